"""From what a user names to files on disk: the bundled model, a folder, a GGUF file, a hub id.

For `open_checkpoint`. It is the only file that talks to huggingface_hub, whose cache, progress
bars, tokens and `HF_HUB_OFFLINE` apply unchanged. Only the files that are read are downloaded:
a repository's `.bin` and `original/` copies of the weights stay where they are, and its GGUF
files, too, where there are safetensors.
"""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from bitnet_rs.loaders.safetensors import INDEX_FILE, SINGLE_FILE, read_index

DEMO: Final = "demo"
_DEMO_FOLDER: Final = Path(__file__).parent.parent / "demo"

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
_HUB_FILE: Final = re.compile(rf"({_HUB_ID.pattern})/([\w.-]+\.gguf)", re.IGNORECASE)
_SOURCES: Final = (
    "'demo', the folder of a checkpoint, a GGUF file, or a hub id such as "
    "'microsoft/bitnet-b1.58-2B-4T'"
)
# Of a split file, all parts but the first, which names the others.
_LATER_PART: Final = re.compile(r"-(?!0*1-of-)\d+-of-\d+\.gguf$", re.IGNORECASE)
_PART: Final = re.compile(r"-\d+(-of-\d+\.gguf)$", re.IGNORECASE)


def locate(source: str | os.PathLike[str], revision: str | None = None) -> tuple[str, Path]:
    """Finds the files of a checkpoint, downloading what is missing.

    Args:
        source: `demo` for the bundled model, a folder, a GGUF file, or a hub id such as
            `microsoft/bitnet-b1.58-2B-4T`, perhaps with the name of a GGUF file behind it
            (`owner/name/file.gguf`). What is on this disk wins over a hub id of the same
            spelling; write `./demo` for a folder that is called `demo`.
        revision: A branch, tag or commit; for hub ids only.

    Returns:
        The name as the user gave it, and a folder that holds `config.json`, or a GGUF file.

    Raises:
        FileNotFoundError: No such folder, file, repository or revision, or not cached while
            offline.
        ValueError: The source is empty, a file of another kind, a folder or repository with
            several GGUF files, or something on this disk with a revision.
        RuntimeError: The download failed.
        TypeError: The source is neither a string nor a path.
    """
    name = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(name, str):
        raise TypeError(f"source is a {type(source).__name__}; wanted a str or a path: {_SOURCES}")
    if not name:
        raise ValueError(f"source is empty; wanted {_SOURCES} ('.' is the current folder)")
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise FileNotFoundError(
            f"{name!r} starts in the home folder of a user that this machine does not know; "
            "write the folder out, or './~...' for a folder that is called so"
        ) from None
    if name != DEMO and not path.exists():
        return name, _download(name, revision)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for hub ids only, and {name} is on this disk")
    if name == DEMO:
        return name, _DEMO_FOLDER
    return name, _of_folder(path, name) if path.is_dir() else _of_file(path, name)


def _of_file(path: Path, name: str) -> Path:
    if path.suffix.lower() != ".gguf":
        raise ValueError(
            f"{name} is a file, but no .gguf; name the folder that holds it and config.json"
        )
    if not path.is_file():
        raise ValueError(f"{name} is neither a file nor a folder; wanted {_SOURCES}")
    return path


def _of_folder(folder: Path, name: str) -> Path:
    """The folder, if it is a checkpoint; else the one GGUF file in it."""
    if (folder / "config.json").is_file():
        weights = [*folder.glob("*.safetensors"), folder / INDEX_FILE]
        if any(path.is_file() for path in weights) or not _ggufs(folder):
            return folder
    found = _ggufs(folder)
    if found:
        return folder / _only(found, name)
    raise FileNotFoundError(
        f"{folder}: no config.json and no .gguf file, so this is not a checkpoint; "
        "name a folder or hub id that holds config.json and model.safetensors, or a GGUF file"
    )


def _ggufs(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf"]


def _only(names: Iterable[str], where: str) -> str:
    """The one GGUF file among these; parts of a split one count once."""
    whole = sorted(name for name in names if not _LATER_PART.search(name))
    if len(whole) == 1:
        return whole[0]
    shown = ", ".join(whole[:6]) + (f" and {len(whole) - 6} more" if len(whole) > 6 else "")
    raise ValueError(
        f"{where} holds {len(whole)} GGUF files; name one of them, as {where}/{whole[0]}: {shown}"
        if whole
        else f"{where} holds parts of a split GGUF file without the first; fetch all of them"
    )


def _download(name: str, revision: str | None) -> Path:
    if match := _HUB_FILE.fullmatch(name):
        return _download_gguf(match[1], match[2], revision)
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name!r} is no folder or file on this disk and no hub id such as "
            "'microsoft/bitnet-b1.58-2B-4T'; 'demo' is the bundled model"
        )
    folder = _snapshot(name, revision, [*_SMALL_FILES, SINGLE_FILE])
    if (folder / SINGLE_FILE).is_file() and (folder / "config.json").is_file():
        return folder
    if not (folder / INDEX_FILE).is_file():
        found = [file for file in _files_of(name, folder) if file.lower().endswith(".gguf")]
        if found:
            return _download_gguf(name, _only(found, name), folder.name)
        raise FileNotFoundError(
            f"hub repository {name} has no {SINGLE_FILE} with a config.json, no {INDEX_FILE} and "
            "no .gguf file; weights are read from safetensors and GGUF checkpoints, not from .bin "
            "files"
        )
    shards = sorted(set(read_index(folder / INDEX_FILE).values()))
    # The snapshot's folder is named by its commit: the shards come from that same one, even if
    # the branch moved in between.
    return _of_folder(_snapshot(name, folder.name, [glob.escape(shard) for shard in shards]), name)


def _files_of(repo: str, folder: Path) -> list[str]:
    """Names of the files at the top of a repository, at a snapshot's commit.

    Those that are cached where the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repo, revision=folder.name)
    except Exception:  # noqa: BLE001 (whatever the network and the hub's client may raise)
        return [path.name for path in folder.iterdir()]
    return [file for file in files if "/" not in file]


def _download_gguf(repo: str, file: str, revision: str | None) -> Path:
    pattern = _PART.sub(r"-*\1", glob.escape(file))
    folder = _snapshot(repo, revision, [pattern])
    if not (folder / file).is_file():
        raise FileNotFoundError(
            f"hub repository {repo} has no file {file}; see https://huggingface.co/{repo}/tree/"
            f"{revision or 'main'} for the names"
        )
    return folder / file


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
