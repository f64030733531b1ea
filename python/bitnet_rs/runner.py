"""One engine on a thread of its own, shared by everything that uses a model.

For `completion.py` and the server, which hand in requests from any thread and get back events.
Apart because it is where threads meet: the engine itself is for one thread, and those who wait for
it may be interrupted at any time without leaving it half done.

The thread lives while there is something to compute, and is started again when there is more. What
it gives back, it gives to sinks: functions that it calls with the events of each step.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from bitnet_rs.engine import Engine, EngineStats, Event, FinishReason, Request, Running

Sink = Callable[[Sequence[Event]], None]


_runners: weakref.WeakSet[Runner] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Ends all threads before the interpreter does: one that comes back from the core must find it."""
    for runner in tuple(_runners):
        runner.stop()


class QueueFullError(RuntimeError):
    """More sequences would wait than were said to be allowed."""


class Runner:
    """Runs an engine. Safe to use from any thread.

    Args:
        engine: The one to run; nobody else may touch it from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        # All of these belong to the lock in `_wake`.
        self._incoming: deque[Running] = deque()
        self._ending: deque[tuple[Running, FinishReason]] = deque()
        self._sinks: dict[int, Sink] = {}  # by id(sequence)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._stopped = False
        _runners.add(self)

    def submit(
        self,
        requests: Sequence[Request],
        sink: Sink,
        *,
        ahead: int | None = None,
        max_waiting: int | None = None,
    ) -> list[Running]:
        """Hands in requests, all or none of them.

        Args:
            requests: What to do.
            sink: Called on the engine's thread with the events that a step brought for these
                sequences, in order. It must be quick, and not raise.
            ahead: As `Running`; then `took` must be called for what was read.
            max_waiting: Most sequences that may wait to be admitted, these included.

        Raises:
            QueueFullError: More would wait than `max_waiting`.
            RuntimeError: The runner was closed.
            ValueError: A request could never be admitted (`Engine.check`).
        """
        sequences = [Running(request, ahead=ahead) for request in requests]
        self.start(sequences, sink, max_waiting=max_waiting)
        return sequences

    def start(
        self, sequences: Sequence[Running], sink: Sink, *, max_waiting: int | None = None
    ) -> None:
        """As `submit`, for sequences that were made before. They must be new."""
        for sequence in sequences:
            self._engine.check(sequence.request)
        with self._wake:
            if self._closed:
                raise RuntimeError("the model was closed; load it again to use it")
            if max_waiting is not None:
                stats = self._engine.stats
                free = max(0, self._engine.max_sequences - stats.active)
                waiting = stats.waiting + len(self._incoming) + len(sequences)
                if waiting > max_waiting + free:
                    raise QueueFullError(
                        f"{stats.waiting + len(self._incoming)} sequences wait already; at most "
                        f"{max_waiting} may: try again later"
                    )
            for sequence in sequences:
                self._sinks[id(sequence)] = sink
                self._incoming.append(sequence)
            if self._thread is None or not self._thread.is_alive():
                # A daemon: who leaves the program in the middle of a stream wants to leave.
                self._thread = threading.Thread(
                    target=self._run, name="bitnet-rs engine", daemon=True
                )
                self._thread.start()
            self._wake.notify()

    def check(self, request: Request) -> None:
        """Refuses what `submit` would refuse however long it waited.

        Raises:
            ValueError: As `Engine.check`.
        """
        self._engine.check(request)

    def cancel(self, sequence: Running, reason: FinishReason = "cancelled") -> None:
        """Ends a sequence; no event of it is given back any more. Ended ones are left as they are.

        What it computes it stops computing after the step that is under way.
        """
        with self._wake:
            if self._sinks.pop(id(sequence), None) is not None:
                self._ending.append((sequence, reason))
                self._wake.notify()

    def took(self, sequence: Running, tokens: int = 1) -> None:
        """Counts tokens as read, for a sequence that may only be so much `ahead`."""
        sequence.taken += tokens
        # It rests if it is ahead by all it may, so just below that it may have to be woken.
        if sequence.ahead is not None:
            with self._wake:
                self._wake.notify()

    def stats(self) -> EngineStats:
        """What the engine has done and does now."""
        stats = self._engine.stats
        stats.waiting += len(self._incoming)
        return stats

    def close(self) -> None:
        """Lets those run to their ends that run, and takes no more; then everything is let go."""
        with self._wake:
            self._closed = True
            running = self._thread is not None and self._thread.is_alive()
        if not running:
            self._engine.close()

    def stop(self) -> None:
        """Ends everything, whatever still runs, and waits for the step that is under way."""
        with self._wake:
            self._closed = self._stopped = True
            thread = self._thread
            self._wake.notify()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while self._next_step():
                self._deliver(self._engine.step())
        except Exception as error:
            # Ours, that is: nobody must wait for ever for what does not come any more.
            with self._wake:
                while self._incoming:
                    self._engine.add(self._incoming.popleft())
                self._thread = None
            self._deliver(self._engine.fail(error))
            raise

    def _next_step(self) -> bool:
        """Waits for something to compute; False if there is nothing, and the thread ends."""
        with self._wake:
            while True:
                if self._stopped:
                    self._thread = None
                    self._sinks.clear()
                    self._engine.close()
                    return False
                while self._incoming:
                    self._engine.add(self._incoming.popleft())
                while self._ending:
                    self._engine.finish(*self._ending.popleft())
                if self._engine.runnable:
                    return True
                if not self._engine.busy:
                    self._thread = None
                    if self._closed:
                        self._engine.close()
                    return False
                self._wake.wait()

    def _deliver(self, events: Sequence[Event]) -> None:
        """Gives each sink its events."""
        parcels: dict[int, tuple[Sink, list[Event]]] = {}
        with self._wake:
            for event in events:
                key = id(event.sequence)
                last = event.finish_reason is not None
                sink = self._sinks.pop(key, None) if last else self._sinks.get(key)
                if sink is not None:
                    parcels.setdefault(id(sink), (sink, []))[1].append(event)
        for sink, parcel in parcels.values():
            try:
                sink(parcel)
            except Exception:  # noqa: BLE001 (whoever it belonged to is gone, such as an event loop)
                for event in parcel:
                    self.cancel(event.sequence)
