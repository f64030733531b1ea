"""Listening, and ending in good order: the app on uvicorn.

For `bitnet-rs serve`, and for tests. Apart because it is about sockets and signals, of which the app
knows nothing.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Final, NoReturn

import uvicorn

from bitnet_rs.server.app import App

if TYPE_CHECKING:
    from bitnet_rs.model import Model
    from bitnet_rs.server.settings import ServerSettings

# Seconds that connections have to close when nothing is being answered any more.
_CLOSING: Final = 3


def listen(settings: ServerSettings) -> socket.socket:
    """A socket at the address of the settings, which does not listen yet.

    Raises:
        OSError: The address is in use, not allowed, or not this machine's.
    """
    wanted = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise OSError(f"cannot listen at {wanted}: {error.strerror}; wanted an address") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            # A server that was ended a moment ago must not keep its port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        cure = {
            errno.EADDRINUSE: "another program has this port; choose one with --port",
            errno.EACCES: "ports below 1024 are for root; choose one with --port",
            errno.EADDRNOTAVAIL: "this machine has no such address; choose one with --host",
        }.get(error.errno or 0, "choose others with --host and --port")
        raise OSError(f"cannot listen at {wanted}: {error.strerror}; {cure}") from None
    return listener


def url_of(settings: ServerSettings, listener: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    elif settings.host == "localhost":
        host = settings.host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves an app until it is told to end; then lets those finish that are being answered.

    The first signal (SIGTERM, or Ctrl-C) starts that: new requests are refused, and `/health` says
    so, while the socket stays open for it. When nothing is being answered, or after the drain
    timeout, it ends. A second signal ends the process there and then.

    Args:
        app: What to serve.
        settings: How.
        ready: Called once it listens.
    """

    def __init__(
        self, app: App, settings: ServerSettings, ready: Callable[[], None] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,  # errors go to stderr, as Python's logging does by itself
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                http="h11",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=_CLOSING,
            )
        )
        self._traffic = app.traffic
        self._service = app.service
        self._drain_timeout = settings.drain_timeout
        self._ready = ready
        self._deadline: float | None = None

    def drain(self) -> None:
        """Begins to end. Any thread may call it."""
        self._deadline = time.monotonic() + self._drain_timeout
        self._traffic.draining = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal, in place of uvicorn's own, which would also exit with the signal's code."""
        if self._traffic.draining:
            _quit(sig)
        self.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and says so."""
        await super().startup(sockets)
        if self.started and self._ready is not None:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Looks, ten times a second, whether it is time to end."""
        over = await super().on_tick(counter)
        if self._deadline is None:
            return over
        if time.monotonic() >= self._deadline:
            self._service.abort_all()
            return True
        return over or not self._traffic.in_flight


def _quit(sig: int) -> NoReturn:
    """Ends the process without more ado: computing threads are not waited for."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(128 + sig)


def serve(
    model: Model,
    settings: ServerSettings,
    listener: socket.socket,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serves a model until a signal says to end.

    Args:
        model: The model; it is not closed.
        settings: How.
        listener: From `listen`; closed at the end.
        ready: Called once it listens.
    """
    if settings.log_requests:
        _log_to_stderr()
    with listener:
        Server(App(model, settings), settings, ready).run(sockets=[listener])


def _log_to_stderr() -> None:
    log = logging.getLogger("bitnet_rs.server")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
