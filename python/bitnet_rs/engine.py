"""Token ids in, token ids out: runs one sequence or many over the core.

For `runner.py`, which gives it a thread. Apart because it knows no text: stop strings, templates
and decoding are its callers' business. It knows requests, caches and steps.

A step is one `forward` of the core over a ragged batch: every sequence that decodes puts in one
token, those that still read their prompt put in chunks of it. Sequences join between steps (`add`)
and leave when they finish or are cancelled. What a sequence generates does not depend on the others
in the batch: the core promises the same logits, and each sequence draws from a generator of its
own.

Who runs when:

- Sequences are admitted in the order they came, by two bounds: how many run at once, and how much
  memory their keys and values may take when each has grown to its full length. So none that was
  admitted ever has to be turned out again.
- A step's prompt tokens are shared out evenly among the prompts, what is left over to those that
  came first: a short prompt is read within a step or two of arriving, however long the one before it
  is, and a long one gets its share however many short ones come.
- A prompt begins with the keys and values of the longest beginning it shares with a finished sequence
  (`prefixes.py`), or with one that is running. Where a running one is about to compute more of what
  they share, the prompt waits for that rather than computing it a second time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet_rs import _core, sampling
from bitnet_rs.prefixes import MIN_TOKENS, Prefixes, shared_prefix
from bitnet_rs.sampling import Logprobs, SamplingParams

# Prompt tokens in one forward, over all sequences. Between two forwards others get their next token,
# so it should be small; every chunk reads all weights once, so it should be large. At 256 the
# reading is a few percent of the computing.
PREFILL_TOKENS = 256

# The same where somebody waits for the end of the step: others decode, or have prompts of their own.
SHARED_PREFILL_TOKENS = 64

# Prompt tokens of a request for their log-probabilities in one forward: each is a whole row of
# logits, half a megabyte for a vocabulary of 128,256.
SCORED_TOKENS = 64

# Sequences computed at once; more wait. Beyond it a step gets slower about as fast as it gets
# wider, while every sequence holds a cache.
MAX_SEQUENCES = 16

# Memory for keys and values where the caller does not say.
KV_LIMIT = 1 << 30

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Constraint(Protocol):
    """What may come next in one sequence, such as a grammar. Used by the engine's thread alone."""

    def restrict(self, logits: NDArray[np.float32], remaining: int) -> None:
        """Sets the logits of tokens that may not come next to -inf.

        Args:
            logits: Shape (vocab_size,), changed in place.
            remaining: How many tokens may still be generated, this one included; >= 1.
        """

    def accept(self, token: int) -> bool:
        """Takes the token that was chosen, which is no stop id; says whether nothing may follow."""


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
        max_tokens: How many tokens to generate at most, >= 1; with `prompt_logprobs`, >= 0.
        params: How tokens are chosen.
        stop_ids: Ids that end the sequence; the one that does is not part of the result.
        logprobs: How many of the most probable tokens to report with each token; None: no
            log-probabilities at all.
        constraint: What may be generated; its own object for each request.
        prompt_logprobs: Report the log-probabilities of the prompt's tokens, too, with as many of
            the most probable ones as `logprobs` says. The whole prompt is computed then.
    """

    prompt: NDArray[np.uint32]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    constraint: Constraint | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        if self.prompt.ndim != 1 or not len(self.prompt):
            raise ValueError(
                f"prompt has the shape {self.prompt.shape}; wanted at least one token, one axis"
            )
        least = 0 if self.prompt_logprobs else 1
        if self.max_tokens < least:
            raise ValueError(f"max_tokens is {self.max_tokens}; wanted at least {least}")

    @property
    def capacity(self) -> int:
        """Tokens that its cache must hold. The last one generated is never put in."""
        return len(self.prompt) + max(self.max_tokens, 1) - 1


class Running:
    """A sequence that an engine is to run, runs, or has run. Read it; only the engine changes it.

    Attributes:
        request: What it was asked.
        ahead: How many tokens it may be ahead of what was taken from it (`taken`), then it rests
            unless others wait to be admitted; None: any number.
        taken: Tokens that whoever reads them has taken so far; theirs to count.
        finish_reason: None while it runs.
        error: What went wrong, where `finish_reason` is `error`.
        n_cached: Prompt tokens whose keys and values were there already.
        prompt_logprobs: Of the prompt's tokens from the second on, if they were asked for;
            complete by the first event.
        submitted: When it was made, in seconds of `time.perf_counter`.
        started: When its first step began; `first_token` and `finished` likewise; None until then.
    """

    def __init__(self, request: Request, *, ahead: int | None = None) -> None:
        self.request = request
        self.ahead = ahead
        self.taken = 0
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.n_cached = 0
        self.prompt_logprobs: list[Logprobs] = []
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.finished: float | None = None
        self._rng = request.params.rng()
        self._n_prompt = len(request.prompt)
        self._ids = np.empty(self._n_prompt + request.max_tokens, np.uint32)
        self._ids[: self._n_prompt] = request.prompt
        self._n = self._n_prompt
        self._cache: _core.KvCache | None = None
        self._n_kv = 0  # tokens in its cache: the first of its ids, always
        self._bytes_when_full = 0

    @property
    def ids(self) -> NDArray[np.uint32]:
        """Prompt and generated tokens."""
        return self._ids[: self._n]

    @property
    def tokens(self) -> list[int]:
        """The generated tokens."""
        return [int(i) for i in self._ids[self._n_prompt : self._n]]

    @property
    def n_generated(self) -> int:
        """How many tokens were generated."""
        return self._n - self._n_prompt

    @property
    def _reads_prompt(self) -> bool:
        return self._n_kv < self._n_prompt

    @property
    def _is_ahead(self) -> bool:
        return self.ahead is not None and self.n_generated - self.taken >= self.ahead

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.finished = time.perf_counter()
        self._cache = None


@dataclass(frozen=True, slots=True)
class Event:
    """What one step brought for one sequence.

    Attributes:
        sequence: The one.
        token: The new token; None where a stop id ended the sequence, or nothing was to be
            generated, or it failed.
        logprobs: Log-probabilities of the token, if the request asked for them.
        finish_reason: Set on a sequence's last event.
        time: When the token was chosen, in seconds of `time.perf_counter`.
    """

    sequence: Running
    token: int | None
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    time: float


@dataclass
class _Totals:
    """What an engine counts as it goes; `EngineStats` describes them."""

    finished: int = 0
    steps: int = 0
    batch_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefix_lookups: int = 0
    prefix_hits: int = 0


@dataclass
class EngineStats(_Totals):
    """What an engine has done so far, and what it does now.

    Attributes:
        waiting: Sequences that were not admitted yet.
        active: Sequences that run.
        finished: Sequences that ended, for whatever reason.
        steps: Steps computed.
        batch_tokens: Tokens in the last step.
        prompt_tokens: Prompt tokens computed.
        cached_tokens: Prompt tokens whose keys and values were there already.
        generated_tokens: Tokens generated.
        prefix_lookups: Prompts that were begun.
        prefix_hits: Those of them that could begin with what was there.
        prefixes: Finished sequences whose keys and values are kept.
        kv_bytes: Memory that keys and values take now, kept ones included.
        kv_limit: The most they may take.
    """

    waiting: int = 0
    active: int = 0
    prefixes: int = 0
    kv_bytes: int = 0
    kv_limit: int = 0


class _Segment(NamedTuple):
    """One sequence's share of a forward: tokens that go into its cache."""

    sequence: Running
    cache: _core.KvCache
    tokens: NDArray[np.uint32]
    complete: bool  # nothing is pending after them, so their logits choose the next token


def wanted_logits(request: Request) -> int | None:
    """How many of the best logits decide a request's next token; None: all of them.

    The core finds a few for half the reading that all of them take, and chooses among them as it
    would among all: `top_k` comes before whatever else looks at more than one logit.
    """
    params = request.params
    if (
        request.logprobs is not None
        or request.constraint is not None
        or params.repetition_penalty != 1.0
    ):
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


def _scores(sequence: Running) -> bool:
    """Whether its next tokens are part of a prompt whose log-probabilities are wanted."""
    return sequence.request.prompt_logprobs and sequence._reads_prompt


def pages_of(tokens: int) -> int:
    """Pages that keys and values of so many tokens take."""
    return -(-tokens // _core.kv_page)


def share_out(wanted: Sequence[int], room: int) -> list[int]:
    """Shares `room` among those who want some: evenly, what is left over to the first ones.

    Each gets at most what it wants; where there is not one for each, the first ones get it.
    """
    if not wanted:
        return []
    even = max(1, room // len(wanted))
    shares = []
    for each in wanted:
        shares.append(min(each, even, room))
        room -= shares[-1]
    for i, each in enumerate(wanted):
        more = min(each - shares[i], room)
        shares[i] += more
        room -= more
    return shares


class Engine:
    """Runs sequences on one core model. For one thread; engines may share a core.

    Args:
        core: The model.
        kv_dtype: Of the caches it makes.
        prefill_tokens: Prompt tokens in one forward, over all sequences.
        shared_prefill_tokens: The same where several sequences run.
        max_sequences: Sequences computed at once; further ones wait their turn.
        kv_limit: Most bytes of keys and values: those of sequences that run, as if they had grown
            to their full length already, and in what is left of it those of finished ones, kept
            for prompts that begin alike.
    """

    def __init__(
        self,
        core: _core.Model,
        *,
        kv_dtype: Literal["f16", "f32"] = "f16",
        prefill_tokens: int = PREFILL_TOKENS,
        shared_prefill_tokens: int = SHARED_PREFILL_TOKENS,
        max_sequences: int = MAX_SEQUENCES,
        kv_limit: int = KV_LIMIT,
    ) -> None:
        self.max_sequences = max_sequences
        self._core = core
        self._kv_dtype: Literal["f16", "f32"] = kv_dtype
        self._prefill_tokens = prefill_tokens
        self._shared_prefill_tokens = min(shared_prefill_tokens, prefill_tokens)
        self._kv_limit = kv_limit
        # Caches take memory by pages; the smallest tells their size.
        self._page_bytes = core.new_cache(1, kv_dtype).n_bytes
        self._waiting: deque[Running] = deque()
        self._active: list[Running] = []
        self._prefixes = Prefixes()
        self._totals = _Totals()
        self._kv_bytes = 0
        self._recount = False  # caches came or went since `_kv_bytes` was counted

    @property
    def busy(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._active or self._waiting)

    @property
    def runnable(self) -> bool:
        """Whether a step would compute anything: not all sequences rest."""
        return any(not self._rests(each) for each in self._active) or (
            bool(self._waiting) and self._fits(self._waiting[0])
        )

    @property
    def stats(self) -> EngineStats:
        """What it has done and does. Any thread may ask; the numbers may be of two steps then."""
        return EngineStats(
            waiting=len(self._waiting),
            active=len(self._active),
            prefixes=len(self._prefixes),
            kv_bytes=self._kv_bytes,
            kv_limit=self._kv_limit,
            **vars(self._totals),
        )

    def check(self, request: Request) -> None:
        """Refuses a request that could never be admitted. Any thread may ask.

        Raises:
            ValueError: Its keys and values would take more memory than there may be in all.
        """
        needed = self._bytes_when_full(request)
        if needed > self._kv_limit:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} to generate "
                f"take {needed / 1e6:,.1f} MB of keys and values; the limit is "
                f"{self._kv_limit / 1e6:,.1f} MB: lower max_tokens, or load the model with a "
                "larger kv_memory"
            )

    def add(self, request: Request | Running) -> Running:
        """Takes a sequence in; it joins at the next step.

        Args:
            request: What to do; or a `Running` of it, which must be new.

        Raises:
            ValueError: As `check`.
        """
        sequence = request if isinstance(request, Running) else Running(request)
        self.check(sequence.request)
        sequence._bytes_when_full = self._bytes_when_full(sequence.request)
        self._waiting.append(sequence)
        return sequence

    def finish(self, sequence: Running, reason: FinishReason = "cancelled") -> None:
        """Ends a sequence from outside, between steps; nothing happens if it has ended already."""
        if sequence.finish_reason is None:
            self._leave(sequence, reason)
            self._count_bytes()

    def fail(self, error: Exception) -> list[Event]:
        """Ends all sequences with an error; returns their last events."""
        events = [self._fail(sequence, error) for sequence in (*self._active, *self._waiting)]
        self._count_bytes()
        return events

    def close(self) -> None:
        """Cancels whatever is left and lets go of all caches."""
        for sequence in (*self._active, *self._waiting):
            self._leave(sequence, "cancelled")
        self._prefixes.clear()
        self._recount = True
        self._count_bytes()

    def _bytes_when_full(self, request: Request) -> int:
        return self._core.new_cache(request.capacity, self._kv_dtype).n_bytes

    def _leave(self, sequence: Running, reason: FinishReason) -> None:
        cache = sequence._cache
        sequence._finish(reason)
        if sequence in self._active:
            self._active.remove(sequence)
        else:
            self._waiting.remove(sequence)
        if cache is not None and reason != "error":
            self._prefixes.keep(sequence.ids[: sequence._n_kv], cache)
        self._totals.finished += 1
        self._recount = True

    def _fail(self, sequence: Running, error: Exception) -> Event:
        sequence.error = error
        self._leave(sequence, "error")
        return Event(sequence, None, None, "error", time.perf_counter())

    # Who may run.

    def _rests(self, sequence: Running) -> bool:
        """Whether it is far enough ahead of its reader.

        Not while others wait for its place: its reader may be waiting for one of those.
        """
        return sequence._is_ahead and not self._waiting

    def _fits(self, sequence: Running) -> bool:
        if len(self._active) >= self.max_sequences:
            return False
        committed = sum(each._bytes_when_full for each in self._active)
        return committed + sequence._bytes_when_full <= self._kv_limit

    def _admit(self) -> None:
        admitted = False
        while self._waiting and self._fits(self._waiting[0]):
            sequence = self._waiting.popleft()
            # What it is going to begin with should be the last to be dropped for it.
            entry, _ = self._prefixes.find(sequence.request.prompt)
            if entry is not None:
                self._prefixes.touch(entry)
            self._active.append(sequence)
            admitted = True
        if admitted:
            self._make_room()

    def _make_room(self) -> None:
        """Drops kept prefixes until those that run can grow to their full lengths."""
        while len(self._prefixes) and self._bytes_held() + self._growth() > self._kv_limit:
            self._prefixes.drop_oldest()

    def _bytes_held(self) -> int:
        """Bytes that keys and values take, each page once."""
        caches = [each._cache for each in self._active if each._cache is not None]
        return _core.kv_bytes([*caches, *(entry.cache for entry in self._prefixes)])

    def _growth(self) -> int:
        """Bytes that the sequences that run may still come to take."""
        return sum(
            each._bytes_when_full - pages_of(each._n_kv) * self._page_bytes for each in self._active
        )

    def _count_bytes(self) -> None:
        if self._recount:
            self._kv_bytes = self._bytes_held()
            self._recount = False

    # What they begin with.

    def _begin(self, sequence: Running) -> bool:
        """Gives a sequence its cache; False if it had better wait for what another computes."""
        request = sequence.request
        # At least one token must be computed, or there are no logits to go on from. Those of the
        # whole prompt come from computing all of it.
        usable = request.prompt[: 0 if request.prompt_logprobs else -1]
        entry, n = self._prefixes.find(usable)
        source = None if entry is None else entry.cache
        for other in self._active:
            if other._cache is None:
                continue
            shared = shared_prefix(other.ids, usable)
            if other._reads_prompt and shared >= max(n, other._n_kv) + MIN_TOKENS:
                return False
            shared = min(shared, other._n_kv)
            if shared > max(n, MIN_TOKENS - 1):
                entry, source, n = None, other._cache, shared
        if source is None:
            sequence._cache = self._core.new_cache(request.capacity, self._kv_dtype)
        else:
            sequence._cache = source.fork(n, request.capacity)
            sequence._n_kv = sequence.n_cached = n
        if entry is not None:
            self._prefixes.touch(entry)
        sequence.started = time.perf_counter()
        self._recount = True
        self._totals.prefix_lookups += 1
        self._totals.prefix_hits += n > 0
        self._totals.cached_tokens += n
        return True

    # What they compute.

    def _batch(self) -> list[_Segment]:
        """The segments of the next forward."""
        segments: list[_Segment] = []
        prompts: list[int] = []  # which of them still read their prompt
        for sequence in self._active:
            if self._rests(sequence) or (sequence._cache is None and not self._begin(sequence)):
                continue
            cache = sequence._cache
            assert cache is not None  # `_begin` made it
            pending = sequence._ids[sequence._n_kv : sequence._n]
            if len(pending) > 1:
                prompts.append(len(segments))
            segments.append(_Segment(sequence, cache, pending, True))
        if not prompts:
            return segments
        most = self._prefill_tokens if len(segments) == 1 else self._shared_prefill_tokens
        # Those that decode always take part; prompts share what is left.
        room = max(1, most - (len(segments) - len(prompts)))
        shares = share_out([len(segments[i].tokens) for i in prompts], room)
        for i, n in zip(prompts, shares, strict=True):
            sequence, cache, pending, _ = segments[i]
            if sequence.request.prompt_logprobs:
                n = min(n, SCORED_TOKENS)
            segments[i] = _Segment(sequence, cache, pending[:n], n == len(pending))
        return [each for each in segments if len(each.tokens)]

    def step(self) -> Sequence[Event]:
        """Computes one forward and returns what it brought: an event for each new token.

        What goes wrong ends the sequences it concerns, with an event that says so.
        """
        self._admit()
        try:
            segments = self._batch()
            found = self._forward(segments)
        except Exception as error:  # noqa: BLE001 (whatever it is, those to come are not concerned)
            # No memory for keys and values, for one. No cache has changed.
            events = [self._fail(each, error) for each in tuple(self._active)]
            self._count_bytes()
            return events
        events = []
        for each, (ids, logits) in zip(segments, found, strict=True):
            sequence = each.sequence
            if sequence._reads_prompt:
                self._totals.prompt_tokens += len(each.tokens)
            before = sequence._n_kv
            sequence._n_kv += len(each.tokens)
            self._kv_bytes += (pages_of(sequence._n_kv) - pages_of(before)) * self._page_bytes
            if not each.complete:
                continue
            try:
                events.append(self._advance(sequence, ids, logits))
            except Exception as error:  # noqa: BLE001 (a constraint's, of whatever class)
                events.append(self._fail(sequence, error))
        if segments:
            self._totals.steps += 1
            self._totals.batch_tokens = sum(len(each.tokens) for each in segments)
        self._count_bytes()
        return events

    def _forward(
        self, segments: Sequence[_Segment]
    ) -> list[tuple[NDArray[np.uint32] | None, NDArray[np.float32]]]:
        """Runs the core; for each segment that is complete, the logits that choose its token."""
        scored = [i for i, each in enumerate(segments) if _scores(each.sequence)]
        plain = [each for i, each in enumerate(segments) if i not in scored]
        found: list[tuple[NDArray[np.uint32] | None, NDArray[np.float32]]] = []
        if plain:
            found = self._core.forward_top(
                [(each.tokens, each.cache) for each in plain],
                [wanted_logits(each.sequence.request) if each.complete else 0 for each in plain],
            )
        for i in scored:
            rows = self._core.forward([(segments[i].tokens, segments[i].cache)], logits="all")
            self._score(segments[i], rows)
            found.insert(i, (None, rows[-1]))
        return found

    def _score(self, segment: _Segment, rows: NDArray[np.float32]) -> None:
        """Notes the log-probabilities of the prompt's tokens that `rows` predict."""
        sequence = segment.sequence
        following = sequence.request.prompt[sequence._n_kv + 1 :]
        top = sequence.request.logprobs or 0
        sequence.prompt_logprobs += [
            sampling.logprobs(row, int(token), top)
            for row, token in zip(rows, following, strict=False)
        ]

    def _advance(
        self, sequence: Running, ids: NDArray[np.uint32] | None, logits: NDArray[np.float32]
    ) -> Event:
        """Chooses a sequence's next token and, where that ends it, lets it go."""
        request = sequence.request
        now = time.perf_counter()
        if sequence.first_token is None:
            sequence.first_token = now
        if request.max_tokens == 0:
            self._leave(sequence, "length")
            return Event(sequence, None, None, "length", now)
        chosen = logits
        if request.params.repetition_penalty != 1.0:
            penalty = request.params.repetition_penalty
            chosen = sampling.penalize(logits, sequence.ids, penalty)
        if request.constraint is not None:
            sampling.greedy(logits)  # refuses bad logits before some are taken out
            chosen = chosen.copy()
            request.constraint.restrict(chosen, request.max_tokens - sequence.n_generated)
            if chosen.max() == -np.inf:
                raise ValueError("the grammar allows none of the model's tokens here")
        token = choose(chosen, request.params, sequence._rng)
        if ids is not None:
            token = int(ids[token])
        if token in request.stop_ids:
            self._leave(sequence, "stop")
            return Event(sequence, None, None, "stop", now)
        report = None
        if request.logprobs is not None:
            report = sampling.logprobs(logits, token, request.logprobs)
        sequence._ids[sequence._n] = token
        sequence._n += 1
        self._totals.generated_tokens += 1
        if request.constraint is not None and request.constraint.accept(token):
            self._leave(sequence, "stop")
        elif sequence.n_generated == request.max_tokens:
            self._leave(sequence, "length")
        return Event(sequence, token, report, sequence.finish_reason, now)
