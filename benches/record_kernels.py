"""Records the tables and the picture of docs/kernels.md: `make bench-kernels`.

Runs the bench `kernel_table`, keeps its lines, and writes the medians as Markdown between two
marks of the page and as an SVG. Not a test.
"""

import argparse
import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from record import commit, svg_bars

from bitnet_rs import system

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
COMMAND = ["cargo", "bench", "--locked", "--quiet", "--bench", "kernel_table"]
Line = dict[str, Any]


def run() -> list[Line]:
    """The lines of one run."""
    done = subprocess.run(COMMAND, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def pick(lines: list[Line], what: str, **fields: Any) -> list[Line]:
    """The lines of a kind with these fields."""
    return [
        line
        for line in lines
        if line["what"] == what and all(line.get(k) == v for k, v in fields.items())
    ]


def ternary_kernels(lines: list[Line]) -> list[str]:
    """Names, in the order that the core lists them."""
    return list(dict.fromkeys(line["kernel"] for line in pick(lines, "gemv-cache")))


def mean(lines: list[Line], key: str) -> float | None:
    """The harmonic mean over the widths: what all of them in turn come to."""
    return len(lines) / sum(1 / line[key] for line in lines) if lines else None


def number(value: float | None, digits: int = 1) -> str:
    """A figure of a table."""
    return "" if value is None else f"{value:,.{digits}f}"


def tables(lines: list[Line]) -> str:
    """The Markdown between the marks."""
    kernels = ternary_kernels(lines)
    read = {n: pick(lines, "read", threads=n)[0]["gb_per_s"] for n in (1, 2)}
    dots = pick(lines, "dot")
    peak = max((line["gmac_per_s"] for line in dots), default=None)
    out = [
        "Limits in the same run: memory gave "
        f"{read[1]:.1f} GB/s to one thread and {read[2]:.1f} GB/s to two; "
        + "; ".join(f"`{d['instruction']}` {d['gmac_per_s']:.0f} GMAC/s a core" for d in dots)
        + ".",
        "",
        (
            "**GEMV** (one token). Gweights/s, and in brackets GB/s of packed weights; the last column "
            "is the share of the read bandwidth of two threads."
        ),
        "",
        "| kernel | cache, 1 thread | memory, 1 thread | memory, 2 threads | of the bandwidth |",
        "|---|---|---|---|---|",
    ]
    for kernel in kernels:
        cells = []
        for what, threads in (("gemv-cache", 1), ("gemv-memory", 1), ("gemv-memory", 2)):
            same = pick(lines, what, kernel=kernel, threads=threads)
            speed, gb = mean(same, "gmac_per_s"), mean(same, "gb_per_s")
            cells.append("" if gb is None else f"{number(speed)} ({number(gb)})")
        both = mean(pick(lines, "gemv-memory", kernel=kernel, threads=2), "gb_per_s")
        cells.append("" if both is None else f"{100 * both / read[2]:.0f} %")
        out.append(f"| {kernel} | " + " | ".join(cells) + " |")
    out += [
        "",
        "**GEMM** (GMAC/s). The last column is the share of the best dot-product peak of one core.",
        "",
        "| kernel | 4 tokens | 16 | 512 | 512, 2 threads | of the peak |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in kernels:
        values = [
            mean(pick(lines, "gemm", kernel=kernel, tokens=n, threads=t), "gmac_per_s")
            for n, t in ((4, 1), (16, 1), (512, 1), (512, 2))
        ]
        if values[0] is None:
            continue
        share = f"{100 * values[2] / peak:.0f} %" if peak and values[2] else ""
        out.append(f"| {kernel} | " + " | ".join(map(number, values)) + f" | {share} |")
    elut = [line["kernel"] for line in pick(lines, "elut-gemv")]
    if elut:
        out += [
            "",
            "**Element-wise tables of other levels**, one thread, from the cache, 2560 columns.",
            "",
            "| kernel (levels) | bits a weight | GEMV, Gweights/s | 16 tokens, GMAC/s |",
            "|---|---|---|---|",
        ]
    for kernel in elut:
        (gemv,) = pick(lines, "elut-gemv", kernel=kernel)
        bits = 8 * gemv["gb_per_s"] / gemv["gmac_per_s"]
        gemm = mean(pick(lines, "elut-gemm", kernel=kernel), "gmac_per_s")
        out.append(f"| {kernel} | {bits:.2f} | {number(gemv['gmac_per_s'])} | {number(gemm)} |")
    widths = sorted({line["cols"] for line in pick(lines, "gemv-memory")})
    out += [
        "",
        "**By width**: GEMV from memory on two threads, Gweights/s.",
        "",
        "| kernel | " + " | ".join(map(str, widths)) + " |",
        "|---" * (len(widths) + 1) + "|",
    ]
    for kernel in kernels:
        same = pick(lines, "gemv-memory", kernel=kernel, threads=2)
        if same:
            by = {line["cols"]: line["gmac_per_s"] for line in same}
            out.append(f"| {kernel} | " + " | ".join(number(by.get(w)) for w in widths) + " |")
    return "\n".join(out)


def chart(lines: list[Line]) -> str:
    """GEMV from memory on two threads, and GEMM of 512 tokens on one, with the limits."""
    kernels = ternary_kernels(lines)
    groups = []
    for title, what, tokens, threads, colour in (
        ("GEMV from memory, 2 threads (Gweights/s)", "gemv-memory", 1, 2, "#cc6677"),
        ("GEMV from the cache, 1 thread (Gweights/s)", "gemv-cache", 1, 1, "#ddaa33"),
        ("GEMM, 512 tokens, 1 thread (GMAC/s)", "gemm", 512, 1, "#4477aa"),
    ):
        bars = [
            (
                kernel,
                mean(
                    pick(lines, what, kernel=kernel, tokens=tokens, threads=threads), "gmac_per_s"
                ),
            )
            for kernel in kernels
        ]
        groups.append((title, colour, [(name, value) for name, value in bars if value]))
    return svg_bars(groups)


def main() -> None:
    """Measures, and writes the lines, the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=Path, help="use the lines of an earlier run")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    if options.lines:
        record = json.loads(options.lines.read_text())
    else:
        record = {
            "date": today,
            "commit": commit(),
            "cpu": system.cpu_name(),
            "cores": system.physical_cores(),
            "isa_cap": os.environ.get("BITNET_RS_ISA", ""),
            "command": " ".join(COMMAND),
            "lines": run(),
        }
        cap = f"-{record['isa_cap']}" if record["isa_cap"] else ""
        best = next(line["kernel"] for line in record["lines"] if "kernel" in line)
        out = HERE / "results" / f"{today}-kernels-{best.partition('-')[0]}{cap}.json"
        head = json.dumps({k: v for k, v in record.items() if k != "lines"})
        body = ",\n  ".join(json.dumps(line) for line in record["lines"])
        out.write_text(f'{head[:-1]}, "lines": [\n  {body}\n]}}\n')
    text = (
        f"Machine: {record['cpu']}, {record['cores']} cores. {record['date']}, commit "
        f"{record['commit']}, `{record['command']}`.\n\n{tables(record['lines'])}"
    )
    page = DOCS / "kernels.md"
    before, _, rest = page.read_text().partition("<!-- measured -->")
    _, _, after = rest.partition("<!-- end -->")
    page.write_text(f"{before}<!-- measured -->\n{text}\n<!-- end -->{after}")
    (DOCS / "kernels.svg").write_text(chart(record["lines"]))
    print(text)


if __name__ == "__main__":
    main()
