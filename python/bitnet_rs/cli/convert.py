"""`bitnet-rs convert`: a checkpoint in the format that another program wants.

For people with a ternary model in one format and a program that reads another. What had to be
rounded is printed; nothing is where there is nothing to print.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from bitnet_rs.cli import common

if TYPE_CHECKING:
    from bitnet_rs.convert import ConvertReport, Loss

# Losses that are printed one by one; a model has hundreds of matrices.
_SHOWN: Final = 5


def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder, GGUF file, hub id, or demo.")],
    dst: Annotated[
        Path,
        typer.Argument(metavar="DST", help="A .gguf file, or a folder for safetensors-packed."),
    ],
    to: Annotated[
        Literal["gguf-i2_s", "gguf-tq2_0", "gguf-tq1_0", "safetensors-packed"],
        typer.Option(
            "--to",
            help="gguf-i2_s for bitnet.cpp, gguf-tq2_0 or the smaller gguf-tq1_0 for llama.cpp, "
            "safetensors-packed for transformers.",
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST if it is there.")
    ] = False,
    json: common.Json = False,
    revision: common.Revision = None,
    activations: common.ActivationsOption = None,
    masters: common.Masters = False,
    i2s_layout: common.I2sLayout = "x86",
    tl_tiles: common.TlTiles = None,
) -> None:
    """Write a checkpoint in another format, and check it bit for bit.

    DST appears when it is whole. What the format cannot hold exactly is listed.
    """
    from bitnet_rs.convert import convert as run

    with _bar(f"Writing {dst.name}") as progress:
        report = run(
            src,
            dst,
            to,
            overwrite=overwrite,
            revision=revision,
            progress=progress,
            **common.file_arguments(activations, masters, i2s_layout, tl_tiles),
        )
    if json:
        common.print_json(report.to_dict())
    else:
        _print(report)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar on stderr, where someone sees it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, _: bar.update(task, completed=done, total=total)


def _print(report: "ConvertReport") -> None:
    print(f"{report.path}: {report.format}, {report.n_bytes / 1e6:,.1f} MB, read back and the same")
    if report.lossless:
        print("lossless: all weights, scales and norms are those of the source")
    else:
        _print_losses(sorted(report.losses, key=lambda loss: -loss.relative_error))
    for note in report.notes:
        print(f"note: {note}")


def _print_losses(losses: "list[Loss]") -> None:
    print(
        f"rounded: {len(losses)} of its numbers or tensors, by up to "
        f"{losses[0].relative_error:.2g} of their value"
    )
    for loss in losses[:_SHOWN]:
        print(f"  {loss.relative_error:.2e}  {loss.name}")
    if len(losses) > _SHOWN:
        print(f"  and {len(losses) - _SHOWN} more by less; --json lists all")
