"""Safetensors files: what tensors they hold, and each tensor as a mapped array.

For `names.py`, which turns them into canonical weights. It stands apart because it knows the
container and nothing of models. The `safetensors` package validates every file (header,
offsets, length) before anything is read; after that this module reads the offsets itself, since
bfloat16 is no numpy dtype and each tensor must be mapped, used and dropped on its own (`mapped`).
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.jsonfile import read_object
from bitnet_rs.loaders.mapped import Mapper, as_typed

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

# What the loaders can hand on. bfloat16 travels as its bits.
_DTYPES: Final[Mapping[str, str]] = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "U8": "|u1",
    "I8": "|i1",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies on disk.

    Attributes:
        name: Its name in the file.
        dtype: Its safetensors dtype, such as `BF16`.
        shape: Its shape on disk.
        file: The file that holds it.
        offset: Bytes from the start of the file to its first byte.
        n_bytes: Bytes it takes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int

    def read(self) -> NDArray[Any]:
        """Maps the tensor read-only; dropping the array unmaps it.

        Returns:
            An aligned, C-contiguous array of the tensor's shape: float32, float16, uint8,
            int8, or uint16 that holds bfloat16 bits.

        Raises:
            ValueError: The dtype is not one of those, or the file shrank since it was opened.
        """
        return Reader().read(self)


class Reader:
    """Reads tensors one after another, each as `TensorInfo.read` does.

    The pages of the one before are let go; see `Mapper`.
    """

    def __init__(self) -> None:
        self._mapper = Mapper()

    def read(self, info: TensorInfo) -> NDArray[Any]:
        """Maps a tensor; see `TensorInfo.read`."""
        if info.dtype not in _DTYPES:
            raise ValueError(
                f"{info.file}: tensor {info.name} has dtype {info.dtype}; "
                f"supported: {', '.join(_DTYPES)}"
            )
        data = self._mapper.map(info.file, info.offset, info.n_bytes, f"tensor {info.name}")
        return as_typed(data, _DTYPES[info.dtype], info.shape)


def to_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """Converts a float tensor exactly.

    Args:
        array: float32, float16, or bfloat16 bits as uint16.
    """
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def open_folder(folder: Path) -> dict[str, TensorInfo]:
    """Finds and validates the weight files of a checkpoint folder.

    Reads headers only. `model.safetensors` wins over an index, as it does in transformers.

    Returns:
        Tensors by their name on disk.

    Raises:
        FileNotFoundError: No safetensors checkpoint here, or a shard is missing.
        ValueError: A file is truncated or malformed, or the index disagrees with a shard.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return _open_shards(folder / INDEX_FILE)
    others = sorted(
        p.name for p in folder.iterdir() if p.suffix in {".safetensors", ".bin", ".gguf", ".pth"}
    )
    found = f"found {', '.join(others)}" if others else "found no weight files"
    raise FileNotFoundError(
        f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}; {found}. "
        "Weights are read from safetensors checkpoints"
    )


def read_index(path: Path) -> dict[str, str]:
    """Reads `model.safetensors.index.json`: tensor name -> shard file name.

    Raises:
        ValueError: It is not such an index, or it names a file outside its own folder.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path}: field `weight_map` must map tensor names to shard files; download it again"
        )
    for tensor, shard in weight_map.items():
        plain = isinstance(shard, str) and Path(shard).name == shard
        if not plain or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{path}: tensor {tensor} is said to be in {shard!r}; "
                "wanted the name of a .safetensors file in the same folder"
            )
    return weight_map


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Validates one safetensors file and lists its tensors.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); "
            f"it has {path.stat().st_size} bytes. Download or copy it again"
        ) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = TensorInfo(
            name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + begin, end - begin
        )
        itemsize = np.dtype(_DTYPES.get(entry["dtype"], "V0")).itemsize
        if itemsize and math.prod(entry["shape"]) * itemsize != end - begin:
            raise ValueError(
                f"{path}: tensor {name} takes {end - begin} bytes, which is not "
                f"{entry['dtype']} of shape {entry['shape']}; download or copy it again"
            )
    return tensors


def _open_shards(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_index(index)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file, but {index.name} names it; download it too"
            )
        shards[shard] = read_header(path)
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise ValueError(
                f"{index}: tensor {tensor} is said to be in {shard}, which does not hold it; "
                "download index and shards again, from one revision"
            )
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}
