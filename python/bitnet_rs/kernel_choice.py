"""Which kernels a model runs on: those asked for, those remembered, or those measured now.

All kernels compute the same bits, so the choice is about speed alone, and speed depends on the
machine, on the shapes of the model's matrices and on the number of threads. `auto` measures all
that on the model's own shapes in a tenth of a second, and remembers what it found in the user's
cache folder. Apart from `machine.py`, which knows no model, and from the core, which reads and
writes no files.

The file is a convenience and never a condition: one that is missing, stale, damaged or not to
be written costs another measurement, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from bitnet_rs import _core, system
from bitnet_rs.jsonfile import read_object
from bitnet_rs.machine import choose_kernel, kernel_cache_file, kernel_source

# What decides between kernels that are better at one than at the other: a short reply to a prompt
# of some length, the pair of numbers that benchmarks of language models are mostly given for.
REPLY_TOKENS: Final = 128
PROMPT_TOKENS: Final = 512

# A kernel further down the core's list must be better by this much: what a second measurement of
# the same kernel differs by, so that the choice is the same every time where it does not matter.
_TIE: Final = 0.03

# A tenth of a second in all: the last round may take longer than the one before it.
_BUDGET_S: Final = 0.08
# Entries of other shapes, thread counts and versions that are kept.
_MOST_ENTRIES: Final = 64
_FORMAT: Final = 1

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """What a kernel achieved on the ternary matrices of a model.

    Attributes:
        kernel: Its name.
        decode_s: Seconds for a single token.
        prefill_s: Seconds for one token of a batch.
    """

    kernel: str
    decode_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernels of a model, and why.

    Attributes:
        kernel: For steps of a single token; the only one if it does both.
        prefill_kernel: For steps of several tokens. Reads the same packed weights.
        reason: Why, in words.
        speeds: What was measured, if it was: the choice first, then the others by speed.
    """

    kernel: str
    prefill_kernel: str
    reason: str
    speeds: tuple[KernelSpeed, ...] = ()


def choose_kernels(kernel: str, config: Mapping[str, Any], threads: int) -> KernelChoice:
    """The kernels for a model.

    Args:
        kernel: A name from `info().kernels`, or `auto`.
        config: The model's config, as the core takes it.
        threads: Threads that will compute.

    Raises:
        ValueError: An unknown kernel, a config that the core refuses.
    """
    name = choose_kernel(kernel)
    if name is not None:
        return KernelChoice(name, name, f"asked for with {kernel_source(kernel)}")
    available = _core.kernels()
    projections = _core.projections(config)
    key = _key(projections, threads)
    file = kernel_cache_file()
    speeds = _recall(file, key, available)
    how = "remembered"
    if speeds is None:
        speeds = [KernelSpeed(*s) for s in _core.measure_kernels(projections, threads, _BUDGET_S)]
        _remember(file, key, speeds)
        how = "measured"
    decode, prefill = select(speeds)
    ordered = sorted(speeds, key=lambda s: (s.kernel not in (decode, prefill), _cost(s, s)))
    cap = os.environ.get("BITNET_RS_ISA", "").strip()
    under = f" under BITNET_RS_ISA={cap}" if cap else ""
    threads_text = f"{threads} thread{'s' * (threads != 1)}"
    return KernelChoice(
        decode,
        prefill,
        f"the fastest{under} on this model's shapes with {threads_text}, {how}",
        tuple(ordered),
    )


def select(speeds: Sequence[KernelSpeed]) -> tuple[str, str]:
    """The pair of kernels, for decode and prefill, that is fastest.

    Among the pairs that read one layout, the one that reads a prompt of `PROMPT_TOKENS` and
    writes a reply of `REPLY_TOKENS` first. Near ties go to the kernel that stands earlier.
    """
    layouts: dict[str, list[KernelSpeed]] = {}
    for speed in speeds:
        layouts.setdefault(_layout(speed.kernel), []).append(speed)
    pairs = [
        (_first(group, lambda s: s.decode_s), _first(group, lambda s: s.prefill_s))
        for group in layouts.values()
    ]
    decode, prefill = _first(pairs, lambda pair: _cost(*pair))
    return decode.kernel, prefill.kernel


def _first(items: Sequence[_T], cost: Callable[[_T], float]) -> _T:
    """The first item whose cost is, but for a near tie, the lowest."""
    lowest = min(cost(item) for item in items)
    return next(item for item in items if cost(item) <= lowest * (1 + _TIE))


def _cost(decode: KernelSpeed, prefill: KernelSpeed) -> float:
    return REPLY_TOKENS * decode.decode_s + PROMPT_TOKENS * prefill.prefill_s


def _layout(kernel: str) -> str:
    return kernel.partition("-")[2]


def _key(projections: Sequence[tuple[int, int, int]], threads: int) -> dict[str, Any]:
    """All that speeds depend on. What changes a field makes old entries stale."""
    return {
        "version": _core.__version__,
        "cpu": system.cpu_name(),
        "features": _core.cpu_features(),
        "kernels": _core.kernels(),
        "threads": threads,
        "projections": [list(p) for p in projections],
    }


def _digest(key: Mapping[str, Any]) -> str:
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _entries(file: Path) -> dict[str, Any]:
    """What the file holds; nothing if it is missing, unreadable, or not such a file."""
    try:
        content = read_object(file)
    except (OSError, ValueError, RuntimeError):
        return {}
    entries = content.get("entries")
    return entries if content.get("format") == _FORMAT and type(entries) is dict else {}


def _recall(
    file: Path, key: Mapping[str, Any], available: Sequence[str]
) -> list[KernelSpeed] | None:
    """The speeds that were found before, or None: every value is checked."""
    entry = _entries(file).get(_digest(key))
    if type(entry) is not dict or entry.get("for") != key:
        return None
    rows = entry.get("speeds")
    if type(rows) is not list or not rows:
        return None
    speeds = []
    for row in rows:
        if type(row) is not list or len(row) != 3 or row[0] not in available:
            return None
        if not all(type(s) is float and math.isfinite(s) and s > 0 for s in row[1:]):
            return None
        speeds.append(KernelSpeed(*row))
    return speeds


def _remember(file: Path, key: Mapping[str, Any], speeds: Sequence[KernelSpeed]) -> None:
    """Writes the speeds beside the others, the oldest of which make room. May fail silently.

    The new file replaces the old one whole, so that a reader never sees half of one; of two
    writers at once the later wins, and the other measures again another time.
    """
    entries = _entries(file)
    entries.pop(_digest(key), None)
    entries[_digest(key)] = {
        "for": key,
        "speeds": [[s.kernel, s.decode_s, s.prefill_s] for s in speeds],
    }
    newest = dict(list(entries.items())[-_MOST_ENTRIES:])
    text = json.dumps({"format": _FORMAT, "entries": newest}, indent=1)
    with suppress(OSError, RuntimeError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".kernels-", suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text + "\n")
            Path(name).replace(file)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
