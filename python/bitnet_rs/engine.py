"""Token ids in, token ids out: runs one sequence or many over the core.

For `model.py` (and whatever else serves requests). Apart because it knows no
text: stop strings, templates and decoding are its callers' business. It knows
requests, caches and steps.

A step is one `forward` of the core over a ragged batch: every sequence that
decodes puts in one token, those that still read their prompt put in chunks of
it. Sequences join between steps (`add`) and leave when they finish or are
cancelled. What a sequence generates does not depend on the others in the batch:
the core promises the same logits, and each sequence draws from a generator of
its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitnet_rs import _core, sampling
from bitnet_rs.sampling import Logprobs, SamplingParams

# Prompt tokens in one forward, over all sequences. Between two forwards an interrupt is noticed
# and other sequences get their next token, so it should be small; every chunk reads all weights
# once, so it should be large. At 256 the reading is a few percent of the computing.
PREFILL_TOKENS = 256

# Sequences computed at once; more wait. Beyond it a step gets slower about as fast as it gets
# wider, while every sequence holds a cache.
MAX_SEQUENCES = 16

FinishReason = Literal["stop", "length", "cancelled"]


def check_ids(
    ids: Sequence[int] | NDArray[np.integer[Any]], vocab_size: int, name: str
) -> NDArray[np.uint32]:
    """Token ids as `Request` and the core take them.

    Raises:
        TypeError: It is no sequence.
        ValueError: There are none, or one is not in the vocabulary; `name` names them.
    """
    if isinstance(ids, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array; wanted a plain one: {name}.compressed() makes it"
        )
    try:
        array = np.asarray(ids)
    except ValueError:  # ragged lists
        raise ValueError(f"{name} is not a flat sequence of token ids") from None
    if array.ndim == 0:
        raise TypeError(f"{name} is of type {type(ids).__name__}; wanted a sequence of token ids")
    if array.size == 0:
        raise ValueError(f"{name} has no tokens; wanted at least one")
    integers = np.issubdtype(array.dtype, np.integer)
    if not integers and array.ndim == 1 and all(type(i) is int for i in ids):
        # Some are beyond 64 bits: numpy has no dtype for them, but there is an id to name.
        array, integers = np.array(ids, object), True
    if array.ndim != 1 or not integers:
        raise ValueError(
            f"{name} has the shape {array.shape} and holds {array.dtype}; wanted integers "
            "along one axis"
        )
    wrong = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(wrong):
        raise ValueError(
            f"{name} has the token id {array[wrong[0]]} at position {wrong[0]}; wanted ids "
            f"from 0 to {vocab_size - 1}"
        )
    return np.ascontiguousarray(array, np.uint32)


@dataclass(frozen=True, slots=True)
class Request:
    """What one sequence is to do.

    Attributes:
        prompt: uint32, shape (n,), n >= 1.
        max_tokens: How many tokens to generate at most, >= 1.
        params: How tokens are chosen.
        stop_ids: Ids that end the sequence; the one that does is not part of the result.
        logprobs: How many of the most probable tokens to report with each token; None: no
            log-probabilities at all.
    """

    prompt: NDArray[np.uint32]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.prompt.ndim != 1 or not len(self.prompt):
            raise ValueError(
                f"prompt has the shape {self.prompt.shape}; wanted at least one token, one axis"
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; wanted at least 1")


class Running:
    """A sequence that an engine runs, or has run. Read it; only the engine changes it.

    Attributes:
        request: What it was asked.
        finish_reason: None while it runs.
        n_cached: Prompt tokens that were in the cache it was given.
        started: Time of its first step; `first_token` and `finished` likewise, in seconds of
            `time.perf_counter`; None until then.
    """

    def __init__(self, request: Request, cache: _core.KvCache | None) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.n_cached = 0 if cache is None else len(cache)
        self.started: float | None = None
        self.first_token: float | None = None
        self.finished: float | None = None
        self._rng = request.params.rng()
        self._n_prompt = len(request.prompt)
        self._ids = np.empty(self._n_prompt + request.max_tokens, np.uint32)
        self._ids[: self._n_prompt] = request.prompt
        self._n = self._n_prompt
        self._cache = cache

    @property
    def ids(self) -> NDArray[np.uint32]:
        """Prompt and generated tokens. Its cache holds the first `len(cache)` of them, always."""
        return self._ids[: self._n]

    @property
    def tokens(self) -> list[int]:
        """The generated tokens."""
        return [int(i) for i in self._ids[self._n_prompt : self._n]]

    @property
    def n_generated(self) -> int:
        """How many tokens were generated."""
        return self._n - self._n_prompt

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.finished = time.perf_counter()
        self._cache = None


@dataclass(frozen=True, slots=True)
class Event:
    """What one step brought for one sequence.

    Attributes:
        sequence: The one.
        token: The new token; None where a stop id ended the sequence.
        logprobs: Log-probabilities of the token, if the request asked for them.
        finish_reason: Set on a sequence's last event.
    """

    sequence: Running
    token: int | None
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class _Segment(NamedTuple):
    """One sequence's share of a forward: tokens that go into its cache."""

    sequence: Running
    cache: _core.KvCache
    tokens: NDArray[np.uint32]
    complete: bool  # nothing is pending after them, so their logits choose the next token


def shared_prefix(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> int:
    """How many tokens two sequences have in common at their start."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def wanted_logits(request: Request) -> int | None:
    """How many of the best logits decide a request's next token; None: all of them.

    The core finds a few for half the reading that all of them take, and chooses among them as it
    would among all: `top_k` comes before whatever else looks at more than one logit.
    """
    params = request.params
    if request.logprobs is not None or params.repetition_penalty != 1.0:
        return None
    return 1 if params.temperature == 0.0 else params.top_k or None


def choose(logits: NDArray[np.float32], params: SamplingParams, rng: np.random.Generator) -> int:
    """Chooses one of the logits by all of the parameters but the repetition penalty.

    Args:
        logits: Contiguous, shape (n,): those of a whole vocabulary, or of some ids in ascending
            order. Not changed.
        params: How to choose.
        rng: The sequence's own; one number is drawn unless decoding is greedy.

    Returns:
        A position in `logits`.

    Raises:
        RuntimeError: The logits hold NaN or +inf, or nothing above -inf.
    """
    best = sampling.greedy(logits)  # checks the logits, whatever comes next
    if params.temperature == 0.0:
        return best
    return _core.sample(
        logits,
        temperature=params.temperature,
        top_k=min(params.top_k, len(logits)),
        top_p=params.top_p,
        min_p=params.min_p,
        draw=rng.random(),
    )


class Engine:
    """Runs sequences on one core model. For one thread; engines may share a core.

    Args:
        core: The model.
        kv_dtype: Of the caches it makes.
        prefill_tokens: Prompt tokens in one forward, over all sequences.
        max_sequences: Sequences computed at once; further ones wait their turn.
    """

    def __init__(
        self,
        core: _core.Model,
        *,
        kv_dtype: Literal["f16", "f32"] = "f16",
        prefill_tokens: int = PREFILL_TOKENS,
        max_sequences: int = MAX_SEQUENCES,
    ) -> None:
        self._core = core
        self._kv_dtype: Literal["f16", "f32"] = kv_dtype
        self._prefill_tokens = prefill_tokens
        self._max_sequences = max_sequences
        self._waiting: deque[Running] = deque()
        self._active: list[Running] = []

    @property
    def busy(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._active or self._waiting)

    def add(
        self,
        request: Request,
        *,
        cache: _core.KvCache | None = None,
        cached: NDArray[np.uint32] | None = None,
    ) -> Running:
        """Takes a sequence in; it joins at the next step.

        Args:
            request: What to do.
            cache: A cache to use instead of a new one. It is cut back to what it shares with
                the prompt, and keeps what this sequence writes: the first `len(cache)` of the
                sequence's `ids`. Give it to nobody else until the sequence has finished.
            cached: The tokens that `cache` holds. None: it is emptied first.

        Raises:
            ValueError: The cache is too small for the prompt and `max_tokens`, or `cached` is
                shorter than it.
        """
        if cache is not None:
            # The last token generated is never put into the cache.
            needed = len(request.prompt) + request.max_tokens - 1
            if needed > cache.capacity:
                raise ValueError(
                    f"cache has a capacity of {cache.capacity} tokens; wanted {needed}: prompt of "
                    f"{len(request.prompt)}, max_tokens {request.max_tokens}"
                )
            keep = 0
            if cached is not None:
                if len(cached) < len(cache):
                    raise ValueError(
                        f"cached names {len(cached)} tokens, but the cache holds {len(cache)}"
                    )
                # At least one token must be computed, or there are no logits to go on from.
                keep = min(
                    shared_prefix(cached[: len(cache)], request.prompt), len(request.prompt) - 1
                )
            cache.truncate(keep)
        sequence = Running(request, cache)
        self._waiting.append(sequence)
        return sequence

    def finish(self, sequence: Running, reason: FinishReason = "cancelled") -> None:
        """Ends a sequence from outside, between steps; nothing happens if it has ended already."""
        if sequence.finish_reason is None:
            self._leave(sequence, reason)

    def close(self) -> None:
        """Cancels whatever is left and lets go of its caches."""
        for sequence in (*self._active, *self._waiting):
            self._leave(sequence, "cancelled")

    def _leave(self, sequence: Running, reason: FinishReason) -> None:
        sequence._finish(reason)
        if sequence in self._active:
            self._active.remove(sequence)
        else:
            self._waiting.remove(sequence)

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._max_sequences:
            sequence = self._waiting[0]
            if sequence._cache is None:
                capacity = len(sequence.request.prompt) + sequence.request.max_tokens
                sequence._cache = self._core.new_cache(capacity, self._kv_dtype)
            sequence.started = time.perf_counter()
            self._active.append(self._waiting.popleft())

    def _batch(self) -> list[_Segment]:
        """The segments of the next forward."""
        pending = [
            _Segment(sequence, cache, sequence.ids[len(cache) :], True)
            for sequence in self._active
            if (cache := sequence._cache) is not None
        ]
        # Those that decode always take part; prompts share what is left, first come first served.
        room = max(1, self._prefill_tokens - sum(len(each.tokens) == 1 for each in pending))
        segments = []
        for each in pending:
            n = len(each.tokens)
            if n > 1:
                take = min(n, room)
                room -= take
                each = each._replace(tokens=each.tokens[:take], complete=take == n)
            if len(each.tokens):
                segments.append(each)
        return segments

    def step(self) -> Sequence[Event]:
        """Computes one forward and returns what it brought: an event for each new token.

        Raises:
            RuntimeError: The model computed logits that are not numbers, or a cache that was
                handed in is in use elsewhere.
        """
        self._admit()
        segments = self._batch()
        if not segments:
            return ()
        found = self._core.forward_top(
            [(each.tokens, each.cache) for each in segments],
            [wanted_logits(each.sequence.request) if each.complete else 0 for each in segments],
        )
        return [
            self._advance(each.sequence, ids, logits)
            for each, (ids, logits) in zip(segments, found, strict=True)
            if each.complete
        ]

    def _advance(
        self, sequence: Running, ids: NDArray[np.uint32] | None, logits: NDArray[np.float32]
    ) -> Event:
        """Chooses a sequence's next token and, where that ends it, lets it go."""
        request = sequence.request
        penalized = logits
        if request.params.repetition_penalty != 1.0:
            penalty = request.params.repetition_penalty
            penalized = sampling.penalize(logits, sequence.ids, penalty)
        token = choose(penalized, request.params, sequence._rng)
        if ids is not None:
            token = int(ids[token])
        if sequence.first_token is None:
            sequence.first_token = time.perf_counter()
        if token in request.stop_ids:
            self._leave(sequence, "stop")
            return Event(sequence, None, None, "stop")
        report = None
        if request.logprobs is not None:
            report = sampling.logprobs(logits, token, request.logprobs)
        sequence._ids[sequence._n] = token
        sequence._n += 1
        if sequence.n_generated == request.max_tokens:
            self._leave(sequence, "length")
        return Event(sequence, token, report, sequence.finish_reason)
