"""From what a user names to a folder on disk: the bundled model, a folder, or a hub id.

For `open_checkpoint`. It is the only file that talks to huggingface_hub, whose cache, progress
bars, tokens and `HF_HUB_OFFLINE` apply unchanged. Only the files that are read are downloaded:
a repository's `.bin`, `.gguf` and `original/` copies of the weights stay where they are.
"""

import glob
import os
import re
from pathlib import Path
from typing import Final

from bitnet_rs.loaders.safetensors import INDEX_FILE, SINGLE_FILE, read_index

DEMO: Final = "demo"
_DEMO_FOLDER: Final = Path(__file__).parent.parent / "demo"

# tokenizer.model is sentencepiece's; it and added_tokens.json count where there is no
# tokenizer.json.
_SMALL_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    INDEX_FILE,
)
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SOURCES: Final = (
    "'demo', the folder of a checkpoint, or a hub id such as 'microsoft/bitnet-b1.58-2B-4T'"
)
_NO_GGUF: Final = (
    "GGUF files are not read yet; name the safetensors repository or folder of the same model"
)


def locate(source: str | os.PathLike[str], revision: str | None = None) -> tuple[str, Path]:
    """Finds the folder of a checkpoint, downloading what is missing.

    Args:
        source: `demo` for the bundled model, a folder, or a hub id such as
            `microsoft/bitnet-b1.58-2B-4T`. A folder wins over a hub id of the same spelling;
            write `./demo` for a folder that is called `demo`.
        revision: A branch, tag or commit; for hub ids only.

    Returns:
        The name as the user gave it, and a folder that holds `config.json`.

    Raises:
        FileNotFoundError: No such folder, repository, revision or file, or not cached while
            offline.
        ValueError: The source is empty, a GGUF or other file, or a folder with a revision.
        RuntimeError: The download failed.
        TypeError: The source is neither a string nor a path.
    """
    name = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(name, str):
        raise TypeError(f"source is a {type(source).__name__}; wanted a str or a path: {_SOURCES}")
    if not name:
        raise ValueError(f"source is empty; wanted {_SOURCES} ('.' is the current folder)")
    try:
        folder = Path(name).expanduser()
    except RuntimeError:
        raise FileNotFoundError(
            f"{name!r} starts in the home folder of a user that this machine does not know; "
            "write the folder out, or './~...' for a folder that is called so"
        ) from None
    if name != DEMO and not folder.is_dir():
        if name.lower().endswith(".gguf"):
            raise ValueError(f"{name}: {_NO_GGUF}")
        if folder.is_file():
            raise ValueError(f"{name} is a file; name the folder that holds it and config.json")
        return name, _with_config(_download(name, revision), name)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for hub ids only, and {name} is on this disk")
    return name, _with_config(_DEMO_FOLDER if name == DEMO else folder, name)


def _with_config(folder: Path, name: str) -> Path:
    if (folder / "config.json").is_file():
        return folder
    if any(folder.glob("*.gguf")) or "gguf" in name.lower():
        raise ValueError(f"{name} has no config.json. {_NO_GGUF}")
    raise FileNotFoundError(
        f"{folder}: no config.json, so this is not a checkpoint; "
        "name the folder or hub id that holds config.json and model.safetensors"
    )


def _download(repo: str, revision: str | None) -> Path:
    if not _HUB_ID.fullmatch(repo):
        raise FileNotFoundError(
            f"{repo!r} is no folder on this disk and no hub id such as "
            "'microsoft/bitnet-b1.58-2B-4T'; 'demo' is the bundled model"
        )
    folder = _snapshot(repo, revision, [*_SMALL_FILES, SINGLE_FILE])
    if (folder / SINGLE_FILE).is_file() or not (folder / "config.json").is_file():
        return folder
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"hub repository {repo} has no {SINGLE_FILE} and no {INDEX_FILE}; "
            "weights are read from safetensors checkpoints, not from .bin or .gguf files"
        )
    shards = sorted(set(read_index(folder / INDEX_FILE).values()))
    # The snapshot's folder is named by its commit: the shards come from that same one, even if
    # the branch moved in between.
    return _snapshot(repo, folder.name, [glob.escape(shard) for shard in shards])


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"hub repository {repo}" + (f" at revision {revision}" if revision else "")
    try:
        # The hub's patterns are no paths: `*` would match `original/model.safetensors` too.
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError as error:
        raise RuntimeError(
            f"{at} is gated: accept its terms on https://huggingface.co/{repo}, "
            "then run `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{at} does not exist; name a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{at} does not exist or is private; check its spelling, "
            "or run `hf auth login` or set HF_TOKEN if it is yours"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{at} is not wholly in the local cache, and the hub cannot be reached; "
            "connect once without HF_HUB_OFFLINE, or name a folder"
        ) from error
    except Exception as error:  # whatever the network and the hub's client may raise
        raise RuntimeError(
            f"downloading {at} failed: {type(error).__name__}: {error}; "
            "running again resumes the download"
        ) from error
