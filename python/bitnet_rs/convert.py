"""`convert`: a checkpoint written again in another format, checked bit for bit before it appears.

For users, through `bitnet_rs.convert` and `bitnet-rs convert`. This file decides what is written
and where; `writers` knows how. In order: the destination is looked at, the checkpoint is opened,
everything is planned and refused if it must be, then tensors are written one after another, then
the file is read back from the disk and decoded, and only if every trit, scale and float is the one
that the checkpoint gave does it get its name. One tensor is in memory at a time.

What is written is what the core computes with: a dividing scale becomes the multiplying one, and
masters become the trits and the scale that the core makes of them when it loads them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from bitnet_rs.loaders import Checkpoint, FileOptions, open_checkpoint
from bitnet_rs.loaders.families import Activations
from bitnet_rs.loaders.options import I2sLayout, Tile
from bitnet_rs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bitnet_rs.writers.gguf import Value
    from bitnet_rs.writers.readback import Progress
    from bitnet_rs.writers.source import Source
    from bitnet_rs.writers.to_gguf import GgufJob
    from bitnet_rs.writers.to_packed import PackedJob

# The writers are imported when something is written: who generates text has no use for them.

Target = Literal["gguf-i2_s", "gguf-tq2_0", "gguf-tq1_0", "safetensors-packed"]

_PACKED: Final = "safetensors-packed"
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Loss:
    """A number that the format cannot hold exactly.

    Attributes:
        name: The tensor whose scales are meant, or a metadata key.
        relative_error: The largest relative error.
    """

    name: str
    relative_error: float


@dataclass(frozen=True)
class ConvertReport:
    """What was written.

    Attributes:
        path: The file or folder.
        n_bytes: Its size; of a folder, that of its files.
        format: The format in words.
        losses: What had to be rounded. Empty where the file holds exactly the numbers that this
            package computes with when it loads the source.
        notes: What a user of the file should know.
    """

    path: Path
    n_bytes: int
    format: str
    losses: tuple[Loss, ...]
    notes: tuple[str, ...]

    @property
    def lossless(self) -> bool:
        """Whether nothing was rounded."""
        return not self.losses

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return asdict(self) | {"path": str(self.path), "lossless": self.lossless}


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: Target,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    activations: Activations | None = None,
    masters: bool = False,
    i2s_layout: I2sLayout = "x86",
    tl_tiles: Mapping[tuple[int, int], Tile] | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Writes a checkpoint in another format.

    Args:
        src: Whatever `load` takes: `demo`, a folder, a GGUF file, or a hub id.
        dst: A file whose name ends in `.gguf`, or a folder for `safetensors-packed`. Nothing is
            under this name before it is whole and checked.
        to: `gguf-i2_s` (for bitnet.cpp, 2 bits a weight), `gguf-tq2_0` or `gguf-tq1_0` (for
            llama.cpp, 2.06 and 1.69 bits), or `safetensors-packed` (for transformers, 2 bits).
        overwrite: Replace what is there. A folder is replaced only if it is a checkpoint and
            nothing else.
        revision: Branch, tag or commit of a hub id.
        activations: What the source does not say about itself, as for `load`; so are the next
            three. It is written down in the new file.
        masters: As for `load`.
        i2s_layout: As for `load`.
        tl_tiles: As for `load`.
        progress: Called with the bytes that are done, those in all, and the tensor at hand. Bytes
            count when they are written and again when they are checked.

    Returns:
        What was written, and what had to be rounded.

    Raises:
        FileExistsError: The destination is there, and `overwrite` is false.
        FileNotFoundError: The source, or the folder of the destination, does not exist.
        KeyError: A tensor is missing.
        OSError: The destination cannot be written, or its disk is full.
        ValueError: The source is malformed, or the format cannot hold it; the message names the
            tensors, and the formats that can.
        RuntimeError: A download failed, or what was written reads back otherwise.
    """
    if to not in get_args(Target):
        raise ValueError(f"to is {to!r}; wanted one of {', '.join(get_args(Target))}")
    path = _destination(dst, to, overwrite=overwrite)
    options = FileOptions.of(
        activations=activations, masters=masters, i2s_layout=i2s_layout, tl_tiles=tl_tiles
    )
    checkpoint = open_checkpoint(src, revision=revision, options=options)
    _keep_apart(checkpoint.path, path)
    from bitnet_rs.writers.readback import Steps
    from bitnet_rs.writers.source import Source

    source = Source(checkpoint.weights, checkpoint.core_config)
    job, notes = _job(checkpoint, source, to)
    if source.has_masters:
        notes += ("masters were quantized as they are at load; to train on, keep the source",)
    _check_space(path, job.n_bytes)
    job.run(path, Steps(job.n_bytes, progress), overwrite=overwrite)
    return ConvertReport(
        path,
        job.n_bytes,
        job.format,
        tuple(Loss(name, error) for name, error in job.losses.items()),
        (*checkpoint.warnings, *notes, *job.notes),
    )


# --- the destination -----------------------------------------------------------------------------


def _destination(dst: str | os.PathLike[str], to: str, *, overwrite: bool) -> Path:
    """The destination as an absolute path, if something may be written there."""
    if not isinstance(dst, (str, os.PathLike)) or not os.fspath(dst):
        raise ValueError(f"dst is {dst!r}; wanted the path of a file or folder to write")
    try:
        given = Path(dst).expanduser()
    except RuntimeError:
        raise FileNotFoundError(
            f"{os.fspath(dst)!r} starts in the home folder of a user that this machine does not "
            "know; write the folder out"
        ) from None
    if given.name in ("", ".."):
        raise ValueError(f"dst is {str(dst)!r}, which has no name; name the file or folder itself")
    # The last part is not resolved: a link is replaced, not what it points to.
    path = given.parent.resolve() / given.name
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; create it first")
    if to == _PACKED:
        _check_folder(path, overwrite=overwrite)
    else:
        _check_file(path, overwrite=overwrite)
    return path


def _check_file(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it, such as {path / 'model.gguf'}")
    if path.suffix.lower() != ".gguf":
        raise ValueError(f"{path}: the name of a GGUF file ends in .gguf; call it {path.name}.gguf")
    _check_free(path, overwrite=overwrite)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file, so it cannot be replaced; name another")


def _check_folder(path: Path, *, overwrite: bool) -> None:
    if path.suffix.lower() in (".gguf", ".safetensors", ".json"):
        raise ValueError(
            f"{path}: packed safetensors are a folder of files; name it without {path.suffix}"
        )
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} is there and is no folder, so none can be written; name another")
    _check_free(path, overwrite=overwrite)
    if not path.exists():
        return
    # All of the folder is replaced, and someone may have named the wrong one.
    entries = list(path.iterdir())
    others = [entry.name for entry in entries if not entry.is_file()]
    if others or (entries and not (path / "config.json").is_file()):
        found = f"holds {others[0]}" if others else "has no config.json"
        raise ValueError(
            f"{path} {found}, so it is more than a checkpoint, and all of it would be deleted; "
            "name another folder, or delete it yourself"
        )


def _check_free(path: Path, *, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} is there already; name another, or ask to overwrite it")


def _keep_apart(source: Path, path: Path) -> None:
    source, path = source.resolve(), path.resolve()
    if path == source:
        raise ValueError(f"{path} is the source itself; name another destination")
    if path.is_relative_to(source):
        raise ValueError(f"{path} lies in the source {source}; name a destination outside it")
    if source.is_relative_to(path):
        raise ValueError(
            f"the source {source} lies in {path}, which would be replaced; name another destination"
        )


def _check_space(path: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise OSError(
            f"{path.parent}: {free / 1e6:,.1f} MB are free and {n_bytes / 1e6:,.1f} MB are needed; "
            "free some space, or name a destination on another disk"
        )


def _job(
    checkpoint: Checkpoint, source: Source, to: Target
) -> tuple[GgufJob | PackedJob, tuple[str, ...]]:
    """What is to be done, and notes on what goes with the weights."""
    if to == _PACKED:
        from bitnet_rs.writers.to_packed import PackedJob

        files, notes = _files(checkpoint)
        return PackedJob(source, files), notes
    from bitnet_rs.writers.to_gguf import ENCODINGS, GgufJob

    metadata, notes = _metadata(checkpoint)
    return GgufJob(source, ENCODINGS[to], _shown_name(checkpoint), metadata), notes


# --- what goes with the weights ------------------------------------------------------------------


def _files(checkpoint: Checkpoint) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Config and tokenizer of packed safetensors, by file name; and notes."""
    from bitnet_rs.writers.packed import packed_config

    config = packed_config(checkpoint.config, checkpoint.core_config)
    files = {"config.json": _json(config)}
    if checkpoint.generation_config:
        files["generation_config.json"] = _json(checkpoint.generation_config)
    notes: tuple[str, ...] = ()
    if checkpoint.core_config["activations"] == "float":
        notes += ("transformers would quantize the activations of this model to int8",)
    if checkpoint.gguf_metadata is None:
        for name in _TOKENIZER_FILES:
            if (checkpoint.path / name).is_file():
                files[name] = (checkpoint.path / name).read_bytes()
        if not {"tokenizer.json", "tokenizer.model"} & set(files):
            notes += (f"without a tokenizer, since {checkpoint.path} has none",)
        return files, notes
    try:
        tokenizer = Tokenizer.of(checkpoint)
    except (FileNotFoundError, ValueError) as error:
        return files, (*notes, f"without a tokenizer: {error}")
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens,
        "chat_template": tokenizer.chat_template,
    }
    files["tokenizer.json"] = (tokenizer.to_json() + "\n").encode()
    files["tokenizer_config.json"] = _json({k: v for k, v in fields.items() if v is not None})
    return files, (*notes, *tokenizer.notes)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _shown_name(checkpoint: Checkpoint) -> str:
    name = Path(checkpoint.name).name or checkpoint.path.resolve().name
    return name.encode(errors="replace").decode()


def _metadata(checkpoint: Checkpoint) -> tuple[dict[str, Value], tuple[str, ...]]:
    """What projections multiply, and the tokenizer as GGUF has it; a note where that cannot be."""
    from bitnet_rs.loaders.gguf_model import ACTIVATIONS_KEY
    from bitnet_rs.writers.gguf import typed
    from bitnet_rs.writers.gguf_tokenizer import gguf_from_tokenizer

    content: dict[str, Any] = {ACTIVATIONS_KEY: checkpoint.core_config["activations"]}
    try:
        tokenizer = Tokenizer.of(checkpoint)
        content |= gguf_from_tokenizer(
            json.loads(tokenizer.to_json()),
            tokenizer.special_tokens,
            tokenizer.chat_template,
            checkpoint.core_config["vocab_size"],
            str(checkpoint.path),
        )
        notes = tokenizer.notes
    except (FileNotFoundError, ValueError) as error:
        notes = (f"without a tokenizer, so that other programs cannot run it: {error}",)
    return {key: typed(value, key) for key, value in content.items()}, notes
