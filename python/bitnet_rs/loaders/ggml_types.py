"""ggml's types: which one each tensor of a GGUF file has, and its weights out of it.

For whoever makes a model of a GGUF file. Apart from `gguf.py`, which knows no types, and from
`ggml_trits.py` and `ggml_floats.py`, which know only bytes: here are the type ids, which llama.cpp
and its forks have given out more than once, and every check that needs a tensor's name.

A ternary matrix is read in two halves, since they are wanted at different times: trits, and the
scales that multiply them. A wrong guess at a type or a layout would give a model that talks
nonsense without an error, so what cannot be told apart for certain is refused.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders import ggml_floats, ggml_trits
from bitnet_rs.loaders.gguf import GgufFile, GgufTensor, shown
from bitnet_rs.loaders.mapped import Mapper, as_typed
from bitnet_rs.loaders.options import I2S_LAYOUTS, GgmlOptions, I2sLayout, Tile

_CURE: Final = "download or copy the file again"
# bitnet.cpp keeps this many bytes after the weights of a matrix; the first four are its scale.
_TAIL: Final = 32
_FLOATS: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class GgmlType:
    """A type, as one tensor has it.

    Attributes:
        name: ggml's name. `Q2_0_g128` and `Q1_0_g32` are Prism's blocks of other sizes.
        kind: `ternary`, `float`, or `unsupported`, which `resolve_types` never returns.
        block: Weights of a block; the columns of a tensor are a multiple.
        block_bytes: Bytes of a block.
        row_bytes: Bytes of a row before its blocks.
        tail_bytes: Bytes after the tensor's blocks.
        layout: Of I2_S, the order of weights; see `GgmlOptions`.
        tile: Of TL1 and TL2, (BM, BK, bm); see `GgmlOptions`.
        scale: The tensor that holds the one scale of the matrix, where that is apart.
    """

    name: str
    kind: Literal["ternary", "float", "unsupported"]
    block: int
    block_bytes: int
    row_bytes: int = 0
    tail_bytes: int = 0
    layout: I2sLayout | None = None
    tile: Tile | None = None
    scale: GgufTensor | None = None

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a tensor takes, without padding to the next one.

        Args:
            shape: Its shape; blocks divide the last dimension.
        """
        n = math.prod(shape)
        if self.name == "TL2":
            # bitnet.cpp's own formula, with its order of divisions. The kernels' tiles take up to
            # that much, since it counts 256 columns of pairs where there are less.
            rows, cols = n // shape[-1], shape[-1]
            n_bytes = (cols - 256) * rows // 3 * 5 // 8 + 256 * rows // 2 * 4 // 8
            return -(-n_bytes // 32) * 32 + self.tail_bytes
        rows = n // shape[-1]
        return rows * self.row_bytes + n // self.block * self.block_bytes + self.tail_bytes


def _ternary(name: str, block: int, block_bytes: int, **more: Any) -> GgmlType:
    return GgmlType(name, "ternary", block, block_bytes, **more)


def _float(name: str, block: int, block_bytes: int) -> GgmlType:
    return GgmlType(name, "float", block, block_bytes)


def _unsupported(name: str, block: int, block_bytes: int) -> GgmlType:
    return GgmlType(name, "unsupported", block, block_bytes)


# What each id may be. Where there are several, the sizes of tensors decide; those that are not
# supported are here to be told from those that are.
_TYPES: Final[Mapping[int, tuple[GgmlType, ...]]] = {
    0: (_float("F32", 1, 4),),
    1: (_float("F16", 1, 2),),
    2: (_float("Q4_0", 32, 18),),
    3: (_float("Q4_1", 32, 20),),
    6: (_float("Q5_0", 32, 22),),
    7: (_float("Q5_1", 32, 24),),
    8: (_float("Q8_0", 32, 34),),
    12: (_float("Q4_K", 256, 144),),
    13: (_float("Q5_K", 256, 176),),
    14: (_float("Q6_K", 256, 210),),
    30: (_float("BF16", 1, 2),),
    34: (_ternary("TQ1_0", 256, 54),),
    35: (_ternary("TQ2_0", 256, 66),),
    # Blocks of I2_S depend on the layout; a quarter byte a weight does not.
    36: (_ternary("I2_S", 4, 1, tail_bytes=_TAIL), _unsupported("IQ4_NL_4_4", 32, 18)),
    # bitnet.cpp counts the tail of TL1 and TL2, but its converter writes none: what lies there is
    # the next tensor, the scale.
    38: (
        _ternary("TL1", 4, 1),
        _ternary("TL1", 4, 1, tail_bytes=_TAIL),
        _unsupported("IQ4_NL_8_8", 32, 18),
    ),
    39: (
        _ternary("TL2", 1, 0),
        _ternary("TL2", 1, 0, tail_bytes=_TAIL),
        _unsupported("MXFP4", 32, 17),
    ),
    40: (_ternary("Q1_0_g32", 32, 6), _unsupported("NVFP4", 64, 36)),
    41: (_ternary("Q1_0", 128, 18),),
    42: (
        _ternary("Q2_0", 64, 18),
        _ternary("Q2_0_g128", 128, 34),
        _ternary("STQ1_0", 256, 42),
    ),
    43: (_ternary("STQ1_0", 256, 42),),
    134: (_ternary("IQ1_BN", 64, 13, row_bytes=2),),
    135: (_ternary("IQ2_BN", 64, 16, row_bytes=4),),
    335: (_ternary("IQ2_BN_R4", 64, 16, row_bytes=4),),
}

# Of those that are refused, what users know them by.
_OTHERS: Final[Mapping[int, str]] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8",
    33: "Q4_0_8_8", 37: "I8_S", 142: "PQ2_0", 143: "PTQ1_0",
}  # fmt: skip
_SUPPORTED: Final = ", ".join(
    sorted({t.name for types in _TYPES.values() for t in types if t.kind != "unsupported"})
)


# --- which type a tensor has ----------------------------------------------------------------------


def resolve_types(file: GgufFile, options: GgmlOptions | None = None) -> Mapping[str, GgmlType]:
    """Finds out which type each tensor has, and that its bytes fill its room.

    Several ids mean different types in llama.cpp and its forks. The room of all tensors with an id
    tells them apart, except that of the last one of a file, which may be followed by anything;
    where that leaves more than one, metadata decides. `general.file_type` does not: its numbers
    have been given out twice, too.

    Args:
        file: A GGUF file.
        options: What the file does not say.

    Returns:
        A supported type by the name of each tensor.

    Raises:
        ValueError: A type is not supported, or cannot be told for certain, or a tensor has not the
            room that it takes, or a shape that its type cannot have.
    """
    options = options or GgmlOptions()
    if options.i2s_layout not in I2S_LAYOUTS:
        raise ValueError(
            f"i2s_layout is {options.i2s_layout!r}; wanted one of {', '.join(I2S_LAYOUTS)}"
        )
    by_id: dict[int, list[GgufTensor]] = {}
    for tensor in file.tensors.values():
        by_id.setdefault(tensor.type_id, []).append(tensor)
    last = _last_tensors(file)
    chosen = {type_id: _choose(file, type_id, tensors, last) for type_id, tensors in by_id.items()}
    return {
        name: _as_stored(tensor, chosen[tensor.type_id], file, last, options)
        for name, tensor in file.tensors.items()
    }


def _last_tensors(file: GgufFile) -> set[str]:
    last: dict[str, GgufTensor] = {}
    for tensor in file.tensors.values():
        before = last.get(str(tensor.file))
        if before is None or tensor.offset > before.offset:
            last[str(tensor.file)] = tensor
    return {tensor.name for tensor in last.values()}


def _choose(file: GgufFile, type_id: int, tensors: list[GgufTensor], last: set[str]) -> GgmlType:
    """The type that an id means in this file."""
    first = tensors[0]
    candidates = _TYPES.get(type_id, ())
    if not candidates:
        _refuse_type(first, _OTHERS.get(type_id, f"with id {type_id}"))
    if len(candidates) > 1:
        alike = [t for t in candidates if all(_fits(t, x, file, last) for x in tensors)]
        if not alike:
            _refuse_sizes(first, candidates, last)
        # A last tensor that ends where the file does says as much as any other.
        candidates = tuple(
            [t for t in alike if all(_fits(t, x, file, set()) for x in tensors)] or alike
        )
    if len(candidates) > 1:
        candidates = _by_metadata(file, candidates)
    if len(candidates) > 1:
        raise ValueError(
            f"{first.file}: tensor {shown(first.name)} has type id {type_id}, which is "
            f"{' or '.join(t.name for t in candidates)}; neither sizes nor metadata tell which. "
            "Use a file with larger tensors, or of another type"
        )
    if candidates[0].kind == "unsupported":
        _refuse_type(first, candidates[0].name)
    return candidates[0]


def _fits(type_: GgmlType, tensor: GgufTensor, file: GgufFile, last: set[str]) -> bool:
    """Whether a tensor may have a type, by its shape and its room.

    Too much room is refused, too, as ggml does: it may be another fork's type with the same id.
    """
    if tensor.shape[-1] % type_.block:
        return False
    if _has_scale_apart(type_) and f"{tensor.name}_scale" not in file.tensors:
        return False
    n_bytes = type_.n_bytes(tensor.shape)
    if tensor.name in last:
        return n_bytes <= tensor.room
    # A writer pads to the alignment; the last tensor may do without.
    return tensor.room in (n_bytes, -(-n_bytes // file.alignment) * file.alignment)


def _has_scale_apart(type_: GgmlType) -> bool:
    return type_.name in ("TL1", "TL2") and not type_.tail_bytes


def _by_metadata(file: GgufFile, candidates: tuple[GgmlType, ...]) -> tuple[GgmlType, ...]:
    """Those of several types that the metadata speaks for; all where it is silent."""
    metadata = file.metadata
    text = " ".join(
        value.lower()
        for key, value in metadata.items()
        if key.startswith("general.") and isinstance(value, str)
    )
    arch = metadata.get("general.architecture")
    arch = arch if isinstance(arch, str) else ""
    named = set()
    if any(key.startswith("prism.") for key in metadata) or "prism" in text or "bonsai" in text:
        named |= {"Q2_0_g128", "Q1_0_g32"}
    if arch.startswith("hunyuan") or "angelslim" in text or "sherry" in text:
        named.add("STQ1_0")
    if arch.startswith("bitnet") or "bitnet" in text:
        named |= {"I2_S", "TL1", "TL2"}
    return tuple(t for t in candidates if t.name in named) or candidates


def _as_stored(
    tensor: GgufTensor,
    type_: GgmlType,
    file: GgufFile,
    last: set[str],
    options: GgmlOptions,
) -> GgmlType:
    """Checks a tensor against its type; adds layout, tile and the tensor of the scale."""
    shape = tensor.shape
    if type_.kind == "ternary" and len(shape) != 2:
        _refuse(
            tensor, f"has shape {list(shape)} and type {type_.name}", "a matrix: two dimensions"
        )
    if shape[-1] % type_.block:
        _refuse(tensor, f"has {shape[-1]} columns", f"a multiple of {type_.block} for {type_.name}")
    if type_.name == "I2_S":
        type_ = replace(type_, layout=_checked_layout(tensor, options.i2s_layout))
    elif type_.name in ("TL1", "TL2"):
        tile = _checked_tile(tensor, type_, options.tl_tiles)
        scale = file.tensors[f"{tensor.name}_scale"] if _has_scale_apart(type_) else None
        if scale is not None and (scale.type_id, math.prod(scale.shape)) != (0, 1):
            _refuse(scale, f"has type id {scale.type_id} and shape {list(scale.shape)}", "one F32")
        type_ = replace(type_, tile=tile, scale=scale)
    elif type_.name == "IQ2_BN_R4" and shape[0] % 4:
        _refuse(tensor, f"has {shape[0]} rows", "a multiple of 4 for IQ2_BN_R4")
    if not _fits(type_, tensor, file, last):
        _refuse(
            tensor,
            f"has {tensor.room} bytes up to the next tensor or the end of the file",
            f"{type_.n_bytes(shape)} for {type_.name} of shape {list(shape)}, and padding to a "
            f"multiple of {file.alignment}",
        )
    return type_


def _checked_layout(tensor: GgufTensor, layout: I2sLayout) -> I2sLayout:
    rows, cols = tensor.shape
    if layout == "rows4" and rows % 4:
        _refuse(
            tensor, f"has {rows} rows", "a multiple of 4 for I2_S in layout rows4", "give another"
        )
    multiple = {"x86": 128, "arm": 64, "rows4": 1}[layout]
    if cols % multiple:
        _refuse(
            tensor,
            f"has {cols} columns",
            f"a multiple of {multiple} for I2_S in layout {layout}",
            "if the file was written on another kind of machine, give its layout: "
            + " or ".join(other for other in I2S_LAYOUTS if other != layout),
        )
    return layout


def _checked_tile(tensor: GgufTensor, type_: GgmlType, tiles: Mapping[Any, Tile]) -> Tile:
    rows, cols = shape = (tensor.shape[0], tensor.shape[1])
    where = f"has type {type_.name} and shape {list(shape)}"
    tile = tiles.get(shape)
    if tile is None:
        _refuse(
            tensor,
            f"{where}, and its tiles are not known",
            f"the option tl_tiles (--tl-tiles) with {{({rows}, {cols}): (BM, BK, bm), ...}}",
            "bitnet.cpp's include/kernel_config.ini of the build that wrote the file has them; or "
            "use an I2_S file of the same model",
        )
    where += f"; its tile is {tile!r}"
    if len(tile) != 3 or not all(type(n) is int and n > 0 for n in tile):
        _refuse(
            tensor, where, "three positive integers (BM, BK, bm)", "correct the option tl_tiles"
        )
    high, wide, low = tile
    if type_.name == "TL1":
        # Blocks are 16 rows at least, and 4 columns.
        good = low in (16, 32, 64) and not (rows % high or high % low or cols % wide)
        good = good and wide % (256 // low) == 0
        wanted = "bm 16, 32 or 64, BM a multiple of bm that divides the rows, BK one of 256 / bm "
        wanted += "that divides the columns"
    else:
        # A sign word spans 32 rows and 24 columns; pairs come in tiles 32 wide.
        good = low == 32 and not (rows % high or high % low or wide % 24 or cols % wide % 32)
        good = good and cols >= max(wide, 256)
        good = (
            good and ggml_trits.tl2_stream(shape, wide) <= type_.n_bytes(shape) - type_.tail_bytes
        )
        wanted = "bm 32, BM a multiple of 32 that divides the rows, BK one of 24 that leaves a "
        wanted += "multiple of 32 of at least 256 columns, at most 256"
    if not good:
        _refuse(tensor, where, wanted, "correct the option tl_tiles")
    return high, wide, low


def _refuse(tensor: GgufTensor, found: str, wanted: str, cure: str = _CURE) -> NoReturn:
    raise ValueError(f"{tensor.file}: tensor {shown(tensor.name)} {found}; wanted {wanted}; {cure}")


def _refuse_type(tensor: GgufTensor, name: str) -> NoReturn:
    why = ""
    if name in ("PQ2_0", "PTQ1_0"):
        why = " (its activations need a Hadamard transform that bitnet-rs does not have)"
    raise ValueError(
        f"{tensor.file}: tensor {shown(tensor.name)} has type {name}, which is not "
        f"supported{why}; supported: {_SUPPORTED}. Use a file of the same model in one of these"
    )


def _refuse_sizes(tensor: GgufTensor, candidates: Iterable[GgmlType], last: set[str]) -> NoReturn:
    sizes = [
        f"{t.n_bytes(tensor.shape)} for {t.name}"
        for t in candidates
        if tensor.shape[-1] % t.block == 0
    ]
    _refuse(
        tensor,
        f"has type id {tensor.type_id}, shape {list(tensor.shape)} and {tensor.room} bytes up to "
        "the next tensor or the end of the file, and no type with that id fits all of its tensors",
        " or ".join(sizes)
        or f"columns that {' or '.join(str(t.block) for t in candidates)} divide",
    )


# --- weights --------------------------------------------------------------------------------------


def read_trits(
    tensor: GgufTensor, type_: GgmlType, mapper: Mapper | None = None
) -> NDArray[np.int8]:
    """Reads the trits of a ternary matrix.

    A group whose scale is 0 has trits 0, and one whose scale is negative has them negated, so that
    trits times scales are what is stored.

    Args:
        tensor: A matrix.
        type_: Its type, from `resolve_types`.
        mapper: One for many tensors; see `GgufTensor.read`.

    Returns:
        -1, 0 and +1, of shape (rows, cols).

    Raises:
        ValueError: A weight is no trit, or a scale is not finite, or the type is not ternary.
    """
    data, shape = _matrix(tensor, type_, mapper)
    try:
        if type_.name == "TL1":
            return ggml_trits.tl1(data, shape, type_.tile or (0, 0, 0))
        if type_.name == "TL2":
            return ggml_trits.tl2(data, shape, type_.tile or (0, 0, 0))
        if type_.name == "I2_S":
            units = ggml_trits.i2_s(type_.layout or "x86", shape[1])
        else:
            units = ggml_trits.units_of(type_.name, shape[1])
        return ggml_trits.unpack(data, shape, units)
    except ggml_trits.DamagedError as error:
        _damaged(tensor, type_, error)


def read_scales(
    tensor: GgufTensor, type_: GgmlType, mapper: Mapper | None = None
) -> NDArray[np.float32]:
    """Reads the scales of a ternary matrix, which multiply its trits.

    Args:
        tensor: A matrix.
        type_: Its type, from `resolve_types`.
        mapper: One for many tensors; see `GgufTensor.read`.

    Returns:
        Finite and not negative (see `read_trits`), and exactly what is stored otherwise: of shape
        (1,) for I2_S, TL1 and TL2; (rows, 1) for IQ1_BN, IQ2_BN and IQ2_BN_R4; else (rows, groups),
        each for cols / groups consecutive weights of a row.

    Raises:
        ValueError: A scale is not finite; the one scale of a matrix is not positive; or the type
            is not ternary.
    """
    data, (rows, cols) = _matrix(tensor, type_, mapper)
    if type_.tail_bytes or type_.scale is not None:
        at = len(data) - type_.tail_bytes
        stored = data[at : at + 4] if type_.scale is None else type_.scale.read(4)
        scale = stored.copy().view("<f4").astype(np.float32)
        if not 0 < scale[0] < np.inf:
            _refuse(tensor, f"has the scale {scale[0]}", "a positive, finite one")
        return scale
    units = ggml_trits.units_of(type_.name, cols)
    try:
        scales = ggml_trits.unit_scales(data, rows * cols // units.n_weights, units)
    except ggml_trits.DamagedError as error:
        _damaged(tensor, type_, error)
    return scales.reshape(rows, -1)


def read_floats(
    tensor: GgufTensor, type_: GgmlType, mapper: Mapper | None = None
) -> NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]:
    """Reads a float tensor.

    Args:
        tensor: Of any shape.
        type_: Its type, from `resolve_types`.
        mapper: One for many tensors; see `GgufTensor.read`.

    Returns:
        Of the tensor's shape: F32, F16 and BF16 as they are stored, mapped read-only (float32,
        float16, or uint16 that holds bfloat16 bits); other types as float32, with ggml's bits.

    Raises:
        ValueError: A factor of a quantized type is not finite, or the type is no float type.
    """
    if type_.kind != "float":
        _refuse(tensor, f"has type {type_.name}", "a float type", "read its trits and scales")
    data = tensor.read(type_.n_bytes(tensor.shape), mapper)
    if type_.name in _FLOATS:
        return as_typed(data, _FLOATS[type_.name], tensor.shape)
    try:
        return ggml_floats.dequantize(data, tensor.shape, type_.name)
    except ValueError as error:
        _damaged(tensor, type_, error)


def _matrix(
    tensor: GgufTensor, type_: GgmlType, mapper: Mapper | None
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    if type_.kind != "ternary":
        _refuse(tensor, f"has type {type_.name}", "a ternary type", "read it as floats")
    rows, cols = tensor.shape
    return tensor.read(type_.n_bytes(tensor.shape), mapper), (rows, cols)


def _damaged(tensor: GgufTensor, type_: GgmlType, error: ValueError) -> NoReturn:
    raise ValueError(
        f"{tensor.file}: tensor {shown(tensor.name)} of type {type_.name} {error}; {_CURE}"
    ) from None
