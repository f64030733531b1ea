"""Records the speeds that docs/performance.md quotes: `make bench-results`.

Runs `bitnet-rs bench` for every shape and thread count, in rounds, so that a drift of the
machine's speed meets all of them; keeps every run, and draws the medians. Not a test.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPES = ("2b-4t", "3b", "8b")


def measure(shape: str, threads: int) -> dict[str, Any]:
    """One run of the command line's bench, as its JSON object."""
    command = [sys.executable, "-m", "bitnet_rs", "bench", "--synthetic", shape, "--json"]
    command += ["--threads", str(threads), "--prompt-tokens", "512", "--new-tokens", "64"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def commit() -> str:
    """The commit that is measured, with a mark if there are changes on top."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def svg_bars(groups: list[tuple[str, str, list[tuple[str, float]]]]) -> str:
    """Groups of horizontal bars, as SVG: (title, colour, [(label, value), ...])."""
    rows = []
    y = 40
    for title, colour, bars in groups:
        longest = max((value for _, value in bars), default=1.0)
        rows.append(f'<text x="10" y="{y}" font-weight="bold">{title}</text>')
        for label, value in bars:
            y += 24
            width = 420 * value / longest
            rows.append(f'<text x="10" y="{y}">{label}</text>')
            rows.append(
                f'<rect x="130" y="{y - 13}" width="{width:.0f}" height="17" fill="{colour}"/>'
            )
            rows.append(f'<text x="{136 + width:.0f}" y="{y}">{value:.1f}</text>')
        y += 44
    body = "\n".join(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="620" height="{y - 20}" '
        f'font-family="sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def chart(medians: dict[tuple[str, int], dict[str, float]]) -> str:
    """Bars of prefill and decode speed, as SVG."""
    return svg_bars(
        [
            (
                title,
                colour,
                [
                    (f"{shape}, {threads} thread{'s' * (threads > 1)}", entry[key])
                    for (shape, threads), entry in medians.items()
                ],
            )
            for title, key, colour in (
                ("prefill, 512 tokens (tokens/s)", "prefill_tokens_per_s", "#4477aa"),
                ("decode, after the prompt (tokens/s)", "decode_tokens_per_s", "#cc6677"),
            )
        ]
    )


def main() -> None:
    """Measures, writes the runs and the picture, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)  # each is a median of three itself
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--chart", type=Path, default=HERE.parent / "docs" / "performance.svg")
    options = parser.parse_args()
    runs = [
        measure(shape, threads)
        for _ in range(options.rounds)
        for shape in options.shapes
        for threads in options.threads
    ]
    keys = ("prefill_tokens_per_s", "decode_tokens_per_s", "read_gb_per_s", "memory_read_gb_per_s")
    medians = {}
    for shape in options.shapes:
        for threads in options.threads:
            same = [r for r in runs if r["model"].endswith(shape) and r["threads"] == threads]
            medians[shape, threads] = {k: statistics.median(r[k] for r in same) for k in keys}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    record = {
        "date": today,
        "commit": commit(),
        "system": platform.platform(),
        "command": " ".join(["python", "benches/record.py", *sys.argv[1:]]),
        "runs": runs,
    }
    out = HERE / "results" / f"{today}-{runs[0]['kernel']}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    options.chart.write_text(chart(medians))
    print("| shape | threads | prefill tok/s | decode tok/s | reading GB/s | memory GB/s |")
    print("|---|---|---|---|---|---|")
    for (shape, threads), entry in medians.items():
        print(f"| {shape} | {threads} | " + " | ".join(f"{entry[k]:.1f}" for k in keys) + " |")


if __name__ == "__main__":
    main()
