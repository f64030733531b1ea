"""What is to be written: a checkpoint's tensors, planned first, then read one at a time.

For `to_gguf.py` and `to_packed.py`. Apart because all formats ask the same of a source: which
matrices it has, how wide they are and how many scales they have, before anything is written, and
trits with multiplying scales after that. Masters become trits by the core's own quantizer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs import _core
from bitnet_rs.loaders.families import PROJECTIONS, Dimensions
from bitnet_rs.loaders.safetensors import to_float32

DTYPES: Final = {"float32": "F32", "float16": "F16", "uint16": "BF16"}
"""Floats as the loaders hand them on, and their names on disk; bfloat16 travels as its bits."""


@dataclass(frozen=True)
class Matrix:
    """A ternary matrix.

    Attributes:
        name: Its canonical name.
        rows: Rows.
        cols: Columns.
        scales: Float32 of shape (1,), (rows, 1) or (rows, groups); None for masters, whose scale
            is found when they are quantized.
    """

    name: str
    rows: int
    cols: int
    scales: NDArray[np.float32] | None

    @property
    def n_scales(self) -> int:
        """How many scales it has."""
        return 1 if self.scales is None else self.scales.size

    @property
    def group(self) -> int:
        """Weights of a row that share a scale."""
        return (
            self.cols
            if self.n_scales < 2 or self.scales is None
            else (self.cols // self.scales.shape[1])
        )


@dataclass(frozen=True)
class Float:
    """A tensor of floats.

    Attributes:
        name: Its canonical name.
        dtype: A key of `DTYPES`.
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class Source:
    """The tensors of a checkpoint.

    Args:
        weights: By canonical name, see `_core.Model`; besides, scales may be (rows, 1) or
            (rows, groups).
        config: config.json as the core takes it.

    Attributes:
        config: The same.
        dims: Its sizes.
        tensors: All of them, in the order of the checkpoint.

    Raises:
        ValueError: The config or a tensor is not one that the core would take.
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> None:
        _core.projections(config)  # refuses what the core would refuse
        self.config: Final = config
        self._weights = weights
        self._names = frozenset(weights)
        self.dims: Final = Dimensions.from_config(config, Path("config.json"))
        shapes = {
            name.rpartition(".")[2]: self.dims.shape(axes) for name, axes in PROJECTIONS.items()
        }
        self.tensors: Final[list[Matrix | Float]] = []
        for name in weights:
            projection = name.removesuffix(".weight").rpartition(".")[2]
            if projection in shapes:
                rows, cols = shapes[projection]
                self.tensors.append(Matrix(name, rows, cols, self._scales(name, rows, cols)))
            elif not name.endswith("_proj.weight_scale"):
                self.tensors.append(self._float(name))

    @property
    def matrices(self) -> list[Matrix]:
        """The ternary ones."""
        return [tensor for tensor in self.tensors if isinstance(tensor, Matrix)]

    @property
    def has_masters(self) -> bool:
        """Whether matrices are quantized on the way."""
        return any(matrix.scales is None for matrix in self.matrices)

    def read_floats(self, tensor: Float) -> NDArray[Any]:
        """Reads a tensor of floats, C-contiguous and little-endian."""
        array = self._weights[tensor.name]
        return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))

    def read_trits(self, matrix: Matrix) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Reads a ternary matrix.

        Returns:
            Trits, shape (rows, cols), and multiplying scales as in `Matrix.scales`.

        Raises:
            ValueError: The content is impossible; the message names the tensor.
        """
        array = self._weights[matrix.name]
        if matrix.scales is None:
            try:
                trits, scale = _core._absmean(to_float32(array))
            except ValueError as error:
                raise ValueError(f"tensor {matrix.name}: {error}") from None
            scales = np.array([scale], np.float32)
        else:
            trits = unpack(array, matrix.rows, matrix.name) if array.dtype == np.uint8 else array
            scales = matrix.scales
        if trits.shape != (matrix.rows, matrix.cols) or trits.dtype != np.int8:
            raise ValueError(
                f"tensor {matrix.name} is {trits.dtype} of shape {list(trits.shape)}; "
                f"config.json wants {[matrix.rows, matrix.cols]}"
            )
        if trits.min() < -1 or trits.max() > 1:
            raise ValueError(f"tensor {matrix.name} holds values other than -1, 0 and 1")
        return trits, scales

    def _float(self, name: str) -> Float:
        array = self._weights[name]
        if array.dtype.name not in DTYPES or f"{name}_scale" in self._names:
            raise ValueError(f"tensor {name} is ternary; only projections can be written so")
        return Float(name, array.dtype.name, array.shape)

    def _scales(self, name: str, rows: int, cols: int) -> NDArray[np.float32] | None:
        if f"{name}_scale" not in self._names:
            return None
        scales: NDArray[np.float32] = self._weights[f"{name}_scale"]
        if not (np.isfinite(scales).all() and (scales >= 0).all()):
            raise ValueError(
                f"tensor {name}_scale holds {scales.min()} to {scales.max()}; scales are finite "
                "numbers and not below zero. The file is damaged"
            )
        if (scales == scales.flat[0]).all():
            return scales.reshape(-1)[:1]
        if scales.ndim != 2 or len(scales) != rows or cols % scales.shape[1]:
            raise ValueError(
                f"tensor {name}_scale has shape {list(scales.shape)}; wanted one scale, or for "
                f"each of {rows} rows a number of them that divides {cols}"
            )
        return scales


def unpack(stored: NDArray[np.uint8], rows: int, name: str) -> NDArray[np.int8]:
    """Trits of a matrix that is stored four rows to a byte; see `_core.Model`.

    Args:
        stored: Shape (ceil(rows / 4), cols).
        rows: Rows of the matrix.
        name: Its name, for messages.

    Raises:
        ValueError: A code is 3, which is no trit.
    """
    quarter, cols = stored.shape
    trits = np.empty((rows, cols), np.int8)
    for i in range(4):
        part = trits[i * quarter : (i + 1) * quarter]
        codes = stored[: len(part)] >> np.uint8(2 * i) & np.uint8(3)
        if codes.max(initial=0) > 2:
            row, col = divmod(int(codes.argmax()), cols)
            raise ValueError(
                f"tensor {name}: the code of row {i * quarter + row}, column {col} is 3, which is "
                "no trit; the file is damaged. Download or copy it again"
            )
        np.subtract(codes.view(np.int8), np.int8(1), out=part)
    return trits


def listed(names: Iterable[str]) -> str:
    """Names for a message, the first few of them."""
    first = list(names)
    shown = ", ".join(first[:3])
    return shown if len(first) <= 3 else f"{shown} and {len(first) - 3} more"


def refuse_groups(source: Source, what: str) -> None:
    """Refuses matrices with more than one scale.

    Args:
        source: Where they are.
        what: What has one scale only, for the message.

    Raises:
        ValueError: There are such; the message names them.
    """
    grouped = [matrix for matrix in source.matrices if matrix.n_scales > 1]
    if grouped:
        raise ValueError(
            f"{what} has one scale, and these have several: {listed(m.name for m in grouped)}. "
            "gguf-tq2_0 and gguf-tq1_0 have one for each 256 weights"
        )


def refuse_zero(name: str, scale: float) -> None:
    """Refuses a scale of a whole matrix that no reader would take.

    Raises:
        ValueError: It is not a finite number above zero.
    """
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(
            f"tensor {name} has the scale {scale}; wanted a finite number above zero. The file is "
            "damaged"
        )
