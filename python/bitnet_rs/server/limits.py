"""What every request passes before it reaches a route: who may ask, how much, and what is noted.

For `app.py`. Apart because none of it knows what is asked. Plain ASGI, so that an answer is passed
on as it comes and a client that leaves is noticed at once.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders

from bitnet_rs.server.errors import ApiError, shown

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from bitnet_rs.server.metrics import Metrics

log = logging.getLogger("bitnet_rs.server")

# Seconds that a body may take to arrive: who sends it byte by byte holds a connection for nothing.
_BODY_SECONDS: Final = 60.0

# A body that is too long is read a little further, so that a client that sends before it listens
# gets to see the answer.
_DISCARD_SECONDS: Final = 2.0
_DISCARD_BYTES: Final = 64_000_000

# What the log and the metrics call an answer that nobody waited for, as nginx does.
CLIENT_LEFT: Final = 499


@dataclass
class Traffic:
    """What a server is doing, for who has to end it.

    Attributes:
        in_flight: Requests that are being answered.
        draining: Whether no more are taken.
    """

    in_flight: int = 0
    draining: bool = False


class Record:
    """Counts requests and logs them; gives each an id and its answer harmless headers.

    Args:
        app: What comes next.
        metrics: Where they are counted.
        endpoints: Paths to count by; all others are `other`.
        traffic: Where it is noted how many are being answered.
        log_requests: Print a line for each.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        endpoints: Collection[str],
        traffic: Traffic,
        log_requests: bool,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = frozenset(endpoints)
        self._traffic = traffic
        self._log = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = CLIENT_LEFT
        complete = False

        async def noting(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = f"req_{uuid4().hex}"
                headers.setdefault("x-content-type-options", "nosniff")
            elif not message.get("more_body", False):
                complete = True
            await send(message)

        self._traffic.in_flight += 1
        try:
            await self._app(scope, receive, noting)
        finally:
            self._traffic.in_flight -= 1
            seconds = time.perf_counter() - start
            if not complete and status < 400:
                status = CLIENT_LEFT
            path = scope["path"]
            if path.startswith("/v1/models/"):
                path = "/v1/models"
            self._metrics.request(path if path in self._endpoints else "other", status, seconds)
            if self._log:
                log.info("%s %s %d %.3f s", scope["method"], shown(scope["path"]), status, seconds)


class Hosts:
    """Refuses requests that name another host than this machine, where only it can connect.

    A page may have its own name resolve to this machine (DNS rebinding): to the browser it is then
    of the same origin as the server. Its name still stands in the Host header.

    Args:
        app: What comes next.
        names: What the Host header may name; None: anything.
    """

    def __init__(self, app: ASGIApp, *, names: frozenset[str] | None) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "http" and self._names is not None:
            host = Headers(scope=scope).get("host", "")
            # Clients of HTTP/1.0 may name none; browsers always do.
            if host and _name_of(host) not in self._names:
                refusal = ApiError(
                    403,
                    f"the Host header is {shown(host)}; this server listens to this machine alone: "
                    "ask for localhost, or start it with --allow-host NAME",
                    code="host_not_allowed",
                )
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Guard:
    """Refuses who has no key, and who comes too late.

    Args:
        app: What comes next.
        api_key: What requests must carry; None: nothing.
        open_paths: What needs no key.
        traffic: Says whether the server is about to end.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        open_paths: Collection[str],
        traffic: Traffic,
    ) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._open = frozenset(open_paths)
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._key is not None and scope["path"] not in self._open:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self._key)
            if scheme.lower() != "bearer" or not right:
                problem = "wrong" if given else "missing"
                return ApiError(
                    401,
                    f"the API key is {problem}; wanted the server's, in the header "
                    "Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if scope["method"] == "POST" and self._traffic.draining:
            return ApiError(
                503,
                "the server is about to end and takes no more requests",
                code="shutting_down",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        return None


def _name_of(host: str) -> str:
    """The name in a Host header, without the port."""
    host = host.lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


class Body:
    """Reads the body of a request, if it is JSON and not too long; the rest gets it in one piece.

    A body of another type is refused: a page of any site may send those to this machine without
    asking (a "simple" request), while for JSON a browser asks first, and is told no.

    Args:
        app: What comes next.
        limit: Most bytes.
    """

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(headers)
            if _length(headers) > self._limit:
                if "expect" not in headers:  # those wait to be told to send
                    await _discard(receive)
                raise self._too_long()
            async with asyncio.timeout(_BODY_SECONDS):
                body = await self._read(receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except TimeoutError:
            late = ApiError(408, f"the body took more than {_BODY_SECONDS:.0f} s", code="timeout")
            await late.response()(scope, receive, send)
            return
        if body is None:
            return
        whole: Message = {"type": "http.request", "body": body, "more_body": False}
        taken = False

        async def replay() -> Message:
            nonlocal taken
            if taken:
                return await receive()
            taken = True
            return whole

        await self._app(scope, replay, send)

    @staticmethod
    def _check(headers: Headers) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415,
                f"the content type is {shown(kind) if kind else 'missing'}; wanted "
                "application/json",
                code="unsupported_media_type",
                headers={"Connection": "close"},
            )

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"the body is longer than {self._limit:,} bytes; send less, or start the server with "
            "a larger --max-body",
            code="request_too_large",
            headers={"Connection": "close"},
        )

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client left before it was there."""
        pieces = []
        n = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            n += len(piece)
            if n > self._limit:
                if message.get("more_body", False):
                    await _discard(receive)
                raise self._too_long()
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)


def _length(headers: Headers) -> int:
    """The length that a body is said to have; 0 where it is not said."""
    length = headers.get("content-length", "")
    return int(length[:20]) if length.isdigit() else 0


async def _discard(receive: Receive) -> None:
    """Reads on for a moment, and forgets what comes."""
    n = 0
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while n < _DISCARD_BYTES:
                message = await receive()
                n += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        pass
