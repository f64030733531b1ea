"""Writes GGUF files: the container, and every ternary block type that the loaders read.

For tests of the loaders and for the fuzzer. Written from the formats' definitions, weight by
weight, where the loaders work on whole words, so that a mistake cannot hide in both.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Trits = NDArray[np.int8]

# Value types by their names: id, and code of struct.
SCALARS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"),
    "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "B"), "u64": (10, "Q"), "i64": (11, "q"),
    "f64": (12, "d"),
}  # fmt: skip
# The codebook as it stands in llama.cpp's pull request 22836.
STQ1_0_CODEBOOK = bytes.fromhex(
    "A9 89 29 09 A6 86 26 06 9A 92 1A 12 6A 62 4A 42 01 21 81 A1 04 24 84 A4 10 18 90 98 40 48 60 68"
)


@dataclass(frozen=True)
class Typed:
    """A metadata value with its type: a key of `SCALARS`, `str`, or `[...]` for arrays of one."""

    type: str
    value: Any


@dataclass(frozen=True)
class Stored:
    """A tensor: its type id, numpy shape and bytes."""

    type_id: int
    shape: tuple[int, ...]
    data: bytes


def gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    *,
    version: int = 3,
    alignment: int = 32,
    pad_last: bool = True,
) -> bytes:
    """The bytes of a GGUF file. Plain ints become u32, floats f32, strings str, bools bool."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += string(key) + encode_value(value)
    offset, body = 0, b""
    for i, (name, tensor) in enumerate(tensors.items()):
        out += string(name) + struct.pack("<I", len(tensor.shape))
        out += b"".join(struct.pack("<Q", n) for n in reversed(tensor.shape))
        out += struct.pack("<IQ", tensor.type_id, offset)
        data = tensor.data
        if pad_last or i < len(tensors) - 1:
            data += b"\0" * (-len(data) % alignment)
        body += data
        offset += len(data)
    return out + b"\0" * (-len(out) % alignment) + body if tensors else out


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Path:
    path.write_bytes(gguf(metadata, tensors))
    return path


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def encode_value(value: Any) -> bytes:
    if not isinstance(value, Typed):
        kinds = {bool: "bool", int: "u32", float: "f32", str: "str"}
        kind = "[str]" if isinstance(value, list) else kinds[type(value)]
        value = Typed(kind, value)
    if value.type == "str":
        return struct.pack("<I", 8) + string(value.value)
    if value.type == "[str]":
        body = b"".join(map(string, value.value))
        return struct.pack("<IIQ", 9, 8, len(value.value)) + body
    if value.type.startswith("["):
        type_id, code = SCALARS[value.type[1:-1]]
        head = struct.pack("<IIQ", 9, type_id, len(value.value))
        return head + struct.pack(f"<{len(value.value)}{code}", *value.value)
    type_id, code = SCALARS[value.type]
    return struct.pack(f"<I{code}", type_id, value.value)


# --- ternary matrices -----------------------------------------------------------------------------
# Each takes trits of (rows, cols) and scales, and gives the bytes of the tensor.


def _place(codes: NDArray[Any], at: NDArray[Any], shift: NDArray[Any], n_bytes: int) -> Bytes:
    """Ors each code into its byte."""
    out = np.zeros(n_bytes, np.uint8)
    np.bitwise_or.at(out, at, (codes << shift).astype(np.uint8))
    return out


def _codes(trits: Trits) -> NDArray[np.int64]:
    return trits.reshape(-1).astype(np.int64) + 1


def i2_s(trits: Trits, scale: float, layout: str = "x86") -> bytes:
    rows, cols = trits.shape
    i = np.arange(rows * cols)
    if layout == "rows4":
        row, col = i // cols, i % cols
        at, shift = row // 4 * cols + col, 6 - 2 * (row % 4)
    else:
        lane = {"x86": 32, "arm": 16}[layout]
        at, shift = i // (4 * lane) * lane + i % lane, 6 - 2 * (i // lane % 4)
    body = _place(_codes(trits), at, shift, rows * cols // 4)
    return body.tobytes() + struct.pack("<f", scale) + b"\xaa" * 28


def _with_half(blocks: Bytes, scales: NDArray[Any], *, first: bool) -> bytes:
    half = scales.reshape(-1, 1).astype("<f2").view(np.uint8)
    return np.concatenate([half, blocks] if first else [blocks, half], axis=1).tobytes()


def tq2_0(trits: Trits, scales: NDArray[Any]) -> bytes:
    n = trits.size // 256
    i = np.arange(trits.size)
    block, half, lane, byte = i // 256, i // 128 % 2, i // 32 % 4, i % 32
    body = _place(_codes(trits), 64 * block + 32 * half + byte, 2 * lane, 64 * n)
    return _with_half(body.reshape(n, 64), scales, first=False)


def q2_0(trits: Trits, scales: NDArray[Any], group: int = 64) -> bytes:
    i = np.arange(trits.size)
    body = _place(_codes(trits), i // 4, 2 * (i % 4), trits.size // 4)
    return _with_half(body.reshape(-1, group // 4), scales, first=True)


def q1_0(trits: Trits, scales: NDArray[Any], group: int = 128) -> bytes:
    i = np.arange(trits.size)
    body = _place(_codes(trits) // 2, i // 8, i % 8, trits.size // 8)
    return _with_half(body.reshape(-1, group // 8), scales, first=True)


def _base3(digits: Sequence[int]) -> int:
    """Five base-3 digits, the first one highest, as a fraction of 256 rounded up."""
    value = 0
    for digit in digits:
        value = 3 * value + int(digit)
    return -(-256 * value // 243)


def tq1_0(trits: Trits, scales: NDArray[Any]) -> bytes:
    blocks = trits.reshape(-1, 256).astype(int) + 1
    out = np.empty((len(blocks), 52), np.uint8)
    for b, x in enumerate(blocks):
        for m in range(32):
            out[b, m] = _base3([x[m + 32 * n] for n in range(5)])
        for m in range(16):
            out[b, 32 + m] = _base3([x[160 + m + 16 * n] for n in range(5)])
        for j in range(4):
            out[b, 48 + j] = _base3([*(x[240 + j + 4 * m] for m in range(4)), 0])
    return _with_half(out, scales, first=False)


def stq1_0(trits: Trits, scales: NDArray[Any]) -> bytes:
    """Of each group of four, exactly one is 0: `sparse_trits` makes such."""
    index_of = {pattern: i for i, pattern in enumerate(STQ1_0_CODEBOOK)}
    blocks = trits.reshape(-1, 256).astype(int) + 1
    out = np.zeros((len(blocks), 40), np.uint8)
    for b, x in enumerate(blocks):
        for g in range(64):
            lanes = [x[g // 16 * 64 + g % 16 + 16 * p] for p in range(4)]
            index = index_of[sum(int(lane) << 2 * p for p, lane in enumerate(lanes))]
            out[b, g // 2] |= (index & 15) << 4 * (g % 2)
            out[b, 32 + g // 8] |= (index >> 4) << (g % 8)
    return _with_half(out, scales, first=False)


def iq1_bn(trits: Trits, scales: NDArray[Any]) -> bytes:
    rows, cols = trits.shape
    out = b""
    for row, scale in zip(trits.astype(int) + 1, scales.reshape(-1), strict=True):
        out += np.array(scale, "<f2").tobytes()
        for x in row.reshape(-1, 4, 16):
            for i, k in product(range(4), range(3)):
                out += bytes([_base3(x[i, 5 * k : 5 * k + 5][::-1])])
            out += bytes([_base3([x[3, 15], x[2, 15], x[1, 15], x[0, 15]])])
    assert len(out) == rows * (2 + cols // 64 * 13)
    return out


def iq2_bn(trits: Trits, scales: NDArray[Any]) -> bytes:
    rows, cols = trits.shape
    i = np.arange(trits.size)
    body = _place(_codes(trits), i // 64 * 16 + i % 16, 2 * (i // 16 % 4), trits.size // 4)
    head = scales.reshape(rows, 1).astype("<f4").view(np.uint8)
    return np.concatenate([head, body.reshape(rows, cols // 4)], axis=1).tobytes()


def iq2_bn_r4(trits: Trits, scales: NDArray[Any]) -> bytes:
    rows, cols = trits.shape
    row, col = np.divmod(np.arange(trits.size), cols)
    ib, k, c = col // 64, row % 4, col % 64
    el, s, i = c // 16, c // 4 % 4, c % 4
    at = row // 4 * cols + 64 * ib + 4 * k + i + 16 * el
    body = _place(_codes(trits), at, 2 * s, trits.size // 4)
    head = scales.reshape(rows // 4, 4).astype("<f4").view(np.uint8)
    return np.concatenate([head, body.reshape(rows // 4, cols)], axis=1).tobytes()


def tl1(trits: Trits, scale: float, tile: tuple[int, int, int]) -> bytes:
    rows, cols = trits.shape
    high, wide, low = tile
    by = 256 // low
    out = bytearray()
    for i, j in product(range(0, rows, high), range(0, cols, wide)):
        for ii, jj in product(range(i, i + high, low), range(j, j + wide, by)):
            for iii, jjj in product(range(ii, ii + low, 16), range(jj, jj + by, 4)):
                for row in trits[iii : iii + 16, jjj : jjj + 4].astype(int):
                    out.append(_pair(row[0], row[1]) << 4 | _pair(row[2], row[3]))
    return bytes(out) + struct.pack("<f", scale) + b"\0" * 28


def _pair(a: int, b: int) -> int:
    return int(3 * a + b + 4)


def tl2(trits: Trits, scale: float, tile: tuple[int, int, int]) -> bytes:
    rows, cols = trits.shape
    high, wide, _ = tile
    split = cols // wide * wide
    triple = trits[:, :split].reshape(rows, -1, 3).astype(int) @ np.array([9, 3, 1])
    swizzle = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
    out = bytearray()
    for i, j in product(range(0, rows, high), range(0, split, wide)):
        for ii, jj in product(range(i, i + high, 32), range(j, j + wide, 6)):
            for r in swizzle:
                a, b = np.abs(triple[ii + r, jj // 3 : jj // 3 + 2])
                out.append(int(a << 4 | b))
    for i, j in product(range(0, rows, high), range(0, split, wide)):
        for ii, jj in product(range(i, i + high, 32), range(j, j + wide, 24)):
            for r in range(16):
                word = 0
                for t in range(8):
                    for row in (ii + r, ii + r + 16):
                        word = word << 1 | int(triple[row, jj // 3 + t] < 0)
                out += struct.pack("<H", word)
    for i, j in product(range(0, rows, high), range(split, cols, 32)):
        for ii, jj in product(range(i, i + high, 32), range(j, j + 32, 4)):
            for r in swizzle:
                a, b, c, d = trits[ii + r, jj : jj + 4].astype(int)
                out.append(_pair(a, b) << 4 | _pair(c, d))
    # The size that bitnet.cpp declares, whatever the tiles take.
    n_bytes = (cols - 256) * rows // 3 * 5 // 8 + 256 * rows // 2 * 4 // 8
    n_bytes = -(-n_bytes // 32) * 32
    assert len(out) <= n_bytes
    return bytes(out).ljust(n_bytes, b"\0") + struct.pack("<f", scale) + b"\0" * 28


def sparse_trits(rng: np.random.Generator, rows: int, cols: int) -> Trits:
    """Trits that STQ1_0 can hold: of weights g, g + 16, g + 32, g + 48 of each 64 one is 0."""
    groups = rng.choice(np.array([-1, 1], np.int8), (rows * cols // 64, 4, 16))
    zero = rng.integers(0, 4, (rows * cols // 64, 1, 16))
    np.put_along_axis(groups, zero, 0, axis=1)
    return groups.reshape(rows, cols)
