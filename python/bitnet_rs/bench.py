"""Speed of a loaded model: prefill and decode, next to what the memory could give.

For `bitnet-rs bench` and `Model.bench`. It works on the core alone, so that a random
model without a tokenizer can be measured too, and it counts whole steps as a user gets
them: each decoded token is the greedy one, chosen as in generation.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from bitnet_rs import _core, system
from bitnet_rs.checks import check_integer
from bitnet_rs.engine import PREFILL_TOKENS

DEFAULT_PROMPT_TOKENS: Final = 512
DEFAULT_NEW_TOKENS: Final = 64

# Enough to have every page of the weights in memory and every thread awake, without
# taking as long as a measured run.
_WARM_UP_PROMPT: Final = 64
_WARM_UP_NEW: Final = 4

# Tokens of the profile: after the measured runs, since looking at the clock takes time too.
_PROFILE_TOKENS: Final = 16

# Parts of a pass that multiply by ternary weights, and do little else.
_MATRICES: Final = frozenset({"q, k, v", "o", "gate, up", "down"})

# Read instead of the usual buffer where there is no memory for that. Still larger than most
# caches.
_SMALL_BUFFER_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class ProfileRow:
    """One part of a decoding step.

    Attributes:
        name: What is computed.
        count: How often in a step.
        seconds: Of a step, on the clock.
        percent: As a share of the step.
        waiting_percent: Share of the threads' time in it that they wait: for each other at its
            end, or for the one that works alone.
        alone: Whether one thread does it alone.
    """

    name: str
    count: float
    seconds: float
    percent: float
    waiting_percent: float
    alone: bool


@dataclass(frozen=True)
class Run:
    """Seconds that one repetition took.

    Attributes:
        prefill_s: From the prompt to the logits of its last token.
        decode_s: All new tokens, one step each, with the choice of the token.
    """

    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class BenchReport:
    """What `run` measured. Speeds are medians over the repetitions.

    Attributes:
        model: Name of the checkpoint or of the synthetic shape.
        params: Weights of the model, all kinds together.
        prefill_tokens_per_s: Prompt tokens per second, the prompt's last logits included.
        decode_tokens_per_s: New tokens per second, one at a time, after the prompt.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens decoded in each repetition.
        repetitions: Measured repetitions; one shorter run before them is not counted.
        threads: Threads that computed.
        kernel: Kernel of the ternary matrices.
        batch_kernels: Those for steps of several tokens, see `KernelChoice`.
        kv_dtype: Type of the cached keys and values.
        bytes_per_token: Weights read to decode one token, in bytes.
        kv_bytes_per_token: Keys and values read to decode one token, on average.
        read_gb_per_s: Both times the decode speed, in GB/s (1e9 bytes).
        memory_read_gb_per_s: Measured speed of plain reads with as many threads, in GB/s: the
            median of measurements after each repetition. Weights that fit a cache can be read
            faster than this. None where there was no memory left to measure it in.
        read_percent: The first as a share of the second, in percent; None if that is.
        rescored_per_token: Rows of the head computed exactly for one decoded token, after the
            scan of its int8 rows.
        full_heads: Decoded tokens for which the scan proved too little, and all logits were
            computed.
        waiting_percent: Share of the threads' time, while decoding, that they wait at the end of
            a parallel step for the others: the barriers' share.
        alone_percent: Share of a decoding step in which one thread works alone.
        profile: The parts of a decoding step, in their order.
        prefill_profile: The parts of reading the prompt once.
        prefill_gmac_per_s: Multiplications by ternary weights while reading the prompt, in 1e9 a
            second for each thread, in the parts that do them.
        packed_bytes: All weights in memory.
        peak_rss_bytes: Most memory of the process until the end of the runs; None if the system
            does not tell.
        cpu: Name of the processor.
        cpu_features: Instruction sets in use.
        version: Version of this package.
        build_profile: `release` or `debug`; a debug build is many times slower.
        python: Version of the interpreter.
        runs: The single repetitions.
    """

    model: str
    params: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    threads: int
    kernel: str
    batch_kernels: list[str]
    kv_dtype: str
    bytes_per_token: int
    kv_bytes_per_token: int
    read_gb_per_s: float
    memory_read_gb_per_s: float | None
    read_percent: float | None
    rescored_per_token: float
    full_heads: int
    waiting_percent: float
    alone_percent: float
    profile: list[ProfileRow]
    prefill_profile: list[ProfileRow]
    prefill_gmac_per_s: float
    packed_bytes: int
    peak_rss_bytes: int | None
    cpu: str
    cpu_features: list[str]
    version: str
    build_profile: str
    python: str
    runs: list[Run]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for `json.dumps`."""
        return asdict(self)


def run(
    core: _core.Model,
    *,
    name: str,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repetitions: int = 3,
    kv_dtype: Literal["f16", "f32"] = "f16",
    context_length: int | None = None,
    chunk_tokens: int = PREFILL_TOKENS,
    on_progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measures how fast a model reads a prompt and writes new tokens.

    The prompt is random token ids from a fixed seed; speed does not depend on them.

    Args:
        core: The model.
        name: What to call it in the report.
        prompt_tokens: Length of the prompt; 512 if None, or what the context has room for.
        new_tokens: Tokens to decode; 64 if None, or a quarter of a context below 256.
        repetitions: Measured runs, at least 1.
        kv_dtype: Type of the cached keys and values.
        context_length: Cap on prompt and new tokens together; the model's own if None.
        chunk_tokens: Prompt tokens in one forward pass, as many as in generation.
        on_progress: Called with a line on what is being done.

    Raises:
        ValueError: A count below 1, or more tokens than the context holds.
    """
    context = context_length or int(core.facts["max_positions"])
    prompt_tokens, new_tokens = _lengths(prompt_tokens, new_tokens, context)
    repetitions = check_integer("repetitions", repetitions, 1)
    say = on_progress or (lambda _: None)

    rng = np.random.default_rng(0)
    prompt = rng.integers(int(core.facts["vocab_size"]), size=prompt_tokens, dtype=np.uint32)
    say("warm-up")
    _run_once(core, prompt[:_WARM_UP_PROMPT], min(_WARM_UP_NEW, new_tokens), kv_dtype, chunk_tokens)
    runs, speeds, peak = [], [], None
    used = core.head_use
    for n in range(repetitions):
        say(f"run {n + 1} of {repetitions}: {prompt_tokens} prompt + {new_tokens} new tokens")
        runs.append(_run_once(core, prompt, new_tokens, kv_dtype, chunk_tokens))
        # Before the bandwidth is measured for the first time: that takes a large buffer.
        peak = peak or system.peak_rss_bytes()
        say("speed of reading memory")
        speeds.append(_memory_speed(core.threads))
    scans = {key: n - used[key] for key, n in core.head_use.items()}
    say(f"profile of {_PROFILE_TOKENS} tokens")
    prefill_profile, profile = _profile(
        core, prompt, min(_PROFILE_TOKENS, new_tokens), kv_dtype, chunk_tokens
    )
    measured = [speed for speed in speeds if speed is not None]
    memory_gb_per_s = statistics.median(measured) if measured else None

    decode = new_tokens / statistics.median(r.decode_s for r in runs)
    bytes_per_token = int(core.facts["bytes_per_token"])
    positions = prompt_tokens + (new_tokens + 1) / 2
    kv_bytes_per_token = int(positions * _kv_bytes(core, kv_dtype))
    read_gb_per_s = (bytes_per_token + kv_bytes_per_token) * decode / 1e9
    return BenchReport(
        model=name,
        params=int(core.facts["params"]),
        prefill_tokens_per_s=prompt_tokens / statistics.median(r.prefill_s for r in runs),
        decode_tokens_per_s=decode,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        threads=core.threads,
        kernel=core.kernel,
        batch_kernels=core.batch_kernels,
        kv_dtype=kv_dtype,
        bytes_per_token=bytes_per_token,
        kv_bytes_per_token=kv_bytes_per_token,
        read_gb_per_s=read_gb_per_s,
        memory_read_gb_per_s=memory_gb_per_s,
        read_percent=100 * read_gb_per_s / memory_gb_per_s if memory_gb_per_s else None,
        rescored_per_token=scans["rescored"] / max(1, scans["scans"] - scans["full"]),
        full_heads=scans["full"],
        waiting_percent=_waiting_percent(profile),
        alone_percent=sum(row.percent for row in profile if row.alone),
        profile=profile,
        prefill_profile=prefill_profile,
        prefill_gmac_per_s=gmac_per_s(core, prompt_tokens, prefill_profile),
        packed_bytes=int(core.facts["packed_bytes"]),
        peak_rss_bytes=peak,
        cpu=system.cpu_name(),
        cpu_features=_core.cpu_features(),
        version=_core.__version__,
        build_profile=_core.build_profile,
        python=platform.python_version(),
        runs=runs,
    )


def _lengths(prompt_tokens: int | None, new_tokens: int | None, context: int) -> tuple[int, int]:
    """Checked lengths; those left open take what the context has room for."""
    if new_tokens is None:
        new_tokens = min(DEFAULT_NEW_TOKENS, max(1, context // 4))
    new_tokens = check_integer("new_tokens", new_tokens, 1)
    if prompt_tokens is None:
        prompt_tokens = max(1, min(DEFAULT_PROMPT_TOKENS, context - new_tokens))
    prompt_tokens = check_integer("prompt_tokens", prompt_tokens, 1)
    if prompt_tokens + new_tokens > context:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new tokens make "
            f"{prompt_tokens + new_tokens}, but the model's context holds {context}; "
            "ask for fewer of either"
        )
    return prompt_tokens, new_tokens


def _memory_speed(threads: int) -> float | None:
    """Speed of plain reads in GB/s; None where there is no memory even for a small buffer."""
    for size in ({}, {"n_bytes": _SMALL_BUFFER_BYTES}):
        try:
            return _core.read_bandwidth(threads, **size)
        except RuntimeError:
            continue
    return None


def _kv_bytes(core: _core.Model, kv_dtype: Literal["f16", "f32"]) -> int:
    """Bytes of the keys and values of one token."""
    facts = core.facts
    per_layer = 2 * int(facts["n_kv_heads"]) * int(facts["head_dim"])
    return int(facts["n_layers"]) * per_layer * (2 if kv_dtype == "f16" else 4)


def prefill(
    core: _core.Model,
    prompt: NDArray[np.uint32],
    cache: _core.KvCache,
    chunk_tokens: int,
) -> int:
    """Reads a prompt as generation does; the token that follows."""
    for begin in range(0, len(prompt), chunk_tokens):
        chunk = prompt[begin : begin + chunk_tokens]
        last = begin + chunk_tokens >= len(prompt)
        [(ids, _)] = core.forward_top([(chunk, cache)], [1 if last else 0])
    assert ids is not None
    return int(ids[0])


def _decode(core: _core.Model, token: int, cache: _core.KvCache, new_tokens: int) -> None:
    for _ in range(new_tokens):
        [(ids, _)] = core.forward_top([(np.array([token], np.uint32), cache)], [1])
        assert ids is not None
        token = int(ids[0])


def _run_once(
    core: _core.Model,
    prompt: NDArray[np.uint32],
    new_tokens: int,
    kv_dtype: Literal["f16", "f32"],
    chunk_tokens: int,
) -> Run:
    cache = core.new_cache(len(prompt) + new_tokens, kv_dtype)
    start = time.perf_counter()
    token = prefill(core, prompt, cache, chunk_tokens)
    prefilled = time.perf_counter()
    _decode(core, token, cache, new_tokens)
    return Run(prefilled - start, time.perf_counter() - prefilled)


def _profile(
    core: _core.Model,
    prompt: NDArray[np.uint32],
    new_tokens: int,
    kv_dtype: Literal["f16", "f32"],
    chunk_tokens: int,
) -> tuple[list[ProfileRow], list[ProfileRow]]:
    """Where the time of reading the prompt goes, and that of a decoding step."""
    cache = core.new_cache(len(prompt) + new_tokens, kv_dtype)
    core.profile(True)
    token = prefill(core, prompt, cache, chunk_tokens)
    read = core.profile(True)
    _decode(core, token, cache, new_tokens)
    decode = core.profile(False)
    return profile_rows(core, read, 1), profile_rows(core, decode, new_tokens)


def profile_rows(
    core: _core.Model, laps: list[tuple[str, int, float, float]], steps: int
) -> list[ProfileRow]:
    """The parts of passes, from what `core.profile` returned of so many steps."""
    total = sum(wall for _, _, wall, _ in laps)
    return [
        ProfileRow(
            name,
            count / steps,
            wall / steps,
            100 * wall / total,
            100 * max(0.0, 1 - (busy or wall) / (core.threads * wall)),
            busy == 0 and core.threads > 1,
        )
        for name, count, wall, busy in laps
    ]


def gmac_per_s(core: _core.Model, prompt_tokens: int, profile: list[ProfileRow]) -> float:
    """Speed of the ternary matrices while reading a prompt, for each thread."""
    facts = core.facts
    layer = int(facts["ternary_params"]) / int(facts["n_layers"])
    kv = 2 * int(facts["n_kv_heads"]) * int(facts["head_dim"]) * int(facts["hidden_size"])
    # The last layer computes keys and values of all tokens, and else the prompt's last token.
    macs = prompt_tokens * (layer * (int(facts["n_layers"]) - 1) + kv)
    macs += layer - kv
    seconds = sum(row.seconds for row in profile if row.name in _MATRICES)
    return macs / seconds / core.threads / 1e9


def _waiting_percent(profile: list[ProfileRow]) -> float:
    """What waiting in shared steps is of a whole step, in percent."""
    return sum(row.percent * row.waiting_percent / 100 for row in profile if not row.alone)
