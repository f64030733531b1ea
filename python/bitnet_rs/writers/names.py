"""Architectures, metadata and tensor names of GGUF, from those of Hugging Face.

For `to_gguf.py`. Names are those of `loaders/gguf_names.py`, read the other way round; what only a
writer has to know of an architecture is here. What is not in the tables is refused, since a reader
would run it wrongly or not at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders.families import Dimensions
from bitnet_rs.loaders.gguf_model import LAST_TOKEN
from bitnet_rs.loaders.gguf_names import ARCHS, Arch, gguf_name
from bitnet_rs.writers.gguf import Value, ValueType, typed


@dataclass(frozen=True)
class Target:
    """What has to be known of an architecture to write it.

    Attributes:
        arch: The architecture.
        scale_tensors: llama.cpp multiplies what a projection gives by a `.scale` tensor if there
            is one, so that scales beyond float16 can be kept. bitnet.cpp's graph of `bitnet-b1.58`
            does so for some projections and not for q, k and v, and llama.cpp lacks it.
        head_sizes: Key and value lengths are always written, as llama.cpp's converter does.
        tied: Other programs take the embedding for the head and do not read a head of its own.
        in_llama_cpp: llama.cpp knows it.
    """

    arch: Arch
    scale_tensors: bool = True
    head_sizes: bool = False
    tied: bool = False
    in_llama_cpp: bool = True


# `bitnet-25` is the older name of `bitnet-b1.58`.
_TARGETS: Final = (
    Target(ARCHS["bitnet-b1.58"], scale_tensors=False, tied=True, in_llama_cpp=False),
    Target(ARCHS["bitnet"], tied=True),
    Target(ARCHS["llama"]),
    Target(ARCHS["qwen3"], head_sizes=True),
    Target(ARCHS["gemma3"], head_sizes=True),
)

# ggml types of floats as the loaders hand them on; bfloat16 travels as uint16.
FLOAT_TYPES: Final = {"float32": 0, "float16": 1, "uint16": 30}


def target_of(core_config: Mapping[str, Any]) -> Target:
    """Finds the architecture of GGUF.

    Raises:
        ValueError: GGUF has none that computes what this model computes.
    """
    key = (core_config["model_type"], core_config.get("hidden_act"))
    for target in _TARGETS:
        if key == (target.arch.architecture, target.arch.hidden_act):
            break
    else:
        known = ", ".join(f"{t.arch.architecture} with {t.arch.hidden_act}" for t in _TARGETS)
        raise ValueError(
            f"config.json: fields `model_type` {key[0]!r} and `hidden_act` {key[1]!r}: no GGUF "
            f"architecture for this model is known here; known: {known}. It can be written as "
            "safetensors-packed"
        )
    return target


def name_in_file(name: str, arch: Arch) -> str:
    """The name of a tensor in GGUF; see `gguf_name`.

    Raises:
        ValueError: GGUF has none.
    """
    found = gguf_name(name, arch)
    if found is None:
        raise ValueError(
            f"tensor {name} has no name in GGUF; this model can be written as safetensors-packed"
        )
    return found


def metadata_of(
    core_config: Mapping[str, Any],
    dims: Dimensions,
    target: Target,
    name: str,
    file_type: int,
    *,
    embedding: bool,
) -> dict[str, Value]:
    """Metadata of the model, without its tokenizer.

    Args:
        core_config: A config that the core accepts.
        dims: Its sizes.
        target: Its architecture.
        name: A name to show.
        file_type: `general.file_type`.
        embedding: Whether it is a model for embeddings.
    """

    def count(value: int) -> Value:
        return Value(ValueType.UINT32, value)

    heads, head_dim = dims.sizes["num_attention_heads"], dims.sizes["head_dim"]
    hidden = dims.sizes["hidden_size"]
    metadata = {
        "general.architecture": Value(ValueType.STRING, target.arch.name),
        "general.type": Value(ValueType.STRING, "model"),
        "general.name": Value(ValueType.STRING, name),
        "general.file_type": count(file_type),
        "general.quantization_version": count(2),
    }
    own = {
        "vocab_size": count(dims.sizes["vocab_size"]),
        "context_length": count(core_config["max_position_embeddings"]),
        "embedding_length": count(hidden),
        "block_count": count(dims.n_layers),
        "feed_forward_length": count(dims.sizes["intermediate_size"]),
        "rope.dimension_count": count(head_dim),
        "rope.freq_base": Value(ValueType.FLOAT32, rope_theta(core_config)),
        "attention.head_count": count(heads),
        "attention.head_count_kv": count(dims.sizes["num_key_value_heads"]),
        "attention.layer_norm_rms_epsilon": Value(ValueType.FLOAT32, core_config["rms_norm_eps"]),
    }
    if target.head_sizes or head_dim * heads != hidden:
        own |= {"attention.key_length": count(head_dim), "attention.value_length": count(head_dim)}
    if embedding:
        own["pooling_type"] = count(LAST_TOKEN)
    if "s" in core_config.get("layer_kinds", ""):
        local_base = float(core_config["rope_local_base_freq"])
        own |= {
            "attention.sliding_window": count(core_config["sliding_window"]),
            "attention.sliding_window_pattern": typed(
                np.array([kind == "s" for kind in core_config["layer_kinds"]]), "pattern"
            ),
            "rope.freq_base_swa": Value(ValueType.FLOAT32, local_base),
        }
    return metadata | {f"{target.arch.name}.{key}": value for key, value in own.items()}


def rope_theta(core_config: Mapping[str, Any]) -> float:
    """The base of the rotary embedding: of transformers 5's `rope_parameters`, else plain."""
    parameters = core_config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta") or core_config["rope_theta"])


def permute(rows: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Rows of q or k (or their scales) from halves of a head to pairs of neighbours.

    Args:
        rows: The first axis is n_heads * head_dim.
        n_heads: Query or key heads.
    """
    halves = rows.reshape(n_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
