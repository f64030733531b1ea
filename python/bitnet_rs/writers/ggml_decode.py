"""The bytes of ggml's ternary types back to trits and scales: the check of what was written.

For `convert.py`, which reads every file back before it gives it its name. Apart from the
encoders, and written from the definitions of the types rather than by turning those around, so
that one mistake cannot be in both.
"""

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.writers.ggml_encode import I2_S, TQ1_0, TQ2_0, Encoding

Bytes = NDArray[np.uint8]
Trits = NDArray[np.int8]


def decode_rows(data: Bytes, encoding: Encoding, cols: int) -> tuple[Trits, Bytes]:
    """Decodes whole rows of a matrix.

    Args:
        data: Their blocks, without the matrix's tail.
        encoding: Their type.
        cols: Columns.

    Returns:
        Codes less one, shape (rows, cols): trits, unless the bytes are damaged, when two-bit
        types can give 2. And the scale of each block as the two bytes of a float16, shape (rows,
        blocks, 2), or (rows, blocks, 0) in types without.
    """
    blocks = data.reshape(-1, encoding.block_bytes)
    n_blocks = cols // encoding.block
    if encoding == I2_S:
        trits = _two_bits(blocks, (6, 4, 2, 0))
        return trits.reshape(-1, cols), np.empty((len(blocks) // n_blocks, n_blocks, 0), np.uint8)
    if encoding == TQ2_0:
        trits = _two_bits(blocks[:, :64].reshape(-1, 32), (0, 2, 4, 6))
    elif encoding == TQ1_0:
        parts = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
        trits = np.concatenate([_digits(blocks[:, a:b], n) for a, b, n in parts], axis=1)
    else:
        raise ValueError(f"type {encoding.name} has no decoder; wanted I2_S, TQ1_0 or TQ2_0")
    return trits.reshape(-1, cols), blocks[:, -2:].reshape(-1, n_blocks, 2)


def _digits(data: Bytes, n_digits: int) -> Trits:
    """The first base-3 digits of bytes, less one.

    Digit n of byte b is the whole part of 3 x / 256, where x is b * 3^n mod 256: 0 up to 85, 1 up
    to 170, else 2.
    """
    digits = []
    for n in range(n_digits):
        x = data * np.uint8(3**n)
        digits.append((x > 85).view(np.int8) + (x > 170).view(np.int8) - np.int8(1))
    return np.concatenate(digits, axis=1)


def _two_bits(groups: Bytes, shifts: tuple[int, ...]) -> Trits:
    parts = [(groups >> np.uint8(shift)) & np.uint8(3) for shift in shifts]
    codes: Trits = np.stack(parts, axis=1).view(np.int8)
    return codes - np.int8(1)
