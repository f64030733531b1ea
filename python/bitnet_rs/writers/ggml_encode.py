"""Trits and scales to the bytes of ggml's ternary types.

For `convert.py`. Each encoder takes a whole matrix and yields its bytes in chunks of rows that
fit a core's cache. Two bits a weight are combined eight bytes at a time: a code is at most 2, so
shifting a 64-bit word by up to six bits never carries a bit from one byte into the next.

Sources: I2_S is bitnet.cpp's `ggml-bitnet-mad.cpp` (x86); TQ1_0 and TQ2_0 are ggml's
`quantize_row_tq1_0_ref` and `quantize_row_tq2_0_ref`, with whose output this agrees bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Trits = NDArray[np.int8]
Bytes = NDArray[np.uint8]
Halves = NDArray[np.float16]

# Weights in a chunk of rows. Measured at 4096 columns: a quarter of a million to four million are
# within a tenth of each other, whole matrices take half as long again.
_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class Encoding:
    """A ternary type of ggml.

    Attributes:
        name: Its name.
        type_id: Its number in tensor infos.
        file_type: `general.file_type` of a file whose matrices have this type.
        block: Weights of a row that are encoded together; widths are multiples of it.
        block_bytes: Bytes of a block.
        tail_bytes: Bytes after the last block of a matrix.
        block_scales: Whether each block has its own scale (float16), or the matrix has one
            (float32).
    """

    name: str
    type_id: int
    file_type: int
    block: int
    block_bytes: int
    tail_bytes: int
    block_scales: bool

    def n_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix."""
        return rows * cols // self.block * self.block_bytes + self.tail_bytes


I2_S: Final = Encoding("I2_S", 36, 40, 128, 32, 32, block_scales=False)
TQ1_0: Final = Encoding("TQ1_0", 34, 36, 256, 54, 0, block_scales=True)
TQ2_0: Final = Encoding("TQ2_0", 35, 37, 256, 66, 0, block_scales=True)

# Five trits as a fraction of 3^5, rounded up to a byte; see ggml's comment on TQ1_0. A base-3
# number below 3^5 comes back from its byte by multiplying with 3 and keeping what overflows.
_TO_BYTE: Final = np.array([-(-v * 256 // 243) for v in range(243)], np.uint8)


def encode_i2_s(trits: Trits, scale: float) -> Iterator[Bytes]:
    """I2_S as bitnet.cpp writes it on x86.

    Of 128 weights, byte p holds the codes of weights p, p + 32, p + 64 and p + 96, the first in
    the highest bits. The scale follows the last block as float32, in 32 bytes of which the rest
    is zero.

    Args:
        trits: Shape (rows, cols), cols a multiple of 128.
        scale: What to multiply by.
    """
    for codes in _codes(trits):
        yield _joined(codes.view(np.uint64).reshape(-1, 4, 4), (6, 4, 2, 0))
    tail = np.zeros(I2_S.tail_bytes, np.uint8)
    tail[:4] = np.array([scale], "<f4").view(np.uint8)
    yield tail


def encode_tq2_0(trits: Trits, scales: Halves) -> Iterator[Bytes]:
    """TQ2_0: halves of 128 weights as in I2_S but the first in the lowest bits, then the scale.

    Args:
        trits: Shape (rows, cols), cols a multiple of 256.
        scales: Of each block; broadcasts to (rows, cols // 256). A block of zeros gets scale 0,
            as it does in ggml, which has nothing but the weights to find scales in.
    """

    def quants(blocks: Bytes) -> Bytes:
        q = blocks.view(np.uint64).reshape(-1, 4, 4)
        return _joined(q, (0, 2, 4, 6)).reshape(-1, 64)

    yield from _blocks_of_256(trits, scales, quants, TQ2_0)


def encode_tq1_0(trits: Trits, scales: Halves) -> Iterator[Bytes]:
    """TQ1_0: five trits a byte, the last 16 of a block four a byte, then the scale.

    Args:
        trits: As in `encode_tq2_0`.
        scales: As in `encode_tq2_0`.
    """

    def quants(blocks: Bytes) -> Bytes:
        return np.concatenate(
            [
                _TO_BYTE[_base_3(blocks[:, :160].reshape(-1, 5, 32))],
                _TO_BYTE[_base_3(blocks[:, 160:240].reshape(-1, 5, 16))],
                # Four digits and a fifth that is zero.
                _TO_BYTE[_base_3(blocks[:, 240:].reshape(-1, 4, 4)) * np.uint8(3)],
            ],
            axis=1,
        )

    yield from _blocks_of_256(trits, scales, quants, TQ1_0)


def _joined(codes: NDArray[np.uint64], shifts: tuple[int, int, int, int]) -> Bytes:
    """Bytes of four codes each, of codes that lie eight in a word, shape (n, 4, words)."""
    joined = codes[:, 0] << np.uint64(shifts[0])
    for n in range(1, 4):
        joined |= codes[:, n] << np.uint64(shifts[n])
    return joined.view(np.uint8)


def _base_3(digits: Bytes) -> Bytes:
    """Numbers whose digits, highest first, run along axis 1. Five digits fit a byte."""
    number: Bytes = digits[:, 0].copy()
    for n in range(1, digits.shape[1]):
        number *= np.uint8(3)
        number += digits[:, n]
    return number


def _blocks_of_256(
    trits: Trits, scales: Halves, quants: Callable[[Bytes], Bytes], encoding: Encoding
) -> Iterator[Bytes]:
    rows, cols = trits.shape
    of_blocks = np.broadcast_to(scales, (rows, cols // encoding.block))
    first = 0
    for codes in _codes(trits):
        blocks = codes.reshape(-1, encoding.block)
        n_rows = len(codes)
        d = of_blocks[first : first + n_rows].reshape(-1, 1).astype("<f2")
        first += n_rows
        d[(blocks == 1).all(axis=1)] = 0
        out = np.empty((len(blocks), encoding.block_bytes), np.uint8)
        out[:, :-2] = quants(blocks)
        out[:, -2:] = d.view(np.uint8)
        yield out


def _codes(trits: Trits) -> Iterator[Bytes]:
    """Trits plus one, in chunks of rows."""
    rows, cols = trits.shape
    step = max(1, _CHUNK // cols)
    for first in range(0, rows, step):
        # As bytes, -1 is 255, and 255 + 1 is 0.
        yield np.ascontiguousarray(trits[first : first + step]).view(np.uint8) + np.uint8(1)


BLOCK_ENCODERS: Final[Mapping[str, Callable[[Trits, Halves], Iterator[Bytes]]]] = {
    TQ1_0.name: encode_tq1_0,
    TQ2_0.name: encode_tq2_0,
}
"""Encoders of types whose blocks have scales, by name."""
