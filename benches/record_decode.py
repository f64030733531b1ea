"""Records the decoding speeds of docs/performance.md, beside llama.cpp's if its model is named.

    python benches/record_decode.py [--peer 2b-tq2_0.gguf --peer-python PYTHON]

In rounds, one after the other, so that a drift of the machine's speed meets all of them:
`bitnet-rs bench --synthetic 2b-4t` after a short prompt with one thread and with two, then
`llama_cpp_decode.py measure` with the same, by a Python that has llama-cpp-python. Keeps every run and
prints medians and ratios. Not a test.
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

from record import HERE, commit

THREADS = (1, 2)
LENGTHS = ("--prompt-tokens", "16", "--new-tokens", "64", "--repetitions", "3")


def run(*command: str) -> Any:
    """The JSON that a command prints."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Measures, writes the runs, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="what llama_cpp_decode.py has made")
    parser.add_argument("--peer-python", default=sys.executable)
    options = parser.parse_args()
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    bench = (sys.executable, "-m", "bitnet_rs", "bench", "--synthetic", "2b-4t", "--json")
    for _ in range(options.rounds):
        for threads in THREADS:
            ours.append(run(*bench, *LENGTHS, "--threads", str(threads)))
            if options.peer is not None:
                peer = (options.peer_python, str(HERE / "llama_cpp_decode.py"), "measure")
                found = run(*peer, str(options.peer), *LENGTHS, "--json", "--threads", str(threads))
                theirs += [
                    {"llama_cpp_python": found["llama_cpp_python"], **result}
                    for result in found["results"]
                ]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    record = {
        "date": today,
        "commit": commit(),
        "system": platform.platform(),
        "command": " ".join(["python", "benches/record_decode.py", *sys.argv[1:2]]),
        "runs": ours,
        "llama_cpp": theirs,
    }
    out = HERE / "results" / f"{today}-decode-{ours[0]['kernel']}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    print("| threads | tok/s | reading GB/s | of the memory's | llama.cpp tok/s | ratio |")
    print("|---|---|---|---|---|---|")
    for threads in THREADS:
        same = [r for r in ours if r["threads"] == threads]
        speed, read, percent = (
            statistics.median(r[key] for r in same)
            for key in ("decode_tokens_per_s", "read_gb_per_s", "read_percent")
        )
        peers = [r["decode_tokens_per_s"] for r in theirs if r["threads"] == threads]
        other = f"{statistics.median(peers):.1f} | {speed / statistics.median(peers):.2f}"
        print(
            f"| {threads} | {speed:.1f} | {read:.1f} | {percent:.0f} % | {other if peers else '|'} |"
        )


if __name__ == "__main__":
    main()
