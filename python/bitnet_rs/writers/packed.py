"""Packed safetensors as transformers has them: four trits a byte, the scale beside the matrix.

For `convert.py`. The `safetensors` package writes a file from tensors that are all in memory, so
the header, which is a length and a JSON object, is composed here; the package reads the file
before it gets its name. The config says `autobitlinear` and `offline`, so the scale multiplies,
and it is float32, whatever the rest of the model is: nothing is rounded.

Source: `pack_weights` and `AutoBitLinear` in transformers' `integrations/bitnet.py`.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders.families import CLASS_OF, Architecture
from bitnet_rs.loaders.names import ACTIVATIONS_FIELD
from bitnet_rs.writers.layout import Layout, Slot

# safetensors' own limit for the JSON header.
_LONGEST_HEADER: Final = 100_000_000

# Fields that belong to the checkpoint that was read: code of its own, and a form of its own.
_NOT_KEPT: Final = frozenset(
    {"auto_map", "weight_bits", "input_bits", "is_bitnet_config", "quantization_config"}
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file to be written.

    Attributes:
        name: Its name.
        dtype: Its safetensors dtype, such as `BF16`.
        shape: Its shape.
        n_bytes: Its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


def compose(tensors: Sequence[StoredTensor]) -> Layout:
    """Lays out a safetensors file.

    Args:
        tensors: In the order in which they will be written.

    Raises:
        ValueError: There are so many that no reader would take the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.n_bytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned, as the package writes them
    if len(text) > _LONGEST_HEADER:
        raise ValueError(
            f"{len(tensors)} tensors need a header of {len(text)} bytes; safetensors allows "
            f"{_LONGEST_HEADER}"
        )
    start = 8 + len(text)
    slots = {
        tensor.name: Slot(start + header[tensor.name]["data_offsets"][0], tensor.n_bytes)
        for tensor in tensors
    }
    return Layout(struct.pack("<Q", len(text)) + text, slots, start + end)


def pack(trits: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Packs a matrix.

    Bits 2i and 2i + 1 of a byte are a trit plus one of quarter i of the rows.

    Args:
        trits: Shape (rows, cols).

    Returns:
        Shape (ceil(rows / 4), cols). Where the rows are no multiple of four, the last quarter is
        short and its missing rows are zero bits.
    """
    rows, cols = trits.shape
    quarter = -(-rows // 4)
    packed = np.zeros((quarter, cols), np.uint8)
    for i in range(4):
        # As bytes, -1 is 255, and 255 + 1 is 0.
        codes = trits[i * quarter : (i + 1) * quarter].view(np.uint8) + np.uint8(1)
        packed[: len(codes)] |= codes << np.uint8(2 * i)
    return packed


def packed_config(config: Mapping[str, Any], core_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the packed form of a checkpoint.

    Args:
        config: That of the checkpoint that is converted.
        core_config: The same as the core takes it: its `model_type` is the architecture that
            runs, and its `tie_word_embeddings` what the tensors are.
    """
    kept = {key: value for key, value in config.items() if key not in _NOT_KEPT}
    arch: Architecture = core_config["model_type"]
    kept |= {"architectures": [CLASS_OF[arch]], "model_type": arch}
    if core_config["activations"] != "int8":
        kept[ACTIVATIONS_FIELD] = core_config["activations"]
    return kept | {
        "tie_word_embeddings": core_config["tie_word_embeddings"],
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": None,
        },
    }
