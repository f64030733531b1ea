"""Which kernels a model runs on: those asked for, those remembered, or those measured now.

All kernels compute the same bits, so the choice is about speed alone, and speed depends on the
machine, on the shapes of the model's matrices and on the number of threads. `auto` measures all
that on the model's own shapes in a fifth of a second, and remembers what it found in the user's
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
_TIE: Final = 0.05

# Once for each machine, shape and number of threads.
_BUDGET_S: Final = 0.2
# Entries of other shapes, thread counts and versions that are kept.
_MOST_ENTRIES: Final = 64
_FORMAT: Final = 2

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """What a kernel achieved on the ternary matrices of a model.

    Attributes:
        kernel: Its name.
        seconds: Seconds for one token: alone, then in steps of each of `_core.batch_inputs`
            tokens.
    """

    kernel: str
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernels of a model, and why.

    Attributes:
        kernel: For steps of a single token; the only one if it does all.
        batch_kernels: For steps of each of `_core.batch_inputs` tokens and more. They read the
            same packed weights.
        reason: Why, in words.
        speeds: What was measured, if it was: the choice first, then the others by speed.
    """

    kernel: str
    batch_kernels: tuple[str, ...]
    reason: str
    speeds: tuple[KernelSpeed, ...] = ()


def choose_kernels(
    kernel: str,
    config: Mapping[str, Any],
    threads: int,
    *,
    grouped: bool = False,
) -> KernelChoice:
    """The kernels for a model.

    Args:
        kernel: A name from `info().kernels`, or `auto`.
        config: The model's config, as the core takes it.
        threads: Threads that will compute.
        grouped: Whether some ternary matrix has several scales.

    Raises:
        ValueError: An unknown kernel, one that cannot run this model, a config that the core
            refuses.
    """
    name = choose_kernel(kernel)
    activations = config.get("activations", "int8")
    suitable = kernels_for(activations, grouped=grouped)
    if name is not None:
        if name not in suitable:
            raise ValueError(
                f"{kernel_source(kernel)} is {name!r}, and this model has {activations} activations"
                f"{' and matrices with several scales' if grouped else ''}; it runs on "
                f"{', '.join(suitable)}, or auto for the fastest"
            )
        return KernelChoice(
            name, (name,) * len(_core.batch_inputs), f"asked for with {kernel_source(kernel)}"
        )
    if grouped or activations == "float":
        # One source for all instruction sets: the highest is the fastest.
        why = "several scales in a matrix" if grouped else "float activations"
        return KernelChoice(
            suitable[0],
            (suitable[0],) * len(_core.batch_inputs),
            f"the only one here for {why}",
        )
    available = _core.kernels()
    projections = _core.projections(config)
    key = _key(projections, threads)
    file = kernel_cache_file()
    speeds = _recall(file, key, available)
    how = "remembered"
    if speeds is None:
        measured = _core.measure_kernels(projections, threads, _BUDGET_S)
        speeds = [KernelSpeed(name, tuple(seconds)) for name, seconds in measured]
        _remember(file, key, speeds)
        how = "measured"
    decode, *batch = select(speeds)
    chosen = {decode, *batch}
    ordered = sorted(speeds, key=lambda s: (s.kernel not in chosen, _cost(s, s)))
    cap = os.environ.get("BITNET_RS_ISA", "").strip()
    under = f" under BITNET_RS_ISA={cap}" if cap else ""
    threads_text = f"{threads} thread{'s' * (threads != 1)}"
    return KernelChoice(
        decode,
        tuple(batch),
        f"the fastest{under} on this model's shapes with {threads_text}, {how}",
        tuple(ordered),
    )


def kernels_for(activations: str, *, grouped: bool) -> list[str]:
    """Kernels that can run a model with the same bits, those of the highest ISA first.

    Args:
        activations: `int8` or `float`.
        grouped: Whether some ternary matrix has several scales.
    """
    if activations == "float":
        return _core.grouped_kernels("float")
    return _core.grouped_kernels("int8") if grouped else _core.kernels()


def describe(kernel: str, batch_kernels: Sequence[str]) -> str:
    """The kernels of a model for people: `avx2-i2, avx2-i2-vlut from 12 tokens`."""
    parts = [kernel]
    last = kernel
    for tokens, name in zip(_core.batch_inputs, batch_kernels, strict=True):
        if name != last:
            parts.append(f"{name} from {tokens} tokens")
        last = name
    return ", ".join(parts)


def select(speeds: Sequence[KernelSpeed]) -> tuple[str, ...]:
    """The kernels that are fastest: for one token, then for each of `_core.batch_inputs`.

    Of the kernels of one layout the fastest for each; of the layouts the one that so reads a
    prompt of `PROMPT_TOKENS` and writes a reply of `REPLY_TOKENS` first. Near ties go to the
    kernel that stands earlier.
    """
    layouts: dict[str, list[KernelSpeed]] = {}
    for speed in speeds:
        layouts.setdefault(_layout(speed.kernel), []).append(speed)
    sets = [
        [_first(group, _seconds(i)) for i in range(1 + len(_core.batch_inputs))]
        for group in layouts.values()
    ]
    chosen = _first(sets, lambda kernels: _cost(kernels[0], kernels[-1]))
    return tuple(speed.kernel for speed in chosen)


def _seconds(size: int) -> Callable[[KernelSpeed], float]:
    """For one token in steps of the `size`-th number of tokens."""
    return lambda speed: speed.seconds[size]


def _first(items: Sequence[_T], cost: Callable[[_T], float]) -> _T:
    """The first item whose cost is, but for a near tie, the lowest."""
    lowest = min(cost(item) for item in items)
    return next(item for item in items if cost(item) <= lowest * (1 + _TIE))


def _cost(decode: KernelSpeed, prefill: KernelSpeed) -> float:
    return REPLY_TOKENS * decode.seconds[0] + PROMPT_TOKENS * prefill.seconds[-1]


def _layout(kernel: str) -> str:
    return kernel.split("-")[1]


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
        if type(row) is not list or len(row) != 2 + len(_core.batch_inputs):
            return None
        if row[0] not in available:
            return None
        if not all(type(s) is float and math.isfinite(s) and s > 0 for s in row[1:]):
            return None
        speeds.append(KernelSpeed(row[0], tuple(row[1:])))
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
        "speeds": [[s.kernel, *s.seconds] for s in speeds],
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
