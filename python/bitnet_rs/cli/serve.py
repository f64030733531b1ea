"""`bitnet-rs serve`: an OpenAI-compatible server for one model.

For clients that speak OpenAI's protocol, and for the chat page in a browser. What stands apart here
is only what a server is told when it starts; the rest is in `bitnet_rs.server`.
"""

import importlib.util
import sys
from typing import Annotated

import typer

from bitnet_rs.cli import common

# What the extra brings, by the names of the modules.
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def serve(
    model: common.ModelArgument = "demo",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0: all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="Port; 0: any that is free.")
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="BITNET_RS_API_KEY",
            help="Key that requests must carry. In the variable nobody sees it in the process list.",
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            "--alias", help="Another name of the model, for clients that insist; *: any name."
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin", help="Origin whose pages may use the server; may be repeated."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="Further name that the Host header may have, as behind a proxy; may be repeated.",
        ),
    ] = None,
    max_sequences: Annotated[
        int | None,
        typer.Option("--max-sequences", min=1, help="Sequences computed at once. Else 16."),
    ] = None,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=0, help="Sequences that may wait; more get a 429.")
    ] = 64,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-n", min=1, help="Most tokens that a request may ask for."),
    ] = None,
    kv_memory: Annotated[
        int | None,
        typer.Option(
            "--kv-memory",
            min=1,
            help="Most megabytes of keys and values. Else a quarter of the memory.",
        ),
    ] = None,
    max_body: Annotated[
        float, typer.Option("--max-body", min=0.001, help="Most megabytes of a request's body.")
    ] = 8.0,
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout",
            min=0.0,
            help="Seconds that running requests have to finish when the server is to end.",
        ),
    ] = 30.0,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Print a line for each request on stderr.")
    ] = False,
    threads: common.Threads = None,
    kernel: common.Kernel = "auto",
    kv_dtype: common.KvDtype = "f16",
    context: common.Context = None,
    revision: common.Revision = None,
    activations: common.ActivationsOption = None,
    masters: common.Masters = False,
    i2s_layout: common.I2sLayout = "x86",
    tl_tiles: common.TlTiles = None,
) -> None:
    """Serve a model to OpenAI clients, and a chat page to browsers.

    The first Ctrl-C or SIGTERM lets running requests finish; a second one ends it at once.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"the server needs more packages, of which {', '.join(missing)} is not installed: "
            "pip install 'bitnet-rs[server]'"
        )
    import bitnet_rs
    from bitnet_rs.server.serving import listen, url_of
    from bitnet_rs.server.serving import serve as run
    from bitnet_rs.server.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        api_key=api_key,
        aliases=tuple(alias or ()),
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allow_host or ()),
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_body=int(max_body * 1e6),
        drain_timeout=drain_timeout,
        log_requests=log_requests,
    )
    listener = listen(settings)  # before the model is loaded: an address in use shows at once
    if not settings.loopback and api_key is None:
        print(
            f"warning: anyone who can reach {host} can use this server; --api-key, or "
            "BITNET_RS_API_KEY, asks for a key",
            file=sys.stderr,
        )
    with (
        listener,
        bitnet_rs.load(
            model,
            threads=threads,
            kernel=kernel,
            kv_dtype=kv_dtype,
            context=context,
            max_sequences=max_sequences,
            kv_memory=None if kv_memory is None else kv_memory * 1_000_000,
            revision=revision,
            **common.file_arguments(activations, masters, i2s_layout, tl_tiles),
        ) as loaded,
    ):
        url = url_of(settings, listener)

        def ready() -> None:
            print(f"serving {loaded.name} at {url}", file=sys.stderr, flush=True)

        run(loaded, settings, listener, ready)
