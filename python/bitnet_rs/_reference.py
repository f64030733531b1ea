"""The whole forward pass in numpy: read this to know what the core computes.

For readers and for tests; the package never imports it. It is slow, keeps no cache, and runs
one sequence at a time, in float32 with exact integer projections. The core computes the same
up to the order of float additions. Top to bottom: the quantizers, the ops, sampling, one layer,
the model.

Shapes: n tokens, d = hidden_size, K = columns of a projection, h = head_dim.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Config = Mapping[str, Any]
Weights = Mapping[str, NDArray[Any]]


# --- quantizers ---------------------------------------------------------------------------------


def absmax(x: Floats) -> tuple[Floats, Floats]:
    """Quantizes activations to int8 codes, each token by its largest magnitude.

    Args:
        x: Shape (n, K).

    Returns:
        Codes -128..127 as float32, shape (n, K), and what to divide by to get x back, (n, 1).
    """
    largest = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-5))
    # Two roundings, as `127 / tensor` is computed in torch. The last bit decides ties at half a
    # code, which are common because embeddings have few bits.
    divisor = np.float32(1) / largest * np.float32(127)
    return np.clip(np.rint(x * divisor), -128, 127), divisor  # rint: half to even


def absmean(w: Floats) -> tuple[NDArray[np.int8], np.float32]:
    """Quantizes master weights to trits, one scale for the matrix.

    Args:
        w: Shape (rows, cols).

    Returns:
        Trits of the same shape, and the multiplying scale.
    """
    scale = np.maximum(np.float32(np.abs(w).mean(dtype=np.float64)), np.float32(1e-5))
    trits = np.clip(np.rint(w * (np.float32(1) / scale)), -1, 1)
    return trits.astype(np.int8), scale


def unpack(stored: NDArray[np.uint8], rows: int) -> NDArray[np.int8]:
    """Trits of a matrix with `rows` rows from their stored form, a quarter of the rows.

    Bits 2i and 2i + 1 of a byte are a trit plus one in quarter i of the matrix.
    """
    quarters = [stored >> 2 * i & 3 for i in range(4)]
    return np.concatenate(quarters)[:rows].astype(np.int8) - np.int8(1)


def project(x: Floats, trits: NDArray[np.int8], scales: Floats, activations: str) -> Floats:
    """Multiplies activations with a ternary matrix: y = x Wᵀ.

    Args:
        x: Shape (n, K).
        trits: Shape (rows, K).
        scales: The matrix's multiplying scale, shape (1,); or (rows, groups), each for K / groups
            columns of a row.
        activations: `int8` quantizes them first, `float` takes them as they are.

    Returns:
        Shape (n, rows).
    """
    codes, divisor = absmax(x) if activations == "int8" else (x, np.float32(1))
    if activations == "int8" and scales.size == 1:
        # Every sum is an integer below 128 K < 2^24, so float32 holds it exactly in any order.
        exact: Floats = codes @ trits.T.astype(np.float32)
        return exact / divisor * scales.reshape(())
    return sum_by_groups(codes, trits, scales) / divisor


def sum_by_groups(x: Floats, trits: NDArray[np.int8], scales: Floats) -> Floats:
    """Sums x * trits * scale over the columns, in the order that the core's sums have.

    Blocks of 64 columns in order; in each of their words of 16 columns one sum, column after
    column; the words in pairs; then the block's scale, by a fused multiply-add.
    """
    n_rows, n_cols = trits.shape
    scales = np.broadcast_to(scales, (n_rows, 1)) if scales.size == 1 else scales
    columns = n_cols // scales.shape[1]
    pad = [(0, 0), (0, -n_cols % 64)]
    x, weights = np.pad(x, pad), np.pad(trits.astype(np.float32), pad)
    total = np.zeros((len(x), n_rows), np.float32)
    for block in range(0, n_cols, 64):
        words = np.zeros((4, *total.shape), np.float32)
        for i in range(64):
            words[i // 16] += x[:, block + i, None] * weights[:, block + i]
        block_sum = (words[0] + words[1]) + (words[2] + words[3])
        scale = scales[:, block // columns].astype(np.float64)
        total = (scale * block_sum + total).astype(np.float32)
    return total


# --- ops ----------------------------------------------------------------------------------------


def to_float32(stored: NDArray[Any]) -> Floats:
    """Widens float16, or bfloat16 that arrives as its bits, without rounding."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def sum_in_order(a: Floats, b: Floats) -> Floats:
    """Sums a * b over the last axis, one after the other, by fused multiply-adds."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    total = np.zeros(np.broadcast_shapes(a.shape[:-1], b.shape[:-1]), np.float32)
    for i in range(a.shape[-1]):
        # The product of two float32 is exact in float64, so that this rounds like one operation.
        total = (wide_a[..., i] * wide_b[..., i] + total).astype(np.float32)
    return total


def sum_in_lanes(a: Floats, b: Floats) -> Floats:
    """Sums a * b over the last axis, which becomes 1 long, in 16 interleaved lanes.

    Lane i takes elements i, i + 16, i + 32, ... in order; then the upper half of the lanes is
    added to the lower until one is left. The core's reductions are defined so, and in another
    order the last bit of a norm would differ, and with it, now and then, an int8 code.
    """
    pad = [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % 16)]
    a, b = (np.pad(x, pad).reshape(*x.shape[:-1], -1, 16) for x in (a, b))
    lanes = sum_in_order(np.moveaxis(a, -2, -1), np.moveaxis(b, -2, -1))
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Divides each row by its root mean square, then multiplies by the weight. x: (n, d)."""
    mean_square = sum_in_lanes(x, x) / np.float32(x.shape[1])
    normalized: Floats = x * (np.float32(1) / np.sqrt(mean_square + np.float32(eps)))
    return normalized * weight


def rope_tables(positions: NDArray[np.int64], head_dim: int, theta: float) -> tuple[Floats, Floats]:
    """Cosines and sines of the rotary embedding, each of shape (n, 1, h/2).

    Frequencies and angles are rounded to float32 where transformers rounds them, since models
    are trained with those.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = (theta ** exponent.astype(np.float64)).astype(np.float32)
    angle = positions[:, None, None].astype(np.float32) * (np.float32(1) / power)
    wide = angle.astype(np.float64)
    return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)


def rope(x: Floats, tables: tuple[Floats, Floats]) -> Floats:
    """Rotates each head's pairs (i, i + h/2) by the position's angles. x: (n, heads, h)."""
    cos, sin = tables
    left, right = np.split(x, 2, axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attention(q: Floats, k: Floats, v: Floats, window: int | None = None) -> Floats:
    """Causal attention; several query heads share a key head (GQA).

    Args:
        q: Shape (n, n_heads, h).
        k: Shape (n, n_kv_heads, h).
        v: Shape (n, n_kv_heads, h).
        window: How many tokens each sees, itself among them; None: all before it.

    Returns:
        Shape (n, n_heads * h).
    """
    n, n_heads, head_dim = q.shape
    # (heads, tokens, h), each key head repeated for the query heads that share it
    q, k, v = (np.repeat(x, n_heads // x.shape[1], axis=1).swapaxes(0, 1) for x in (q, k, v))
    scores = sum_in_order(q[:, :, None], k[:, None]) * np.float32(head_dim**-0.5)
    seen = np.tri(n, dtype=bool)  # no token sees a later one
    if window is not None:
        seen &= ~np.tri(n, k=-window, dtype=bool)
    scores[:, ~seen] = -np.inf
    weights = exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = sum_in_order(weights[:, :, None], v.swapaxes(1, 2)[:, None])
    mixed *= np.float32(1) / sum_in_lanes(weights, np.ones_like(weights))
    return mixed.swapaxes(0, 1).reshape(n, n_heads * head_dim)


def exp(x: Floats) -> Floats:
    """e^x, correctly rounded, so that the result does not depend on the machine."""
    with np.errstate(over="ignore"):  # silu(x) wants the infinity
        return np.exp(x.astype(np.float64)).astype(np.float32)


def relu2(x: Floats) -> Floats:
    """ReLU, squared."""
    return np.square(np.maximum(x, np.float32(0)))


def silu(x: Floats) -> Floats:
    """Multiplies x with its logistic function."""
    return x / (np.float32(1) + exp(-x))


def gelu_tanh(x: Floats) -> Floats:
    """GELU by tanh, x (1 + tanh u) / 2, written with e^-2u."""
    u2 = np.float32(1.595769) * (x + np.float32(0.044715) * (x * x * x))
    return x / (np.float32(1) + exp(-u2))


ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "relu2": relu2,
    "silu": silu,
    "gelu_pytorch_tanh": gelu_tanh,
}


# --- sampling -----------------------------------------------------------------------------------


def sample(
    logits: Floats,
    weights: Sequence[int],
    *,
    top_k: int,
    top_p: float,
    min_p: float,
    draw: float,
) -> int:
    """Draws a position of a row of logits.

    Args:
        logits: Shape (n,).
        weights: floor(2^40 e^((logit - highest) / temperature)) for each of them.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: 0 keeps all.
        draw: A uniform number in [0, 1).
    """
    # sorted() is stable: among equals, lower positions stay first.
    kept = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    if top_p < 1:
        wanted = math.ceil(top_p * sum(weights[i] for i in kept))
        kept = sorted(sorted(kept), key=lambda i: -weights[i])
        reached = list(itertools.accumulate(weights[i] for i in kept))
        kept = kept[: sum(total < wanted for total in reached) + 1]
    kept = [i for i in sorted(kept) if weights[i] >= math.ceil(min_p * 2**40)]
    reached = list(itertools.accumulate(weights[i] for i in kept))
    # The product is rounded to float64 and may reach the sum; no draw does.
    target = min(int(draw * reached[-1]), reached[-1] - 1)
    return kept[sum(total <= target for total in reached)]


# --- the model ----------------------------------------------------------------------------------


def forward(config: Config, weights: Weights, ids: Sequence[int] | NDArray[Any]) -> Floats:
    """Computes the logits after every token of one sequence.

    Args:
        config: `Checkpoint.core_config`.
        weights: `Checkpoint.weights`.
        ids: n token ids.

    Returns:
        Shape (n, vocab_size).
    """
    tied = config["tie_word_embeddings"]
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return hidden_states(config, weights, ids) @ to_float32(head).T


def embed(config: Config, weights: Weights, ids: Sequence[int] | NDArray[Any]) -> Floats:
    """Computes the embedding of a text: the last token's hidden state, of length 1."""
    last: Floats = hidden_states(config, weights, ids)[-1]
    embedding: Floats = last / np.sqrt(np.square(last).sum())
    return embedding


def hidden_states(config: Config, weights: Weights, ids: Sequence[int] | NDArray[Any]) -> Floats:
    """Computes what the head takes, for every token: shape (n, hidden_size)."""
    x = to_float32(weights["model.embed_tokens.weight"][np.asarray(ids)])
    if config["model_type"] == "gemma3_text":
        x *= np.float32(math.sqrt(config["hidden_size"]))
    n_layers, positions = config["num_hidden_layers"], np.arange(len(x))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kinds = config.get("layer_kinds", "f" * n_layers)  # full, or sliding: with a window
    tables = {"f": rope_tables(positions, head_dim, _rope_theta(config))}
    if "s" in kinds:
        tables["s"] = rope_tables(positions, head_dim, config["rope_local_base_freq"])
    for i, kind in enumerate(kinds):
        window = config["sliding_window"] if kind == "s" else None
        x = x + attention_block(config, weights, f"model.layers.{i}.", x, tables[kind], window)
        x = x + feed_forward_block(config, weights, f"model.layers.{i}.", x)
    return rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])


def attention_block(
    config: Config,
    weights: Weights,
    layer: str,
    x: Floats,
    tables: tuple[Floats, Floats],
    window: int | None,
) -> Floats:
    """What the attention of one layer adds to x."""
    n, n_heads, eps = len(x), config["num_attention_heads"], config["rms_norm_eps"]
    n_kv_heads = config.get("num_key_value_heads") or n_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
    a = rms_norm(x, weights[layer + "input_layernorm.weight"], eps)

    def heads(name: str, count: int) -> Floats:
        y = _linear(config, weights, f"{layer}self_attn.{name}_proj", count * head_dim, a)
        norm = f"{layer}self_attn.{name}_norm.weight"  # Qwen3 and Gemma 3, of queries and keys
        if norm in weights:
            y = rms_norm(y.reshape(-1, head_dim), weights[norm], eps)
        return y.reshape(n, count, head_dim)

    q, k, v = heads("q", n_heads), heads("k", n_kv_heads), heads("v", n_kv_heads)
    a = attention(rope(q, tables), rope(k, tables), v, window)
    if config["model_type"] == "bitnet":
        a = rms_norm(a, weights[layer + "self_attn.attn_sub_norm.weight"], eps)
    a = _linear(config, weights, layer + "self_attn.o_proj", config["hidden_size"], a)
    if config["model_type"] == "gemma3_text":
        a = rms_norm(a, weights[layer + "post_attention_layernorm.weight"], eps)
    return a


def feed_forward_block(config: Config, weights: Weights, layer: str, x: Floats) -> Floats:
    """What the feed-forward network of one layer adds to x."""
    gemma, eps = config["model_type"] == "gemma3_text", config["rms_norm_eps"]
    before = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
    f = rms_norm(x, weights[f"{layer}{before}.weight"], eps)
    width = config["intermediate_size"]
    gate = _linear(config, weights, layer + "mlp.gate_proj", width, f)
    gate = ACTIVATIONS[config["hidden_act"]](gate)
    f = gate * _linear(config, weights, layer + "mlp.up_proj", width, f)
    if config["model_type"] == "bitnet":
        f = rms_norm(f, weights[layer + "mlp.ffn_sub_norm.weight"], eps)
    f = _linear(config, weights, layer + "mlp.down_proj", config["hidden_size"], f)
    if gemma:
        f = rms_norm(f, weights[layer + "post_feedforward_layernorm.weight"], eps)
    return f


def _linear(config: Config, weights: Weights, name: str, rows: int, x: Floats) -> Floats:
    if name + ".norm.weight" in weights:  # BitLinear with a norm of its own
        x = rms_norm(x, weights[name + ".norm.weight"], config["rms_norm_eps"])
    activations = config.get("activations", "int8")
    stored = weights[name + ".weight"]
    if name + ".weight_scale" in weights:
        trits = unpack(stored, rows) if stored.dtype == np.uint8 else stored
        return project(x, trits, weights[name + ".weight_scale"], activations)
    trits, scale = absmean(to_float32(stored))
    return project(x, trits, scale.reshape(1), activations)


def _rope_theta(config: Config) -> float:
    parameters = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or parameters.get("rope_theta", 10000.0))
