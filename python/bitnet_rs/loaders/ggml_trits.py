"""Ternary block types of ggml and its forks: from packed bytes to trits and scales.

For `ggml_types.py`, which knows which type a tensor has and checks sizes. Apart because here is
all the arithmetic: each layout is a function from bytes to codes 0, 1, 2 for the trits -1, 0, +1,
and a function that finds the scales.

A layout is a sequence of units: a block with its scale, a row, four interleaved rows, or a group
of a matrix that has one scale. Units are unpacked some at a time, so that temporaries stay small
and in a cache. Codes of two bits are unpacked eight to a machine word: two billion weights a second
on one core, and one billion of those that are packed five a byte.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# Weights that are unpacked at once. With fewer, numpy's calls take the time: 2¹⁶ were half as fast
# on an EPYC with 512 KB of second-level cache, 2¹⁴ a sixth. From 2¹⁹ to 2²¹ nothing changed, and
# temporaries only grow.
_AT_ONCE: Final = 1 << 19

_HIGH_FIRST: Final = (6, 4, 2, 0)
_LOW_FIRST: Final = (0, 2, 4, 6)


class DamagedError(ValueError):
    """Bytes that are no ternary weights. The message wants the tensor's name before it."""


def _no_trit(at: int, cols: int, what: str) -> NoReturn:
    row, col = divmod(at, cols)
    raise DamagedError(f"holds {what} at row {row}, column {col}, which is no ternary weight")


@dataclass(frozen=True)
class Units:
    """How the bytes of a matrix fall into units.

    Attributes:
        n_bytes: Bytes of a unit.
        n_weights: Weights of a unit, consecutive in the matrix once they are unpacked.
        unpack: Writes the codes of units, (n, n_weights), from their bytes, (n, n_bytes).
        scales: Finds the scales of units, (n, scales of a unit), each for equally many
            consecutive weights; None where the matrix has one scale, elsewhere.
    """

    n_bytes: int
    n_weights: int
    unpack: Callable[[Bytes, Bytes], None]
    scales: Callable[[Bytes], NDArray[np.float32]] | None = None


def unpack(data: Bytes, shape: tuple[int, int], units: Units) -> NDArray[np.int8]:
    """Unpacks a matrix.

    A group whose scale is 0 gets trits 0, whatever its codes say; one whose scale is negative has
    its trits negated (its scale is then the absolute value, see `unit_scales`).

    Args:
        data: As many bytes as the units of the matrix take, or more.
        shape: (rows, cols).
        units: Their layout; units divide the matrix.

    Raises:
        DamagedError: A code is no trit, or a scale is NaN or infinite.
    """
    rows, cols = shape
    n_units = rows * cols // units.n_weights
    packed = data[: n_units * units.n_bytes].reshape(n_units, units.n_bytes)
    trits = np.empty((n_units, units.n_weights), np.int8)
    step = max(1, _AT_ONCE // units.n_weights)
    for begin in range(0, n_units, step):
        chunk = packed[begin : begin + step]
        out = trits[begin : begin + step]
        codes = out.view(np.uint8)
        units.unpack(chunk, codes)
        if codes.max() > 2:
            at = int(np.argmax(codes.reshape(-1) > 2))
            code = int(codes.reshape(-1)[at])
            _no_trit(begin * units.n_weights + at, cols, f"code {code}")
        np.subtract(codes, 1, out=codes)  # 0 wraps to the byte of -1
        if units.scales is not None:
            scales = units.scales(chunk)
            _check_finite(scales, begin * scales.shape[1])
            _fold(out, scales)
    return trits.reshape(shape)


def unit_scales(data: Bytes, n_units: int, units: Units) -> NDArray[np.float32]:
    """Absolute values of the scales of a matrix, one for each group of weights, in order.

    Raises:
        DamagedError: A scale is NaN or infinite.
    """
    assert units.scales is not None
    packed = data[: n_units * units.n_bytes].reshape(n_units, units.n_bytes)
    scales = units.scales(packed)
    _check_finite(scales, 0)
    return np.abs(scales).reshape(-1)


def _check_finite(scales: NDArray[np.float32], first: int) -> None:
    finite = np.isfinite(scales).reshape(-1)
    if not finite.all():
        at = int(np.argmin(finite))
        raise DamagedError(
            f"has the scale {scales.reshape(-1)[at]} (number {first + at + 1}); wanted a finite one"
        )


def _fold(trits: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
    odd = (scales <= 0).reshape(-1)
    if odd.any():
        groups = trits.reshape(len(odd), -1)
        groups[odd] *= np.sign(scales).reshape(-1, 1)[odd].astype(np.int8)


# --- scales ---------------------------------------------------------------------------------------


def _floats(units: Bytes, *, at: int, n: int, dtype: str) -> NDArray[np.float32]:
    """`n` little-endian floats at a byte of each unit, widened exactly."""
    size = n * np.dtype(dtype).itemsize
    stored = np.ascontiguousarray(units[:, at : at + size]).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs: they are refused by who asked
        return stored.astype(np.float32)


def _half(at: int) -> Callable[[Bytes], NDArray[np.float32]]:
    return partial(_floats, at=at, n=1, dtype="<f2")


# --- two bits a weight ----------------------------------------------------------------------------


def _lanes(packed: Bytes, codes: Bytes, *, lane: int, shifts: Sequence[int]) -> None:
    """Groups of `lane` bytes: code k of byte p is weight k·lane + p of the group's 4·lane."""
    wide = packed.reshape(-1, lane).view(np.uint64)
    out = codes.reshape(-1, 4 * lane).view(np.uint64)
    n = lane // 8
    for k, shift in enumerate(shifts):
        for word in range(n):  # columns of words: numpy is slow where inner loops are short
            np.right_shift(wide[:, word], np.uint64(shift), out=out[:, k * n + word])
    np.bitwise_and(out, np.uint64(0x0303030303030303), out=out)


def _group(lane: int, shifts: Sequence[int]) -> Units:
    return Units(lane, 4 * lane, partial(_lanes, lane=lane, shifts=shifts))


def _four_rows(packed: Bytes, codes: Bytes) -> None:
    """A byte holds one column of four rows, the first one highest."""
    cols = packed.shape[1]
    for k, shift in enumerate(_HIGH_FIRST):
        row = codes[:, k * cols : (k + 1) * cols]
        np.right_shift(packed, np.uint8(shift), out=row)
        np.bitwise_and(row, np.uint8(3), out=row)


def i2_s(layout: str, cols: int) -> Units:
    """I2_S of bitnet.cpp: groups without scales; the matrix has one, after them.

    Args:
        layout: `x86`, groups of 128 weights in 32 bytes; `arm`, 64 in 16; `rows4`, four rows.
        cols: Columns of the matrix.
    """
    if layout == "rows4":
        return Units(cols, 4 * cols, _four_rows)
    return _group({"x86": 32, "arm": 16}[layout], _HIGH_FIRST)


def _tq2_0(units: Bytes, codes: Bytes) -> None:
    _lanes(np.ascontiguousarray(units[:, :64]), codes, lane=32, shifts=_LOW_FIRST)


def _q2_0(units: Bytes, codes: Bytes) -> None:
    """Four consecutive weights a byte, the first one lowest."""
    spread = codes.view("<u4")
    np.copyto(spread, units[:, 2:])
    # The high half of a byte goes two bytes up, then of each pair the higher code one byte up.
    np.bitwise_or(spread, spread << 12, out=spread)
    np.bitwise_and(spread, 0x000F000F, out=spread)
    np.bitwise_or(spread, spread << 6, out=spread)
    np.bitwise_and(spread, 0x03030303, out=spread)


def _iq2_bn(units: Bytes, codes: Bytes) -> None:
    _lanes(np.ascontiguousarray(units[:, 4:]), codes, lane=16, shifts=_LOW_FIRST)


def _iq2_bn_r4(units: Bytes, codes: Bytes) -> None:
    """Four rows, four bytes of each in turn; 16 columns are four bytes of four codes."""
    n, n_bytes = units.shape
    wide = np.ascontiguousarray(units[:, 16:]).view(np.uint32).reshape(n, (n_bytes - 16) // 16, 4)
    out = codes.view(np.uint32).reshape(n, 4, -1, 4)  # unit, row, 16 columns, 4 columns
    for row in range(4):
        for k, shift in enumerate(_LOW_FIRST):
            np.right_shift(wide[:, :, row], np.uint32(shift), out=out[:, row, :, k])
    np.bitwise_and(out, np.uint32(0x03030303), out=out)


# --- five trits a byte ----------------------------------------------------------------------------


def _digit(packed: Bytes, power: int) -> Bytes:
    """The digit of a base-3 fraction of 8 bits that multiplying by `power` brings to the front.

    A byte holds ceil(256·v / 243) for the five-digit v. Times a power of 3, the part below 256 is
    the fraction that starts with the digit wanted; the digit is 3·fraction / 256, rounded down.
    """
    fraction = packed * np.uint8(power)
    digit = (fraction >= 86).view(np.uint8)  # 3·86 > 256
    return np.add(digit, (fraction >= 171).view(np.uint8), out=digit)  # 3·171 > 512


def _tq1_0(units: Bytes, codes: Bytes) -> None:
    first = np.ascontiguousarray(units[:, :32])
    second = np.ascontiguousarray(units[:, 32:48])
    third = np.ascontiguousarray(units[:, 48:52])
    for n, power in enumerate((1, 3, 9, 27, 81)):
        codes[:, 32 * n : 32 * n + 32] = _digit(first, power)
        codes[:, 160 + 16 * n : 176 + 16 * n] = _digit(second, power)
        if n < 4:
            codes[:, 240 + 4 * n : 244 + 4 * n] = _digit(third, power)


def _iq1_bn(units: Bytes, codes: Bytes) -> None:
    """64 weights in 13 bytes: of each 16 three bytes of five, and the rest share the last one."""
    blocks = np.ascontiguousarray(units[:, 2:]).reshape(-1, 13)
    packed = np.ascontiguousarray(blocks[:, :12]).reshape(-1, 3)  # of 16 weights
    last = np.ascontiguousarray(blocks[:, 12])
    out = codes.reshape(-1, 16)
    # Unlike TQ1_0 the first weight is the lowest digit.
    for j, power in enumerate((81, 27, 9, 3, 1)):
        digits = _digit(packed, power)
        for k in range(3):
            out[:, 5 * k + j] = digits[:, k]
        if j < 4:
            out[j::4, 15] = _digit(last, power)


# --- a sign, or three of four ---------------------------------------------------------------------


def _q1_0(units: Bytes, codes: Bytes) -> None:
    bits = np.unpackbits(units[:, 2:], axis=1, bitorder="little")
    np.left_shift(bits, 1, out=codes)  # -1 or +1, never 0


def _three_of_four() -> Bytes:
    """The 32 patterns of STQ1_0: four codes of two bits, exactly one of them 0.

    The index is the sign of the first weight that is not 0 (bit 4: negative), where the 0 is (bits
    2 and 3), and whether the second (bit 0) and third (bit 1) differ from the first in sign.
    """
    patterns = np.empty(32, np.uint8)
    for index in range(32):
        first = -1 if index >> 4 else 1
        signs = [first, *(-first if index >> bit & 1 else first for bit in (0, 1))]
        signs.insert(index >> 2 & 3, 0)
        patterns[index] = sum((sign + 1) << 2 * place for place, sign in enumerate(signs))
    return patterns


_STQ1_0: Final = _three_of_four()


def _stq1_0(units: Bytes, codes: Bytes) -> None:
    """64 groups of four weights, 16 apart: a half-byte each, and a bit for the first sign."""
    index = np.empty((len(units), 64), np.uint8)
    index[:, 0::2] = units[:, :32] & 15
    index[:, 1::2] = units[:, :32] >> 4
    index |= np.unpackbits(units[:, 32:40], axis=1, bitorder="little") << 4
    _lanes(_STQ1_0[index], codes, lane=16, shifts=_LOW_FIRST)


# --- which is which -------------------------------------------------------------------------------

_BLOCKS: Final = {
    "TQ1_0": Units(54, 256, _tq1_0, _half(52)),
    "TQ2_0": Units(66, 256, _tq2_0, _half(64)),
    "Q1_0": Units(18, 128, _q1_0, _half(0)),
    "Q1_0_g32": Units(6, 32, _q1_0, _half(0)),
    "Q2_0": Units(18, 64, _q2_0, _half(0)),
    "Q2_0_g128": Units(34, 128, _q2_0, _half(0)),
    "STQ1_0": Units(42, 256, _stq1_0, _half(40)),
}


def units_of(name: str, cols: int) -> Units:
    """The layout of a type whose units hold their scales.

    Args:
        name: The type.
        cols: Columns of the matrix; where a scale is a row's, the unit is one row or four.
    """
    if name == "IQ1_BN":
        return Units(2 + cols // 64 * 13, cols, _iq1_bn, _half(0))
    if name == "IQ2_BN":
        return Units(4 + cols // 4, cols, _iq2_bn, partial(_floats, at=0, n=1, dtype="<f4"))
    if name == "IQ2_BN_R4":
        four = partial(_floats, at=0, n=4, dtype="<f4")
        return Units(16 + cols, 4 * cols, _iq2_bn_r4, four)
    return _BLOCKS[name]


# --- tiles of look-up tables ----------------------------------------------------------------------


def _pairs() -> NDArray[np.int8]:
    """Four trits of each byte that holds two pairs, the first one in the high half.

    A pair (a, b) has the code 3·a + b + 4. 9 to 15 mean nothing: they become 2.
    """
    code = np.arange(16)
    pair = np.stack([code // 3 - 1, code % 3 - 1], axis=1)
    pair[9:] = 2
    four = np.concatenate([np.repeat(pair, 16, axis=0), np.tile(pair, (16, 1))], axis=1)
    return four.astype(np.int8)


def _triples() -> NDArray[np.int8]:
    """Three trits of each code of five bits: a sign over four bits of magnitude.

    A triple (a, b, c) has the magnitude |9·a + 3·b + c|. 14 and 15 mean nothing: they become 2.
    """
    values = np.arange(14)
    first = (values + 4) // 9
    second = (values - 9 * first + 1) // 3
    triple = np.full((32, 3), 2)
    triple[:14] = np.stack([first, second, values - 9 * first - 3 * second], axis=1)
    triple[16:30] = -triple[:14]
    return triple.astype(np.int8)


_PAIRS: Final = _pairs()
_TRIPLES: Final = _triples()


def tl1(data: Bytes, shape: tuple[int, int], tile: tuple[int, int, int]) -> NDArray[np.int8]:
    """Unpacks TL1: two weights a half-byte, in the order in which ARM kernels look them up.

    Tiles of (BM, BK) weights follow each other, rows of tiles one after another; in each, blocks of
    bm rows and 256 / bm columns; in those, 16 rows and four columns, a byte for each row.

    Args:
        data: rows · cols / 4 bytes, or more.
        shape: (rows, cols).
        tile: (BM, BK, bm), which divide the shape.

    Raises:
        DamagedError: A code is no pair of trits.
    """
    rows, cols = shape
    high, wide, low = tile
    by = 256 // low
    codes = data[: rows * cols // 4].reshape(
        (rows // high, cols // wide, high // low, wide // by, low // 16, by // 4, 16)
    )
    trits = np.empty(shape, np.int8)
    out = trits.view(np.uint32).reshape(
        (rows // high, high // low, low // 16, 16, cols // wide, wide // by, by // 4)
    )
    table = _PAIRS.view(np.uint32).reshape(-1)
    for i in range(rows // high):
        out[i] = table[codes[i]].transpose(1, 3, 5, 0, 2, 4)
    _check_decoded(trits)
    return trits


def tl2(data: Bytes, shape: tuple[int, int], tile: tuple[int, int, int]) -> NDArray[np.int8]:
    """Unpacks TL2: three weights in five bits, in the order in which x86 kernels look them up.

    As many columns as tiles of BK hold are triples: half-bytes of magnitudes, then the signs. The
    columns that are left are pairs as in TL1, in tiles 32 wide.

    Args:
        data: The bytes of magnitudes, signs and pairs, or more.
        shape: (rows, cols).
        tile: (BM, BK, 32), which fit the shape.

    Raises:
        DamagedError: A code is no triple, or no pair, of trits.
    """
    rows, cols = shape
    high, wide, _ = tile
    split = cols // wide * wide
    n_magnitudes = rows * split // 6
    n_signs = rows * split // 24
    trits = np.empty(shape, np.int8)

    # A byte holds two triples of a row. Blocks are 32 rows and six columns.
    packed = _rows_of_tiles(data[:n_magnitudes], rows, split, (high, wide, 6))
    codes = np.empty((rows, split // 6, 2), np.uint8)
    np.right_shift(packed, 4, out=codes[:, :, 0])
    np.bitwise_and(packed, 15, out=codes[:, :, 1])
    # A sign word holds eight triples of row r from its highest bit down, in between those of row
    # r + 16. Blocks are 32 rows, of which 16 have a word, and 24 columns.
    words = data[n_magnitudes : n_magnitudes + n_signs]
    bits = np.unpackbits(words.reshape(-1, 2)[:, ::-1], axis=1)
    bits = bits.reshape((rows // high, split // wide, high // 32, wide // 24, 16, 8, 2))
    codes |= bits.transpose(0, 2, 6, 4, 1, 3, 5).reshape(codes.shape) << 4
    trits[:, :split] = _TRIPLES[codes.reshape(rows, -1)].reshape(rows, split)

    if split < cols:
        begin = n_magnitudes + n_signs
        rest = data[begin : begin + rows * (cols - split) // 4]
        packed = _rows_of_tiles(rest, rows, cols - split, (high, 32, 4))
        trits[:, split:] = _PAIRS[packed].reshape(rows, -1)
    _check_decoded(trits)
    return trits


def _rows_of_tiles(data: Bytes, rows: int, cols: int, tile: tuple[int, int, int]) -> Bytes:
    """Bytes of TL2 as rows of a matrix: each holds `by` columns, and blocks are 32 rows high.

    A block's rows come by eights, the second and third eight exchanged.
    """
    high, wide, by = tile
    blocks = data.reshape((rows // high, cols // wide, high // 32, wide // by, 4, 8))
    return blocks[:, :, :, :, [0, 2, 1, 3]].transpose(0, 2, 4, 5, 1, 3).reshape(rows, cols // by)


def _check_decoded(trits: NDArray[np.int8]) -> None:
    if trits.max() > 1:
        _no_trit(int(np.argmax(trits > 1)), trits.shape[1], "a code without meaning")


def tl2_stream(shape: tuple[int, int], wide: int) -> int:
    """Bytes of magnitudes, signs and pairs of TL2 with tiles `wide` columns wide."""
    rows, cols = shape
    split = cols // wide * wide
    return math.ceil(rows * split * 5 / 24) + rows * (cols - split) // 4
