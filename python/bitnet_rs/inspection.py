"""What a checkpoint is, without loading it: also one that would be refused, and then why.

For `bitnet-rs info`. `load` stops at the first thing that it does not understand; here each part
is looked at by itself, so that a file that cannot run still tells what it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_rs.jsonfile import read_object
from bitnet_rs.loaders import FileOptions, open_checkpoint
from bitnet_rs.loaders.hub import locate
from bitnet_rs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bitnet_rs.loaders.gguf import GgufFile

# What any of the readers may raise about a file.
_REFUSALS = (ValueError, LookupError, OSError, RuntimeError)


@dataclass(frozen=True)
class TensorKind:
    """Tensors of one type.

    Attributes:
        type: As the container has it: `BF16`, `U8`, `I2_S`.
        tensors: How many.
        weights: Their elements on disk.
    """

    type: str
    tensors: int
    weights: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is. Everything that could not be found out is None or empty.

    Attributes:
        name: As it was named.
        path: The folder or the GGUF file.
        container: `safetensors`, or `GGUF` with its version.
        title: What the file calls itself.
        architecture: As the files have it.
        runs_as: The forward pass that runs.
        format: How weights are stored, in words.
        tensors: Its tensors, by type.
        n_bytes: Bytes of the weight files.
        activations: What projections multiply, `int8` or `float`.
        lossless: Whether the computation is exactly the one the model was trained for.
        lossless_reason: Why.
        embedding: Whether it is a model for embeddings.
        tokenizer: Its tokenizer in words.
        chat_template: The template's source (jinja).
        notes: What was not taken as the files have it, or is to be known.
        refused: Why it cannot be loaded; None if it can, as far as headers tell.
    """

    name: str
    path: str
    container: str | None = None
    title: str | None = None
    architecture: str | None = None
    runs_as: str | None = None
    format: str | None = None
    tensors: tuple[TensorKind, ...] = ()
    n_bytes: int | None = None
    activations: str | None = None
    lossless: bool | None = None
    lossless_reason: str | None = None
    embedding: bool | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    notes: tuple[str, ...] = ()
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for `json.dumps`."""
        return asdict(self)


def inspect(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    options: FileOptions | None = None,
) -> Inspection:
    """Looks at a checkpoint's headers, metadata and tokenizer. Loads no weights.

    Args:
        source: As for `load`.
        revision: Branch, tag or commit of a hub id.
        options: As for `open_checkpoint`.

    Raises:
        FileNotFoundError, ValueError, RuntimeError, TypeError: There is nothing to look at.
    """
    name, path = locate(source, revision)
    facts = _gguf_facts(path) if path.is_file() else _folder_facts(path)
    try:
        checkpoint = open_checkpoint(source, revision=revision, options=options)
    except _REFUSALS as error:
        if facts.get("container") is None:
            raise
        return Inspection(name, str(path), **facts, refused=_message(error))
    notes = (*checkpoint.warnings, *checkpoint.notes)
    try:
        tokenizer = Tokenizer.of(checkpoint)
    except FileNotFoundError:
        facts |= {"tokenizer": "none; only logits() and core.forward() work, on token ids"}
    except _REFUSALS as error:
        facts |= {"tokenizer": "refused", "refused": _message(error)}
    else:
        notes += tokenizer.notes
        facts |= {
            "tokenizer": f"{tokenizer.vocab_size} tokens",
            "chat_template": tokenizer.chat_template,
        }
    return Inspection(
        name,
        str(path),
        **facts,
        runs_as=str(checkpoint.core_config["model_type"]),
        format=checkpoint.format,
        activations=str(checkpoint.core_config["activations"]),
        lossless=checkpoint.lossless,
        lossless_reason=checkpoint.lossless_reason,
        embedding=checkpoint.embedding,
        notes=notes,
    )


def _message(error: Exception) -> str:
    # str() of a KeyError is the repr of its message.
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def _kinds(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[TensorKind, ...]:
    """Tensors (type, shape) by type, in the order in which types come up."""
    import math

    found: dict[str, TensorKind] = {}
    for type_, shape in tensors:
        old = found.get(type_, TensorKind(type_, 0, 0))
        found[type_] = TensorKind(type_, old.tensors + 1, old.weights + math.prod(shape))
    return tuple(found.values())


def _gguf_facts(path: Path) -> dict[str, Any]:
    from bitnet_rs.loaders.gguf import open_gguf

    try:
        file = open_gguf(path)
    except _REFUSALS:
        return {}
    metadata = file.metadata
    return {
        "container": f"GGUF v{file.version}",
        "title": _text(metadata, "general.name"),
        "architecture": _text(metadata, "general.architecture"),
        "tensors": _kinds(_gguf_tensors(file)),
        "n_bytes": file.n_bytes,
        "tokenizer": _text(metadata, "tokenizer.ggml.model"),
        "chat_template": _text(metadata, "tokenizer.chat_template"),
    }


def _gguf_tensors(file: GgufFile) -> list[tuple[str, tuple[int, ...]]]:
    from bitnet_rs.loaders.ggml_types import resolve_types

    try:
        types = {name: type_.name for name, type_ in resolve_types(file).items()}
    except _REFUSALS:
        types = {}
    return [
        (types.get(name, f"type {tensor.type_id}"), tensor.shape)
        for name, tensor in file.tensors.items()
    ]


def _folder_facts(folder: Path) -> dict[str, Any]:
    from bitnet_rs.loaders.safetensors import open_folder

    facts: dict[str, Any] = {}
    try:
        config = read_object(folder / "config.json")
        tensors = open_folder(folder)
    except _REFUSALS:
        return facts
    named = config.get("architectures")
    if isinstance(named, list) and len(named) == 1:
        facts["architecture"] = str(named[0])
    return facts | {
        "container": "safetensors",
        "title": _text(config, "_name_or_path"),
        "tensors": _kinds((tensor.dtype, tensor.shape) for tensor in tensors.values()),
        "n_bytes": sum(file.stat().st_size for file in {t.file for t in tensors.values()}),
    }


def _text(content: Mapping[str, Any], key: str) -> str | None:
    value = content.get(key)
    return value if isinstance(value, str) and value else None
