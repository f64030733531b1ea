"""Whether I2_S weights look as if they lay in another order than the one they are read in.

For whoever opens a GGUF file and can warn. Apart from `ggml_types.py` because it is a guess, by
statistics and by the names that tensors have in GGUF files: nothing else in the loaders guesses.

Neither codes nor sizes tell the layouts of I2_S apart. Read in the wrong one, a matrix is still a
matrix of trits: between `x86` and `arm` its columns are exchanged within each 128, the same way in
every row. So no matrix can say alone which layout it is in. But column j multiplies what the weight
j of the norm before it scaled, and in trained models the two know of each other: how dense a column
is goes with how large the norm's weight is. Norms are floats, in their true order.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders import ggml_trits
from bitnet_rs.loaders.ggml_types import GgmlType, read_floats
from bitnet_rs.loaders.gguf import GgufFile, GgufTensor
from bitnet_rs.loaders.options import I2S_LAYOUTS, I2sLayout
from bitnet_rs.loaders.safetensors import to_float32

# Norms, and the matrices that multiply what they give. Of those that have a norm before them, the
# gate and up projections say least.
_AFTER: Final = {
    "attn_norm": ("attn_q", "attn_v"),
    "attn_sub_norm": ("attn_output",),
    "ffn_sub_norm": ("ffn_down",),
}
_MOST_LAYERS: Final = 8
_MOST_ROWS: Final = 512  # of each matrix: enough to know a column's density to 2 %


def looks_like_another_layout(file: GgufFile, types: Mapping[str, GgmlType]) -> str | None:
    """Looks for signs that the I2_S matrices of a model were written in another layout.

    For each norm and the matrices behind it, the rank correlation of the norm's weights and the
    columns' densities of non-zeros is computed, under each layout. Without a relation between the
    two, n·r² for n columns follows a chi-square distribution with one degree of freedom whatever
    the weights are, so the sum over k norms is k, give or take a few times √(2k). A warning wants
    another layout to be ahead by 50 + 3·k, and by a factor of 2: weights without
    such a relation do that less than once in 10¹⁰ files.

    How reliable it is: with the bundled model, which was trained, the true layout scores 1,700
    where others score 20 to 140, and any one of its layers is enough. With the norm before
    attention alone, as in models without sub-norms, the true layout scores 180 and others less
    than 15, of six layers two or three are needed. How strong the relation is in other trained
    models was not measured, and weights that nobody trained have none. So silence says nothing,
    and a warning is no proof.

    Args:
        file: A GGUF file with names as llama.cpp has them.
        types: Of `resolve_types`; the layout in which matrices are read is there.

    Returns:
        A sentence for a warning, or None.

    Raises:
        ValueError: A norm cannot be read.
    """
    pairs = list(_pairs(file, types))
    if not pairs:
        return None
    chosen = types[pairs[0][1][0].name].layout
    matrices = [matrix for _, after in pairs for matrix in after]
    scores: dict[I2sLayout, float] = {}
    for layout in I2S_LAYOUTS:
        if all(_possible(matrix, layout) for matrix in matrices):
            scores[layout] = sum(_agreement(norm, after, layout) for norm, after in pairs)
    best = max(scores, key=lambda layout: scores[layout], default=None)
    if chosen not in scores or best is None:
        return None
    if scores[best] < scores[chosen] + 50 + 3 * len(pairs) or scores[best] < 2 * scores[chosen]:
        return None
    return (
        f"{file.path}: I2_S weights are read in layout {chosen}, but they look as if they were "
        f"written in layout {best} (their columns agree with the norms before them by "
        f"{scores[best]:.0f} instead of {scores[chosen]:.0f}); if the model talks nonsense, give "
        f"the layout {best}"
    )


def _pairs(
    file: GgufFile, types: Mapping[str, GgmlType]
) -> Iterator[tuple[NDArray[np.float32], list[GgufTensor]]]:
    """Norms, and the I2_S matrices behind each, of some layers spread over the model."""
    found = (re.fullmatch(r"blk\.(\d+)\.attn_norm\.weight", name) for name in file.tensors)
    layers = sorted({int(match[1]) for match in found if match})
    picked = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int)
    for layer in (layers[i] for i in picked):
        for norm_name, names in _AFTER.items():
            norm = file.tensors.get(f"blk.{layer}.{norm_name}.weight")
            if norm is None or types[norm.name].kind != "float" or len(norm.shape) != 1:
                continue
            after = [file.tensors.get(f"blk.{layer}.{name}.weight") for name in names]
            matrices = [
                matrix
                for matrix in after
                if matrix is not None
                and types[matrix.name].name == "I2_S"
                and matrix.shape[1] == norm.shape[0]
            ]
            if matrices:
                yield np.abs(to_float32(read_floats(norm, types[norm.name]))), matrices


def _possible(matrix: GgufTensor, layout: I2sLayout) -> bool:
    rows, cols = matrix.shape
    return rows % 4 == 0 if layout == "rows4" else cols % {"x86": 128, "arm": 64}[layout] == 0


def _agreement(norm: NDArray[np.float32], matrices: list[GgufTensor], layout: I2sLayout) -> float:
    """n·r², for the rank correlation r of n weights of a norm and the columns behind them."""
    density = np.zeros(len(norm))
    for matrix in matrices:
        rows, cols = min(matrix.shape[0], _MOST_ROWS), matrix.shape[1]
        if layout == "rows4":
            rows -= rows % 4
        try:
            trits = ggml_trits.unpack(
                matrix.read(rows * cols // 4), (rows, cols), ggml_trits.i2_s(layout, cols)
            )
        except ggml_trits.DamagedError:
            continue  # who reads the whole matrix says so with its name
        density += np.count_nonzero(trits, axis=0)
    x, y = _ranks(norm), _ranks(density)
    spread = float(x @ x) * float(y @ y)
    return len(norm) * float(x @ y) ** 2 / spread if spread else 0.0


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks about 0. Equal values have equal ones: the mean of the places that they take."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)]
    ranks -= ranks.mean()
    return ranks
