"""`bitnet-rs verify`: whether a model gives the same bits in every way it can be computed.

For people who doubt a machine or a checkpoint, and for CI: the exit code is 1 if a
check fails.
"""

from pathlib import Path
from typing import Annotated

import typer

from bitnet_rs.cli import common


def verify(
    model: common.ModelArgument = "demo",
    golden: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Compare with logits of another program, too; else with the model's own "
            "golden.npz, if it has one.",
        ),
    ] = None,
    json: common.Json = False,
    threads: common.Threads = None,
    kernel: common.Kernel = "auto",
    kv_dtype: common.KvDtype = "f16",
    revision: common.Revision = None,
    activations: common.ActivationsOption = None,
    masters: common.Masters = False,
    i2s_layout: common.I2sLayout = "x86",
    tl_tiles: common.TlTiles = None,
) -> None:
    """Check that kernels, threads, batches and chunks change no bit.

    Large models take minutes and twice their memory. Exit code 1 if a check fails.
    """
    import bitnet_rs
    from bitnet_rs import verify as verifier

    loaded = bitnet_rs.load(
        model,
        threads=threads,
        kernel=kernel,
        kv_dtype=kv_dtype,
        revision=revision,
        **common.file_arguments(activations, masters, i2s_layout, tl_tiles),
    )
    with common.Progress() as progress:

        def show(check: verifier.Check) -> None:
            progress.wipe()
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<32}  {check.detail}", flush=True)

        report = verifier.run(
            loaded, golden=golden, on_check=None if json else show, on_progress=progress
        )
    if json:
        common.print_json(report.to_dict())
    else:
        failed = sum(not check.ok for check in report.checks)
        outcome = f"{failed} of {len(report.checks)} checks failed" if failed else "all checks ok"
        print(f"{report.model}, {report.kernel}, {report.threads} threads: {outcome}")
    if not report.ok:
        raise typer.Exit(1)
