"""What several commands share: options and small printing.

For the commands beside it. Each option is written down once, so that it has one name,
one range and one help text everywhere. A value out of range is wrong usage (exit code
2) and never reaches a model.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, TextIO, TypedDict

import typer

from bitnet_rs import _core
from bitnet_rs.machine import MAX_THREADS

if TYPE_CHECKING:
    from bitnet_rs import Timings, Usage


def _known_kernel(name: str) -> str:
    grouped = (*_core.grouped_kernels("float"), *_core.grouped_kernels("int8"))
    known = ("auto", *_core.kernels(), *grouped)
    if name not in known:
        raise typer.BadParameter(f"{name!r} is none of those this CPU can run: {', '.join(known)}.")
    return name


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _above_zero(value: float | None) -> float | None:
    # typer's `min` cannot leave out the bound itself.
    if value is not None and value <= 0:
        raise typer.BadParameter(f"{value} is not above 0.")
    return _finite(value)


def _not_empty(strings: list[str] | None) -> list[str] | None:
    if strings is not None and "" in strings:
        raise typer.BadParameter("an empty string is found everywhere; write one or leave it out.")
    return strings


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, GGUF file, hub id, or demo.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        min=1,
        max=MAX_THREADS,
        help="Threads that compute. Else BITNET_RS_THREADS, else one per physical core.",
    ),
]
Kernel = Annotated[
    str,
    typer.Option(
        "--kernel",
        callback=_known_kernel,
        help="Kernel, one of those that `info` lists. auto: BITNET_RS_KERNEL, else the fastest, "
        "by measurement.",
    ),
]
KvDtype = Annotated[
    Literal["f16", "f32"],
    typer.Option("--kv-dtype", help="Type of cached keys and values."),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        help="Most tokens of prompt and answer together. Else what the model was trained for.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub id."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Stats = Annotated[
    bool, typer.Option("--stats/--no-stats", help="Report the speed on stderr.", show_default=False)
]

MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", "-n", min=1, help="Most tokens to write."),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, callback=_finite, help="0 is greedy; higher is more random."),
]
TopK = Annotated[
    int | None,
    typer.Option(min=0, help="Keep the k most probable tokens; 0: all."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        max=1.0,
        callback=_above_zero,
        help="Keep the most probable tokens that together reach this; 1: all.",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        callback=_finite,
        help="Drop tokens below this share of the best one's probability; 0: none.",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        callback=_above_zero, help="Above 1, tokens that occurred already become less probable."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="The same seed gives the same text."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        callback=_not_empty,
        help="End before this string; may be given several times.",
    ),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after stop tokens.")]


def _tiles(texts: list[str] | None) -> list[str] | None:
    for text in texts or ():
        if not _TILE.fullmatch(text):
            raise typer.BadParameter(f"{text!r}; wanted ROWSxCOLUMNS=BM,BK,bm.")
    return texts


_TILE: Final = re.compile(r"(\d{1,9})x(\d{1,9})=(\d{1,9}),(\d{1,9}),(\d{1,9})")

ActivationsOption = Annotated[
    Literal["int8", "float"] | None,
    typer.Option(
        "--activations",
        help="What ternary matrices multiply, where the files do not say, or to round float "
        "activations to int8. Else as trained.",
    ),
]
Masters = Annotated[
    bool,
    typer.Option(
        "--masters", help="Float weights are masters of a ternary model, whatever the config says."
    ),
]
I2sLayout = Annotated[
    Literal["x86", "arm", "rows4"],
    typer.Option("--i2s-layout", help="Order of weights in an I2_S file; published ones: x86."),
]
TlTiles = Annotated[
    list[str] | None,
    typer.Option(
        "--tl-tiles",
        metavar="ROWSxCOLUMNS=BM,BK,bm",
        callback=_tiles,
        help="Tiles of the matrices of that shape in a TL1 or TL2 file; once for each shape.",
    ),
]


class FileArguments(TypedDict):
    """What `load` takes for files that do not say everything."""

    activations: Literal["int8", "float"] | None
    masters: bool
    i2s_layout: Literal["x86", "arm", "rows4"]
    tl_tiles: dict[tuple[int, int], tuple[int, int, int]]


def file_arguments(
    activations: Literal["int8", "float"] | None,
    masters: bool,  # noqa: FBT001 (as the command line has them)
    i2s_layout: Literal["x86", "arm", "rows4"],
    tl_tiles: list[str] | None,
) -> FileArguments:
    """The options above as `load` takes them."""
    tiles = {}
    for text in tl_tiles or ():
        if match := _TILE.fullmatch(text):
            rows, cols, bm, bk, small = map(int, match.groups())
            tiles[rows, cols] = (bm, bk, small)
    return {
        "activations": activations,
        "masters": masters,
        "i2s_layout": i2s_layout,
        "tl_tiles": tiles,
    }


def standard_input() -> TextIO:
    """Where prompts and messages are read from.

    Raises:
        ValueError: It was closed, as by `<&-`.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed; wanted a terminal, a pipe or a file there")
    return sys.stdin


def read_text(read: Callable[[], str], name: str) -> str:
    """What `read` takes from stdin.

    Raises:
        ValueError: It is not UTF-8 text.
    """
    try:
        text = read()
        text.encode()  # lone surrogates stand for bytes that could not be decoded
    except UnicodeError:
        raise ValueError(f"{name} on stdin is not UTF-8 text; convert it first") from None
    return text


def print_json(content: dict[str, Any]) -> None:
    """Prints one object on stdout."""
    print(json.dumps(content, indent=2, ensure_ascii=False))


def print_table(rows: dict[str, str]) -> None:
    """Prints names and values in two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def print_stats(usage: "Usage", timings: "Timings", finish_reason: str) -> None:
    """Says on stderr how fast a completion was."""
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    print(
        f"prefill: {usage.prompt_tokens} tokens{cached}, "
        f"{timings.prefill_tokens_per_s:.1f} tokens/s | "
        f"decode: {usage.completion_tokens} tokens, {timings.decode_tokens_per_s:.1f} tokens/s | "
        f"finish: {finish_reason}",
        file=sys.stderr,
    )


class Progress:
    """One line on stderr that is written over again and again; silent where nobody looks.

    Use it in a `with` statement: the line is wiped at the end.
    """

    def __init__(self) -> None:
        self._visible = sys.stderr.isatty()

    def __call__(self, line: str) -> None:
        """Shows a line instead of the one before."""
        if self._visible:
            # Carriage return, then "erase to the end of the line".
            print(f"\r\x1b[K{line} ...", end="", file=sys.stderr, flush=True)

    def wipe(self) -> None:
        """Leaves an empty line, for something else to be printed there."""
        if self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()
