"""Checkpoint tensors to canonical weights: names, forms, scale direction, checks.

For `open_checkpoint`. A new Hugging Face spelling of a ternary model belongs here and nowhere
else. Canonical names are those of `microsoft/bitnet-b1.58-2B-4T`; the canonical form of a
projection is either trits, four a byte as they are stored, with a float32 scale that multiplies,
or float masters as they are, which the core quantizes by their absolute mean.

Everything that changes the result and is not understood is refused: a form, a field, a tensor
that no architecture here has.
"""

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders.safetensors import Reader, TensorInfo, to_float32

Architecture = Literal["bitnet", "llama"]
Kind = Literal["packed", "masters", "scale", "norm", "dense"]

_FLOATS: Final = ("F32", "F16", "BF16")
_DTYPE_NAMES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# `architectures` of config.json: the core's architecture, and the model_type that may go with
# it. 1bitLLM's models say "llama" but have sub-norms, in modelling code of their own.
_ARCHITECTURES: Final[Mapping[str, tuple[Architecture, tuple[str, ...]]]] = {
    "BitNetForCausalLM": ("bitnet", ("bitnet",)),
    "BitnetForCausalLM": ("bitnet", ("bitnet", "llama")),
    "LlamaForCausalLM": ("llama", ("llama",)),
}
_BY_MODEL_TYPE: Final = {"bitnet": "BitNetForCausalLM", "llama": "LlamaForCausalLM"}

# Spelling on disk -> canonical.
_ALIASES: Final = {
    "self_attn.inner_attn_ln.weight": "self_attn.attn_sub_norm.weight",
    "mlp.ffn_layernorm.weight": "mlp.ffn_sub_norm.weight",
}
# A constant of RoPE that old checkpoints store; it follows from config.json.
_DERIVED: Final = "rotary_emb.inv_freq"


def architecture(config: Mapping[str, Any], where: Path) -> Architecture:
    """Decides which forward pass the weights were trained for.

    Args:
        config: The content of config.json.
        where: Its path, for messages.

    Raises:
        ValueError: Unknown `architectures`, or a `model_type` that contradicts it.
    """
    named = config.get("architectures")
    model_type = config.get("model_type")
    if named is None and isinstance(model_type, str) and model_type in _BY_MODEL_TYPE:
        named = [_BY_MODEL_TYPE[model_type]]
    if named not in [[known] for known in _ARCHITECTURES]:
        raise ValueError(
            f"{where}: field `architectures` is {named!r}; "
            f"supported: one of {', '.join(_ARCHITECTURES)}"
        )
    arch, model_types = _ARCHITECTURES[named[0]]
    if model_type is not None and model_type not in model_types:
        raise ValueError(
            f"{where}: field `model_type` is {model_type!r}; "
            f"{named[0]} wants {' or '.join(map(repr, model_types))}"
        )
    return arch


@dataclass(frozen=True)
class Form:
    """How a checkpoint stores its ternary matrices.

    Attributes:
        packed: Four trits a byte with a scale each; else float masters without one.
        divides: The scale on disk divides, so the canonical one is its reciprocal.
    """

    packed: bool
    divides: bool = False


def weight_form(config: Mapping[str, Any], where: Path) -> Form:
    """Decides how the ternary matrices are stored, from `quantization_config`.

    The direction of the scale stands nowhere but in `linear_class`, and a wrong one gives
    plausible numbers: an absent or unknown value is never guessed at beyond what transformers
    itself defaults to.

    Raises:
        ValueError: A field has an unknown value, or nothing says that the model is ternary.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return _undeclared_form(config, where)
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
    if linear_class == "bitlinear":
        return Form(packed=True, divides=True)  # transformers ignores the mode here
    return Form(packed=mode == "offline")


def _undeclared_form(config: Mapping[str, Any], where: Path) -> Form:
    # 1bitLLM's own code quantizes every projection, so the name of the class is the claim.
    if "BitnetForCausalLM" not in (config.get("architectures") or ()):
        raise ValueError(
            f"{where}: field `quantization_config` is missing, so nothing says that this is a "
            "ternary model; a model trained with float weights cannot run here. If its weights "
            'are the masters of a ternary model, add "quantization_config": {"quant_method": '
            '"bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}'
        )
    for field, wanted in (("weight_bits", 1), ("input_bits", 8)):
        if config.get(field, wanted) != wanted:
            raise ValueError(f"{where}: field `{field}` is {config[field]!r}; supported: {wanted}")
    return Form(packed=False)


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
    for number, projection in product(("0", "00", "000"), _PROJECTIONS):
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


# Fields of config.json whose product is one axis of a tensor.
Axis = tuple[str, ...]
_HIDDEN: Final[Axis] = ("hidden_size",)
_FFN: Final[Axis] = ("intermediate_size",)
_VOCAB: Final[Axis] = ("vocab_size",)
_QUERIES: Final[Axis] = ("num_attention_heads", "head_dim")
_KEYS: Final[Axis] = ("num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class Dimensions:
    """The sizes that fix the shape of every tensor.

    Attributes:
        n_layers: Layers.
        sizes: The other sizes, by their field of config.json.
        derived: How a size follows from others, for the fields that are not there.
    """

    n_layers: int
    sizes: Mapping[str, int]
    derived: Mapping[str, str]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: Path) -> Self:
        """Reads them from config.json.

        Raises:
            ValueError: A field is missing or not a positive integer.
        """

        def size(field: str) -> int:
            value = config.get(field)
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"{where}: field `{field}` is {value!r}; wanted a positive integer"
                )
            return value

        sizes = {
            field: size(field)
            for field in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
        }
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if config.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"{where}: `hidden_size` {hidden} is no multiple of `num_attention_heads` "
                f"{heads}, and there is no `head_dim`"
            )
        derived = {}
        for field, default, origin in (
            ("num_key_value_heads", heads, "`num_attention_heads`"),
            ("head_dim", hidden // heads, "`hidden_size` / `num_attention_heads`"),
        ):
            if config.get(field) is None:
                sizes[field], derived[field] = default, origin
            else:
                sizes[field] = size(field)
        return cls(size("num_hidden_layers"), sizes, derived)

    def shape(self, axes: tuple[Axis, ...]) -> tuple[int, ...]:
        """The shape of a tensor with these axes."""
        return tuple(math.prod(self.sizes[field] for field in axis) for axis in axes)

    def explain(self, axis: Axis) -> str:
        """The fields and values whose product is the length of an axis."""
        return " x ".join(
            f"`{field}` {self.sizes[field]}"
            + (f" (= {self.derived[field]})" if field in self.derived else "")
            for field in axis
        )


# Rows and columns of each projection.
_PROJECTIONS: Final[Mapping[str, tuple[Axis, Axis]]] = {
    "self_attn.q_proj": (_QUERIES, _HIDDEN),
    "self_attn.k_proj": (_KEYS, _HIDDEN),
    "self_attn.v_proj": (_KEYS, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _QUERIES),
    "mlp.gate_proj": (_FFN, _HIDDEN),
    "mlp.up_proj": (_FFN, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _FFN),
}


def _expected(
    n_layers: int, arch: Architecture, form: Form, *, head: bool
) -> Iterator[tuple[str, Kind, tuple[Axis, ...]]]:
    """Canonical name, kind and axes of every tensor, in the order of the layers."""
    yield "model.embed_tokens.weight", "dense", (_VOCAB, _HIDDEN)
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", "norm", (_HIDDEN,)
        yield layer + "post_attention_layernorm.weight", "norm", (_HIDDEN,)
        if arch == "bitnet":
            yield layer + "self_attn.attn_sub_norm.weight", "norm", (_QUERIES,)
            yield layer + "mlp.ffn_sub_norm.weight", "norm", (_FFN,)
        for projection, axes in _PROJECTIONS.items():
            name = f"{layer}{projection}.weight"
            yield name, "packed" if form.packed else "masters", axes
            if form.packed:
                yield f"{name}_scale", "scale", ((),)  # one element
    yield "model.norm.weight", "norm", (_HIDDEN,)
    if head:
        yield "lm_head.weight", "dense", (_VOCAB, _HIDDEN)


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    kind: Kind
    shape: tuple[int, ...]


class Weights(Mapping[str, NDArray[Any]]):
    """Tensors by canonical name, read and checked when asked for.

    Nothing is kept: an array that is asked for twice is read twice. Ternary matrices are uint8,
    four rows to a byte (`_core.Model` says how), their scales float32 of shape (1,); norms are
    float32; masters, embeddings and head are as on disk (float32, float16, or bfloat16 bits as
    uint16). What is as on disk is mapped from the file, read-only; its pages leave the process's
    memory when the next tensor is asked for, and come back if they are read again.

    Raises:
        KeyError: On a name that the checkpoint does not have.
        ValueError: On a tensor whose content is impossible, such as a scale of zero.
    """

    def __init__(self, entries: Mapping[str, _Entry], form: Form, folder: Path) -> None:
        self._entries = entries
        self._form = form
        self._folder = folder
        self._reader = Reader()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor

    def __repr__(self) -> str:
        return f"<{len(self)} tensors of {self._folder}>"

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._entries:
            raise KeyError(f"tensor {name} is not in the checkpoint {self._folder}")
        entry = self._entries[name]
        array = self._reader.read(entry.info)
        match entry.kind:
            case "scale":
                return _scale(array, entry.info, divides=self._form.divides)
            case "norm":
                return _norm(array, entry.info)
            case _:
                return array


def canonical_weights(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], folder: Path
) -> tuple[Weights, Architecture, bool]:
    """Matches the tensors on disk with what config.json wants; reads no tensor but a tied head.

    Args:
        tensors: Tensors by their name on disk.
        config: The content of config.json.
        folder: The checkpoint's folder, for messages.

    Returns:
        The weights, the architecture, and whether the head is the embedding (tied).

    Raises:
        KeyError: A tensor is missing.
        ValueError: A field or a tensor does not fit; the message names it.
    """
    where = folder / "config.json"
    arch = architecture(config, where)
    form = weight_form(config, where)
    dims = Dimensions.from_config(config, where)
    on_disk = _by_canonical_name(tensors)
    tied = _is_tied(config, on_disk, where)

    entries: dict[str, _Entry] = {}
    for name, kind, axes in _expected(dims.n_layers, arch, form, head=not tied):
        if name not in on_disk:
            hint = (
                "; a packed projection needs its scale, and nothing else says how large it is"
                if kind == "scale"
                else "; sub-norms are part of the BitNet architecture"
                if "sub_norm" in name
                else ""
            )
            raise KeyError(f"tensor {name} is not in the checkpoint {folder}{hint}")
        entries[name] = _Entry(on_disk[name], kind, dims.shape(axes))
        _check_header(entries[name], axes, dims, where)
    for name, info in on_disk.items():
        if name not in entries and not (tied and name == "lm_head.weight"):
            _refuse_unexpected(name, info, arch, dims, where)
    return Weights(entries, form, folder), arch, tied


def format_of(weights: Weights) -> str:
    """Says in words how the ternary matrices are stored on disk."""
    if weights._form.packed:
        return f"safetensors, 2-bit packed, scale {'divides' if weights._form.divides else 'multiplies'}"
    dtypes = {e.info.dtype for e in weights._entries.values() if e.kind == "masters"}
    names = "/".join(sorted(_DTYPE_NAMES[dtype] for dtype in dtypes))
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


def _norm(array: NDArray[Any], info: TensorInfo) -> NDArray[np.float32]:
    weight = to_float32(array)
    if not np.isfinite(weight).all():
        raise ValueError(
            f"{info.file}: tensor {info.name} holds NaN or infinity; the file is damaged"
        )
    return weight


def _by_canonical_name(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        canonical = name
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
    if kind == "masters" and info.dtype == "U8":
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
    elif arch == "llama" and "sub_norm" in name:
        why = "sub-norms belong to BitNetForCausalLM, and `architectures` names LlamaForCausalLM"
    else:
        why = f"the {arch} architecture has no such tensor, so the model would run wrongly"
    raise ValueError(f"{info.file}: unexpected tensor {info.name}; {why}")
