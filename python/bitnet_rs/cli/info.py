"""`bitnet-rs info`: the machine, the kernel in use and why, and the facts about a model.

For people who choose a model or report a problem; with `--json`, for programs. Of a checkpoint
that cannot be loaded it tells what it is and why.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitnet_rs.cli import common

if TYPE_CHECKING:
    from bitnet_rs import Info, Model
    from bitnet_rs.inspection import Inspection
    from bitnet_rs.kernel_choice import KernelChoice


def info(
    model: common.ModelArgument = "demo",
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List the tensors on disk, too.")
    ] = False,
    json: common.Json = False,
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
    """Show CPU features, kernels and versions, and facts about a model."""
    import bitnet_rs
    from bitnet_rs import _core

    machine = bitnet_rs.info()
    arguments = common.file_arguments(activations, masters, i2s_layout, tl_tiles)
    found = _inspect(model, revision, arguments)
    try:
        if found.refused is not None:
            raise ValueError(found.refused)
        loaded = bitnet_rs.load(
            model,
            threads=threads,
            kernel=kernel,
            kv_dtype=kv_dtype,
            context=context,
            revision=revision,
            **arguments,
        )
    except (ValueError, LookupError):
        # What it is, though it cannot run; the error comes last, on stderr.
        if json:
            common.print_json(_machine(machine) | {"model": found.to_dict()})
        else:
            _print_found(found)
        raise
    if json:
        report = _machine(machine) | {
            "kernel": loaded.kernel,
            "batch_kernels": dict(zip(_core.batch_inputs, loaded.batch_kernels, strict=True)),
            "kernel_reason": loaded.kernel_choice.reason,
            "kernel_speeds": [asdict(speed) for speed in loaded.kernel_choice.speeds],
            "threads": loaded.threads,
            "model": _facts(loaded)
            | {"file": {key: value for key, value in found.to_dict().items() if key != "refused"}},
        }
        if tensors:
            report["model"]["tensors"] = [
                {"name": name, "dtype": dtype, "shape": shape}
                for name, dtype, shape in loaded.checkpoint.tensors()
            ]
        common.print_json(report)
        return
    _print_machine(machine, _in_use(loaded), loaded.threads)
    _print_speeds(loaded.kernel_choice)
    print()
    print(loaded)
    _print_facts(_facts(loaded) | {"tensor_kinds": _tensor_kinds(found)})
    if tensors:
        print()
        for name, dtype, shape in loaded.checkpoint.tensors():
            print(f"  {name}  {dtype}  {'x'.join(map(str, shape))}")


def _inspect(model: str, revision: str | None, arguments: common.FileArguments) -> "Inspection":
    from bitnet_rs.inspection import inspect
    from bitnet_rs.loaders import FileOptions

    return inspect(model, revision=revision, options=FileOptions.of(**arguments))


def _print_found(found: "Inspection") -> None:
    """What is known of a checkpoint that cannot be loaded."""
    size = f"{found.n_bytes / 1e6:,.1f} MB in " if found.n_bytes is not None else ""
    template = "with" if found.chat_template else "without"
    tokenizer = found.tokenizer and f"{found.tokenizer}, {template} a chat template"
    rows = {
        "file": f"{found.container}, {size}{found.path}",
        "called": found.title,
        "arch": found.architecture,
        "format": found.format,
        "tensors": _tensor_kinds(found),
        "tokenizer": tokenizer,
        "notes": "; ".join(found.notes),
    }
    common.print_table({name: value for name, value in rows.items() if value})


def _tensor_kinds(found: "Inspection") -> str:
    return ", ".join(f"{kind.tensors} {kind.type}" for kind in found.tensors)


def _in_use(model: "Model") -> str:
    from bitnet_rs.kernel_choice import describe

    return f"{describe(model.kernel, model.batch_kernels)}: {model.kernel_choice.reason}"


def _print_speeds(choice: "KernelChoice") -> None:
    """What was measured: the time that a token's ternary matrices take."""
    from bitnet_rs import _core

    if not choice.speeds:
        return
    sizes = "".join(f"{n:>9}" for n in (1, *_core.batch_inputs))
    print(f"{'measured':<12}{'ms a token, in steps of':<24}{sizes} tokens")
    for speed in choice.speeds:
        print(f"{'':<12}{speed.kernel:<24}" + "".join(f"{1e3 * s:9.3f}" for s in speed.seconds))


def _machine(machine: "Info") -> dict[str, Any]:
    from bitnet_rs import system

    return machine.to_dict() | {
        "physical_cores": system.physical_cores(),
        "memory_bytes": system.memory_bytes(),
    }


def _facts(model: "Model") -> dict[str, Any]:
    """Everything about a model that is a number or a word."""
    from bitnet_rs.tokenizer import Tokenizer

    try:
        tokenizer: Tokenizer | None = model.tokenizer
    except FileNotFoundError:
        tokenizer = None
    return {
        "name": model.name,
        "path": str(model.checkpoint.path),
        "format": model.format,
        "files_bytes": model.checkpoint.n_files_bytes,
        "lossless": model.lossless,
        "lossless_reason": model.lossless_reason,
        "notes": list(model.notes),
        "context_length": model.context_length,
        "kv_dtype": model.kv_dtype,
        "kv_cache_bytes": model.core.new_cache(model.context_length, model.kv_dtype).n_bytes,
        "stop_ids": sorted(model.stop_ids),
        "tokenizer": tokenizer is not None,
        "chat_template": bool(tokenizer and tokenizer.chat_template),
        **model.facts,
    }


def _print_machine(machine: "Info", kernel: str, threads: int) -> None:
    facts = _machine(machine)
    memory = facts["memory_bytes"]
    common.print_table(
        {
            "bitnet-rs": f"{machine.version} ({machine.build_profile} build)",
            "cpu": f"{machine.cpu}, {facts['physical_cores']} cores usable"
            + (f", {memory / 1e9:.1f} GB of memory" if memory else ""),
            "features": " ".join(machine.cpu_features) or "none in use",
            "kernels": ", ".join(machine.kernels),
            "in use": kernel,
            "threads": str(threads),
            "remembered": f"in {machine.kernel_cache}",
            "versions": ", ".join(f"{name} {n}" for name, n in machine.versions.items()),
        }
    )


def _print_facts(facts: dict[str, Any]) -> None:
    heads = f"{facts['n_heads']} heads of {facts['head_dim']}, {facts['n_kv_heads']} for keys"
    rows = {
        "layers": f"{facts['n_layers']} of width {facts['hidden_size']} and "
        f"{facts['intermediate_size']}; {heads}",
        "vocabulary": f"{facts['vocab_size']} tokens; stops at {facts['stop_ids']}",
        "tokenizer": "none; only logits() and core.forward() work, on token ids"
        if not facts["tokenizer"]
        else "with a chat template"
        if facts["chat_template"]
        else "without a chat template",
        "tensors": facts["tensor_kinds"],
        "files": f"{facts['files_bytes'] / 1e6:,.1f} MB in {facts['path']}",
        "a token": f"reads {facts['bytes_per_token'] / 1e6:,.1f} MB of weights",
        "kv cache": f"{facts['kv_cache_bytes'] / 1e6:,.1f} MB when the context is full",
    }
    for name, value in rows.items():
        print(f"  {name:<10} {value}")
