"""Starts real servers, for the tests of the server and of the chat page.

Each listens on a free port of this machine, in a thread of the test's process, so that tests can
look into the model's engine while it serves.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from bitnet_rs import Model
from bitnet_rs.engine import Event, Running
from bitnet_rs.server.app import App
from bitnet_rs.server.serving import Server, listen, url_of
from bitnet_rs.server.settings import ServerSettings


@dataclass
class Served:
    """A server that runs.

    Attributes:
        model: What it serves.
        url: Where, without a slash at the end.
        port: The same.
        app: The app itself.
        client: Asks it.
    """

    model: Model
    url: str
    port: int
    app: App
    client: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Waits until nothing runs and nothing waits."""

        def idle() -> bool:
            stats = self.model.runner.stats()
            return not stats.active and not stats.waiting

        wait_until(idle, seconds)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextmanager
def serving(model: Model, **settings: Any) -> Iterator[Served]:
    """A server of the model, until the end of the block; the model stays open."""
    chosen = ServerSettings(port=0, **settings)
    listener = listen(chosen)
    url = url_of(chosen, listener)
    port = listener.getsockname()[1]
    app = App(model, chosen)
    ready = threading.Event()
    server = Server(app, chosen, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert ready.wait(20)
    with httpx.Client(base_url=url, timeout=30) as client:
        try:
            yield Served(model, url, port, app, client)
        finally:
            client.close()
            server.drain()
            thread.join(20)
            listener.close()
            assert not thread.is_alive()


class _Slow:
    """Allows everything, and takes its time."""

    def restrict(self, logits: NDArray[np.float32], remaining: int) -> None:
        time.sleep(0.02)

    def accept(self, token: int) -> bool:
        return False


@contextmanager
def occupied(model: Model) -> Iterator[None]:
    """Takes one of the model's places with a sequence that takes about ten seconds."""
    settings = model.settings(max_tokens=480, ignore_eos=True)
    ids = model.check_encoded(model.encode("Once"), "prompt")
    sequence = Running(model.request(ids, settings, constraint=_Slow()))
    begun = threading.Event()

    def sink(_: Sequence[Event]) -> None:
        begun.set()

    model.runner.start([sequence], sink)
    assert begun.wait(20)
    try:
        yield
    finally:
        model.runner.cancel(sequence)
