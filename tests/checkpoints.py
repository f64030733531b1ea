"""Writes tiny random checkpoints, in every form that the loaders read.

For all tests. Packing and the file header are written here from the formats' definitions, on
their own, so that a mistake in the loaders cannot hide in both.
"""

import json
import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parent / "data"

Architecture = Literal["bitnet", "llama"]
Form = Literal["multiply", "divide", "masters"]
Stored = tuple[str, NDArray[Any]]  # safetensors dtype, and an array with those bytes

_QUANTIZATION: dict[Form, dict[str, Any]] = {
    "multiply": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "divide": {"modules_to_not_convert": None},
    "masters": {"linear_class": "autobitlinear", "quantization_mode": "online"},
}


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk, and what the loaders should make of it.

    Attributes:
        folder: Where it lies.
        config: The content of its config.json.
        canonical: What `Checkpoint.weights` should hold.
        stored: What its weight files hold, by name on disk.
    """

    folder: Path
    config: dict[str, Any]
    canonical: dict[str, NDArray[Any]]
    stored: dict[str, Stored]

    def edit_config(self, **changes: Any) -> None:
        """Rewrites config.json; a field set to `...` is removed."""
        config = {**self.config, **changes}
        config = {key: value for key, value in config.items() if value is not ...}
        (self.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def edit_tensors(self, changes: Mapping[str, Stored | None]) -> None:
        """Rewrites model.safetensors with tensors replaced, added, or (None) removed."""
        tensors = {**self.stored, **changes}
        save(
            self.folder / "model.safetensors",
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
        )


def write(
    folder: Path,
    *,
    architecture: Architecture = "bitnet",
    form: Form = "multiply",
    dtype: str = "BF16",
    tied: bool = True,
    shards: int = 1,
    names: Literal["hf", "1bitllm"] = "hf",
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 20,
    hidden_size: int = 80,
    intermediate_size: int = 500,
    vocab_size: int = 1024,
    max_position_embeddings: int = 64,
    seed: int = 0,
) -> Written:
    """Writes a random checkpoint with tokenizer.

    Args:
        folder: Created if need be.
        architecture: With sub-norms (relu2) or without (SiLU).
        form: Packed with a scale of either direction, or float masters.
        dtype: Of masters, embeddings, head and norms: BF16, F16 or F32.
        tied: The head is the embedding.
        shards: Weight files; more than one come with an index.
        names: 1bitLLM's: other names of the sub-norms, and no `quantization_config`.
        n_layers: Layers.
        n_heads: Query heads.
        n_kv_heads: Key and value heads.
        head_dim: Width of a head; written to the config only where it does not follow.
        hidden_size: Width of the model.
        intermediate_size: Width of the feed-forward network.
        vocab_size: Tokens; the tokenizer has 1024.
        max_position_embeddings: Context.
        seed: Of the weights.
    """
    rng = np.random.default_rng(seed)
    canonical: dict[str, NDArray[Any]] = {}
    stored: dict[str, Stored] = {}

    def dense(name: str, values: NDArray[np.float64], *, widen: bool = False) -> None:
        stored[_on_disk(name, names)] = entry = encode(values, dtype)
        canonical[name] = decode(entry) if widen else entry[1]

    def norm(name: str, size: int) -> None:
        dense(name, rng.uniform(0.5, 1.5, size), widen=True)

    def projection(name: str, rows: int, cols: int) -> None:
        if form == "masters":
            dense(name, rng.normal(0, 0.7, (rows, cols)))
            return
        trits = rng.integers(-1, 2, (rows, cols), np.int8)
        scale = encode(rng.uniform(0.5, 2.0, 1), dtype)
        alpha = decode(scale)
        packed = pack(trits)
        stored[name], stored[f"{name}_scale"] = ("U8", packed), scale
        canonical[name] = packed
        canonical[f"{name}_scale"] = np.float32(1) / alpha if form == "divide" else alpha

    dense("model.embed_tokens.weight", rng.normal(0, 1, (vocab_size, hidden_size)))
    width = n_heads * head_dim
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        norm(layer + "input_layernorm.weight", hidden_size)
        projection(layer + "self_attn.q_proj.weight", width, hidden_size)
        projection(layer + "self_attn.k_proj.weight", n_kv_heads * head_dim, hidden_size)
        projection(layer + "self_attn.v_proj.weight", n_kv_heads * head_dim, hidden_size)
        projection(layer + "self_attn.o_proj.weight", hidden_size, width)
        norm(layer + "post_attention_layernorm.weight", hidden_size)
        projection(layer + "mlp.gate_proj.weight", intermediate_size, hidden_size)
        projection(layer + "mlp.up_proj.weight", intermediate_size, hidden_size)
        projection(layer + "mlp.down_proj.weight", hidden_size, intermediate_size)
        if architecture == "bitnet":
            norm(layer + "self_attn.attn_sub_norm.weight", width)
            norm(layer + "mlp.ffn_sub_norm.weight", intermediate_size)
    norm("model.norm.weight", hidden_size)
    if not tied:
        dense("lm_head.weight", rng.normal(0, 1, (vocab_size, hidden_size)))

    sub_norms = architecture == "bitnet"
    config: dict[str, Any] = {
        "architectures": ["BitNetForCausalLM" if sub_norms else "LlamaForCausalLM"],
        "model_type": architecture,
        "hidden_act": "relu2" if sub_norms else "silu",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tied,
        "bos_token_id": 1021,
        "eos_token_id": 1022,
        "quantization_config": {"quant_method": "bitnet", **_QUANTIZATION[form]},
    }
    if head_dim * n_heads != hidden_size:
        config["head_dim"] = head_dim
    if names == "1bitllm":
        assert (architecture, form) == ("bitnet", "masters"), "1bitLLM has no other form"
        del config["quantization_config"]
        config |= {"architectures": ["BitnetForCausalLM"], "model_type": "llama"}
        config |= {"hidden_act": "silu", "weight_bits": 1, "input_bits": 8}

    folder.mkdir(parents=True, exist_ok=True)
    written = Written(folder, config, canonical, stored)
    written.edit_config()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DATA / "bitnet-online" / name, folder / name)
    if shards == 1:
        save(folder / "model.safetensors", stored)
    else:
        _save_shards(folder, stored, shards)
    return written


def save(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes a safetensors file: header length, JSON header, the tensors' bytes in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, array) in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def pack(trits: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Packs (rows, cols) trits to (ceil(rows / 4), cols) bytes, as Hugging Face does."""
    rows, cols = trits.shape
    quarter = math.ceil(rows / 4)
    packed = np.zeros((quarter, cols), np.uint8)
    for row in range(rows):
        packed[row % quarter] |= (trits[row] + 1).astype(np.uint8) << (2 * (row // quarter))
    return packed


def encode(values: NDArray[Any], dtype: str) -> Stored:
    """Rounds values to a stored float type; bfloat16 by dropping bits."""
    single = values.astype(np.float32)
    if dtype == "BF16":
        return dtype, (single.view(np.uint32) >> 16).astype(np.uint16)
    return dtype, single.astype({"F16": np.float16, "F32": np.float32}[dtype])


def decode(stored: Stored) -> NDArray[np.float32]:
    """Widens a stored float tensor."""
    dtype, array = stored
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _save_shards(folder: Path, stored: Mapping[str, Stored], n: int) -> None:
    order = list(stored)
    weight_map: dict[str, str] = {}
    for i in range(n):
        shard = f"model-{i + 1:05}-of-{n:05}.safetensors"
        part = order[i::n]
        save(folder / shard, {name: stored[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _on_disk(name: str, names: str) -> str:
    if names == "1bitllm":
        name = name.replace("attn_sub_norm", "inner_attn_ln")
        name = name.replace("ffn_sub_norm", "ffn_layernorm")
    return name
