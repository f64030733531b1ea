"""`bitnet-rs chat`: a conversation in the terminal.

For people; with piped input, for scripts: one message a line, one reply each, and
nothing else on stdout. Ctrl-C stops a reply and not the program.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitnet_rs.cli import common

if TYPE_CHECKING:
    from bitnet_rs import Chat
    from bitnet_rs.options import Options

_HELP = """\
/help            this list
/reset           forget the conversation, keep the system message
/system [TEXT]   start over with another system message, or with none
/history         show the conversation
/quit            leave; Ctrl-D and, at an empty prompt, Ctrl-C twice do the same
Ctrl-C stops a reply. A message that begins with / is written with two: //like this"""

# Lines of input that are remembered from one session to the next.
_HISTORY_LINES = 1000


def chat(
    model: common.ModelArgument = "demo",
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="System message to begin with.")
    ] = None,
    max_tokens: common.MaxTokens = None,
    stop: common.Stop = None,
    ignore_eos: common.IgnoreEos = False,
    stats: common.Stats = False,
    temperature: common.Temperature = None,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    min_p: common.MinP = None,
    repetition_penalty: common.RepetitionPenalty = None,
    seed: common.Seed = None,
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
    """Talk with a model.

    /help lists the commands. Ctrl-C stops a reply; Ctrl-D leaves. Piped input is read line by
    line, each line a message.
    """
    stdin = common.standard_input()
    import bitnet_rs

    loaded = bitnet_rs.load(
        model,
        threads=threads,
        kernel=kernel,
        kv_dtype=kv_dtype,
        context=context,
        revision=revision,
        **common.file_arguments(activations, masters, i2s_layout, tl_tiles),
    )
    options: Options = {
        "max_tokens": max_tokens,
        "stop": stop,
        "ignore_eos": ignore_eos,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    conversation = loaded.chat(system)
    if not stdin.isatty():
        while line := common.read_text(stdin.readline, "a message"):
            message = line.rstrip("\r\n")
            if message and not _turn(conversation, message, options, stats=stats):
                break
        return
    print(f"{loaded.name} | {loaded.kernel} | /help for commands, Ctrl-D to leave")
    with _line_history():
        _converse(conversation, options, stats=stats)


def _converse(conversation: "Chat", options: "Options", *, stats: bool) -> None:
    """Reads messages from a terminal and answers them until the user leaves."""
    leaving = False  # Ctrl-C was pressed at an empty prompt
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if leaving:
                print()
                return
            leaving = True
            print("\n[Ctrl-C again or Ctrl-D to leave]")
            continue
        leaving = False
        if not message:
            continue
        try:
            if not _turn(conversation, message, options, stats=stats):
                return
        except KeyboardInterrupt:
            print("\n[stopped]")
        except ValueError as error:
            # Too long for the context, for one: the conversation is as it was.
            print(f"error: {error}", file=sys.stderr)


def _turn(conversation: "Chat", message: str, options: "Options", *, stats: bool) -> bool:
    """Answers a message or follows a command; False to leave."""
    if message.startswith("/") and not message.startswith("//"):
        return _command(conversation, message)
    stream = conversation.stream(message.removeprefix("/"), **options)
    with stream:
        for piece in stream:
            print(piece, end="", flush=True)
    print()
    if stats:
        completion = stream.completion
        common.print_stats(completion.usage, completion.timings, completion.finish_reason)
    return True


def _command(conversation: "Chat", line: str) -> bool:
    command, _, rest = line.partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        conversation.clear()
    elif command == "/system":
        rest = rest.strip()
        conversation.messages = [{"role": "system", "content": rest}] if rest else []
    elif command == "/history":
        for message in conversation.messages:
            print(f"{message['role']}: {message['content']}")
    elif command == "/help":
        print(_HELP)
    else:
        print(f"unknown command {command}\n{_HELP}")
    return True


@contextmanager
def _line_history() -> Iterator[None]:
    """Line editing, with the lines of earlier sessions where they can be kept."""
    try:
        import readline
    except ImportError:  # Windows; some builds of Python
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "bitnet-rs" / "chat_history"
    try:
        readline.read_history_file(file)
    except OSError:
        readline.clear_history()
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY_LINES)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
            file.chmod(0o600)  # what was said is nobody else's business
        except OSError:
            pass
