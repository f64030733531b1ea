"""Checkpoints on disk to what the core and the tokenizer need.

For `model.load`. `open_checkpoint` finds the folder or file (`hub`), validates the files
(`safetensors`, `gguf`) and maps their tensors to canonical weights (`names`, `gguf_model`); it
reads headers and small JSON files, and each tensor only when the core asks for it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bitnet_rs.jsonfile import read_object
from bitnet_rs.loaders.families import Activations, core_config
from bitnet_rs.loaders.hub import locate
from bitnet_rs.loaders.names import canonical_weights, format_of
from bitnet_rs.loaders.options import FileOptions
from bitnet_rs.loaders.safetensors import open_folder

__all__ = ["Checkpoint", "FileOptions", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint; no weight is in memory yet.

    Attributes:
        name: What the user named: `demo`, a hub id, a folder, a file.
        path: The folder with the files, or the GGUF file.
        config: config.json, as is; of a GGUF file, its metadata by the names of config.json.
        core_config: config.json as the core takes it: `model_type` is the architecture that
            runs (`bitnet` for every model with sub-norms), `tie_word_embeddings` says what the
            file holds, `activations` what projections multiply.
        generation_config: generation_config.json, empty when absent.
        weights: Tensors by canonical name; see `_core.Model`.
        grouped: Whether some ternary matrix has several scales.
        embedding: Whether it is a model for embeddings, which has no use for a head.
        format: The storage format in words.
        lossless: Whether the computation is exact in the sense of `docs/numerics.md`.
        lossless_reason: Why, in one sentence.
        n_files_bytes: Bytes of the weight files.
        notes: Sentences about what was not taken as the files have it, or is to be known.
        warnings: Sentences about what is probably wrong.
        gguf_metadata: Of a GGUF file, which holds its tokenizer; else None.
        options: With which it was opened.
    """

    name: str
    path: Path
    config: dict[str, Any] = field(repr=False)
    core_config: dict[str, Any] = field(repr=False)
    generation_config: dict[str, Any] = field(repr=False)
    weights: Mapping[str, NDArray[Any]]
    grouped: bool
    embedding: bool
    format: str
    lossless: bool
    lossless_reason: str
    n_files_bytes: int
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    gguf_metadata: Mapping[str, Any] | None = field(repr=False, default=None)
    options: FileOptions = field(repr=False, default_factory=FileOptions)
    _tensors: tuple[tuple[str, str, tuple[int, ...]], ...] = field(repr=False, default=())

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Lists (name on disk, type on disk, shape on disk), in the order of the files.

        Types are those of safetensors (`BF16`) or ggml (`I2_S`); shapes have the slowest dimension
        first.
        """
        return list(self._tensors)

    @property
    def config_file(self) -> Path:
        """Where `config` stands: config.json, or the GGUF file."""
        return self.path if self.gguf_metadata is not None else self.path / "config.json"


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    options: FileOptions | None = None,
) -> Checkpoint:
    """Opens a ternary model's checkpoint, downloading it first where needed.

    Args:
        source: `demo` for the bundled model, a folder, a GGUF file, or a hub id.
        revision: Branch, tag or commit of a hub id.
        options: What files do not say about themselves.

    Raises:
        FileNotFoundError: A folder, repository or file does not exist, or is not cached while
            offline.
        KeyError: A tensor is missing.
        ValueError: A file, field or tensor is malformed or not supported; the message names it.
        RuntimeError: The download failed, or the repository is gated.
        TypeError: `source` is neither a string nor a path.
    """
    options = options or FileOptions()
    name, path = locate(source, revision)
    if path.is_file():
        return _open_gguf(name, path, options)
    config = read_object(path / "config.json")
    generation = path / "generation_config.json"
    tensors = open_folder(path)
    found = canonical_weights(tensors, config, path, masters=options.masters)
    activations, lossless, reason = _activations(
        found.form.activations, options, path / "config.json", stated=found.form.kind != "values"
    )
    files = {tensor.file for tensor in tensors.values()}
    return Checkpoint(
        name=name,
        path=path,
        config=config,
        core_config=core_config(
            config,
            found.architecture,
            tied=found.tied,
            activations=activations,
            where=path / "config.json",
        ),
        generation_config=read_object(generation) if generation.is_file() else {},
        weights=found.weights,
        # The kernels for float activations take either; others have to know.
        grouped=activations == "int8" and found.weights.has_groups(),
        embedding=found.embedding,
        format=format_of(found.weights),
        lossless=lossless,
        lossless_reason=reason,
        n_files_bytes=sum(file.stat().st_size for file in files),
        options=options,
        _tensors=tuple((t.name, t.dtype, t.shape) for t in tensors.values()),
    )


def _open_gguf(name: str, path: Path, options: FileOptions) -> Checkpoint:
    from bitnet_rs.loaders.gguf_model import open_gguf_model

    model = open_gguf_model(path, options)
    activations, lossless, reason = _activations(
        model.activations, options, path, stated=model.activations_stated
    )
    return Checkpoint(
        name=name,
        path=path,
        config=model.config,
        core_config=core_config(
            model.config,
            model.architecture,
            tied=model.tied,
            activations=activations,
            where=path,
        ),
        generation_config={},
        weights=model.weights,
        grouped=activations == "int8" and model.weights.has_groups(),
        embedding=model.embedding,
        format=model.format,
        lossless=lossless,
        lossless_reason=reason,
        n_files_bytes=model.n_bytes,
        notes=model.notes,
        warnings=model.warnings,
        gguf_metadata=model.metadata,
        options=options,
        _tensors=model.tensors,
    )


def _activations(
    trained: Activations, options: FileOptions, where: Path, *, stated: bool
) -> tuple[Activations, bool, str]:
    """What projections multiply; whether that is lossless, and why.

    Args:
        trained: What the files say, or what is assumed where they say nothing.
        options: What the user says.
        where: The file that says it, for messages.
        stated: Whether the files say it.

    Raises:
        ValueError: The user wants what the model was not trained for.
    """
    exactly = "and their products are summed exactly, in integers"
    if trained == "int8":
        if options.activations == "float" and stated:
            raise ValueError(
                f"activations='float', but {where} is of a model trained with int8 activations; "
                "leave the option out"
            )
        if options.activations != "float":
            return (
                "int8",
                True,
                f"trained with ternary weights and int8 activations, {exactly}",
            )
    if options.activations == "int8":
        if stated:
            return (
                "int8",
                False,
                "trained with float activations, which activations='int8' rounds to 8 bits",
            )
        return "int8", True, f"activations='int8' says how it was trained, {exactly}"
    if stated:
        return (
            "float",
            True,
            "trained with ternary weights and float activations, which stay float32",
        )
    return (
        "float",
        True,
        (
            "the file says nothing of int8 activations, so they stay float32; for a model that "
            "was trained with them (BitNet), say activations='int8'"
        ),
    )
