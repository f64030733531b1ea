"""Speed of a loaded model: prefill and decode, next to what the memory could give.

For `bitnet-rs bench` and `Model.bench`. It works on the core alone, so that a random
model without a tokenizer can be measured too, and it counts whole steps as a user gets
them: each decoded token is the greedy one, found over all its logits.
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

# Read instead of the usual buffer where there is no memory for that. Still larger than most
# caches.
_SMALL_BUFFER_BYTES: Final = 64 << 20


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
        prefill_kernel: The one for several tokens at a time.
        kv_dtype: Type of the cached keys and values.
        bytes_per_token: Weights read to decode one token, in bytes; keys and values not counted.
        read_gb_per_s: `bytes_per_token` times the decode speed, in GB/s (1e9 bytes).
        memory_read_gb_per_s: Measured speed of plain reads with as many threads, in GB/s. Weights
            that fit a cache can be read faster than this. None where there was no memory left
            to measure it in.
        read_percent: The first as a share of the second, in percent; None if that is.
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
    prefill_kernel: str
    kv_dtype: str
    bytes_per_token: int
    read_gb_per_s: float
    memory_read_gb_per_s: float | None
    read_percent: float | None
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
    runs = []
    for n in range(repetitions):
        say(f"run {n + 1} of {repetitions}: {prompt_tokens} prompt + {new_tokens} new tokens")
        runs.append(_run_once(core, prompt, new_tokens, kv_dtype, chunk_tokens))
    # Before the bandwidth is measured: that takes a large buffer of its own.
    peak = system.peak_rss_bytes()
    say("speed of reading memory")
    memory_gb_per_s = _memory_speed(core.threads)

    decode = new_tokens / statistics.median(r.decode_s for r in runs)
    bytes_per_token = int(core.facts["bytes_per_token"])
    read_gb_per_s = bytes_per_token * decode / 1e9
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
        prefill_kernel=core.prefill_kernel,
        kv_dtype=kv_dtype,
        bytes_per_token=bytes_per_token,
        read_gb_per_s=read_gb_per_s,
        memory_read_gb_per_s=memory_gb_per_s,
        read_percent=100 * read_gb_per_s / memory_gb_per_s if memory_gb_per_s else None,
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


def _run_once(
    core: _core.Model,
    prompt: NDArray[np.uint32],
    new_tokens: int,
    kv_dtype: Literal["f16", "f32"],
    chunk_tokens: int,
) -> Run:
    cache = core.new_cache(len(prompt) + new_tokens, kv_dtype)
    start = time.perf_counter()
    for begin in range(0, len(prompt), chunk_tokens):
        logits = core.forward([(prompt[begin : begin + chunk_tokens], cache)])
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        token = np.argmax(logits[0])
        logits = core.forward([(np.array([token], np.uint32), cache)])
    return Run(prefilled - start, time.perf_counter() - prefilled)
