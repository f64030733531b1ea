"""The command line: `bitnet-rs`, or `python -m bitnet_rs`.

One file a command; each parses its arguments, calls the package and prints. This one
puts them together and turns what goes wrong into exit codes, for all commands alike:
0 done, 1 the work failed (one line on stderr says why), 2 wrong usage, 130 stopped by
Ctrl-C.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from bitnet_rs import __version__
from bitnet_rs.cli import bench, chat, convert, generate, info, serve, verify

app = typer.Typer(
    name="bitnet-rs",
    help="Run ternary (1.58-bit) language models on CPUs: exact and fast.",
    epilog="MODEL is a folder, a GGUF file, a Hugging Face id such as microsoft/bitnet-b1.58-2B-4T, or "
    "demo, the small model that comes with the package and is used when none is named.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and one-line errors, wherever they are printed
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    generate.generate,
    chat.chat,
    serve.serve,
    info.info,
    verify.verify,
    bench.bench,
    convert.convert,
):
    app.command()(command)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - the signature of a typer callback
    if wanted:
        print(f"bitnet-rs {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits with its code.

    Args:
        arguments: Without the program's name; those of the process if None.
    """
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    # Streams that were closed (`>&-`) are None.
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (open to the end)
    if sys.stdout is None:
        print("error: standard output is closed; wanted somewhere to print to", file=sys.stderr)
        return 1
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    # For people, not for those who wrote the line.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_one_line(message)}\n"
    code = 0
    try:
        try:
            app(arguments, prog_name="bitnet-rs")
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough, as in `| head`. What is still buffered would raise again
        # when the interpreter flushes it at exit, so it is sent nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, LookupError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    return code


def _one_line(error: Exception | str) -> str:
    # str() of a KeyError is the repr of its message.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).splitlines()).strip() or type(error).__name__
