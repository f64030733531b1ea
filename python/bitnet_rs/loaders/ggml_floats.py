"""Float block types of ggml: from packed bytes to float32.

For `ggml_types.py`. Apart from `ggml_trits.py` because these hold embeddings, heads and norms,
which are never ternary. The definitions are the `dequantize_row_*` functions of ggml's
`ggml-quants.c`: the same float32 operations in the same order, so that every bit is ggml's.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Weights that are dequantized at once; see `ggml_trits._AT_ONCE`. These temporaries are wider.
_AT_ONCE: Final = 1 << 18


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at a byte of each block, (n, 1), widened."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(n, b) bytes to (n, 2·b): the low halves of all, then the high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """A bit of each of 32 weights, at its place above a half-byte."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8)) * _half(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    return _nibbles(blocks[:, 4:]) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (codes.astype(np.int8) - np.int8(16)) * _half(blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8) * _half(blocks, 0)


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Scales and minima of the eight parts of a block, six bits each, from 12 bytes."""
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    minima = np.concatenate([mid & 63, high >> 4 | mid >> 6 << 4], axis=1)
    return scales, minima


def _parts_of_32(blocks: Bytes, codes: Bytes) -> Floats:
    """Q4_K and Q5_K: eight parts of 32 weights, each with a scale and a minimum.

    Args:
        blocks: Starting with the factors of scales and minima, then both in six bits.
        codes: (n, 8, 32).
    """
    scales, minima = _six_bits(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales)[:, :, np.newaxis]
    minimum = (_half(blocks, 2) * minima)[:, :, np.newaxis]
    return scale * codes - minimum


def _q4_k(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 16:].reshape(-1, 32))
    return _parts_of_32(blocks, codes.reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32)
    # Bit k of byte p is the fifth bit of weight p of part k.
    part = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    high = blocks[:, 16:48].reshape(-1, 1, 32) >> part & np.uint8(1)
    return _parts_of_32(blocks, codes | high << np.uint8(4))


def _q6_k(blocks: Bytes) -> Floats:
    # Each half of 128 weights has 64 bytes of half-bytes and 32 bytes of pairs of high bits.
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 4, 32)
    shift = np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    high = blocks[:, 128:192].reshape(-1, 1, 32) >> shift & 3
    codes = (low | high << 4).astype(np.int8) - np.int8(32)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return scales[:, :, np.newaxis] * codes.reshape(-1, 16, 16)


# Weights and bytes of a block, the bytes that hold float16 factors, and the function.
_QUANTS: Final[dict[str, tuple[int, int, tuple[int, ...], Callable[[Bytes], Floats]]]] = {
    "Q4_0": (32, 18, (0,), _q4_0),
    "Q4_1": (32, 20, (0, 2), _q4_1),
    "Q5_0": (32, 22, (0,), _q5_0),
    "Q5_1": (32, 24, (0, 2), _q5_1),
    "Q8_0": (32, 34, (0,), _q8_0),
    "Q4_K": (256, 144, (0, 2), _q4_k),
    "Q5_K": (256, 176, (0, 2), _q5_k),
    "Q6_K": (256, 210, (208,), _q6_k),
}


def dequantize(data: Bytes, shape: tuple[int, ...], name: str) -> Floats:
    """Dequantizes a tensor.

    Args:
        data: As many bytes as its blocks take.
        shape: Its shape; blocks divide the last dimension.
        name: Its type, such as `Q8_0`.

    Raises:
        ValueError: A factor is NaN or infinite. The message wants the tensor's name before it.
    """
    weights, n_bytes, factors, function = _QUANTS[name]
    blocks = data.reshape(-1, n_bytes)
    out = np.empty((len(blocks), weights), np.float32)
    step = _AT_ONCE // weights
    for begin in range(0, len(blocks), step):
        chunk = blocks[begin : begin + step]
        for at in factors:
            finite = np.isfinite(_half(chunk, at))
            if not finite.all():
                block = begin + int(np.argmin(finite))
                raise ValueError(f"has a factor that is not finite in block {block}")
        out[begin : begin + step] = function(chunk).reshape(-1, weights)
    return out.reshape(shape)
