"""Random ternary models of known shapes, for measuring speed without a checkpoint.

For `bitnet-rs bench --synthetic` and for tests. It is apart from the loaders because
nothing here comes from a file. The weights are seeded, made one tensor at a time when
the core asks for it, and scaled so that every activation stays of order one: the
model computes finite nonsense at the speed of a real one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from bitnet_rs import _core


@dataclass(frozen=True)
class _Shape:
    """What sets one published model apart from another, as far as speed goes."""

    model_type: str
    hidden_act: str
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    tied: bool


_SHAPES: Final = {
    # microsoft/bitnet-b1.58-2B-4T
    "2b-4t": _Shape("bitnet", "relu2", 2560, 6912, 30, 20, 5, 128256, 4096, 500000.0, tied=True),
    # 1bitLLM/bitnet_b1_58-3B: the sub-norms of BitNet, the SiLU of Llama, head_dim 100
    "3b": _Shape("bitnet", "silu", 3200, 8640, 26, 32, 32, 32002, 2048, 10000.0, tied=True),
    # HF1BitLLM/Llama3-8B-1.58-100B-tokens: no sub-norms, a head of its own
    "8b": _Shape("llama", "silu", 4096, 14336, 32, 32, 8, 128256, 8192, 500000.0, tied=False),
    # no published model: small enough for a test, with ragged widths
    "tiny": _Shape("bitnet", "relu2", 96, 260, 2, 6, 2, 307, 256, 10000.0, tied=True),
}

SHAPES: Final = tuple(_SHAPES)
"""Names that `synthetic` knows."""

# Random numbers are drawn once into pools of this many and copied from there: drawing
# seven thousand million of them one by one would take the 8b shape half a minute. The
# size is a prime, so that rows of a matrix do not repeat at any common width.
_POOL_SIZE: Final = 4_194_301


@dataclass(frozen=True)
class SyntheticModel:
    """Random weights in a published model's shape.

    Attributes:
        name: The name of the shape, such as `2b-4t`.
        config: The content of a `config.json`, as `_core.Model` takes it.
        weights: Tensors by canonical name, made anew at every request: ternary matrices
            int8 with a float32 scale of shape (1,), norms float32, embeddings and head
            bfloat16 as uint16.
    """

    name: str
    config: dict[str, Any]
    weights: Mapping[str, NDArray[Any]]

    def build(
        self,
        *,
        kernel: str | None = None,
        batch_kernels: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> _core.Model:
        """Packs the weights for the kernels; as `_core.Model`."""
        return _core.Model(
            self.config,
            self.weights,
            kernel=kernel,
            batch_kernels=batch_kernels,
            threads=threads,
        )


def synthetic(
    name: str, *, activations: Literal["int8", "float"] = "int8", seed: int = 0
) -> SyntheticModel:
    """Makes a model of a known shape. Costs nothing until weights are asked for.

    Args:
        name: One of `SHAPES`.
        activations: What its projections multiply.
        seed: The same seed gives the same weights, tensor by tensor, on every machine.

    Raises:
        ValueError: An unknown name; the message lists the known ones.
    """
    shape = _SHAPES.get(name)
    if shape is None:
        known = ", ".join(SHAPES)
        raise ValueError(f"unknown synthetic model {name!r}; known shapes: {known}")
    config = {
        "architectures": [
            "BitNetForCausalLM" if shape.model_type == "bitnet" else "LlamaForCausalLM"
        ],
        "model_type": shape.model_type,
        "hidden_act": shape.hidden_act,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.hidden_size // shape.n_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "activations": activations,
    }
    return SyntheticModel(name, config, _Weights(shape, seed))


class _Weights(Mapping[str, NDArray[Any]]):
    """The tensors of a shape, each made when it is asked for and kept by no one."""

    def __init__(self, shape: _Shape, seed: int) -> None:
        self._shapes = _tensor_shapes(shape)
        self._seed = seed
        rng = np.random.default_rng(seed)
        self._trits = rng.integers(-1, 2, _POOL_SIZE, dtype=np.int8)
        # As models are initialised: small enough that tied logits are of order one.
        deviation = 1 / math.sqrt(shape.hidden_size)
        normals = rng.standard_normal(_POOL_SIZE, dtype=np.float32) * np.float32(deviation)
        self._bfloat16s = _to_bfloat16(normals)

    def __getitem__(self, name: str) -> NDArray[Any]:
        matrix = name.removesuffix("_scale")
        if name != matrix and matrix in self._shapes:
            # A trit's variance is 2/3, so this keeps the variance of a normed input.
            return np.array([1 / math.sqrt(self._shapes[matrix][1] * 2 / 3)], np.float32)
        shape = self._shapes[name]
        # The name, not the order of the requests, decides the values.
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        if len(shape) == 1:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        pool = self._trits if "_proj." in name else self._bfloat16s
        return _copy_at_random(pool, shape, rng)

    def __iter__(self) -> Iterator[str]:
        for name in self._shapes:
            yield name
            if "_proj." in name:
                yield f"{name}_scale"

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _tensor_shapes(shape: _Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors but the scales, by canonical name, in the order of the model."""
    hidden, inter = shape.hidden_size, shape.intermediate_size
    kv_rows = hidden // shape.n_heads * shape.n_kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for n in range(shape.n_layers):
        layer = f"model.layers.{n}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv_rows, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv_rows, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inter, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inter)
        if shape.model_type == "bitnet":
            shapes[f"{layer}.self_attn.attn_sub_norm.weight"] = (hidden,)
            shapes[f"{layer}.mlp.ffn_sub_norm.weight"] = (inter,)
    shapes["model.norm.weight"] = (hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocab_size, hidden)
    return shapes


def _copy_at_random(
    pool: NDArray[Any], shape: tuple[int, ...], rng: np.random.Generator
) -> NDArray[Any]:
    """An array filled with runs of `pool`, each from a random place to the pool's end."""
    out = np.empty(math.prod(shape), pool.dtype)
    filled = 0
    while filled < out.size:
        start = int(rng.integers(pool.size))
        run = pool[start : start + out.size - filled]
        out[filled : filled + run.size] = run
        filled += run.size
    return out.reshape(shape)


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Finite float32 values rounded to bfloat16 (ties to even), as their upper 16 bits."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)
