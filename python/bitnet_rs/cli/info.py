"""`bitnet-rs info`: the machine, the kernel in use and why, and the facts about a model.

For people who choose a model or report a problem; with `--json`, for programs.
"""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitnet_rs.cli import common

if TYPE_CHECKING:
    from bitnet_rs import Info, Model


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
) -> None:
    """Show CPU features, kernels and versions, and facts about a model."""
    import bitnet_rs

    machine = bitnet_rs.info()
    loaded = bitnet_rs.load(
        model, threads=threads, kernel=kernel, kv_dtype=kv_dtype, context=context, revision=revision
    )
    reason = _kernel_reason(kernel)
    if json:
        report = _machine(machine) | {
            "kernel": loaded.kernel,
            "kernel_reason": reason,
            "threads": loaded.threads,
            "model": _facts(loaded),
        }
        if tensors:
            report["model"]["tensors"] = [
                {"name": name, "dtype": dtype, "shape": shape}
                for name, dtype, shape in loaded.checkpoint.tensors()
            ]
        common.print_json(report)
        return
    _print_machine(machine, f"{loaded.kernel}: {reason}", loaded.threads)
    print()
    print(loaded)
    _print_facts(_facts(loaded))
    if tensors:
        print()
        for name, dtype, shape in loaded.checkpoint.tensors():
            print(f"  {name}  {dtype}  {'x'.join(map(str, shape))}")


def _kernel_reason(asked: str) -> str:
    if asked != "auto":
        return "asked for with --kernel"
    if os.environ.get("BITNET_RS_KERNEL", "").strip() not in ("", "auto"):
        return "asked for with BITNET_RS_KERNEL"
    cap = os.environ.get("BITNET_RS_ISA", "").strip()
    return f"the fastest under BITNET_RS_ISA={cap}" if cap else "the fastest that this CPU can run"


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
        "files": f"{facts['files_bytes'] / 1e6:,.1f} MB in {facts['path']}",
        "a token": f"reads {facts['bytes_per_token'] / 1e6:,.1f} MB of weights",
        "kv cache": f"{facts['kv_cache_bytes'] / 1e6:,.1f} MB when the context is full",
    }
    for name, value in rows.items():
        print(f"  {name:<10} {value}")
