"""Checkpoints on disk to what the core and the tokenizer need.

For `model.load`. `open_checkpoint` finds the folder (`hub`), validates the files
(`safetensors`) and maps their tensors to canonical weights (`names`); it reads headers and
small JSON files, and each tensor only when the core asks for it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bitnet_rs.jsonfile import read_object
from bitnet_rs.loaders.hub import locate
from bitnet_rs.loaders.names import canonical_weights, format_of
from bitnet_rs.loaders.safetensors import TensorInfo, open_folder

__all__ = ["Checkpoint", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint; no weight is in memory yet.

    Attributes:
        name: What the user named: `demo`, a hub id, a folder.
        path: The folder with the files.
        config: config.json, as is.
        core_config: config.json as the core takes it: `model_type` is the architecture that
            runs (`bitnet` for every model with sub-norms, else `llama`), and
            `tie_word_embeddings` says what the file holds.
        generation_config: generation_config.json, empty when absent.
        weights: Tensors by canonical name; see `_core.Model`.
        format: The storage format in words.
        lossless: Whether the computation is exact in the sense of `docs/numerics.md`.
        lossless_reason: Why, in one sentence.
        n_files_bytes: Bytes of the weight files.
    """

    name: str
    path: Path
    config: dict[str, Any] = field(repr=False)
    core_config: dict[str, Any] = field(repr=False)
    generation_config: dict[str, Any] = field(repr=False)
    weights: Mapping[str, NDArray[Any]]
    format: str
    lossless: bool
    lossless_reason: str
    n_files_bytes: int
    _tensors: Mapping[str, TensorInfo] = field(repr=False)

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Lists (name on disk, safetensors dtype, shape on disk), in the order of the files."""
        return [(t.name, t.dtype, t.shape) for t in self._tensors.values()]


def open_checkpoint(source: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Opens a ternary model's checkpoint, downloading it first where needed.

    Args:
        source: `demo` for the bundled model, a folder, or a hub id.
        revision: Branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: A folder, repository or file does not exist, or is not cached while
            offline.
        KeyError: A tensor is missing.
        ValueError: A file, field or tensor is malformed or not supported; the message names it.
        RuntimeError: The download failed, or the repository is gated.
        TypeError: `source` is neither a string nor a path.
    """
    name, folder = locate(source, revision)
    config = read_object(folder / "config.json")
    generation = folder / "generation_config.json"
    tensors = open_folder(folder)
    weights, arch, tied = canonical_weights(tensors, config, folder)
    files = {tensor.file for tensor in tensors.values()}
    return Checkpoint(
        name=name,
        path=folder,
        config=config,
        core_config={**config, "model_type": arch, "tie_word_embeddings": tied},
        generation_config=read_object(generation) if generation.is_file() else {},
        weights=weights,
        format=format_of(weights),
        # Every form that is accepted today comes from training with both quantizers in place.
        lossless=True,
        lossless_reason=(
            "trained with ternary weights and int8 activations, and their products are summed "
            "exactly, in integers"
        ),
        n_files_bytes=sum(file.stat().st_size for file in files),
        _tensors=tensors,
    )
