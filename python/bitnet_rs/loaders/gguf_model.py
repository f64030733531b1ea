"""GGUF files to canonical weights: architectures, names, scales, what the metadata means.

For `open_checkpoint`. `gguf.py` knows the container and `ggml_types.py` the blocks; this file
knows models: which forward pass an architecture's name stands for, how llama.cpp calls the tensors
and fields that Hugging Face calls otherwise, where scales are, and that rows of queries and keys
are permuted in `llama` files. What changes the result and is not understood is refused.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders.families import (
    CLASS_OF,
    Activations,
    Architecture,
    Axis,
    Dimensions,
    expected_tensors,
)
from bitnet_rs.loaders.ggml_types import (
    GgmlType,
    read_floats,
    read_scales,
    read_trits,
    resolve_types,
)
from bitnet_rs.loaders.gguf import GgufFile, GgufTensor, open_gguf, shown
from bitnet_rs.loaders.gguf_names import ARCHS, Arch, gguf_name
from bitnet_rs.loaders.i2s_layout import looks_like_another_layout
from bitnet_rs.loaders.lazy import LazyWeights
from bitnet_rs.loaders.mapped import Mapper
from bitnet_rs.loaders.options import FileOptions
from bitnet_rs.loaders.safetensors import to_float32
from bitnet_rs.loaders.ternary_values import Recovered, Recovery, collapse, is_ternary, recover

_HEAD: Final = "output.weight"
_PROJECTION_NORM: Final = "blk.0.attn_q_norm_in.weight"
_ROPE_FACTORS: Final = "rope_freqs.weight"

# Types that bitnet.cpp's and ik_llama.cpp's BitNet kernels alone have: they quantize activations
# to int8 by token, as these models are trained. Other ternary types serve weights alone.
_INT8_TYPES: Final = ("I2_S", "TL1", "TL2", "IQ1_BN", "IQ2_BN", "IQ2_BN_R4")

# What this package's own `convert` writes, where the architecture does not say it.
ACTIVATIONS_KEY: Final = "bitnet-rs.activations"

LAST_TOKEN: Final = 3
"""llama.cpp's `pooling_type` of the embedding models."""

_CURE: Final = "download or copy the file again"


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file, understood; no weight is in memory.

    Attributes:
        config: What config.json would say.
        architecture: What runs.
        tied: The head is the embedding.
        activations: What projections multiply.
        activations_stated: Whether the file says so; else it is an assumption.
        embedding: Whether it is a model for embeddings.
        weights: Tensors by canonical name.
        format: How weights are stored, in words.
        n_bytes: Bytes of the file or of its parts.
        warnings: What is probably wrong.
        notes: What a user should know.
        metadata: All of the file's.
        tensors: (name, ggml type, shape) of each.
    """

    config: dict[str, Any]
    architecture: Architecture
    tied: bool
    activations: Activations
    activations_stated: bool
    embedding: bool
    weights: "GgufWeights"
    format: str
    n_bytes: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    metadata: Mapping[str, Any]
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]


def open_gguf_model(path: Path, options: FileOptions) -> GgufModel:
    """Opens a GGUF file and matches its tensors with its metadata.

    Raises:
        FileNotFoundError: There is no such file.
        KeyError: A tensor is missing.
        ValueError: The file, a field or a tensor is malformed or not supported.
    """
    file = open_gguf(path)
    arch = _arch(file)
    types = resolve_types(file, options.ggml)
    config = _config(file, arch)
    dims = Dimensions.from_config(config, path)
    tied = _is_tied(file, types)
    embedding = _PROJECTION_NORM in file.tensors
    entries = _entries(file, types, arch, dims, head=not tied, projection_norms=embedding)
    _refuse_unexpected(file, types, entries, arch, dims, tied=tied)
    weights = GgufWeights(entries, types, path, masters=options.masters)
    activations, stated = _activations(
        file, types, entries, arch, bit_linear=embedding or weights.has_masters
    )
    warning = looks_like_another_layout(file, types)
    return GgufModel(
        config=config,
        architecture=arch.architecture,
        tied=tied,
        activations=activations,
        activations_stated=stated,
        embedding=embedding,
        weights=weights,
        format=_format(file, types, entries),
        n_bytes=file.n_bytes,
        warnings=(warning,) if warning else (),
        notes=tuple(_pooling_notes(file)) if embedding else (),
        metadata=file.metadata,
        tensors=tuple((t.name, types[t.name].name, t.shape) for t in file.tensors.values()),
    )


# --- metadata -------------------------------------------------------------------------------------


def _arch(file: GgufFile) -> Arch:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHS:
        raise ValueError(
            f"{file.path}: field `general.architecture` is {name!r}; supported: {', '.join(ARCHS)}"
        )
    return ARCHS[name]


class _Fields:
    """Fields of one architecture, with checks."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._prefix = file.metadata["general.architecture"]

    def refuse(self, key: str, found: object, wanted: str) -> NoReturn:
        raise ValueError(
            f"{self._file.path}: field `{self._prefix}.{key}` is {found!r}; wanted {wanted}"
        )

    def get(self, key: str) -> Any:
        return self._file.metadata.get(f"{self._prefix}.{key}")

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; of an array for each layer, the one that all have."""
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            self.refuse(key, value, "a positive integer, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):
            self.refuse(key, value, "a number")
        return float(value)


def _config(file: GgufFile, arch: Arch) -> dict[str, Any]:
    """The metadata by the names of config.json."""
    fields = _Fields(file)
    hidden = fields.size("embedding_length")
    heads = fields.size("attention.head_count")
    head_dim = fields.size(
        "attention.key_length", fields.size("rope.dimension_count", hidden // heads)
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.size(key, head_dim) != head_dim:
            fields.refuse(key, fields.get(key), f"the width of a head, {head_dim}")
    kind = fields.get("rope.scaling.type")
    factor = fields.number("rope.scaling.factor", 1.0)
    if kind not in (None, "none") and factor != 1.0:
        fields.refuse("rope.scaling.type", f"{kind} by {factor}", "no scaling")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise KeyError(f"tensor token_embd.weight is not in the file {file.path}, or is no matrix")
    config: dict[str, Any] = {
        "architectures": [CLASS_OF[arch.architecture]],
        "model_type": arch.architecture,
        "hidden_act": arch.hidden_act,
        "hidden_size": hidden,
        "intermediate_size": fields.size("feed_forward_length"),
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": fields.size("vocab_size", embedding.shape[0]),
        "max_position_embeddings": fields.size("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        # Where it is missing, llama.cpp takes this.
        "rope_theta": fields.number("rope.freq_base", 10000.0),
    }
    for key, role in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        found = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
        if type(found) is int:
            config[key] = found
    if arch.architecture == "gemma3_text":
        config |= _gemma3(fields, head_dim)
    return config


def _gemma3(fields: _Fields, head_dim: int) -> dict[str, Any]:
    """What llama.cpp's `gemma3` takes from metadata or fixes itself (src/models/gemma3.cpp)."""
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if fields.number(key, 0.0) != 0.0:
            fields.refuse(key, fields.get(key), "0")
    config: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": head_dim,
        "sliding_window": None,
    }
    if not fields.get("attention.sliding_window"):
        return config
    config |= {
        "sliding_window": fields.size("attention.sliding_window"),
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 10000.0),
    }
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):  # for each layer whether it has a window
        kinds = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
        return config | {"layer_types": kinds}
    return config | {"sliding_window_pattern": fields.size("attention.sliding_window_pattern", 6)}


def _activations(
    file: GgufFile,
    types: Mapping[str, GgmlType],
    entries: Mapping[str, "_Entry"],
    arch: Arch,
    *,
    bit_linear: bool,
) -> tuple[Activations, bool]:
    """What the model was trained to multiply, and whether the file says so."""
    stated = file.metadata.get(ACTIVATIONS_KEY)
    if stated is not None:
        if stated not in ("int8", "float"):
            raise ValueError(
                f"{file.path}: field `{ACTIVATIONS_KEY}` is {stated!r}; wanted 'int8' or 'float'"
            )
        return stated, True
    names = {types[e.tensor.name].name for e in entries.values() if e.kind == "trits"}
    if arch.architecture == "bitnet" or bit_linear or names & set(_INT8_TYPES):
        return "int8", True
    # A head or an embedding of trits: Bonsai's, whose models are weights alone.
    if any(e.kind == "ternary dense" for e in entries.values()):
        return "float", True
    return "float", False


def _pooling_notes(file: GgufFile) -> Iterator[str]:
    """Says so where an embedding model's file asks for another token than the last.

    Microsoft's converter writes the mean where it finds no description of the pooling.
    """
    key = f"{file.metadata['general.architecture']}.pooling_type"
    found = file.metadata.get(key, LAST_TOKEN)
    if found != LAST_TOKEN:
        yield (
            f"{file.path}: field `{key}` is {found!r}; embed() takes the last token, {LAST_TOKEN}, "
            "as these models were trained"
        )


# --- tensors --------------------------------------------------------------------------------------

Kind = Literal["trits", "values", "scales", "norm", "dense", "ternary dense"]


@dataclass(frozen=True)
class _Entry:
    """Where a canonical tensor comes from.

    Attributes:
        tensor: On disk.
        kind: `values` are floats that are ternary; `scales` are those of trits or of values.
        factor: A further scale, in a tensor of its own.
        heads: Rows are permuted within so many heads, or 0.
    """

    tensor: GgufTensor
    kind: Kind
    factor: GgufTensor | None = None
    heads: int = 0


def _entries(
    file: GgufFile,
    types: Mapping[str, GgmlType],
    arch: Arch,
    dims: Dimensions,
    *,
    head: bool,
    projection_norms: bool,
) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    expected = expected_tensors(
        arch.architecture, dims.n_layers, head=head, projection_norms=projection_norms
    )
    for name, kind, axes in expected:
        on_disk = gguf_name(name, arch)
        tensor = file.tensors.get(on_disk) if on_disk else None
        if on_disk is None or tensor is None:
            raise KeyError(
                f"tensor {on_disk} is not in the file {file.path}; "
                f"`{file.metadata['general.architecture']}` needs it. {_CURE.capitalize()}"
            )
        _check_shape(tensor, axes, dims)
        ternary = types[on_disk].kind == "ternary"
        if kind == "norm":
            if ternary:
                _refuse(tensor, types, "a norm is a float tensor")
            entries[name] = _Entry(tensor, "norm")
        elif kind == "dense":
            entries[name] = _Entry(tensor, "ternary dense" if ternary else "dense")
        else:
            entry = _Entry(
                tensor,
                "trits" if ternary else "values",
                _factor(file, types, tensor),
                permuted_heads(name, dims) if arch.permuted else 0,
            )
            entries[name] = entry
            entries[f"{name}_scale"] = replace(entry, kind="scales")
    return entries


def permuted_heads(name: str, dims: Dimensions) -> int:
    """Heads within which rows of a matrix are permuted in a `llama` file: those of q and k."""
    if name.endswith("q_proj.weight"):
        return dims.sizes["num_attention_heads"]
    if name.endswith("k_proj.weight"):
        return dims.sizes["num_key_value_heads"]
    return 0


# Names of tensors with a further scale: llama.cpp's `bitnet`, bitnet.cpp's TL1 and TL2.
_FACTORS: Final = (".scale", ".weight_scale", "_scale")


def _factor(file: GgufFile, types: Mapping[str, GgmlType], tensor: GgufTensor) -> GgufTensor | None:
    stem = tensor.name.removesuffix(".weight")
    found = [file.tensors[stem + end] for end in _FACTORS if stem + end in file.tensors]
    if not found:
        return None
    if len(found) > 1 or math.prod(found[0].shape) != 1 or types[found[0].name].name != "F32":
        names = ", ".join(f"{t.name} {list(t.shape)}" for t in found)
        raise ValueError(
            f"{file.path}: {names}: wanted one float32 number, the scale of {tensor.name}; {_CURE}"
        )
    # bitnet.cpp's TL files have the same scale twice, after the weights and in a tensor.
    return None if types[tensor.name].name in ("TL1", "TL2") else found[0]


def _check_shape(tensor: GgufTensor, axes: tuple[Axis, ...], dims: Dimensions) -> None:
    wanted = dims.shape(axes)
    if tensor.shape != wanted:
        why = "; ".join(dims.explain(axis) for axis in axes)
        raise ValueError(
            f"{tensor.file}: tensor {shown(tensor.name)} has shape {list(tensor.shape)}; the "
            f"metadata wants {list(wanted)} ({why}). {_CURE.capitalize()}"
        )


def _refuse(tensor: GgufTensor, types: Mapping[str, GgmlType], wanted: str) -> NoReturn:
    raise ValueError(
        f"{tensor.file}: tensor {shown(tensor.name)} has type {types[tensor.name].name}; {wanted}"
    )


def _is_tied(file: GgufFile, types: Mapping[str, GgmlType]) -> bool:
    """Whether the head is the embedding. The first 2B-4T file holds the same matrix twice."""
    head, embedding = file.tensors.get(_HEAD), file.tensors.get("token_embd.weight")
    if head is None or embedding is None:
        return True
    if head.shape != embedding.shape or types[_HEAD] != types[embedding.name]:
        return False
    n_bytes, step = types[_HEAD].n_bytes(head.shape), 1 << 22
    for at in range(0, n_bytes, step):
        # Mapped piece by piece: both as a whole would count as memory of this process.
        a, b = (
            Mapper().map(t.file, t.offset + at, min(step, n_bytes - at), f"tensor {t.name}")
            for t in (head, embedding)
        )
        if not np.array_equal(a, b):
            return False
    return True


def _refuse_unexpected(
    file: GgufFile,
    types: Mapping[str, GgmlType],
    entries: Mapping[str, _Entry],
    arch: Arch,
    dims: Dimensions,
    *,
    tied: bool,
) -> None:
    """A tensor that nobody would read changes the result: refused, unless it is known not to."""
    known = {entry.tensor.name for entry in entries.values()}
    stems = {name.removesuffix(".weight") for name in known}
    for name, tensor in file.tensors.items():
        if name in known or (tied and name == _HEAD):
            continue
        if any(name.removesuffix(end) in stems for end in _FACTORS if name.endswith(end)):
            continue
        if name == _ROPE_FACTORS:
            if (
                types[name].kind == "float"
                and (to_float32(read_floats(tensor, types[name])) == 1).all()
            ):
                continue
            why = "it scales rotary embeddings, which is not supported"
        else:
            layer = re.match(r"blk\.(\d+)\.", name)
            if layer and int(layer[1]) >= dims.n_layers:
                why = f"`block_count` is {dims.n_layers}"
            else:
                arch_name = file.metadata["general.architecture"]
                why = f"`{arch_name}` has no such tensor, so the model would run wrongly"
        raise ValueError(f"{file.path}: unexpected tensor {shown(name)}; {why}")


class GgufWeights(LazyWeights[_Entry]):
    """Tensors of a GGUF file by canonical name, read and checked when asked for.

    As `names.Weights`, with ternary matrices int8 and their scales of shape (1,) or (rows,
    groups); where `masters` are said to be there, float matrices stay floats without a scale.

    Attributes:
        has_masters: Whether that is so.

    Raises:
        KeyError: On a name that the file does not have.
        ValueError: On a tensor whose content is impossible.
    """

    def __init__(
        self,
        entries: Mapping[str, _Entry],
        types: Mapping[str, GgmlType],
        path: Path,
        *,
        masters: bool,
    ) -> None:
        self._types = types
        self._mapper = Mapper()
        self._recovery = Recovery()
        self.has_masters: Final = masters and self._are_masters(entries)
        kept = {
            name: entry
            for name, entry in entries.items()
            if not (self.has_masters and entry.kind == "scales")
        }
        super().__init__(kept, path)

    def _are_masters(self, entries: Mapping[str, _Entry]) -> bool:
        first = next((e for e in entries.values() if e.kind == "values"), None)
        return first is not None and not is_ternary(self._floats(first.tensor))

    def _read(self, name: str, entry: _Entry) -> NDArray[Any]:
        match entry.kind:
            case "trits":
                trits = read_trits(entry.tensor, self._types[entry.tensor.name], self._mapper)
                return unpermuted(trits, entry.heads)
            case "values" if self.has_masters:
                return unpermuted(self._floats(entry.tensor), entry.heads)
            case "values":
                return self._recovery.trits(name, lambda: self._recover(entry))
            case "scales":
                return self._scales(name.removesuffix("_scale"), entry)
            case "norm":
                return self._norm(entry)
            case "dense":
                return self._floats(entry.tensor)
            case "ternary dense":
                return self._ternary_dense(entry)

    def _floats(self, tensor: GgufTensor) -> NDArray[Any]:
        return read_floats(tensor, self._types[tensor.name], self._mapper)

    def _norm(self, entry: _Entry) -> NDArray[np.float32]:
        weight = to_float32(self._floats(entry.tensor))
        if not np.isfinite(weight).all():
            raise ValueError(
                f"{self._path}: tensor {entry.tensor.name} holds NaN or infinity; {_CURE}"
            )
        return weight

    def _recover(self, entry: _Entry) -> Recovered:
        try:
            trits, scales = recover(self._floats(entry.tensor))
        except ValueError as error:
            raise ValueError(
                f"{self._path}: tensor {entry.tensor.name} {error}. If the file holds the masters "
                "of a ternary model, load it with masters=True (--masters); other float weights "
                "cannot run here"
            ) from None
        return (
            unpermuted(trits, entry.heads),
            scales if scales.size == 1 else unpermuted(scales, entry.heads),
        )

    def _scales(self, name: str, entry: _Entry) -> NDArray[np.float32]:
        type_ = self._types[entry.tensor.name]
        if type_.kind == "ternary":
            scales = collapse(read_scales(entry.tensor, type_, self._mapper))
            if scales.size > 1:
                scales = unpermuted(scales, entry.heads)
        else:
            scales = self._recovery.scales(name, lambda: self._recover(entry))
        if entry.factor is None:
            return scales
        factor = to_float32(self._floats(entry.factor)).reshape(())
        if not 0 < factor < np.inf:
            raise ValueError(
                f"{self._path}: tensor {entry.factor.name} is {factor}; a scale is a finite number "
                f"above zero. {_CURE.capitalize()}"
            )
        return scales * factor

    def _ternary_dense(self, entry: _Entry) -> NDArray[Any]:
        """Trits times scales, which float16 holds exactly where it is what scales are stored in."""
        tensor, type_ = entry.tensor, self._types[entry.tensor.name]
        rows, cols = tensor.shape
        half = type_.tail_bytes == 0 and not type_.name.startswith("IQ2_BN")
        out = np.empty((rows, cols), np.float16 if half else np.float32)
        scales = read_scales(tensor, type_, self._mapper)
        trits = read_trits(tensor, type_, self._mapper)
        step = max(1, (1 << 20) // cols)
        for start in range(0, rows, step):
            part = trits[start : start + step]
            if scales.size == 1:
                out[start : start + step] = part * scales.reshape(())
                continue
            by_group = part.reshape(len(part), scales.shape[1], -1)
            values = by_group * scales[start : start + step, :, None]
            out[start : start + step] = values.reshape(part.shape)
        out.flags.writeable = False  # so that the core need not copy it
        return out

    def has_groups(self) -> bool:
        """Whether some matrix has several scales; reads the scales of all that may."""
        found = any(
            self[name].size > 1 for name, entry in self._entries.items() if entry.kind == "scales"
        )
        self._recovery.clear()
        return found


def unpermuted(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of queries or keys in the order of halves; `convert_hf_to_gguf.py` interleaves them.

    Args:
        rows: The first axis is heads * head_dim.
        heads: Query or key heads; 0 leaves rows as they are.
    """
    if not heads:
        return rows
    parts = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(rows.shape)


def _format(file: GgufFile, types: Mapping[str, GgmlType], entries: Mapping[str, _Entry]) -> str:
    """How the matrices are stored, in words."""
    names = [types[e.tensor.name] for e in entries.values() if e.kind in ("trits", "values")]
    words = []
    for type_ in dict.fromkeys(names):
        word = type_.name
        if type_.layout:
            word += f" ({type_.layout} layout)"
        elif type_.kind == "float":
            word = f"ternary values in {word}"
        words.append(word)
    dense = types["token_embd.weight"].name
    return (
        f"GGUF v{file.version} `{file.metadata['general.architecture']}`, {', '.join(words)}; "
        f"embedding {dense}"
    )
