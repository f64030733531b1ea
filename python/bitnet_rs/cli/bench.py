"""`bitnet-rs bench`: tokens per second, and how much of the memory's speed that is.

For people who compare machines, kernels and thread counts. `--synthetic` needs no
checkpoint: random ternary weights in a known shape run as fast as trained ones.
"""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bitnet_rs.cli import common

if TYPE_CHECKING:
    from bitnet_rs.bench import BenchReport


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder, hub id, or demo. [default: demo]"),
    ] = None,
    synthetic: Annotated[
        Literal["2b-4t", "3b", "8b", "tiny"] | None,
        typer.Option("--synthetic", help="Random weights in the shape of a known model."),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", "-p", min=1, help="512, or what the context has room for."),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option("--new-tokens", "-n", min=1, help="64, or less if the context is short."),
    ] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Runs; the median counts.")
    ] = 3,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time of a decoding step goes.")
    ] = False,
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
    """Measure prefill and decode speed."""
    if model is not None and synthetic is not None:
        raise typer.BadParameter("--synthetic stands instead of MODEL; leave one of them out.")
    if revision is not None and synthetic is not None:
        raise typer.BadParameter("--synthetic is no hub id and has no --revision; leave it out.")
    import bitnet_rs
    from bitnet_rs import bench as bencher

    with common.Progress() as progress:
        if synthetic is None:
            loaded = bitnet_rs.load(
                model or "demo",
                threads=threads,
                kernel=kernel,
                revision=revision,
                **common.file_arguments(activations, masters, i2s_layout, tl_tiles),
            )
            name, core = loaded.name, loaded.core
        else:
            from bitnet_rs.kernel_choice import choose_kernels
            from bitnet_rs.machine import choose_threads
            from bitnet_rs.synthetic import synthetic as make

            progress(f"making random weights in the shape of {synthetic}")
            name = f"synthetic {synthetic}" + (", float activations" * (activations == "float"))
            random = make(synthetic, activations=activations or "int8")
            n_threads = choose_threads(threads)
            choice = choose_kernels(kernel, random.config, n_threads)
            core = random.build(
                kernel=choice.kernel, batch_kernels=choice.batch_kernels, threads=n_threads
            )
        report = bencher.run(
            core,
            name=name,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repetitions=repetitions,
            kv_dtype=kv_dtype,
            on_progress=progress,
        )
    if json:
        common.print_json(report.to_dict())
    else:
        _print(report)
        if profile:
            _print_profile(report)


def _print(report: "BenchReport") -> None:
    from bitnet_rs.kernel_choice import describe

    kernels = describe(report.kernel, report.batch_kernels)
    peak = report.peak_rss_bytes
    memory = ": not compared, as there was no memory left to measure its speed in"
    if report.memory_read_gb_per_s is not None and report.read_percent is not None:
        memory = (
            f": {report.read_percent:.0f} % of the {report.memory_read_gb_per_s:,.1f} GB/s that "
            "memory gave"
        )
    common.print_table(
        {
            "model": f"{report.model}, {report.params / 1e6:,.1f} M parameters, "
            f"{report.packed_bytes / 1e6:,.1f} MB in memory",
            "machine": f"{report.cpu}; {kernels}, {report.threads} threads, "
            f"bitnet-rs {report.version} ({report.build_profile} build)",
            "prefill": f"{report.prefill_tokens_per_s:,.1f} tokens/s  "
            f"({report.prompt_tokens} tokens; ternary matrices "
            f"{report.prefill_gmac_per_s:,.0f} GMAC/s a thread)",
            "decode": f"{report.decode_tokens_per_s:,.1f} tokens/s  ({report.new_tokens} tokens, "
            f"after the prompt, kv cache in {report.kv_dtype})",
            "reading": f"{report.read_gb_per_s:,.1f} GB/s while decoding "
            f"({report.bytes_per_token / 1e6:,.1f} MB of weights and "
            f"{report.kv_bytes_per_token / 1e6:,.1f} MB of keys and values a token){memory}",
            "head": f"int8 rows read, {report.rescored_per_token:,.1f} rows a token rescored, "
            f"all logits computed for {report.full_heads} tokens",
            "waiting": f"for each other {report.waiting_percent:.1f} % of a decoding step; one "
            f"thread works alone {report.alone_percent:.1f} % of it",
            "peak memory": f"{peak / 1e6:,.0f} MB" if peak else "not known on this system",
        }
    )


def _print_profile(report: "BenchReport") -> None:
    """The parts of prefill and of a decoding step, as tables."""
    from rich.console import Console
    from rich.table import Table

    for title, rows in (
        (f"reading {report.prompt_tokens} tokens", report.prefill_profile),
        ("a decoding step", report.profile),
    ):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("part", min_width=15)
        for column in ("times", "microseconds", "share", "threads waiting"):
            table.add_column(column, justify="right", min_width=12)
        for row in rows:
            table.add_row(
                row.name,
                f"{row.count:,.0f}",
                f"{1e6 * row.seconds:,.0f}",
                f"{row.percent:.1f} %",
                "one works alone" if row.alone else f"{row.waiting_percent:.1f} %",
            )
        Console().print(table)
