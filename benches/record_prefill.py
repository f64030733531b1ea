"""Records the prefill speeds of docs/performance.md, beside llama.cpp's if its model is named.

    python benches/record_prefill.py [--peer 2b-tq2_0.gguf --peer-python PYTHON]

For the 2B shape, steps of 1 to 4096 tokens with the kernels that `auto` takes, with dot products
alone and with tables alone, in rounds, so that a drift of the machine's speed meets all of them;
then prompts of 512 tokens for the 3B and the 8B shape. llama.cpp by `llama_cpp_decode.py measure`,
in the same rounds, by a Python that has llama-cpp-python. Keeps every run, draws and prints the
medians. Prompts of more than 256 tokens are read in chunks, as in generation. Not a test.
"""

import argparse
import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from record import HERE, commit

from bitnet_rs import _core, bench, system
from bitnet_rs.engine import PREFILL_TOKENS
from bitnet_rs.kernel_choice import choose_kernels, describe
from bitnet_rs.synthetic import synthetic

TOKENS = (1, 2, 4, 8, 12, 16, 17, 24, 32, 64, 128, 256, 512, 4096)
# Of the peer, which takes long for many.
PEER_TOKENS = (1, 2, 4, 8, 16, 32, 128, 512)
COLOURS = ("#4477aa", "#228833", "#cc6677", "#999999")
# (ways of reading, tokens): runs.
Runs = dict[tuple[str, int], list[dict[str, Any]]]


def build(shape: str, kernel: str, threads: int) -> tuple[_core.Model, str]:
    """A random model with the kernels for `kernel`, and their names."""
    random = synthetic(shape)
    choice = choose_kernels(kernel, random.config, threads)
    core = random.build(kernel=choice.kernel, batch_kernels=choice.batch_kernels, threads=threads)
    return core, describe(choice.kernel, choice.batch_kernels)


def repetitions(tokens: int) -> int:
    """Enough for a median, except where one run takes seconds."""
    return 3 if tokens <= 128 else 1


def ours(core: _core.Model, tokens: int) -> dict[str, Any]:
    """Reads so many tokens, as generation does, after a warm-up."""
    vocab = int(core.facts["vocab_size"])
    prompt = np.random.default_rng(0).integers(vocab, size=tokens, dtype=np.uint32)
    bench.prefill(core, prompt[:64], core.new_cache(64), PREFILL_TOKENS)
    seconds, speeds = [], []
    for _ in range(repetitions(tokens)):
        cache = core.new_cache(tokens)
        core.profile(True)
        start = time.perf_counter()
        bench.prefill(core, prompt, cache, PREFILL_TOKENS)
        seconds.append(time.perf_counter() - start)
        rows = bench.profile_rows(core, core.profile(False), 1)
        speeds.append(bench.gmac_per_s(core, tokens, rows))
    return {
        "seconds": seconds,
        "prefill_tokens_per_s": tokens / statistics.median(seconds),
        "prefill_gmac_per_s": statistics.median(speeds),
        "profile": [asdict(row) for row in rows],
    }


def theirs(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """The same of llama.cpp."""
    command = [options.peer_python, str(HERE / "llama_cpp_decode.py"), "measure"]
    command += [str(options.peer), "--json", "--threads", str(options.threads)]
    command += ["--prompt-tokens", str(tokens), "--new-tokens", "1"]
    command += ["--repetitions", "1"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    [result] = found["results"]
    return {"llama_cpp_python": found["llama_cpp_python"], **result}


def peak() -> float | None:
    """GMAC/s of a core's best dot-product instruction."""
    command = [
        "cargo",
        "bench",
        "--locked",
        "--quiet",
        "--bench",
        "kernel_table",
        "--",
        "no-kernel",
    ]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return max((line["gmac_per_s"] for line in lines if line["what"] == "dot"), default=None)


def chart(lines: dict[str, dict[int, float]], level: tuple[str, float] | None) -> str:
    """Speed against the number of tokens, both logarithmic, as SVG."""
    left, top, width, height = 60, 30, 560, 320
    xs = sorted({n for line in lines.values() for n in line})
    values = [v for line in lines.values() for v in line.values()]
    low, high = min(values) / 1.2, max([*values, *([level[1]] if level else [])]) * 1.2

    def log(v: float, a: float, b: float) -> float:
        return math.log(v / a) / math.log(b / a)

    def x(n: int) -> float:
        return left + width * log(n, xs[0], xs[-1])

    def y(v: float) -> float:
        return top + height * (1 - log(v, low, high))

    out = []
    for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 4096):
        out.append(
            f'<line x1="{x(n):.0f}" y1="{top}" x2="{x(n):.0f}" y2="{top + height}" stroke="#eee"/>'
            f'<text x="{x(n):.0f}" y="{top + height + 18}" text-anchor="middle">{n}</text>'
        )
    for v in (5, 10, 20, 50, 100, 200, 400):
        if low < v < high:
            out.append(
                f'<line x1="{left}" y1="{y(v):.0f}" x2="{left + width}" y2="{y(v):.0f}" '
                f'stroke="#eee"/><text x="{left - 6}" y="{y(v) + 4:.0f}" '
                f'text-anchor="end">{v}</text>'
            )
    if level:
        out.append(
            f'<line x1="{left}" y1="{y(level[1]):.0f}" x2="{left + width}" y2="{y(level[1]):.0f}" '
            f'stroke="black" stroke-dasharray="5 4"/>'
            f'<text x="{left + 8}" y="{y(level[1]) - 6:.0f}">{level[0]}</text>'
        )
    for i, (colour, (name, line)) in enumerate(zip(COLOURS, lines.items(), strict=False)):
        points = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in sorted(line.items()))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [
            f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>'
            for n, v in line.items()
        ]
        legend = top + height - 12 - 18 * (len(lines) - 1 - i)
        out.append(f'<text x="{left + 300}" y="{legend}" fill="{colour}">{name}</text>')
    body = "\n".join(out)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" '
        f'height="{top + height + 50}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n'
        f'<text x="{left}" y="18">tokens/s</text>'
        f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">'
        "tokens of a step (a prompt from 256 on)</text>\n</svg>\n"
    )


def median(runs: Runs, way: str, tokens: int, key: str) -> float | None:
    """Over the rounds."""
    found = [run[key] for run in runs[way, tokens]]
    return statistics.median(found) if found else None


def text(value: float | None, digits: int = 1) -> str:
    """A figure of a table."""
    return "" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Measures, writes the runs and the picture, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dots", default="avx2-i2", help="kernel of dot products")
    parser.add_argument("--tables", default="avx2-t5-vlut", help="kernel of tables")
    parser.add_argument("--peer", type=Path, help="what llama_cpp_decode.py has made")
    parser.add_argument("--peer-python", default=sys.executable)
    options = parser.parse_args()
    limit = peak()
    ways = {"auto": "auto", options.dots: options.dots, options.tables: options.tables}
    built = {way: build("2b-4t", kernel, options.threads) for way, kernel in ways.items()}
    runs: Runs = defaultdict(list)
    for n in range(options.rounds):
        for tokens in TOKENS:
            print(f"round {n + 1} of {options.rounds}, {tokens} tokens", file=sys.stderr)
            for way, (core, _) in built.items():
                if tokens <= 512 or (way == "auto" and n == 0):
                    runs[way, tokens].append(ours(core, tokens))
            if options.peer is not None and tokens in PEER_TOKENS:
                runs["llama.cpp", tokens].append(theirs(options, tokens))
    core, chosen = built["auto"]
    macs = int(core.facts["ternary_params"])  # of a token
    del core
    built.clear()
    others: dict[str, list[dict[str, Any]]] = {}
    for shape in ("2b-4t", "3b", "8b"):
        core, _ = build(shape, "auto", options.threads)
        others[shape] = [ours(core, 512) for _ in range(options.rounds)]
        del core
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    record = {
        "date": today,
        "commit": commit(),
        "cpu": system.cpu_name(),
        "system": platform.platform(),
        "threads": options.threads,
        "kernels": chosen,
        "dot_peak_gmac_per_s": limit,
        "command": f"python benches/record_prefill.py --rounds {options.rounds}",
        "runs": [
            {"way": way, "tokens": tokens, "runs": found} for (way, tokens), found in runs.items()
        ],
        "shapes": others,
    }
    (HERE / "results" / f"{today}-prefill.json").write_text(json.dumps(record, indent=1) + "\n")
    columns = [*ways, *(["llama.cpp"] if options.peer else [])]
    speed = "prefill_tokens_per_s"
    lines = {
        way: {n: v for n in TOKENS if (v := median(runs, way, n, speed)) is not None}
        for way in columns
    }
    one = {"llama.cpp": "llama.cpp TQ2_0"}
    level = None
    if limit is not None:
        level = (
            f"{limit:.0f} GMAC/s a core: dot-product peak",
            limit * 1e9 * options.threads / macs,
        )
    (HERE.parent / "docs" / "prefill.svg").write_text(
        chart({one.get(way, way): line for way, line in lines.items()}, level)
    )
    print(f"kernels: {chosen}; peak of the dot product: {text(limit)} GMAC/s a core\n")
    print("| tokens |" + "".join(f" {way} | GMAC/s a core |" for way in ways), end="")
    print(" llama.cpp | ratio |\n|" + "---|" * (3 + 2 * len(ways)))
    for n in TOKENS:
        cells = []
        for way in ways:
            cells.append(text(median(runs, way, n, speed)))
            cells.append(text(median(runs, way, n, "prefill_gmac_per_s"), 0))
        peer, best = median(runs, "llama.cpp", n, speed), median(runs, "auto", n, speed)
        cells += [text(peer), text(best / peer) if peer and best else ""]
        print(f"| {n} | " + " | ".join(cells) + " |")
    print("\n| shape | tokens/s, 512 tokens | GMAC/s a core |\n|---|---|---|")
    for shape, found in others.items():
        cells = [
            text(statistics.median(run[key] for run in found), digits)
            for key, digits in ((speed, 1), ("prefill_gmac_per_s", 0))
        ]
        print(f"| {shape} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
