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


def project(x: Floats, trits: NDArray[np.int8], scale: np.float32) -> Floats:
    """Multiplies quantized activations with a ternary matrix: y = x Wᵀ.

    Args:
        x: Shape (n, K).
        trits: Shape (rows, K).
        scale: The matrix's multiplying scale.

    Returns:
        Shape (n, rows).
    """
    codes, divisor = absmax(x)
    # Every sum is an integer below 128 K < 2^24, so float32 holds it exactly in any order.
    exact: Floats = codes @ trits.T.astype(np.float32)
    return exact / divisor * scale


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


def attention(q: Floats, k: Floats, v: Floats) -> Floats:
    """Causal attention; several query heads share a key head (GQA).

    Args:
        q: Shape (n, n_heads, h).
        k: Shape (n, n_kv_heads, h).
        v: Shape (n, n_kv_heads, h).

    Returns:
        Shape (n, n_heads * h).
    """
    n, n_heads, head_dim = q.shape
    # (heads, tokens, h), each key head repeated for the query heads that share it
    q, k, v = (np.repeat(x, n_heads // x.shape[1], axis=1).swapaxes(0, 1) for x in (q, k, v))
    scores = sum_in_order(q[:, :, None], k[:, None]) * np.float32(head_dim**-0.5)
    scores[:, ~np.tri(n, dtype=bool)] = -np.inf  # no token sees a later one
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


ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {"relu2": relu2, "silu": silu}


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
    embedding = weights["model.embed_tokens.weight"]
    x = to_float32(embedding[np.asarray(ids)])
    n_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
    tables = rope_tables(np.arange(len(x)), head_dim, _rope_theta(config))
    for i in range(config["num_hidden_layers"]):
        x = x + attention_block(config, weights, f"model.layers.{i}.", x, tables)
        x = x + feed_forward_block(config, weights, f"model.layers.{i}.", x)
    x = rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    head = embedding if config["tie_word_embeddings"] else weights["lm_head.weight"]
    return x @ to_float32(head).T


def attention_block(
    config: Config, weights: Weights, layer: str, x: Floats, tables: tuple[Floats, Floats]
) -> Floats:
    """What the attention of one layer adds to x."""
    n, n_heads = len(x), config["num_attention_heads"]
    n_kv_heads = config.get("num_key_value_heads") or n_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
    a = rms_norm(x, weights[layer + "input_layernorm.weight"], config["rms_norm_eps"])
    q = _linear(weights, layer + "self_attn.q_proj", n_heads * head_dim, a).reshape(n, n_heads, -1)
    k = _linear(weights, layer + "self_attn.k_proj", n_kv_heads * head_dim, a).reshape(
        n, n_kv_heads, -1
    )
    v = _linear(weights, layer + "self_attn.v_proj", n_kv_heads * head_dim, a).reshape(
        n, n_kv_heads, -1
    )
    a = attention(rope(q, tables), rope(k, tables), v)
    if config["model_type"] == "bitnet":
        a = rms_norm(a, weights[layer + "self_attn.attn_sub_norm.weight"], config["rms_norm_eps"])
    return _linear(weights, layer + "self_attn.o_proj", config["hidden_size"], a)


def feed_forward_block(config: Config, weights: Weights, layer: str, x: Floats) -> Floats:
    """What the feed-forward network of one layer adds to x."""
    f = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], config["rms_norm_eps"])
    gate = ACTIVATIONS[config["hidden_act"]](
        _linear(weights, layer + "mlp.gate_proj", config["intermediate_size"], f)
    )
    f = gate * _linear(weights, layer + "mlp.up_proj", config["intermediate_size"], f)
    if config["model_type"] == "bitnet":
        f = rms_norm(f, weights[layer + "mlp.ffn_sub_norm.weight"], config["rms_norm_eps"])
    return _linear(weights, layer + "mlp.down_proj", config["hidden_size"], f)


def _linear(weights: Weights, name: str, rows: int, x: Floats) -> Floats:
    stored = weights[name + ".weight"]
    if name + ".weight_scale" in weights:
        trits = unpack(stored, rows) if stored.dtype == np.uint8 else stored
        return project(x, trits, weights[name + ".weight_scale"][0])
    return project(x, *absmean(to_float32(stored)))


def _rope_theta(config: Config) -> float:
    parameters = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or parameters.get("rope_theta", 10000.0))
