"""The GGUF container, version 3: metadata, tensor infos, then tensors at aligned offsets.

For `convert.py`. It knows the container and nothing of models or of what a tensor's bytes mean.
The form is that of ggml's `docs/gguf.md`; everything is little-endian.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np

from bitnet_rs.writers.layout import Layout, Slot

ALIGNMENT: Final = 32
"""What readers assume where `general.alignment` is not written; it is not."""


class ValueType(IntEnum):
    """Types of metadata values, by their number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_FORMATS: Final = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
_BY_DTYPE: Final = {
    "uint8": ValueType.UINT8,
    "int8": ValueType.INT8,
    "uint16": ValueType.UINT16,
    "int16": ValueType.INT16,
    "uint32": ValueType.UINT32,
    "int32": ValueType.INT32,
    "float32": ValueType.FLOAT32,
    "bool": ValueType.BOOL,
    "uint64": ValueType.UINT64,
    "int64": ValueType.INT64,
    "float64": ValueType.FLOAT64,
}


@dataclass(frozen=True)
class Value:
    """A metadata value with its type on disk.

    Attributes:
        type: The type; of the elements, for an array.
        content: A number, bool or string; a sequence of them for an array.
        array: Whether it is an array.
    """

    type: ValueType
    content: Any
    array: bool = False


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file to be written.

    Attributes:
        name: Its name.
        type_id: Its ggml type.
        shape: Slowest axis first, as in numpy; the file has them the other way round.
        n_bytes: Its size.
    """

    name: str
    type_id: int
    shape: tuple[int, ...]
    n_bytes: int


def typed(content: Any, key: str) -> Value:
    """Gives a Python value the type that such metadata usually has.

    Integers become uint32, or int32 below zero; in lists always int32, as llama.cpp has them.
    Floats become float32; numpy arrays keep their type.

    Args:
        content: A number, bool, string, numpy array, or a list of one kind of them.
        key: Its name, for messages.

    Raises:
        ValueError: Any other type.
    """
    if isinstance(content, np.ndarray):
        found = _BY_DTYPE.get(content.dtype.name)
        if content.ndim == 1 and found is not None:
            return Value(found, content, array=True)
    elif isinstance(content, (list, tuple)):
        kinds = {type(element) for element in content}
        for kind, value_type in (
            (str, ValueType.STRING),
            (bool, ValueType.BOOL),
            (int, ValueType.INT32),
            (float, ValueType.FLOAT32),
        ):
            if kinds <= {kind}:
                return Value(value_type, content, array=True)
    elif isinstance(content, str):
        return Value(ValueType.STRING, content)
    elif isinstance(content, (bool, np.bool_)):
        return Value(ValueType.BOOL, bool(content))
    elif isinstance(content, (int, np.integer)):
        return Value(ValueType.INT32 if content < 0 else ValueType.UINT32, int(content))
    elif isinstance(content, (float, np.floating)):
        return Value(ValueType.FLOAT32, float(content))
    raise ValueError(
        f"metadata {key} is a {type(content).__name__} that GGUF cannot hold; wanted a number, a "
        "bool, a string, or a flat list or array of one of them"
    )


def compose(metadata: Mapping[str, Value], tensors: Sequence[TensorSpec]) -> Layout:
    """Lays out a file.

    Args:
        metadata: By key, in the order in which it is written.
        tensors: In the order in which they will be written.

    Raises:
        ValueError: A value does not fit its type, a string is not valid Unicode, or two tensors
            have one name.
    """
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _string(key, key)
        try:
            header += _value(value, key)
        except (struct.error, OverflowError) as error:
            raise ValueError(
                f"metadata {key} is {value.content!r:.80}, which does not fit "
                f"{value.type.name.lower()} ({error})"
            ) from None
    offsets, end = _offsets(tensors)
    for spec, offset in zip(tensors, offsets, strict=True):
        header += _string(spec.name, spec.name)
        header += struct.pack("<I", len(spec.shape))
        header += struct.pack(f"<{len(spec.shape)}Q", *reversed(spec.shape))
        header += struct.pack("<IQ", spec.type_id, offset)
    header += bytes(-len(header) % ALIGNMENT)
    slots = {
        spec.name: Slot(len(header) + offset, spec.n_bytes)
        for spec, offset in zip(tensors, offsets, strict=True)
    }
    if len(slots) != len(tensors):
        names = [spec.name for spec in tensors]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"tensor {twice} is there twice; wanted each once")
    return Layout(bytes(header), slots, len(header) + end)


def _offsets(tensors: Iterable[TensorSpec]) -> tuple[list[int], int]:
    """Offsets from the start of the data, and where the padded data ends."""
    offsets, end = [], 0
    for spec in tensors:
        offsets.append(end)
        end += spec.n_bytes + -spec.n_bytes % ALIGNMENT
    return offsets, end


def _value(value: Value, key: str) -> bytes:
    if not value.array:
        return struct.pack("<I", value.type) + _scalar(value.type, value.content, key)
    start = struct.pack("<IIQ", ValueType.ARRAY, value.type, len(value.content))
    if value.type is ValueType.STRING:
        return start + b"".join(_string(element, key) for element in value.content)
    elements = np.asarray(value.content).tolist()
    return start + struct.pack(f"<{len(elements)}{_FORMATS[value.type]}", *elements)


def _scalar(value_type: ValueType, content: Any, key: str) -> bytes:
    if value_type is ValueType.STRING:
        return _string(content, key)
    return struct.pack("<" + _FORMATS[value_type], content)


def _string(text: str, key: str) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"metadata {key} holds a lone surrogate at position {error.start}, which is no "
            "character; repair the file that it comes from"
        ) from None
    return struct.pack("<Q", len(encoded)) + encoded
