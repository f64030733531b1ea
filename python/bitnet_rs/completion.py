"""What a generation gives back: text as it comes, and the finished completion.

For `model.py`, `chat.py` and the server, which share it. Apart because it is the one place where
the engine's tokens become text: streaming decode, stop strings, and the held-back text that may
still turn out to be one.
"""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from bitnet_rs.engine import Event, FinishReason, Running
from bitnet_rs.runner import Runner

if TYPE_CHECKING:
    from bitnet_rs.sampling import Logprobs
    from bitnet_rs.tokenizer import Tokenizer


# Tokens that a stream may be ahead of its reader, so that neither waits for the other while both are
# at work, and little is computed for one who never comes back.
_AHEAD: Final = 16


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and its natural-log probability, under the model's own distribution.

    Attributes:
        token: The id.
        text: Its text; U+FFFD where the token is only part of a character.
        logprob: Before temperature, penalties and the other sampling parameters.
        top: The most probable tokens at this step, most probable first; empty in these themselves.
    """

    token: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a completion took.

    Attributes:
        prompt_tokens: Length of the prompt, BOS included.
        completion_tokens: Tokens generated, without the stop token.
        cached_tokens: Prompt tokens that did not need computing: another prompt began alike.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a completion took. In a batch, the others' share of the steps is included.

    Attributes:
        prefill_s: Seconds from the start to the first token.
        decode_s: Seconds from the first token to the end.
        prefill_tokens_per_s: Prompt tokens computed per second; 0 where nothing was.
        decode_tokens_per_s: Tokens after the first, per second; 0 where there were none.
    """

    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation.

    Attributes:
        text: What was generated, without special tokens, ending before a stop string.
        tokens: Ids of all tokens generated, those of a stop string included, a stop token not.
        logprobs: One entry for each of `tokens`, if they were asked for.
        finish_reason: `stop` (a stop token or a stop string, or a grammar's end), `length`
            (`max_tokens` or the end of the context), or `cancelled` (the stream was closed).
        usage: Tokens counted.
        timings: Seconds and speeds.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason
    usage: Usage
    timings: Timings

    def __str__(self) -> str:
        return self.text


class Reply:
    """The text of one running sequence.

    Args:
        sequence: The one, as the engine runs it.
        tokenizer: For its text.
        stop: Strings that end the text, none of them empty.
    """

    def __init__(self, sequence: Running, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.sequence = sequence
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder()
        self._stop = tuple(stop)
        self._held = ""  # decoded, but possibly the beginning of a stop string
        self._pieces: list[str] = []
        self._tokens: list[int] = []  # those taken; the sequence may be further
        self._logprobs: list[Logprobs] = []
        self._last = 0.0

    def take(self, event: Event) -> str:
        """Takes an event of this sequence; returns the text that is certain by now, maybe "".

        Where it finds a stop string, `finish_reason` is set, and the sequence is to be ended.
        """
        self._last = event.time
        if event.token is not None:
            self._tokens.append(event.token)
            self._held += self._decoder.push(event.token)
            if event.logprobs is not None:
                self._logprobs.append(event.logprobs)
        if event.finish_reason is not None:
            self._held += self._decoder.flush()
            self.finish_reason = event.finish_reason
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.finish_reason = "stop"
            piece = self._held[: min(found)]
        elif self.finish_reason is not None:
            piece = self._held
        else:
            piece = self._held[: len(self._held) - self._undecided()]
        self._held = "" if self.finish_reason else self._held[len(piece) :]
        if piece:
            self._pieces.append(piece)
        return piece

    def _undecided(self) -> int:
        """Length of the longest end of the held text that is the beginning of a stop string."""
        longest = max(map(len, self._stop), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def usage(self) -> Usage:
        """Tokens taken so far."""
        sequence = self.sequence
        return Usage(len(sequence.request.prompt), len(self._tokens), sequence.n_cached)

    def completion(self) -> Completion:
        """The finished generation; an unfinished one counts as cancelled."""
        return Completion(
            text=self.text,
            tokens=list(self._tokens),
            logprobs=self._token_logprobs(),
            finish_reason=self.finish_reason or "cancelled",
            usage=self.usage,
            timings=self._timings(),
        )

    def _token_logprobs(self) -> list[TokenLogprob] | None:
        if self.sequence.request.logprobs is None:
            return None
        text = self._tokenizer.token_text
        return [
            TokenLogprob(
                token,
                text(token),
                step.logprob,
                tuple(TokenLogprob(i, text(i), logprob) for i, logprob in step.top),
            )
            # Ctrl-C can land between the two.
            for token, step in zip(self._tokens, self._logprobs, strict=False)
        ]

    def _timings(self) -> Timings:
        sequence = self.sequence
        start = sequence.started or 0.0
        first = sequence.first_token or start
        prefill_s, decode_s = first - start, max(0.0, self._last - first)
        computed = len(sequence.request.prompt) - sequence.n_cached if sequence.first_token else 0
        decoded = max(0, len(self._tokens) - 1)
        return Timings(
            prefill_s,
            decode_s,
            computed / prefill_s if prefill_s > 0 else 0.0,
            decoded / decode_s if decode_s > 0 else 0.0,
        )


def run(runner: Runner, replies: Sequence[Reply]) -> Generator[tuple[Reply, str], None, None]:
    """Runs the replies' sequences, which must be new, with each one's text as it comes.

    Nothing is computed before the first piece is asked for. Closing the generator cancels what is
    unfinished.

    Raises:
        ValueError: A request could never be admitted.
        RuntimeError: The model was closed.
        Exception: What ended a sequence, with whatever was wrong there.
    """
    of = {id(reply.sequence): reply for reply in replies}
    events: queue.SimpleQueue[Sequence[Event]] = queue.SimpleQueue()
    unfinished = len(replies)
    runner.start([reply.sequence for reply in replies], events.put)
    try:
        while unfinished:
            for event in _wait(events):
                reply = of[id(event.sequence)]
                if reply.finish_reason is not None:
                    continue
                piece = reply.take(event)
                runner.took(event.sequence)
                if event.sequence.error is not None:
                    raise event.sequence.error
                if reply.finish_reason is not None:
                    unfinished -= 1
                    runner.cancel(event.sequence, reply.finish_reason)
                if piece:
                    yield reply, piece
    finally:
        for reply in replies:
            runner.cancel(reply.sequence)


def _wait(events: queue.SimpleQueue[Sequence[Event]]) -> Sequence[Event]:
    """The next events. In turns: without a limit, Windows would not let Ctrl-C through."""
    while True:
        try:
            return events.get(timeout=0.5)
        except queue.Empty:
            pass


def stream(runner: Runner, reply: Reply) -> Generator[str, None, None]:
    """Runs a single reply, piece by piece, never far ahead of who reads it."""
    reply.sequence.ahead = _AHEAD
    pieces = run(runner, [reply])
    try:
        for _, piece in pieces:
            yield piece
    finally:
        pieces.close()


class Stream(Iterator[str]):
    """Pieces of text as they are generated. Closing it cancels the generation.

    A piece is never empty and never ends inside a character. Use it in a `for` loop; where the
    loop may be left early, in a `with` block, too, so that the generation ends there and then.
    """

    def __init__(self, pieces: Generator[str, None, None], reply: Reply) -> None:
        self._pieces = pieces
        self._reply = reply
        self._over = False

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except BaseException:
            # The end, an error or Ctrl-C: a generator that raised does not go on.
            self._over = True
            raise

    def close(self) -> None:
        """Cancels the generation, if it still runs, and frees its cache."""
        self._pieces.close()
        self._over = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def completion(self) -> Completion:
        """The whole completion, once the stream has ended or was closed.

        Raises:
            RuntimeError: It is still running.
        """
        if not self._over:
            raise RuntimeError(
                "the stream has not ended; take all its pieces, or close() it, before `completion`"
            )
        return self._reply.completion()
