"""What GGUF calls architectures and tensors that Hugging Face calls otherwise.

For `gguf_model.py`, which reads files, and `writers`, which writes them. A family that GGUF has a
name for is added here: a line in `ARCHS` and, if it has tensors that no other has, their names.

Sources: the conversion scripts and `src/models` of llama.cpp (October 2026), bitnet.cpp's
`convert-hf-to-gguf-bitnet.py`, and its converter of the embedding models for `norm_in`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from bitnet_rs.loaders.families import Architecture


@dataclass(frozen=True)
class Arch:
    """What a value of `general.architecture` stands for.

    Attributes:
        name: The value.
        architecture: What runs.
        hidden_act: The gate's activation. No metadata says it: `bitnet` is SiLU and the later
            names squared ReLU, and mixing them up gives fluent nonsense.
        permuted: Rows of q and k are in the order of interleaved RoPE.
    """

    name: str
    architecture: Architecture
    hidden_act: str
    permuted: bool = False


_ALL: Final = (
    Arch("bitnet", "bitnet", "silu"),
    Arch("bitnet-25", "bitnet", "relu2"),
    Arch("bitnet-b1.58", "bitnet", "relu2"),
    Arch("llama", "llama", "silu", permuted=True),
    Arch("qwen3", "qwen3", "silu"),
    Arch("gemma3", "gemma3_text", "gelu_pytorch_tanh"),
)
ARCHS: Final[Mapping[str, Arch]] = {arch.name: arch for arch in _ALL}

# Parts of tensor names, canonical -> GGUF.
_PARTS: Final[Mapping[str, str]] = {
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
_GEMMA_PARTS: Final[Mapping[str, str]] = {
    **_PARTS,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_WHOLE: Final[Mapping[str, str]] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str, arch: Arch) -> str | None:
    """The name of a tensor in GGUF; None where it has none.

    Args:
        name: The canonical one, such as `model.layers.0.self_attn.q_proj.weight`.
        arch: The architecture.
    """
    if name in _WHOLE:
        return _WHOLE[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)((?<=_proj)\.norm)?\.weight", name)
    if match is None:
        return None
    layer, part, normed = match.groups()
    parts = _GEMMA_PARTS if arch.architecture == "gemma3_text" else _PARTS
    if part not in parts:
        return None
    return f"blk.{layer}.{parts[part]}{'_norm_in' if normed else ''}.weight"
