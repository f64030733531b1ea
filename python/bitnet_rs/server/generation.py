"""From requests to pieces of text, on the event loop: what the routes that generate share.

For `chat.py` and `completions.py`. Apart because it is where the engine's thread meets the event
loop: events come in from there, pieces of text go out here, and whoever stops reading, for whatever
reason, has the sequences cancelled.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from starlette.responses import Response

from bitnet_rs.runner import QueueFullError
from bitnet_rs.server.errors import ApiError, bad_request, internal_error

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from bitnet_rs.completion import Reply
    from bitnet_rs.engine import Event, FinishReason
    from bitnet_rs.runner import Runner
    from bitnet_rs.server.metrics import Metrics

log = logging.getLogger("bitnet_rs.server")

_T = TypeVar("_T")

# Seconds between two pieces of a stream, at least. Small models write thousands of tokens a second;
# one chunk for each would cost more than the tokens, and nobody reads a hundred a second.
_PACE: Final = 0.008

# OpenAI's stand-in for what JSON has no number for.
_LEAST_LOGPROB: Final = -9999.0


def logprob(value: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(value, _LEAST_LOGPROB)


class _Inbox:
    """Takes events on the engine's thread and gives them to a task of the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._ready = asyncio.Event()
        self._told = False  # the loop knows that there is something
        self._urgent = False  # and that it should look at once
        self._taken = 0.0

    def __call__(self, events: Sequence[Event]) -> None:
        """The engine's side."""
        self._events.extend(events)
        urgent = any(event.finish_reason is not None for event in events)
        if not self._told or (urgent and not self._urgent):
            self._told, self._urgent = True, urgent
            self._loop.call_soon_threadsafe(self.wake, urgent)

    def wake(self, urgent: bool = True) -> None:  # noqa: FBT001 (call_soon has no keywords)
        """Has `take` return: at once, or when its pace allows."""
        wait = self._taken + _PACE - time.perf_counter()
        if urgent or wait <= 0:
            self._ready.set()
        else:
            self._loop.call_later(wait, self._ready.set)

    async def take(self, idle: float | None) -> list[Event]:
        """All events that have come; none if it was woken otherwise, or nothing came for `idle` s."""
        try:
            async with asyncio.timeout(idle):
                await self._ready.wait()
        except TimeoutError:
            return []
        self._ready.clear()
        # In this order: what comes after the flags are down wakes again.
        self._told = self._urgent = False
        self._taken = time.perf_counter()
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events


class Piece(NamedTuple):
    """What is new of one choice.

    Attributes:
        choice: Which one.
        text: Text that is certain by now, maybe "".
        events: The tokens that brought it.
        finish_reason: Set on the last piece.
    """

    choice: int
    text: str
    events: Sequence[Event]
    finish_reason: FinishReason | None


@dataclass
class Usage:
    """Tokens that a request took, over all its choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generation:
    """The sequences of one HTTP request.

    Args:
        runner: Runs them.
        replies: One for each choice, with sequences that are new.
        per_prompt: How many choices in a row have the same prompt.
        metrics: Where tokens are counted.
    """

    def __init__(
        self, runner: Runner, replies: Sequence[Reply], per_prompt: int, metrics: Metrics
    ) -> None:
        self.replies = replies
        self._runner = runner
        self._per_prompt = per_prompt
        self._metrics = metrics
        self._inbox = _Inbox()
        self._index = {id(reply.sequence): i for i, reply in enumerate(replies)}
        self._last: list[float | None] = [None] * len(replies)
        self._refusal: ApiError | None = None

    def start(self, max_waiting: int) -> None:
        """Hands the sequences in.

        Args:
            max_waiting: Most sequences that may wait, those of others included.

        Raises:
            ApiError: They cannot run, or too many wait already.
        """
        try:
            self._runner.start(
                [reply.sequence for reply in self.replies], self._inbox, max_waiting=max_waiting
            )
        except QueueFullError as error:
            raise ApiError(
                429, str(error), code="queue_full", headers={"Retry-After": "1"}
            ) from None
        except ValueError as error:
            raise bad_request(str(error), code="context_length_exceeded") from None
        except RuntimeError as error:  # closed
            raise ApiError(503, str(error), code="shutting_down") from None

    def abort(self, refusal: ApiError) -> None:
        """Ends everything; whoever reads gets this error."""
        self._refusal = refusal
        self._inbox.wake()

    def cancel(self) -> None:
        """Ends what is unfinished; nothing happens to what has ended."""
        for reply in self.replies:
            self._runner.cancel(reply.sequence)

    async def pieces(self, idle: float | None = None) -> AsyncGenerator[list[Piece], None]:
        """What is new of each choice, as it comes; none when nothing came for `idle` seconds.

        Raises:
            ApiError: A sequence ended by an error, or everything by `abort`.
        """
        unfinished = len(self.replies)
        while unfinished:
            events = await self._inbox.take(idle)
            if self._refusal is not None:
                raise self._refusal
            pieces = self._read(events)
            unfinished -= sum(piece.finish_reason is not None for piece in pieces)
            if pieces or not events:
                yield pieces

    def _read(self, events: Sequence[Event]) -> list[Piece]:
        """Turns events into pieces, one for each choice that has any."""
        by_choice: dict[int, list[Event]] = {}
        for event in events:
            by_choice.setdefault(self._index[id(event.sequence)], []).append(event)
        pieces = []
        for i, new in by_choice.items():
            reply = self.replies[i]
            if reply.finish_reason is not None:
                continue  # a stop string was found, and these were under way
            self._last[i] = self._metrics.tokens(reply.sequence, self._last[i], new)
            text = ""
            taken = []
            for event in new:
                taken.append(event)
                text += reply.take(event)
                if reply.finish_reason is not None:
                    break
            if reply.finish_reason == "error":
                raise _failure(reply.sequence.error)
            if reply.finish_reason == "cancelled":
                raise ApiError(503, "the model was closed", code="shutting_down")
            if reply.finish_reason is not None:
                self._runner.cancel(reply.sequence, reply.finish_reason)
            pieces.append(Piece(i, text, taken, reply.finish_reason))
        return pieces

    async def finish(self) -> None:
        """Waits until all have ended.

        Raises:
            ApiError: As `pieces`.
        """
        async for _ in self.pieces():
            pass

    def usage(self) -> Usage:
        """Tokens taken so far. A prompt counts once, however many choices it has."""
        total = Usage()
        for i, reply in enumerate(self.replies):
            usage = reply.usage
            total.completion_tokens += usage.completion_tokens
            if i % self._per_prompt == 0:
                total.prompt_tokens += usage.prompt_tokens
                total.cached_tokens += usage.cached_tokens
        return total


def _failure(error: Exception | None) -> ApiError:
    """What a client is told of a sequence that failed."""
    if isinstance(error, ValueError):
        return ApiError(500, str(error), code="generation_failed")
    log.error("a sequence failed", exc_info=error)
    if isinstance(error, MemoryError):
        return ApiError(503, "there is not enough memory for this request", code="out_of_memory")
    return internal_error()


async def until_left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T | None:
    """Runs `work`, and cancels it when the client leaves; then there is nothing to return."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(until_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        # Until they are really over: what they hold is let go of by then.
        await asyncio.gather(working, leaving, return_exceptions=True)


class NoResponse(Response):
    """The answer to a client that has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends nothing."""


class EventStream(Response):
    """Server-sent events.

    Args:
        chunks: What is sent, as `event` and `DONE` write it; None where nothing has come for a
            while. Closed when the client leaves.
        end: Called when it is over, even if nothing was sent.
    """

    def __init__(self, chunks: AsyncGenerator[bytes | None, None], end: Callable[[], None]) -> None:
        # None of Response's own: there is no body yet.
        self.status_code = 200
        self.background = None
        self._chunks = chunks
        self._end = end
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # nginx would hold it back
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the chunks as they come."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_left(receive, self._send(send))
        finally:
            self._end()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                body = b": keep-alive\n\n" if chunk is None else chunk
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


DONE: Final = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return (
        b"data: "
        + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        + b"\n\n"
    )


async def with_errors(
    chunks: AsyncGenerator[bytes | None, None],
) -> AsyncGenerator[bytes | None, None]:
    """The chunks; an error on the way, when the status is sent already, becomes an event."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except ApiError as error:
        yield event(error.body())
    except Exception:
        log.exception("a stream failed")
        yield event(internal_error().body())


def json_response(content: dict[str, Any]) -> Response:
    """An answer in one piece."""
    return Response(json.dumps(content, ensure_ascii=False), media_type="application/json")
