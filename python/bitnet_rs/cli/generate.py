"""`bitnet-rs generate`: text that continues a prompt, as it is written.

For the terminal and for pipes. What stands apart here is finding out which of the
arguments is the model and where the prompt comes from.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from bitnet_rs.cli import common

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def generate(
    first: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder, GGUF file, hub id, or demo. [default: demo]"),
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Text to continue. Without it, or with -: stdin."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Folder, GGUF file, hub id, or demo; then PROMPT stands alone."
        ),
    ] = None,
    max_tokens: common.MaxTokens = None,
    stop: common.Stop = None,
    ignore_eos: common.IgnoreEos = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt, too.")] = False,
    json: common.Json = False,
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
    """Continue a prompt.

    One argument alone is the prompt, for demo; if it names a model and stdin is a pipe, it is
    the model, and the prompt is read from there. One line end is taken off a prompt from stdin.

    Sampling options that are not given come from the model's generation_config.json; where that
    asks for no sampling, the most probable token is taken.
    """
    name, prompt = _model_and_prompt(first, second, model)
    import bitnet_rs

    loaded = bitnet_rs.load(
        name,
        threads=threads,
        kernel=kernel,
        kv_dtype=kv_dtype,
        context=context,
        revision=revision,
        **common.file_arguments(activations, masters, i2s_layout, tl_tiles),
    )
    stream = loaded.stream(
        prompt,
        max_tokens=max_tokens,
        stop=stop,
        ignore_eos=ignore_eos,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if echo and not json:
        print(prompt, end="", flush=True)
    interrupted = False
    try:
        with stream:
            for piece in stream:
                if not json:
                    print(piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    completion = stream.completion
    if json:
        from dataclasses import asdict

        common.print_json(
            {
                "model": loaded.name,
                "kernel": loaded.kernel,
                "threads": loaded.threads,
                "prompt": prompt,
                "text": completion.text,
                "tokens": completion.tokens,
                "finish_reason": completion.finish_reason,
                "usage": asdict(completion.usage),
                "timings": asdict(completion.timings),
            }
        )
    else:
        print()
    if stats:
        common.print_stats(completion.usage, completion.timings, completion.finish_reason)
    if interrupted:
        raise typer.Exit(130)


def _model_and_prompt(first: str | None, second: str | None, model: str | None) -> tuple[str, str]:
    """Which model and which prompt the arguments, `--model` and stdin mean."""
    if model is not None:
        if second is not None:
            raise typer.BadParameter(
                "MODEL and --model; leave one out, and put quotes round a prompt of several words."
            )
        prompt = first
    elif second is not None or (first is not None and _names_model(first)):
        model, prompt = first, second
    else:
        prompt = first
    model = model or "demo"
    if prompt is not None and prompt != "-":
        return model, prompt
    hint = "write one behind the model, or alone for demo"
    if first == model and second is None:
        hint = f"write one behind the model; if {first!r} is the prompt, add --model demo"
    stdin = common.standard_input()
    if stdin.isatty():
        raise typer.BadParameter(f"no prompt; {hint}, or pipe it in.")
    text = common.read_text(stdin.read, "the prompt").removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError(f"the prompt on stdin is empty; {hint}, or pipe some text in")
    return model, text


def _names_model(argument: str) -> bool:
    """Whether a lone argument is rather a model than a prompt: demo, a path, or a hub id."""
    if argument in ("", "-", "demo"):
        return argument == "demo"
    try:
        if Path(argument).expanduser().exists():
            return True
    except (OSError, RuntimeError, ValueError):  # too long for a path, no such home, a null byte
        return False
    return _HUB_ID.fullmatch(argument) is not None or argument.endswith(".gguf")
