"""The promise of one set of bits, checked on a loaded model and on this machine.

For `bitnet-rs verify` and `Model.verify`, and for anyone who doubts a CPU, a compiler or
a checkpoint. The same tokens are computed in every way that must not matter: by another
kernel, with another number of threads, alone and in a batch, in one piece and in many.
Logits are compared as bits; only golden logits, which come from another program, are
compared by distance. It is apart from the tests because it needs no test data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

import numpy as np
from numpy.typing import NDArray

from bitnet_rs import _core

if TYPE_CHECKING:
    from bitnet_rs.model import Model

Logits = NDArray[np.float32]
Tokens = NDArray[np.uint32]
Build = Callable[[str, int], _core.Model]
"""Builds the same model again, with a kernel and a number of threads."""

# How many tokens the checks run on: as many as this many multiplications allow, so that the
# scalar kernel takes seconds and not minutes on a large model, within bounds that keep the
# checks meaningful (a prompt of several tokens) and those of small models quick.
_WORK: Final = 3e10
_FEWEST_TOKENS, _MOST_TOKENS = 12, 96
# Tokens decoded one by one after the prompt: a step of one token takes other code than a prompt.
_STEPS: Final = 3
# A model above this size is built again for one other number of threads only, not for all.
_LARGE_BYTES: Final = 256_000_000
# Sequences in the ragged batch, tokens in a chunk: odd, so that no block of a kernel is filled.
_BATCH: Final = 8
_CHUNK: Final = 5

# Tolerances of golden logits. Two programs that add floats in different orders put, now and
# then, one activation on different sides of an int8 rounding boundary, which moves all later
# logits of that sequence by some hundredths.
_GOLDEN_MEDIAN: Final = 1e-5
_GOLDEN_CLOSE: Final = 1e-4
_GOLDEN_SHARE: Final = 0.8
_GOLDEN_MOST: Final = 0.15
_GOLDEN_MARGIN: Final = 0.1


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: What should be the same, such as `kernel avx2-i2 = generic-i2`.
        ok: Whether it was.
        detail: How much was compared, or how it differed.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one model on one machine.

    Attributes:
        model: Name of the model.
        kernel: Kernel that was in use.
        threads: Threads that were in use.
        kv_dtype: Type of the cached keys and values.
        checks: In the order they were made.
    """

    model: str
    kernel: str
    threads: int
    kv_dtype: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every check was passed."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for `json.dumps`: `ok`, `checks` and the facts."""
        return {"ok": self.ok, **asdict(self)}


def run(
    model: Model,
    *,
    golden: Path | None = None,
    on_check: Callable[[Check], None] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Checks a loaded model. Takes seconds; minutes for models of thousands of millions.

    For other kernels and thread counts the model is built again from its files, one such copy
    at a time: about twice its memory is in use.

    Args:
        model: The model.
        golden: Token ids and logits from another program, see `check_core`. None: the file
            `golden.npz` beside the model's weights, if it is there.
        on_check: Called with each check as soon as it is made.
        on_progress: Called with a line on what is being done.

    Raises:
        ValueError, FileNotFoundError, KeyError: The model's files have changed or are gone.
    """
    from bitnet_rs.kernel_choice import kernels_for
    from bitnet_rs.loaders import open_checkpoint

    def build(kernel: str, threads: int) -> _core.Model:
        checkpoint = open_checkpoint(model.checkpoint.path, options=model.checkpoint.options)
        return _core.Model(
            checkpoint.core_config, checkpoint.weights, kernel=kernel, threads=threads
        )

    beside = model.checkpoint.config_file.with_name("golden.npz")
    if golden is None and model.checkpoint.gguf_metadata is None and beside.is_file():
        golden = beside
    checks = []
    for check in check_core(
        model.core,
        build,
        kernels=kernels_for(str(model.facts["activations"]), grouped=model.checkpoint.grouped),
        kv_dtype=model.kv_dtype,
        context_length=model.context_length,
        golden=golden,
        on_progress=on_progress,
    ):
        checks.append(check)
        if on_check is not None:
            on_check(check)
    return VerifyReport(model.name, model.core.kernel, model.core.threads, model.kv_dtype, checks)


def check_core(
    core: _core.Model,
    build: Build,
    *,
    kernels: Sequence[str],
    kv_dtype: Literal["f16", "f32"] = "f16",
    context_length: int | None = None,
    golden: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Iterator[Check]:
    """Makes the checks one after the other, on the core alone.

    Args:
        core: The model in use.
        build: Builds it again.
        kernels: Names to compare, the scalar one last; as `_core.kernels` gives them.
        kv_dtype: Type of the cached keys and values.
        context_length: Most tokens of one sequence; the model's own if None.
        golden: An .npz file of token ids and logits from another program: for each prompt n
            from 0 on, `ids_n` (integers), `logits_n` (floats, [ids, vocabulary]) and, if known,
            `greedy_n` (the greedy tokens that follow). A file that is not so is a failed check.
        on_progress: Called with a line on what is being done.
    """
    say = on_progress or (lambda _: None)
    facts = core.facts
    context = min(context_length or int(facts["max_positions"]), int(facts["max_positions"]))
    affordable = min(max(int(_WORK / int(facts["params"])), _FEWEST_TOKENS), _MOST_TOKENS)
    n_tokens = max(1, min(affordable, context - _STEPS))
    ids = _random_ids(int(facts["vocab_size"]), n_tokens + _STEPS)

    say(f"{n_tokens} tokens with kernel {core.kernel}, {core.threads} threads")
    expected = _prompt_and_steps(core, ids, kv_dtype)
    odd = int((~np.isfinite(expected)).sum())
    size = f"{expected.shape[0]} positions of {expected.shape[1]} logits"
    yield Check("logits finite", odd == 0, f"{odd} are not, in {size}" if odd else size)
    yield from _check_forwards(core, ids, expected, kv_dtype, say)
    yield from _check_rebuilt(core, build, kernels, ids, expected, kv_dtype, say)
    if golden is not None:
        say(f"logits of {golden.name}")
        yield from _check_golden(core, golden)


def _check_forwards(
    core: _core.Model,
    ids: Tokens,
    expected: Logits,
    kv_dtype: Literal["f16", "f32"],
    say: Callable[[str], None],
) -> Iterator[Check]:
    """One core, the same tokens, cut and grouped in every way."""

    def in_chunks(size: int) -> Logits:
        cache = core.new_cache(len(ids), kv_dtype)
        chunks = [ids[n : n + size] for n in range(0, len(ids), size)]
        return np.concatenate([core.forward([(c, cache)], logits="all") for c in chunks])

    def after_truncate() -> Logits:
        half = len(ids) // 2
        cache = core.new_cache(len(ids), kv_dtype)
        core.forward([(np.concatenate([ids[:half], ids[: len(ids) - half]]), cache)])
        cache.truncate(half)
        return core.forward([(ids[half:], cache)], logits="all")

    def best_few() -> Logits:
        cache = core.new_cache(len(ids), kv_dtype)
        rows = np.zeros_like(expected)
        for n, k in enumerate(ks):
            [(best, logits)] = core.forward_top([(ids[n : n + 1], cache)], [k])
            rows[n, best] = logits
        return rows

    say("the best logits by the int8 rows")
    ks = [(1, 40)[n % 2] for n in range(len(ids))]
    wanted = np.zeros_like(expected)
    for row, out, k in zip(expected, wanted, ks, strict=True):
        best = np.argsort(-row, kind="stable")[:k]
        out[best] = row[best]
    used = core.head_use
    check = _same("int8-scanned head = full head", wanted, best_few)
    scans, full, rescored = (
        core.head_use[key] - used[key] for key in ("scans", "full", "rescored")
    )
    yield replace(
        check,
        detail=f"{check.detail}; {rescored / max(1, scans - full):.1f} rows rescored for each of "
        f"{scans - full} tokens, all for {full}",
    )

    say("prompts cut into chunks")
    yield _same("prefill = token by token", expected, lambda: in_chunks(1))
    yield _same("chunks = one", expected, lambda: in_chunks(_CHUNK))
    yield _same("truncated cache = fresh", expected[len(ids) // 2 :], after_truncate)

    # Sequences of different lengths, each followed by one step, none the same as another.
    prompts = [np.roll(ids, n)[: 1 + n * (len(ids) - 2) // (_BATCH - 1)] for n in range(_BATCH)]
    steps = [np.roll(ids, n)[-1:] for n in range(_BATCH)]

    def together(which: range) -> Logits:
        caches = [core.new_cache(len(ids), kv_dtype) for _ in which]
        rows = [core.forward([(prompts[n], c) for n, c in zip(which, caches, strict=True)])]
        rows += [core.forward([(steps[n], c) for n, c in zip(which, caches, strict=True)])]
        return np.concatenate(rows)

    say(f"a batch of {_BATCH}")
    alone = np.stack([together(range(n, n + 1)) for n in range(_BATCH)], axis=1)
    yield _same(
        f"batch of {_BATCH} = alone",
        alone.reshape(-1, alone.shape[-1]),
        lambda: together(range(_BATCH)),
    )


def _check_rebuilt(
    core: _core.Model,
    build: Build,
    kernels: Sequence[str],
    ids: Tokens,
    expected: Logits,
    kv_dtype: Literal["f16", "f32"],
    say: Callable[[str], None],
) -> Iterator[Check]:
    """Every kernel against the scalar one, and other numbers of threads against the one in use."""

    def rebuilt(kernel: str, threads: int) -> Logits:
        if (kernel, threads) == (core.kernel, core.threads):
            return expected
        say(f"building again with kernel {kernel}, {threads} threads")
        return _prompt_and_steps(build(kernel, threads), ids, kv_dtype)

    *fast, scalar = kernels
    if fast:
        by_scalar = rebuilt(scalar, core.threads)
    for kernel in fast:
        yield _same(
            f"kernel {kernel} = {scalar}",
            by_scalar,
            lambda kernel=kernel: rebuilt(kernel, core.threads),  # type: ignore[misc]
        )
    large = int(core.facts["packed_bytes"]) > _LARGE_BYTES
    for threads in _thread_counts(core.threads, few=large):
        yield _same(
            f"threads {threads} = {core.threads}",
            expected,
            lambda threads=threads: rebuilt(core.kernel, threads),  # type: ignore[misc]
        )


def _thread_counts(in_use: int, *, few: bool) -> list[int]:
    """Numbers of threads to compare with the number in use.

    Two and three are tried even where there are fewer cores: rows and heads are split
    unevenly then, whatever the machine.
    """
    if few:
        return [1] if in_use > 1 else [2]
    counts = {1, 2, 3, in_use // 2, in_use - 1} if in_use > 8 else {*range(1, in_use), 2, 3}
    return sorted(counts - {in_use, 0})


def _check_golden(core: _core.Model, golden: Path) -> Iterator[Check]:
    """Logits and greedy tokens of another program, with keys and values in float32."""
    try:
        # Opened here: np.load leaves a file open that turns out to be no archive.
        with golden.open("rb") as file:
            cases = _read_golden(file, int(core.facts["vocab_size"]))
    except Exception as error:  # noqa: BLE001 (numpy, zipfile and zlib: there is no end of them)
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        yield Check("golden logits", False, f"{golden}: {reason}")
        return
    try:
        yield _golden_logits(core, cases)
        if any(len(greedy) for _, _, greedy in cases):
            yield _golden_greedy(core, cases)
    except (ValueError, RuntimeError) as error:  # as in `_same`
        yield Check("golden logits", False, f"{golden}: {type(error).__name__}: {error}")


def _read_golden(file: BinaryIO, vocab_size: int) -> list[tuple[Tokens, Logits, Tokens]]:
    """Ids, logits and greedy tokens (none if not there) of every prompt.

    Nothing is left out in silence: whatever could not be compared is an error.

    Raises:
        ValueError: Not such a file; the message names the array.
    """
    arrays = np.load(file)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("holds a single array; wanted an .npz of ids_0, logits_0, ...")  # noqa: TRY004 (a bad file)
    with arrays:
        names = [n for n in arrays.files if n.startswith(("ids_", "logits_", "greedy_"))]
        count = sum(name.startswith("ids_") for name in names)
        allowed = {f"{kind}_{n}" for kind in ("ids", "logits", "greedy") for n in range(count)}
        missing = [f"{kind}_{n}" for n in range(max(count, 1)) for kind in ("ids", "logits")]
        missing = [name for name in missing if name not in names]
        if missing or not allowed.issuperset(names):
            stray = sorted(set(names) - allowed)
            raise ValueError(
                f"has no array named {missing[0]}"
                if missing
                else f"has an array {stray[0]}, but no ids to go with it"
            )
        return [_golden_case(arrays, n, vocab_size) for n in range(count)]


def _golden_case(
    arrays: Mapping[str, NDArray[Any]], n: int, vocab_size: int
) -> tuple[Tokens, Logits, Tokens]:
    def tokens(name: str) -> Tokens:
        array = arrays[name]
        if array.dtype.kind not in "iu" or array.ndim != 1 or not len(array):
            raise ValueError(
                f"array {name} is {array.dtype} of shape {array.shape}; "
                "wanted token ids: integers, one axis, at least one"
            )
        if not 0 <= array.min() <= array.max() < vocab_size:
            raise ValueError(
                f"array {name} has ids from {array.min()} to {array.max()}; "
                f"the model's vocabulary has 0 to {vocab_size - 1}"
            )
        return np.ascontiguousarray(array, np.uint32)

    ids = tokens(f"ids_{n}")
    logits = arrays[f"logits_{n}"]
    if logits.dtype.kind != "f" or logits.shape != (len(ids), vocab_size):
        raise ValueError(
            f"array logits_{n} is {logits.dtype} of shape {logits.shape}; "
            f"wanted floats of shape {(len(ids), vocab_size)}"
        )
    greedy = tokens(f"greedy_{n}") if f"greedy_{n}" in arrays else np.empty(0, np.uint32)
    with np.errstate(over="ignore"):
        return ids, np.asarray(logits, np.float32), greedy


def _golden_logits(core: _core.Model, cases: list[tuple[Tokens, Logits, Tokens]]) -> Check:
    """Distance to golden logits, at every position of every prompt."""
    medians, worst = [], []
    for ids, wanted, _ in cases:
        logits = core.forward([(ids, core.new_cache(len(ids), "f32"))], logits="all")
        distance = np.abs(logits - wanted)
        medians.append(float(np.median(distance)))
        worst.append(distance.max(axis=1))
    by_position = np.concatenate(worst)
    close = float((by_position < _GOLDEN_CLOSE).mean())
    # Written so that a NaN fails.
    ok = (
        max(medians) < _GOLDEN_MEDIAN
        and close >= _GOLDEN_SHARE
        and bool((by_position < _GOLDEN_MOST).all())
    )
    return Check(
        "golden logits",
        ok,
        f"{len(by_position)} positions: {100 * close:.0f} % within {_GOLDEN_CLOSE:g} "
        f"(wanted {100 * _GOLDEN_SHARE:.0f} %), largest difference {by_position.max():.2g} "
        f"(wanted < {_GOLDEN_MOST:g}), largest median of a prompt {max(medians):.2g} "
        f"(wanted < {_GOLDEN_MEDIAN:g})",
    )


def _golden_greedy(core: _core.Model, cases: list[tuple[Tokens, Logits, Tokens]]) -> Check:
    """Greedy tokens, up to the first choice that a rounding difference could turn."""
    compared = 0
    for number, (ids, _, greedy) in enumerate(cases):
        cache = core.new_cache(len(ids) + len(greedy), "f32")
        tokens = ids
        for step, wanted in enumerate(greedy):
            logits = core.forward([(tokens, cache)])[0]
            second, best = np.partition(logits, -2)[-2:]
            if best - second < _GOLDEN_MARGIN:
                break
            token = int(np.argmax(logits))
            if token != wanted:
                return Check(
                    "golden greedy tokens",
                    False,
                    f"prompt {number}, step {step}: token {token}, wanted {wanted}",
                )
            compared += 1
            tokens = np.array([token], np.uint32)
    # Without a prompt whose first choice is clear, nothing was compared, and that is no success.
    return Check(
        "golden greedy tokens",
        compared > 0,
        f"{compared} tokens, up to the first close choice (margin < {_GOLDEN_MARGIN:g}) "
        f"after each of {len(cases)} prompts",
    )


def _same(name: str, expected: Logits, compute: Callable[[], Logits]) -> Check:
    """A check for equality of bits; a computation that raises has failed."""
    try:
        logits = compute()
    except (ValueError, RuntimeError) as error:
        return Check(name, False, f"{type(error).__name__}: {error}")
    if logits.shape != expected.shape:
        return Check(name, False, f"shape {logits.shape}, wanted {expected.shape}")
    # As integers: -0.0 differs from 0.0, and a NaN equals itself.
    differ = logits.view(np.uint32) != expected.view(np.uint32)
    if not differ.any():
        return Check(name, True, f"{len(expected)} rows of {expected.shape[1]} logits, same bits")
    rows = np.flatnonzero(differ.any(axis=1))
    distance = float(np.abs(logits - expected).max())
    return Check(
        name,
        False,
        f"{int(differ.sum())} of {differ.size} logits differ, in {len(rows)} of {len(differ)} rows, "
        f"first in row {rows[0]}; by up to {distance:.3g}",
    )


def _prompt_and_steps(core: _core.Model, ids: Tokens, kv_dtype: Literal["f16", "f32"]) -> Logits:
    """Logits at every position: all but the last few tokens at once, then one by one."""
    cache = core.new_cache(len(ids), kv_dtype)
    split = len(ids) - _STEPS
    pieces = [ids[:split], *(ids[n : n + 1] for n in range(split, len(ids)))]
    return np.concatenate([core.forward([(p, cache)], logits="all") for p in pieces])


def _random_ids(vocab_size: int, n: int) -> Tokens:
    """Token ids from a fixed seed, the first and the last of the vocabulary among them."""
    ids = np.random.default_rng(1).integers(vocab_size, size=n, dtype=np.uint32)
    ids[0], ids[-1] = 0, vocab_size - 1
    return ids
