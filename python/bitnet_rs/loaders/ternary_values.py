"""Float matrices that are ternary already: every value is -s, 0 or +s, with some scales s.

For checkpoints that were "unpacked" or "dequantized" for engines without ternary matrices: TriLM,
Ternary-Bonsai, a revision of Falcon-E. Trits and scales are recovered exactly; a matrix with any
other value is refused, never rounded. Apart from `names.py` since this is arithmetic on values.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders.safetensors import to_float32

# Columns that surely share a scale: what the core takes (`i2g`), and a divisor of the groups of
# all known families (128 in Bonsai; in TriLM the columns of a shard, multiples of 256).
_BLOCK: Final = 64
# Elements that are looked at together, so that temporaries stay in the cache.
_CHUNK: Final = 1 << 19


Recovered = tuple[NDArray[np.int8], NDArray[np.float32]]


def recover(stored: NDArray[Any]) -> Recovered:
    """Recovers a ternary matrix from its values.

    Args:
        stored: float32, float16, or bfloat16 bits as uint16; shape (rows, cols).

    Returns:
        Trits int8 of the same shape, and their scales, see `collapse`.

    Raises:
        ValueError: It holds anything else than ternary values with a scale for each 64 columns of
            a row; the message says where, and leaves file and tensor to the caller.
    """
    n_rows, n_cols = stored.shape
    block = _BLOCK if n_cols % _BLOCK == 0 else n_cols
    trits = np.empty(stored.shape, np.int8)
    scales = np.empty((n_rows, n_cols // block), np.float32)
    # Bits without the sign are in the order of magnitudes, and integers are compared several times
    # as fast as float16 is converted.
    unsigned = np.dtype(f"u{stored.itemsize}")
    magnitude = unsigned.type((1 << 8 * stored.itemsize - 1) - 1)
    for rows in _row_chunks(n_rows, n_cols):
        bits = stored[rows].view(unsigned).reshape(-1, n_cols // block, block)
        size = bits & magnitude
        largest = size.max(axis=2)
        fits = (size == largest[:, :, None]) | (size == 0)
        scales[rows] = to_float32(largest.view(stored.dtype))
        if not (np.isfinite(scales[rows]).all() and fits.all()):
            values = to_float32(stored[rows]).reshape(size.shape)
            raise ValueError(_what_does_not_fit(values, fits, rows.start, block))
        some = size != 0
        negative = some & (bits != size)
        part = trits[rows].reshape(size.shape)
        np.subtract(some.view(np.int8), negative.view(np.int8) << 1, out=part)
    return trits, collapse(scales)


class Recovery:
    """Trits and scales that are asked for apart, and found at once: scales first, as the core does.

    Keeps the trits of the matrix whose scales were asked for last.
    """

    def __init__(self) -> None:
        self._kept: tuple[str, NDArray[np.int8]] | None = None

    def scales(self, name: str, recover_it: Callable[[], Recovered]) -> NDArray[np.float32]:
        """The scales of the matrix `name`."""
        trits, scales = recover_it()
        self._kept = (name, trits)
        return scales

    def trits(self, name: str, recover_it: Callable[[], Recovered]) -> NDArray[np.int8]:
        """The trits of the matrix `name`, which are not kept any longer."""
        kept, self._kept = self._kept, None
        return kept[1] if kept is not None and kept[0] == name else recover_it()[0]

    def clear(self) -> None:
        """Keeps nothing."""
        self._kept = None


def is_ternary(stored: NDArray[Any]) -> bool:
    """Whether `recover` would succeed on the first rows of a matrix that is not zero there."""
    part = stored[: max(1, _CHUNK // stored.shape[1])]
    try:
        _, scales = recover(part)
    except ValueError:
        return False
    return bool(scales.any())


def collapse(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Puts scales into as few numbers as say the same.

    A scale of 0 belongs to a group of zeros, which any scale fits.

    Args:
        scales: Of each group of columns of each row, shape (rows, groups); one is left as it is.

    Returns:
        Shape (1,) where all are equal, else (rows, n) with the least n, a divisor of the groups.
    """
    if scales.shape == (1,):
        return scales
    n_rows, groups = scales.shape
    most = scales.max(initial=0)
    if ((scales == most) | (scales == 0)).all():
        return np.array([most], np.float32)
    for n in range(1, groups + 1):
        if groups % n:
            continue
        parts = scales.reshape(n_rows, n, groups // n)
        largest = parts.max(axis=2, keepdims=True)
        if ((parts == largest) | (parts == 0)).all():
            return np.ascontiguousarray(largest[:, :, 0])
    raise AssertionError("every scale by itself is equal to itself")


def _row_chunks(n_rows: int, n_cols: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, n_cols))
    for start in range(0, n_rows, step):
        yield slice(start, min(n_rows, start + step))


def _what_does_not_fit(
    values: NDArray[np.float32], fits: NDArray[np.bool_], first: int, block: int
) -> str:
    if not np.isfinite(values).all():
        return "holds NaN or infinity"
    row, group, _ = (int(i) for i in np.argwhere(~fits)[0])
    sizes = np.unique(np.abs(values[row, group]))
    sizes = sizes[sizes > 0]
    return (
        f"is not ternary: in row {first + row}, the {block} columns from {group * block} on hold "
        f"{len(sizes)} different magnitudes, such as {sizes[0]:g} and {sizes[-1]:g}"
    )
