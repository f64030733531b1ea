"""Checkpoint tensors to canonical weights: names, forms, scale direction, checks.

For `open_checkpoint`. A new Hugging Face spelling of a ternary model belongs here and nowhere
else. Canonical names are those of transformers' classes (`families.py`); the canonical form of a
projection is either trits, four a byte as they are stored, with a float32 scale that multiplies;
or a byte each, with one scale or several; or float masters as they are, which the core quantizes
by their absolute mean.

Everything that changes the result and is not understood is refused: a form, a field, a tensor
that no architecture here has.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders.families import (
    PROJECTIONS,
    Activations,
    Architecture,
    Axis,
    Dimensions,
    architecture,
    expected_tensors,
    has_sub_norms,
)
from bitnet_rs.loaders.lazy import LazyWeights
from bitnet_rs.loaders.safetensors import Reader, TensorInfo, to_float32
from bitnet_rs.loaders.ternary_values import Recovered, Recovery, is_ternary, recover

# How an entry is stored; "values" are floats that are ternary already, "scales" are theirs.
Kind = Literal["packed", "masters", "values", "scale", "scales", "norm", "dense"]

_FLOATS: Final = ("F32", "F16", "BF16")
_DTYPE_NAMES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Spelling on disk -> canonical.
_ALIASES: Final = {
    "self_attn.inner_attn_ln.weight": "self_attn.attn_sub_norm.weight",
    "mlp.ffn_layernorm.weight": "mlp.ffn_sub_norm.weight",
}
# What this package's own `convert` adds to config.json where activations are not int8.
ACTIVATIONS_FIELD: Final = "bitnet_rs_activations"
# A constant of RoPE that old checkpoints store; it follows from config.json.
_DERIVED: Final = "rotary_emb.inv_freq"
_EMBEDDING: Final = "model.embed_tokens.weight"
# Only models whose projections are BitLinears with a norm of their own have it.
_PROJECTION_NORM: Final = "model.layers.0.self_attn.q_proj.norm.weight"
_FIRST: Final = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Form:
    """How a checkpoint stores its ternary matrices, and what they were trained to multiply.

    Attributes:
        kind: Four trits a byte with a scale each; float masters; or floats that are ternary.
        divides: The scale on disk divides, so the canonical one is its reciprocal.
        activations: int8, or float where nothing says otherwise.
    """

    kind: Literal["packed", "masters", "values"]
    divides: bool = False
    activations: Activations = "int8"


def weight_form(
    config: Mapping[str, Any],
    on_disk: Mapping[str, TensorInfo],
    where: Path,
    *,
    masters: bool = False,
) -> Form:
    """Decides how the ternary matrices are stored, from `quantization_config`.

    The direction of the scale stands nowhere but in `linear_class`, and a wrong one gives
    plausible numbers: an absent or unknown value is never guessed at beyond what transformers
    itself defaults to.

    Args:
        config: The content of config.json.
        on_disk: Tensors by canonical name.
        where: The path of config.json, for messages.
        masters: The user says that the weights are masters, where config.json says nothing.

    Raises:
        ValueError: A field has an unknown value, or nothing says that the model is ternary.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return _undeclared_form(config, on_disk, where, masters=masters)
    if type(quantization) is not dict:
        raise ValueError(
            f"{where}: field `quantization_config` is {quantization!r}; wanted an object"
        )

    def known(field: str, default: str | None, allowed: tuple[str, ...]) -> str:
        value = quantization.get(field, default)
        if value not in allowed:
            raise ValueError(
                f"{where}: field `quantization_config.{field}` is {value!r}; "
                f"supported: {', '.join(map(repr, allowed))}"
            )
        return str(value)

    known("quant_method", "bitnet", ("bitnet",))
    linear_class = known("linear_class", "bitlinear", ("bitlinear", "autobitlinear"))
    mode = known("quantization_mode", "offline", ("offline", "online"))
    if quantization.get("use_rms_norm"):
        raise ValueError(
            f"{where}: field `quantization_config.use_rms_norm` is true; norms inside the "
            "projections are not supported, so only false runs correctly"
        )
    _refuse_unconverted(quantization.get("modules_to_not_convert"), where)
    activations = config.get(ACTIVATIONS_FIELD, "int8")
    if activations not in get_args(Activations):
        raise ValueError(
            f"{where}: field `{ACTIVATIONS_FIELD}` is {activations!r}; wanted 'int8' or 'float'"
        )
    if linear_class == "bitlinear":
        # transformers ignores the mode here.
        return Form("packed", divides=True, activations=activations)
    return Form("packed" if mode == "offline" else "masters", activations=activations)


def _undeclared_form(
    config: Mapping[str, Any], on_disk: Mapping[str, TensorInfo], where: Path, *, masters: bool
) -> Form:
    # 1bitLLM's own code quantizes every projection, so the name of the class is the claim; so is
    # a norm in front of every projection.
    if "BitnetForCausalLM" in (config.get("architectures") or ()):
        for field, wanted in (("weight_bits", 1), ("input_bits", 8)):
            if config.get(field, wanted) != wanted:
                raise ValueError(
                    f"{where}: field `{field}` is {config[field]!r}; supported: {wanted}"
                )
        return Form("masters")
    if masters or _PROJECTION_NORM in on_disk:
        return Form("masters")
    if "quantization" in config:
        raise ValueError(
            f"{where}: field `quantization` is of MLX, whose weights are not read; take the GGUF "
            "or the unpacked safetensors of the same model"
        )
    first = on_disk.get(_FIRST)
    if first is not None and first.dtype == "U8":
        raise ValueError(
            f"{where}: field `quantization_config` is missing, and nothing else says whether the "
            f"scales of the packed weights multiply or divide (tensor {first.name} in {first.file} "
            "is U8). For weights that transformers packed as `BitLinear`, add "
            '"quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear"}; as '
            '`AutoBitLinear`, "autobitlinear"'
        )
    if first is not None and first.dtype in _FLOATS and len(first.shape) == 2 and first.n_bytes:
        if is_ternary(first.read()):
            return Form("values", activations="float")
        found = f"the values of {first.name} are not ternary"
    else:
        found = f"there are no float values in {_FIRST}"
    raise ValueError(
        f"{where}: field `quantization_config` is missing and {found}, so nothing says that this is "
        "a ternary model; a model trained with float weights cannot run here. If its weights are "
        "the masters of a ternary model, load it with masters=True (--masters), or add "
        '"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", '
        '"quantization_mode": "online"}'
    )


def _refuse_unconverted(modules: object, where: Path) -> None:
    """Refuses a list that keeps projections in float; entries that match none are dead."""
    if modules is None:
        return
    field = f"{where}: field `quantization_config.modules_to_not_convert`"
    if not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        raise ValueError(f"{field} is {modules!r}; wanted null or a list of module names")
    for entry in modules:
        if not re.fullmatch(r"[A-Za-z0-9_.*]*", entry):
            raise ValueError(
                f"{field} has the entry {reprlib.repr(entry)}; wanted names of modules: letters, "
                "digits, '_', '.', and '*' for any run of characters"
            )
        if any(_may_mean(entry, name) for name in _all_projections()):
            raise ValueError(
                f"{field} keeps {reprlib.repr(entry)} in float; "
                "models with a part of their projections in float are not supported"
            )


def _all_projections() -> Iterator[str]:
    """Names of all projections, with a layer's number of one to three digits, all of them 0."""
    for number, projection in product(("0", "00", "000"), PROJECTIONS):
        yield f"model.layers.{number}.{projection}"


def _may_mean(entry: str, name: str) -> bool:
    """Whether an entry could stand for a module whose name differs in digits only.

    transformers takes an entry for a regular expression that matches from the start of a name,
    or for a name's ending. A foreign file's regular expression may take for ever, so this
    matches by hand, in time of the lengths' product, a little more than the expression would: a
    `.` is any character, and a `*` any run, which may also replace the character before it.
    """
    entry = re.sub(r"\d", "0", entry)
    if name.endswith(entry):
        return True
    *starred, last = entry.split("*")
    pieces = [*(piece[:-1] for piece in starred), last]
    position = 0
    for i, piece in enumerate(pieces):
        ends = len(name) - len(piece) if i else 0  # the first piece is where the name starts
        for start in range(position, ends + 1):
            part = name[start : start + len(piece)]
            if len(part) == len(piece) and all(
                p in (".", c) for p, c in zip(piece, part, strict=True)
            ):
                position = start + len(piece)
                break
        else:
            return False
    return True


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    kind: Kind
    shape: tuple[int, ...]
    plus_one: bool = False  # Gemma stores its norms' weights less one


class Weights(LazyWeights[_Entry]):
    """Tensors by canonical name, read and checked when asked for.

    Nothing is kept, but for the trits of a matrix whose scales were asked for first: an array that
    is asked for twice is read twice. Ternary matrices are uint8, four rows to a byte (`_core.Model`
    says how), their scales float32 of shape (1,); or int8, with scales of shape (1,) or (rows,
    groups). Norms are float32; masters, embeddings and head are as on disk (float32, float16, or
    bfloat16 bits as uint16). What is as on disk is mapped from the file, read-only; its pages leave
    the process's memory when the next tensor is asked for, and come back if they are read again.

    Raises:
        KeyError: On a name that the checkpoint does not have.
        ValueError: On a tensor whose content is impossible, such as a scale of zero.
    """

    def __init__(self, entries: Mapping[str, _Entry], form: Form, folder: Path) -> None:
        super().__init__(entries, folder)
        self._form = form
        self._reader = Reader()
        self._recovery = Recovery()

    def _read(self, name: str, entry: _Entry) -> NDArray[Any]:
        if entry.kind == "values":
            return self._recovery.trits(name, lambda: self._recover(entry))
        if entry.kind == "scales":
            matrix = name.removesuffix("_scale")
            return self._recovery.scales(matrix, lambda: self._recover(entry))
        array = self._reader.read(entry.info)
        match entry.kind:
            case "scale":
                return _scale(array, entry.info, divides=self._form.divides)
            case "norm":
                return _norm(array, entry.info, plus_one=entry.plus_one)
            case _:
                return array

    def _recover(self, entry: _Entry) -> Recovered:
        try:
            return recover(self._reader.read(entry.info))
        except ValueError as error:
            raise ValueError(
                f"{entry.info.file}: tensor {entry.info.name} {error}. Other matrices of this "
                "checkpoint are ternary; the file is damaged or of a model with float layers, "
                "which is not supported"
            ) from None

    def has_groups(self) -> bool:
        """Whether some matrix has several scales; reads all matrices that may."""
        scales = [name for name, entry in self._entries.items() if entry.kind == "scales"]
        found = any(self[name].size > 1 for name in scales)
        self._recovery.clear()
        return found


@dataclass(frozen=True)
class Found:
    """What a checkpoint's tensors turned out to be.

    Attributes:
        weights: Tensors by canonical name.
        architecture: What runs.
        tied: The head is the embedding.
        form: How its ternary matrices are stored.
        embedding: It is one of the embedding models, known by the norms of their projections.
    """

    weights: Weights
    architecture: Architecture
    tied: bool
    form: Form
    embedding: bool


def canonical_weights(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    folder: Path,
    *,
    masters: bool = False,
) -> Found:
    """Matches the tensors on disk with what config.json wants.

    Reads no tensor but a tied head, and the first matrix where config.json does not say what it is.

    Args:
        tensors: Tensors by their name on disk.
        config: The content of config.json.
        folder: The checkpoint's folder, for messages.
        masters: The weights are masters, where config.json says nothing.

    Raises:
        KeyError: A tensor is missing.
        ValueError: A field or a tensor does not fit; the message names it.
    """
    where = folder / "config.json"
    arch = architecture(config, where)
    on_disk = _by_canonical_name(tensors)
    form = weight_form(config, on_disk, where, masters=masters)
    dims = Dimensions.from_config(config, where)
    tied = _is_tied(config, on_disk, where)

    entries: dict[str, _Entry] = {}
    expected = expected_tensors(
        arch, dims.n_layers, head=not tied, projection_norms=_PROJECTION_NORM in on_disk
    )
    for name, kind, axes in expected:
        plus_one = kind == "norm" and stored_less_one(name, arch)
        stored: Kind = form.kind if kind == "projection" else kind
        info = _find(on_disk, name, folder)
        entries[name] = _Entry(info, stored, dims.shape(axes), plus_one)
        _check_header(entries[name], axes, dims, where)
        if kind != "projection":
            continue
        scale = f"{name}_scale"
        if form.kind == "packed":
            entries[scale] = _Entry(_find(on_disk, scale, folder), "scale", (1,))
            _check_header(entries[scale], ((),), dims, where)
        elif form.kind == "values":
            entries[scale] = _Entry(info, "scales", (1,))
    for name, info in on_disk.items():
        if name not in entries and not (tied and name == "lm_head.weight"):
            _refuse_unexpected(name, info, arch, dims, where)
    embedding = _PROJECTION_NORM in on_disk
    return Found(Weights(entries, form, folder), arch, tied, form, embedding)


def stored_less_one(name: str, arch: str) -> bool:
    """Whether a norm's weight is stored as what it multiplies by less one: Gemma's own norms."""
    own = name.endswith("norm.weight") and not name.endswith("_proj.norm.weight")
    return arch == "gemma3_text" and own


def _find(on_disk: Mapping[str, TensorInfo], name: str, folder: Path) -> TensorInfo:
    if name not in on_disk:
        hint = (
            "; a packed projection needs its scale, and nothing else says how large it is"
            if name.endswith("_scale")
            else "; sub-norms are part of the BitNet architecture"
            if "sub_norm" in name
            else ""
        )
        raise KeyError(f"tensor {name} is not in the checkpoint {folder}{hint}")
    return on_disk[name]


def format_of(weights: Weights) -> str:
    """Says in words how the ternary matrices are stored on disk."""
    form = weights._form
    if form.kind == "packed":
        return f"safetensors, 2-bit packed, scale {'divides' if form.divides else 'multiplies'}"
    dtypes = {e.info.dtype for e in weights._entries.values() if e.kind == form.kind}
    names = "/".join(sorted(_DTYPE_NAMES[dtype] for dtype in dtypes))
    if form.kind == "values":
        return f"safetensors, ternary values in {names}"
    return f"safetensors, {names} masters, quantized at load"


def _scale(array: NDArray[Any], info: TensorInfo, *, divides: bool) -> NDArray[np.float32]:
    stored = to_float32(array).reshape(1)
    with np.errstate(over="ignore", divide="ignore"):
        scale = np.float32(1) / stored if divides else stored
    if not (np.isfinite(stored[0]) and stored[0] > 0 and np.isfinite(scale[0])):
        raise ValueError(
            f"{info.file}: tensor {info.name} is {stored[0]}; a weight scale is a finite number "
            "above zero. The file is damaged"
        )
    return scale


def _norm(array: NDArray[Any], info: TensorInfo, *, plus_one: bool = False) -> NDArray[np.float32]:
    weight = to_float32(array)
    if plus_one:
        weight = weight + np.float32(1)
    if not np.isfinite(weight).all():
        raise ValueError(
            f"{info.file}: tensor {info.name} holds NaN or infinity; the file is damaged"
        )
    return weight


def _by_canonical_name(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    # Models that were saved without their head have no prefix.
    prefix = "" if _EMBEDDING in tensors else "model."
    for name, info in tensors.items():
        canonical = name if name.startswith(("model.", "lm_head.")) else prefix + name
        for alias, target in _ALIASES.items():
            if name.endswith("." + alias):
                canonical = name.removesuffix(alias) + target
        if canonical in found:
            raise ValueError(
                f"{info.file}: tensors {found[canonical].name} and {name} are two names of one "
                "tensor; wanted one of them"
            )
        found[canonical] = info
    return found


def _is_tied(config: Mapping[str, Any], on_disk: Mapping[str, TensorInfo], where: Path) -> bool:
    """Whether the head is the embedding. Both families default to untied in transformers."""
    declared = config.get("tie_word_embeddings")
    head = on_disk.get("lm_head.weight")
    if declared is None:
        return head is None
    if type(declared) is not bool:
        raise ValueError(
            f"{where}: field `tie_word_embeddings` is {declared!r}; wanted true or false"
        )
    embedding = on_disk.get("model.embed_tokens.weight")
    if declared and head and embedding and not _same_content(head, embedding):
        raise ValueError(
            f"{where}: field `tie_word_embeddings` is true, but {head.file} has a lm_head.weight "
            "that differs from model.embed_tokens.weight; set it to false if that head is meant"
        )
    return declared


def _same_content(a: TensorInfo, b: TensorInfo) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    x, y = a.read().reshape(-1), b.read().reshape(-1)
    step = 1 << 22
    return all(np.array_equal(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step))


def _check_header(entry: _Entry, axes: tuple[Axis, ...], dims: Dimensions, where: Path) -> None:
    """Checks dtype and shape of a tensor on disk against its kind and canonical shape."""
    info, kind, shape = entry.info, entry.kind, entry.shape

    def refuse(found: str, wanted: str) -> NoReturn:
        raise ValueError(f"{info.file}: tensor {info.name} {found}; {wanted}")

    if kind == "packed" and info.dtype != "U8":
        refuse(
            f"is {info.dtype} {list(info.shape)}",
            f"{where.name} says that the weights are packed, so wanted U8. Masters need "
            '"linear_class": "autobitlinear" and "quantization_mode": "online" in its '
            "`quantization_config`",
        )
    if kind in ("masters", "values") and info.dtype == "U8":
        refuse(
            f"is U8 {list(info.shape)}",
            f"{where.name} says that the weights are float masters. Packed weights need a "
            '`quantization_config` with "quantization_mode": "offline"',
        )
    if kind != "packed" and info.dtype not in _FLOATS:
        refuse(f"has dtype {info.dtype}", f"supported: {', '.join(_FLOATS)}")

    wanted = shape
    if kind == "packed":
        wanted = (-(-shape[0] // 4), shape[1])
    if kind == "scale" and info.shape == ():
        return
    if info.shape != wanted:
        reasons = [
            dims.explain(axis) + (f" = {n}" if len(axis) > 1 else "")
            for axis, n in zip(axes, shape, strict=True)
            if axis
        ]
        if kind == "packed":
            reasons[0] += " rows, four to a byte"
        why = f" ({'; '.join(reasons)})" if reasons else ""
        refuse(
            f"has shape {list(info.shape)}",
            f"the sizes in {where.name} want {list(wanted)}{why}",
        )


def _refuse_unexpected(
    name: str, info: TensorInfo, arch: Architecture, dims: Dimensions, where: Path
) -> None:
    """A tensor that nobody would read changes the result: refused, unless it is known not to."""
    if name.endswith(_DERIVED):
        return
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if name.endswith("_proj.weight_scale"):
        why = (
            f"{where.name} says that the weights are float masters, which have no scale; packed "
            'weights need a `quantization_config` with "quantization_mode": "offline"'
        )
    elif layer and int(layer[1]) >= dims.n_layers:
        why = f"{where.name} has `num_hidden_layers` {dims.n_layers}"
    elif not has_sub_norms(arch) and "sub_norm" in name:
        why = f"sub-norms belong to BitNetForCausalLM, and `architectures` names {arch}"
    else:
        why = f"the {arch} architecture has no such tensor, so the model would run wrongly"
    raise ValueError(f"{info.file}: unexpected tensor {info.name}; {why}")
