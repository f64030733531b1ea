"""A thousand requests from 32 clients, well-behaved and not, against a real server on loopback.

    python tests/soak_server.py [REQUESTS] [CLIENTS] [SEED]

Clients take requests in turns: to the end, streamed or not; hung up on halfway; bodies that are too
large or no JSON; prompts that do not fit. Then it is checked that

- every finished text is the one that the same request gives alone, in this process,
- every refusal is the one that was asked for, and nothing else went wrong,
- nothing is left running, and neither the server's memory nor its keys and values have grown since a
  first round of the same kind.

Exits with 1 and says what was wrong otherwise. Bounded in requests and time. Not part of the suite,
which has a short one of its kind: `make soak`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import bitnet_rs

KV_MEMORY_MB = 24
MAX_BODY = 200_000
CONTEXT = 512
STARTS = (
    "Once upon a time",
    "It was the best of times, it was the worst of times, it was the age of wisdom, ",
    "Call me Ishmael. Some years ago, never mind how long precisely, ",
    "Emma looked at",
    "The whale",
)


@dataclass
class Soak:
    """What happened."""

    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def bodies(seed: int, n: int) -> list[dict[str, Any]]:
    """Requests of all sorts, each with one right answer."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        prompt = rng.choice(STARTS) + " ".join(rng.choices(("the", "sea", "and", "a"), k=i % 9))
        body: dict[str, Any] = {"model": "demo", "prompt": prompt, "max_tokens": rng.randint(1, 60)}
        body |= {"temperature": rng.choice((0, 0.8, 1.2)), "seed": rng.randrange(1000)}
        if rng.random() < 0.3:
            body["stop"] = rng.choice((["."], ["the", "sea"], ","))
        if rng.random() < 0.2:
            body["top_p"] = 0.9
        found.append(body)
    return found


def alone(model: bitnet_rs.Model, body: dict[str, Any]) -> tuple[str, str]:
    """Text and finish reason of a request that runs by itself."""
    options = {k: v for k, v in body.items() if k not in ("model", "prompt")}
    result = model.complete(body["prompt"], **options)
    return result.text, result.finish_reason


async def finished(client: httpx.AsyncClient, body: dict[str, Any], *, stream: bool) -> Any:
    """Text and finish reason; or the status of a refusal."""
    if not stream:
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return answer.status_code
        (choice,) = answer.json()["choices"]
        return choice["text"], choice["finish_reason"]
    text, reason = "", None
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            return answer.status_code
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return chunk
                for choice in chunk["choices"]:
                    text += choice["text"]
                    reason = choice["finish_reason"] or reason
    return text, reason


async def hang_up(client: httpx.AsyncClient, body: dict[str, Any], rng: random.Random) -> int:
    """Leaves in the middle: of a stream after a few lines, of an answer after a moment."""
    body = body | {"max_tokens": 400, "ignore_eos": True}
    body.pop("stop", None)
    if rng.random() < 0.5:
        lines = rng.randint(0, 6)
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            async for _ in answer.aiter_lines():
                lines -= 1
                if lines < 0 or answer.status_code != 200:
                    break
            return answer.status_code
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(client.post("/v1/completions", json=body), rng.random() * 0.2)
    return 200


async def hostile(client: httpx.AsyncClient, rng: random.Random) -> tuple[str, int, int]:
    """Something that is to be refused: what, the status that came, the one wanted."""
    kind = rng.choice(("malformed", "large", "long", "model", "range", "chunked"))
    url = "/v1/completions"
    if kind == "malformed":
        answer = await client.post(url, content=b'{"prompt": "x", ', headers=JSON)
        return kind, answer.status_code, 400
    if kind == "large":
        answer = await client.post(url, json={"model": "demo", "prompt": "x" * (MAX_BODY + 1)})
        return kind, answer.status_code, 413
    if kind == "chunked":

        async def endless() -> Any:
            for _ in range(8):
                yield b"x" * (MAX_BODY // 4)

        answer = await client.post(url, content=endless(), headers=JSON)
        return kind, answer.status_code, 413
    if kind == "long":
        answer = await client.post(url, json={"model": "demo", "prompt": "word " * (2 * CONTEXT)})
        return kind, answer.status_code, 400
    if kind == "model":
        answer = await client.post(url, json={"model": "another", "prompt": "x"})
        return kind, answer.status_code, 404
    answer = await client.post(url, json={"model": "demo", "prompt": "x", "temperature": -1})
    return kind, answer.status_code, 400


JSON = {"Content-Type": "application/json"}


async def one(
    client: httpx.AsyncClient,
    pool: list[tuple[dict[str, Any], tuple[str, str]]],
    rng: random.Random,
    soak: Soak,
) -> None:
    """One request of a random kind."""
    kind = rng.choices(("whole", "stream", "hang up", "hostile"), (35, 30, 20, 15))[0]
    body, expected = rng.choice(pool)
    if kind == "hostile":
        what, status, wanted = await hostile(client, rng)
        soak.seen[f"{what}: {status}"] += 1
        if status != wanted:
            soak.wrong.append(f"{what}: status {status}, wanted {wanted}")
        return
    for _ in range(200):  # the queue is kept short, so that it is full now and then
        if kind == "hang up":
            status = await hang_up(client, body, rng)
            result: Any = status if status != 200 else None
        else:
            result = await finished(client, body, stream=kind == "stream")
        if result != 429:
            break
        soak.seen["queue full, tried again: 429"] += 1
        await asyncio.sleep(0.05 + 0.1 * rng.random())
    soak.seen[kind] += 1
    if (kind != "hang up" and result != expected) or (kind == "hang up" and result is not None):
        soak.wrong.append(f"{kind}: {body}: {result!r}, wanted {expected!r}")


async def clients(
    url: str, pool: list[tuple[dict[str, Any], tuple[str, str]]], n: int, width: int, seed: int
) -> Soak:
    """`n` requests by `width` clients with connections of their own."""
    soak = Soak()
    left = iter(range(n))

    async def client(number: int) -> None:
        rng = random.Random(1000 * seed + number)
        async with httpx.AsyncClient(base_url=url, timeout=120) as connection:
            for _ in left:
                await one(connection, pool, rng, soak)

    await asyncio.gather(*(client(i) for i in range(width)))
    return soak


def settled(url: str) -> dict[str, float]:
    """The server's figures, once nothing runs any more."""
    deadline = time.monotonic() + 30
    while True:
        text = httpx.get(f"{url}/metrics").text
        found = dict(re.findall(r"^(bitnet_rs_\w+) ([0-9.e+-]+)$", text, re.MULTILINE))
        figures = {name: float(value) for name, value in found.items()}
        if not figures["bitnet_rs_active_sequences"] and not figures["bitnet_rs_queue_length"]:
            return figures
        if time.monotonic() > deadline:
            raise SystemExit(f"still running 30 seconds after the last client left: {figures}")
        time.sleep(0.05)


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(kib) * 1024


def main() -> int:
    """Runs it; 0 if all was right."""
    n, width, seed = (int(a) for a in (*sys.argv[1:], *("1000", "32", "1")[len(sys.argv) - 1 :]))
    model = bitnet_rs.load()
    pool = [(body, alone(model, body)) for body in bodies(seed, 60)]
    command = [sys.executable, "-m", "bitnet_rs", "serve", "--port", "0", "--max-sequences", "6"]
    command += [
        "--max-queue",
        "8",
        "--kv-memory",
        str(KV_MEMORY_MB),
        "--max-body",
        str(MAX_BODY / 1e6),
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        (url,) = re.findall(r"http://[\d.]+:\d+", line)
        first = asyncio.run(clients(url, pool, max(n // 3, 1), width, seed + 1))
        before, memory = settled(url), resident(server.pid)
        started = time.perf_counter()
        soak = asyncio.run(clients(url, pool, n, width, seed))
        seconds = time.perf_counter() - started
        after, grown = settled(url), resident(server.pid) - memory
        wrong = first.wrong + soak.wrong
        for what, count in sorted(soak.seen.items()):
            print(f"{count:5}  {what}")
        held = [each["bitnet_rs_kv_bytes"] / 1e6 for each in (before, after)]
        print(
            f"{n} requests by {width} clients in {seconds:.1f} s; memory grew by {grown / 1e6:.1f} MB"
        )
        print(
            f"keys and values: {held[0]:.1f} MB before, {held[1]:.1f} MB after, all of them prefixes"
        )
        if held[1] > KV_MEMORY_MB:
            wrong.append(f"{held[1]} MB of keys and values; the limit was {KV_MEMORY_MB}")
        if grown > 8e6:
            wrong.append(f"memory grew by {grown} bytes")
        server.terminate()
        if server.wait(timeout=60) != 0:
            wrong.append(f"the server ended with {server.returncode}")
        said = server.stderr.read()
        if "Traceback" in said:
            wrong.append(said)
    finally:
        server.kill()
        server.wait()
    for each in wrong[:20]:
        print("wrong:", each)
    print("failed" if wrong else "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
