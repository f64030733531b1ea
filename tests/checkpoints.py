"""Writes tiny random checkpoints, in every form that the loaders read.

For all tests. Packing and the file header are written here from the formats' definitions, on
their own, so that a mistake in the loaders cannot hide in both.
"""

import json
import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parent / "data"

Architecture = Literal["bitnet", "llama", "qwen3", "gemma3_text"]
Form = Literal["multiply", "divide", "masters", "values"]
Stored = tuple[str, NDArray[Any]]  # safetensors dtype, and an array with those bytes

_QUANTIZATION: dict[Form, dict[str, Any]] = {
    "multiply": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "divide": {"modules_to_not_convert": None},
    "masters": {"linear_class": "autobitlinear", "quantization_mode": "online"},
}
_CLASSES: dict[Architecture, str] = {
    "bitnet": "BitNetForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3TextModel",
}
_ACTIVATIONS: dict[Architecture, str] = {"bitnet": "relu2", "gemma3_text": "gelu_pytorch_tanh"}


_MORE_NORMS: dict[Architecture, dict[str, str]] = {
    "bitnet": {"self_attn.attn_sub_norm": "queries", "mlp.ffn_sub_norm": "ffn"},
    "qwen3": {"self_attn.q_norm": "head", "self_attn.k_norm": "head"},
    "gemma3_text": {
        "self_attn.q_norm": "head",
        "self_attn.k_norm": "head",
        "pre_feedforward_layernorm": "hidden",
        "post_feedforward_layernorm": "hidden",
    },
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


@dataclass
class _Random:
    """Random tensors, as they are on disk and as the loaders should hand them on."""

    rng: np.random.Generator
    architecture: Architecture
    form: Form
    dtype: str
    names: str
    scales: tuple[int, int]
    projection_norms: bool = False
    canonical: dict[str, NDArray[Any]] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)

    def _store(self, name: str, values: NDArray[Any]) -> Stored:
        self.stored[_on_disk(name, self.names)] = entry = encode(values, self.dtype)
        return entry

    def dense(self, name: str, shape: tuple[int, int], deviation: float = 1) -> None:
        self.canonical[name] = self._store(name, self.rng.normal(0, deviation, shape))[1]

    def norm(self, name: str, size: int) -> None:
        gemma = self.architecture == "gemma3_text" and "_proj.norm" not in name
        weight = decode(self._store(name, self.rng.uniform(0.5, 1.5, size) - gemma))
        self.canonical[name] = weight + np.float32(1) if gemma else weight

    def projection(self, name: str, rows: int, cols: int) -> None:
        if self.projection_norms:
            self.norm(name.replace(".weight", ".norm.weight"), cols)
        if self.form == "masters":
            self.dense(name, (rows, cols), 0.7)
        elif self.form == "values":
            self._values(name, rows, cols)
        else:
            trits = self.rng.integers(-1, 2, (rows, cols), np.int8)
            scale = encode(self.rng.uniform(0.5, 2.0, 1), self.dtype)
            alpha = decode(scale)
            packed = pack(trits)
            self.stored[name], self.stored[f"{name}_scale"] = ("U8", packed), scale
            self.canonical[name] = packed
            divides = self.form == "divide"
            self.canonical[f"{name}_scale"] = np.float32(1) / alpha if divides else alpha

    def _values(self, name: str, rows: int, cols: int) -> None:
        trits = self.rng.integers(-1, 2, (rows, cols), np.int8)
        alpha = decode(encode(self.rng.uniform(0.5, 2.0, self.scales), self.dtype))
        by_row = np.repeat(alpha, -(-rows // self.scales[0]), axis=0)[:rows]
        self._store(name, trits * np.repeat(by_row, cols // self.scales[1], axis=1))
        self.canonical[name] = trits
        one = self.scales == (1, 1)
        scales = alpha.reshape(1) if one else np.ascontiguousarray(by_row)
        self.canonical[f"{name}_scale"] = scales


def write(
    folder: Path,
    *,
    architecture: Architecture = "bitnet",
    form: Form = "multiply",
    dtype: str = "BF16",
    tied: bool = True,
    shards: int = 1,
    names: Literal["hf", "1bitllm"] = "hf",
    scales: tuple[int, int] = (1, 1),
    projection_norms: bool = False,
    prefix: str = "model.",
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
        architecture: With sub-norms (relu2), without (SiLU), or with norms of heads.
        form: Packed with a scale of either direction, float masters, or floats that are ternary.
        dtype: Of masters, embeddings, head and norms: BF16, F16 or F32.
        tied: The head is the embedding.
        shards: Weight files; more than one come with an index.
        names: 1bitLLM's: other names of the sub-norms, and no `quantization_config`.
        scales: Of floats that are ternary: how many groups of rows and of columns of a matrix have
            scales of their own.
        projection_norms: Every projection has a norm of its own.
        prefix: Of all names but the head's; "" for a model that was saved without one.
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
    made = _Random(np.random.default_rng(seed), architecture, form, dtype, names, scales)
    made.projection_norms = projection_norms
    made.dense("model.embed_tokens.weight", (vocab_size, hidden_size))
    width = n_heads * head_dim
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        made.norm(layer + "input_layernorm.weight", hidden_size)
        made.projection(layer + "self_attn.q_proj.weight", width, hidden_size)
        made.projection(layer + "self_attn.k_proj.weight", n_kv_heads * head_dim, hidden_size)
        made.projection(layer + "self_attn.v_proj.weight", n_kv_heads * head_dim, hidden_size)
        made.projection(layer + "self_attn.o_proj.weight", hidden_size, width)
        made.norm(layer + "post_attention_layernorm.weight", hidden_size)
        made.projection(layer + "mlp.gate_proj.weight", intermediate_size, hidden_size)
        made.projection(layer + "mlp.up_proj.weight", intermediate_size, hidden_size)
        made.projection(layer + "mlp.down_proj.weight", hidden_size, intermediate_size)
        more = {"hidden": hidden_size, "queries": width, "ffn": intermediate_size, "head": head_dim}
        for name, axis in _MORE_NORMS.get(architecture, {}).items():
            made.norm(f"{layer}{name}.weight", more[axis])
    made.norm("model.norm.weight", hidden_size)
    if not tied:
        made.dense("lm_head.weight", (vocab_size, hidden_size))
    canonical, stored = made.canonical, made.stored

    activation = "hidden_activation" if architecture == "gemma3_text" else "hidden_act"
    config: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        activation: _ACTIVATIONS.get(architecture, "silu"),
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
    }
    if form in _QUANTIZATION and not projection_norms:
        config["quantization_config"] = {"quant_method": "bitnet", **_QUANTIZATION[form]}
    if head_dim * n_heads != hidden_size or architecture in ("qwen3", "gemma3_text"):
        config["head_dim"] = head_dim
    if architecture == "gemma3_text":
        config |= {"query_pre_attn_scalar": head_dim, "sliding_window": None}
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
    on_disk = {name.replace("model.", prefix, 1): tensor for name, tensor in stored.items()}
    if shards == 1:
        save(folder / "model.safetensors", on_disk)
    else:
        _save_shards(folder, on_disk, shards)
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
