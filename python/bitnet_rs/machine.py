"""How this machine is used: threads and kernels, as asked for, and reported.

For `load`, which asks with its arguments, and for `info`, which shows what `load` would do
without any. Apart from `system.py`, which only reads what the operating system says: here an
argument goes before the environment, the environment before a default, and the core says
which kernels the CPU can run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from bitnet_rs import _core, system
from bitnet_rs.checks import check_integer

# More is a slip of the keyboard, not a machine.
MAX_THREADS: Final = 1024


def choose_threads(threads: int | None) -> int:
    """How many threads to compute with: argument, environment, physical cores."""
    if threads is not None:
        return check_integer("threads", threads, 1, MAX_THREADS)
    text = os.environ.get("BITNET_RS_THREADS", "").strip()
    if not text:
        return system.default_threads()
    if text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS:
        return int(text)
    raise ValueError(
        f"the environment variable BITNET_RS_THREADS is {text!r}; wanted an integer from 1 to "
        f"{MAX_THREADS}, or nothing for one thread per physical core"
    )


def choose_kv_memory(kv_memory: int | None, full_context: int) -> int:
    """Bytes for keys and values: what is asked for, else a quarter of the machine's memory.

    Args:
        kv_memory: What is asked for.
        full_context: Bytes of one sequence that fills the context: the least where nobody asks.
    """
    if kv_memory is not None:
        return kv_memory
    return max(full_context, (system.usable_memory() or 0) // 4)


def choose_kernel(kernel: str) -> str | None:
    """Name of the kernel asked for, None if it is to be measured: argument, then environment."""
    source = kernel_source(kernel)
    if kernel == "auto":
        kernel = os.environ.get("BITNET_RS_KERNEL", "").strip() or "auto"
    if kernel == "auto":
        return None
    available = _core.kernels()
    grouped = [*_core.grouped_kernels("float"), *_core.grouped_kernels("int8")]
    if kernel not in available and kernel not in grouped:
        raise ValueError(
            f"{source} is {kernel!r}; this CPU can run {', '.join(available)}, or auto for the "
            "fastest"
        )
    return kernel


def kernel_source(kernel: str) -> str:
    """What names the kernel: the argument, or else the environment."""
    return "the environment variable BITNET_RS_KERNEL" if kernel == "auto" else "kernel"


def kernel_cache_file() -> Path:
    """Where `auto` remembers speeds: `kernels.json` in this package's cache folder.

    The folder is `$XDG_CACHE_HOME/bitnet-rs`, or `~/.cache/bitnet-rs`, on every system, as the
    hub's downloads are found.
    """
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    path = Path(base) / "bitnet-rs" / "kernels.json"
    try:
        return path.expanduser()
    except RuntimeError:  # no home: a folder that is not there, which is the same as an empty one
        return path


@dataclass(frozen=True, slots=True)
class Info:
    """What `info` found. Printed, it is a small table.

    Attributes:
        version: Of bitnet-rs.
        build_profile: `release`, or `debug`, which is many times slower.
        cpu: Name of the processor.
        cpu_features: Instruction sets in use.
        kernels: Kernels this CPU can run, those of the highest instruction set first.
        kernel: The one that `load` would use, or `auto`: measured on each model's shapes.
        kernel_cache: Where `auto` remembers what it measured.
        threads: How many threads `load` would use.
        versions: Of Python and of the packages below, by name.
    """

    version: str
    build_profile: str
    cpu: str
    cpu_features: tuple[str, ...]
    kernels: tuple[str, ...]
    kernel: str
    kernel_cache: str
    threads: int
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for `json.dumps`."""
        return asdict(self)

    def __str__(self) -> str:
        rows = {
            "bitnet-rs": f"{self.version} ({self.build_profile})",
            "cpu": self.cpu,
            "features": " ".join(self.cpu_features) or "none used",
            "kernels": ", ".join(self.kernels),
            "kernel": self.kernel + (", measured for each model" if self.kernel == "auto" else ""),
            "threads": str(self.threads),
            "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        }
        return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def info() -> Info:
    """CPU features, kernels, threads and versions: what to put into a bug report.

    Raises:
        ValueError: BITNET_RS_THREADS or BITNET_RS_KERNEL has a value that can't be used.
    """
    import platform
    from importlib import metadata

    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for package in ("tokenizers", "safetensors", "huggingface_hub"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return Info(
        version=_core.__version__,
        build_profile=_core.build_profile,
        cpu=system.cpu_name(),
        cpu_features=tuple(_core.cpu_features()),
        kernels=tuple(_core.kernels()),
        kernel=choose_kernel("auto") or "auto",
        kernel_cache=str(kernel_cache_file()),
        threads=choose_threads(None),
        versions=versions,
    )
