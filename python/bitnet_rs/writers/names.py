"""Architectures, metadata and tensor names of GGUF, from those of Hugging Face.

For `convert.py`. A model family that GGUF has a name for is added here: a line in `_ARCHES` and,
if it has tensors that no other has, their names. What is not in the tables is refused, since a
reader would run it wrongly or not at all.

Sources: the conversion scripts and `src/models` of llama.cpp (October 2026), bitnet.cpp's
`convert-hf-to-gguf-bitnet.py`, and its converter of the embedding models for `norm_in`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.writers.gguf import Value, ValueType


@dataclass(frozen=True)
class Arch:
    """How GGUF has a model family.

    Attributes:
        name: `general.architecture`.
        permuted: Rows of q and k lie in pairs for rotary embeddings of neighbours (llama.cpp's
            NORM); else halves of a head are rotated with each other, as in Hugging Face.
        scale_tensors: llama.cpp multiplies what a projection gives by a `.scale` tensor if there
            is one, so that scales beyond float16 can be kept. bitnet.cpp's graph of `bitnet-b1.58`
            does so for some projections and not for q, k and v, and llama.cpp lacks it.
        head_sizes: Key and value lengths are always written, as llama.cpp's converter does.
        tied: Other programs take the embedding for the head and do not read a head of its own.
        in_llama_cpp: llama.cpp knows it.
    """

    name: str
    permuted: bool = False
    scale_tensors: bool = True
    head_sizes: bool = False
    tied: bool = False
    in_llama_cpp: bool = True


_ARCHES: Final[Mapping[tuple[str, str], Arch]] = {
    # model_type of the core, hidden_act
    ("bitnet", "relu2"): Arch("bitnet-b1.58", scale_tensors=False, tied=True, in_llama_cpp=False),
    ("bitnet", "silu"): Arch("bitnet", tied=True),
    ("llama", "silu"): Arch("llama", permuted=True),
    ("qwen3", "silu"): Arch("qwen3", head_sizes=True),
    ("gemma3_text", "gelu_pytorch_tanh"): Arch("gemma3", head_sizes=True),
}

_OUTSIDE: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

_IN_GEMMA_LAYER: Final = {
    **_IN_LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

# ggml types of floats as the loaders hand them on; bfloat16 travels as uint16.
FLOAT_TYPES: Final = {"float32": 0, "float16": 1, "uint16": 30}


def arch_of(core_config: Mapping[str, Any]) -> Arch:
    """Finds the architecture of GGUF.

    Raises:
        ValueError: GGUF has none that computes what this model computes.
    """
    key = (str(core_config["model_type"]), str(core_config.get("hidden_act")))
    if key not in _ARCHES:
        known = ", ".join(f"{model_type} with {act}" for model_type, act in _ARCHES)
        raise ValueError(
            f"config.json: fields `model_type` {key[0]!r} and `hidden_act` {key[1]!r}: no GGUF "
            f"architecture for this model is known here; known: {known}. It can be written as "
            "safetensors-packed"
        )
    if "s" in core_config.get("layer_kinds", ""):
        raise ValueError(
            "config.json: field `layer_types` has sliding windows, whose pattern GGUF files do not "
            "state in full; this model can be written as safetensors-packed"
        )
    return _ARCHES[key]


def gguf_name(name: str, arch: Arch) -> str:
    """The name of a tensor in GGUF.

    Args:
        name: The canonical one, such as `model.layers.0.self_attn.q_proj.weight`.
        arch: The architecture.

    Raises:
        ValueError: GGUF has none.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)(_proj\.norm)?\.weight", name)
    if found:
        layer, part, normed = found.groups()
        parts = _IN_GEMMA_LAYER if arch.name == "gemma3" else _IN_LAYER
        if normed and f"{part}_proj" in parts:
            return f"blk.{layer}.{parts[f'{part}_proj']}_norm_in.weight"
        if not normed and part in parts:
            return f"blk.{layer}.{parts[part]}.weight"
    raise ValueError(
        f"tensor {name} has no name in GGUF; this model can be written as safetensors-packed"
    )


def metadata_of(
    core_config: Mapping[str, Any], arch: Arch, name: str, file_type: int
) -> dict[str, Value]:
    """Metadata of the model, without its tokenizer.

    Args:
        core_config: A config that the core accepts.
        arch: Its architecture.
        name: A name to show.
        file_type: `general.file_type`.
    """

    def count(value: int) -> Value:
        return Value(ValueType.UINT32, value)

    heads = core_config["num_attention_heads"]
    head_dim = core_config.get("head_dim") or core_config["hidden_size"] // heads
    metadata = {
        "general.architecture": Value(ValueType.STRING, arch.name),
        "general.type": Value(ValueType.STRING, "model"),
        "general.name": Value(ValueType.STRING, name),
        "general.file_type": count(file_type),
        "general.quantization_version": count(2),
    }
    own = {
        "vocab_size": count(core_config["vocab_size"]),
        "context_length": count(core_config["max_position_embeddings"]),
        "embedding_length": count(core_config["hidden_size"]),
        "block_count": count(core_config["num_hidden_layers"]),
        "feed_forward_length": count(core_config["intermediate_size"]),
        "rope.dimension_count": count(head_dim),
        "rope.freq_base": Value(ValueType.FLOAT32, rope_theta(core_config)),
        "attention.head_count": count(heads),
        "attention.head_count_kv": count(core_config.get("num_key_value_heads") or heads),
        "attention.layer_norm_rms_epsilon": Value(ValueType.FLOAT32, core_config["rms_norm_eps"]),
    }
    if arch.head_sizes or head_dim * heads != core_config["hidden_size"]:
        own |= {"attention.key_length": count(head_dim), "attention.value_length": count(head_dim)}
    return metadata | {f"{arch.name}.{key}": value for key, value in own.items()}


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


def unpermute(rows: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """The other way round: the row that was at 2 i + j of a head goes to j * head_dim / 2 + i."""
    head_dim = len(rows) // n_heads
    first = np.arange(len(rows)) // head_dim * head_dim
    place = np.arange(len(rows)) % head_dim
    half, i = place // (head_dim // 2), place % (head_dim // 2)
    back: NDArray[Any] = rows[first + 2 * i + half]
    return back
