"""Records what docs/server.md says of many streams at once, and of short prompts beside long ones.

    python benches/record_serving.py [--shapes demo 2b-4t] [--out FILE]

The bundled model and random weights in the 2B shape, through the engine's thread, as `generate`,
`chat` and the server use it:

- tokens/s of 1, 2, 4, 8 and 16 greedy streams with prompts of their own, in rounds, so that a drift
  of the machine's speed meets all of them; the medians of ratios in a round;
- while a prompt of 2,000 tokens (480 for the bundled model, whose context is 512) is read: the time
  to the first token of short prompts that arrive meanwhile, and the pauses of a stream that was
  running before, beside the time that a step of one chunk takes.

Keeps every run and prints medians. Not a test.
"""

import argparse
import datetime
import itertools
import json
import platform
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import HERE, commit

import bitnet_rs
from bitnet_rs import _core, system
from bitnet_rs.engine import (
    PREFILL_TOKENS,
    SHARED_PREFILL_TOKENS,
    Engine,
    Event,
    Request,
    Running,
)
from bitnet_rs.kernel_choice import choose_kernels, describe
from bitnet_rs.runner import Runner
from bitnet_rs.synthetic import synthetic

STREAMS = (1, 2, 4, 8, 16)
PROMPT = 24
KV_LIMIT = 4 << 30


class Inbox:
    """Takes events; says when all sequences have ended."""

    def __init__(self, sequences: int = 1) -> None:
        self.times: dict[int, list[float]] = {}
        self.done = threading.Event()
        self._left = sequences

    def __call__(self, events: Sequence[Event]) -> None:
        for event in events:
            self.times.setdefault(id(event.sequence), []).append(event.time)
            self._left -= event.finish_reason is not None
        if not self._left:
            self.done.set()


def load(name: str, threads: int) -> tuple[_core.Model, str]:
    """The bundled model, or a random one of a shape; and the names of its kernels."""
    if name == "demo":
        model = bitnet_rs.load(threads=threads)
        return model.core, describe(model.kernel, model.batch_kernels)
    random = synthetic(name)
    choice = choose_kernels("auto", random.config, threads)
    core = random.build(kernel=choice.kernel, batch_kernels=choice.batch_kernels, threads=threads)
    return core, describe(choice.kernel, choice.batch_kernels)


def prompt(core: _core.Model, n: int, seed: int) -> NDArray[np.uint32]:
    """Random tokens."""
    vocab = int(core.facts["vocab_size"])
    return np.random.default_rng(seed).integers(vocab, size=n, dtype=np.uint32)


def streams(core: _core.Model, n: int, tokens: int) -> float:
    """Tokens/s of `n` streams together, from the last one's first token to the first one's last."""
    runner = Runner(Engine(core, kv_limit=KV_LIMIT))
    inbox = Inbox(n)
    sequences = runner.submit([Request(prompt(core, PROMPT, i), tokens) for i in range(n)], inbox)
    inbox.done.wait()
    runner.stop()
    times = [inbox.times[id(each)] for each in sequences]
    start, end = max(each[0] for each in times), min(each[-1] for each in times)
    counted = sum(start < t <= end for each in times for t in each)
    return counted / (end - start)


def beside(core: _core.Model, long: int, room: int) -> dict[str, Any]:
    """Short prompts that arrive while a long one is read."""
    runner = Runner(Engine(core, kv_limit=KV_LIMIT))
    running, reading = Inbox(), Inbox()
    (stream,) = runner.submit([Request(prompt(core, PROMPT, 100), room)], running)
    while len(running.times.get(id(stream), ())) < 8:
        time.sleep(0.001)
    started = time.perf_counter()
    (reader,) = runner.submit([Request(prompt(core, long, 101), 1)], reading)
    firsts: list[float] = []
    alone: list[float] = []
    seed = 200
    while not reading.done.is_set():
        inbox = Inbox()
        (short,) = runner.submit([Request(prompt(core, PROMPT, seed), 1)], inbox)
        inbox.done.wait()
        if not reading.done.is_set() and short.first_token is not None:
            firsts.append(short.first_token - short.submitted)
        seed += 1
        time.sleep(0.01)
    read = time.perf_counter() - started
    runner.cancel(stream)
    times = [t for t in running.times[id(stream)] if started < t < started + read]
    pauses = [b - a for a, b in itertools.pairwise(times)]
    for _ in range(5):
        inbox = Inbox()
        (short,) = runner.submit([Request(prompt(core, PROMPT, seed), 1)], inbox)
        inbox.done.wait()
        alone.append((short.first_token or 0.0) - short.submitted)
        seed += 1
    runner.stop()
    return {
        "long_prompt_tokens": long,
        "long_prompt_s": (reader.first_token or 0.0) - reader.submitted,
        "short_first_token_s": firsts,
        "short_first_token_alone_s": alone,
        "stream_pauses_s": pauses,
        "chunk_s": {n: chunk(core, n) for n in (SHARED_PREFILL_TOKENS, PREFILL_TOKENS)},
    }


def chunk(core: _core.Model, n: int) -> float:
    """Seconds for a step of `n` prompt tokens, the median of three."""
    seconds = []
    for _ in range(3):
        sequence = Running(Request(prompt(core, n, 300), 1))
        engine = Engine(core, kv_limit=KV_LIMIT, shared_prefill_tokens=n, prefill_tokens=n)
        engine.add(sequence)
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    core, kernels = load(name, options.threads)
    demo = name == "demo"
    tokens = 400 if demo else options.tokens
    runs: dict[int, list[float]] = {n: [] for n in STREAMS}
    # Those of the bundled model take a fraction of a second, in which others do a lot.
    for _ in range(options.rounds * (8 if demo else 1)):
        for n in STREAMS:
            runs[n].append(streams(core, n, tokens))
    ratios = {
        n: statistics.median(a / b for a, b in zip(runs[n], runs[1], strict=True)) for n in STREAMS
    }
    for n in STREAMS:
        median = statistics.median(runs[n])
        print(f"{name}: {n:2} streams {median:8,.1f} tokens/s, {ratios[n]:.2f} times one")
    long = beside(core, 480 if demo else 2000, 480 if demo else 3000)
    firsts = long["short_first_token_s"]
    print(
        f"{name}: beside a prompt of {long['long_prompt_tokens']} tokens: first token after "
        f"{statistics.median(firsts):.3f} s, at most {max(firsts):.3f} s ({len(firsts)} prompts); "
        f"the stream paused for at most {max(long['stream_pauses_s']):.3f} s; a step of "
        + ", ".join(f"{n} tokens takes {s:.3f} s" for n, s in long["chunk_s"].items())
    )
    return {"model": name, "kernels": kernels, "streams": runs, "ratio_to_one": ratios, **long}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["demo", "2b-4t"])
    parser.add_argument("--threads", type=int, default=system.default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="of each stream of a large model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "cpu": system.cpu_name(),
        "python": platform.python_version(),
        "threads": options.threads,
        "models": [measure(name, options) for name in options.shapes],
    }
    out = options.out or HERE / "results" / f"{report['date']}-serving.json"
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
