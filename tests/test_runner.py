"""The engine's thread: requests from many threads, events to their sinks, ends in any order."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bitnet_rs import SamplingParams, _core
from bitnet_rs.engine import Engine, Event, Request
from bitnet_rs.loaders import open_checkpoint
from bitnet_rs.runner import QueueFullError, Runner


@pytest.fixture(scope="module")
def core() -> _core.Model:
    checkpoint = open_checkpoint(Path(__file__).parent / "data" / "bitnet-packed")
    return _core.Model(checkpoint.core_config, checkpoint.weights, threads=1)


@pytest.fixture
def runner(core: _core.Model) -> Iterator[Runner]:
    runner = Runner(Engine(core, max_sequences=4))
    yield runner
    runner.stop()


def prompt(n: int, seed: int = 0) -> NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 1021, n).astype(np.uint32)


def alone(core: _core.Model, request: Request) -> list[int]:
    engine = Engine(core)
    sequence = engine.add(request)
    while engine.busy:
        engine.step()
    return sequence.tokens


class Inbox:
    """A sink that can be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = threading.Condition()

    def __call__(self, events: Sequence[Event]) -> None:
        with self._news:
            self.events += events
            self._news.notify_all()

    def wait_for(self, finished: int = 0, tokens: int = 0) -> None:
        def enough() -> bool:
            ends = sum(event.finish_reason is not None for event in self.events)
            return ends >= finished and len(self.events) >= tokens

        with self._news:
            assert self._news.wait_for(enough, timeout=60)


def until_idle(runner: Runner) -> None:
    deadline = time.monotonic() + 60
    while (stats := runner.stats()).active or stats.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_many_threads_get_what_they_would_get_alone(core: _core.Model, runner: Runner) -> None:
    jobs = [
        Request(prompt(3 + 17 * i, i % 5), 6 + i, SamplingParams(temperature=float(i % 2), seed=i))
        for i in range(12)
    ]

    def work(request: Request) -> list[int]:
        inbox = Inbox()
        (sequence,) = runner.submit([request], inbox)
        inbox.wait_for(finished=1)
        assert [e.token for e in inbox.events] == sequence.tokens
        return sequence.tokens

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, jobs)) == [alone(core, job) for job in jobs]
    until_idle(runner)
    assert runner.stats().finished == 12


def test_the_thread_ends_when_there_is_nothing_to_do(runner: Runner) -> None:
    for _ in range(3):
        inbox = Inbox()
        runner.submit([Request(prompt(4), 3)], inbox)
        inbox.wait_for(finished=1)
        deadline = time.monotonic() + 60
        while runner._thread is not None:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_cancelled_ones_give_no_more_events(core: _core.Model, runner: Runner) -> None:
    gone, kept = Inbox(), Inbox()
    (long,) = runner.submit([Request(prompt(5), 2000)], gone)
    gone.wait_for(tokens=3)
    (other,) = runner.submit([Request(prompt(6), 30)], kept)
    runner.cancel(long)
    n = len(gone.events)
    kept.wait_for(finished=1)
    assert len(gone.events) == n
    until_idle(runner)
    assert long.finish_reason == "cancelled"
    assert other.tokens == alone(core, other.request)
    runner.cancel(long)  # again, and it is over already
    runner.cancel(other)
    assert other.finish_reason == "length"


def test_one_that_waits_can_be_cancelled(runner: Runner) -> None:
    inbox = Inbox()
    sequences = runner.submit([Request(prompt(5, i), 500) for i in range(9)], inbox)
    for sequence in sequences:
        runner.cancel(sequence)
    until_idle(runner)
    assert {sequence.finish_reason for sequence in sequences} == {"cancelled"}
    assert runner.stats().finished == 9


def test_a_full_queue_takes_all_or_none(runner: Runner) -> None:
    inbox = Inbox()
    running = runner.submit([Request(prompt(5, i), 3000) for i in range(4)], inbox)
    inbox.wait_for(tokens=4)
    more = [Request(prompt(5, i), 10) for i in range(3)]
    with pytest.raises(QueueFullError, match="0 sequences wait already; at most 2 may"):
        runner.submit(more, inbox, max_waiting=2)
    taken = runner.submit(more[:2], inbox, max_waiting=2)
    assert runner.stats().waiting <= 2
    for sequence in running:
        runner.cancel(sequence)
    inbox.wait_for(finished=2)
    assert {each.finish_reason for each in taken} == {"length"}


def test_a_sink_that_raises_loses_its_sequence_and_nobody_elses(
    core: _core.Model, runner: Runner
) -> None:
    def closed(events: Sequence[Event]) -> None:
        raise RuntimeError("Event loop is closed")

    inbox = Inbox()
    (lost,) = runner.submit([Request(prompt(5), 500)], closed)
    (other,) = runner.submit([Request(prompt(7), 20)], inbox)
    inbox.wait_for(finished=1)
    until_idle(runner)
    assert lost.finish_reason == "cancelled"
    assert other.tokens == alone(core, other.request)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_ours_reaches_whoever_waits(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = Inbox()
    with monkeypatch.context() as patch:
        patch.setattr(runner._engine, "step", lambda: 1 / 0)
        sequences = runner.submit([Request(prompt(5), 5), Request(prompt(6), 5)], inbox)
        inbox.wait_for(finished=2)
        for thread in threading.enumerate():  # its last words belong to this test
            if thread.name == "bitnet-rs engine":
                thread.join(timeout=60)
    assert all(isinstance(each.error, ZeroDivisionError) for each in sequences)
    after = Inbox()
    runner.submit([Request(prompt(5), 5)], after)
    after.wait_for(finished=1)
    assert after.events[-1].finish_reason == "length"


def test_closing_ends_what_runs_and_frees_what_is_kept(runner: Runner) -> None:
    inbox = Inbox()
    (running,) = runner.submit([Request(prompt(40), 30)], inbox)
    runner.close()
    with pytest.raises(RuntimeError, match="was closed"):
        runner.submit([Request(prompt(5), 5)], inbox)
    inbox.wait_for(finished=1)
    runner.stop()
    assert running.finish_reason == "length"
    assert runner.stats().kv_bytes == 0


def test_a_program_may_end_in_the_middle_of_a_stream() -> None:
    code = """
import bitnet_rs
model = bitnet_rs.load()
stream = model.stream("Once", ignore_eos=True, max_tokens=400)
model.runner.submit([model.request(model._prompt("Twice"), model.settings(max_tokens=450))], print)
print(next(stream))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
