"""Model families: the architecture that runs, the sizes and tensors that it has, its config.

For the loaders of every container: files differ in names, forms and containers, a family is the
same in all of them. Canonical names are those of transformers' own classes. What changes the
result and is not understood is refused.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

Architecture = Literal["bitnet", "llama", "qwen3", "gemma3_text"]
Activations = Literal["int8", "float"]

# `architectures` of config.json: the core's architecture, and the model_type that may go with
# it. 1bitLLM's models say "llama" but have sub-norms, in modelling code of their own. Embedding
# models are saved without a head, under the names of the bodies.
_CLASSES: Final[Mapping[str, tuple[Architecture, tuple[str, ...]]]] = {
    "BitNetForCausalLM": ("bitnet", ("bitnet",)),
    "BitnetForCausalLM": ("bitnet", ("bitnet", "llama")),
    "LlamaForCausalLM": ("llama", ("llama",)),
    "Qwen3ForCausalLM": ("qwen3", ("qwen3",)),
    "Qwen3Model": ("qwen3", ("qwen3",)),
    "Gemma3ForCausalLM": ("gemma3_text", ("gemma3_text",)),
    "Gemma3TextModel": ("gemma3_text", ("gemma3_text",)),
}
CLASS_OF: Final[Mapping[Architecture, str]] = {
    "bitnet": "BitNetForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""The class of transformers that computes each architecture."""


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
    if named is None:
        # Of a list, which has no hash, too: no type's name equals it.
        named = [cls for kind, cls in CLASS_OF.items() if kind == model_type] or None
    if named not in [[known] for known in _CLASSES]:
        raise ValueError(
            f"{where}: field `architectures` is {named!r}; supported: one of {', '.join(_CLASSES)}"
        )
    arch, model_types = _CLASSES[named[0]]
    if model_type is not None and model_type not in model_types:
        raise ValueError(
            f"{where}: field `model_type` is {model_type!r}; "
            f"{named[0]} wants {' or '.join(map(repr, model_types))}"
        )
    return arch


# Fields of config.json whose product is one axis of a tensor.
Axis = tuple[str, ...]
_HIDDEN: Final[Axis] = ("hidden_size",)
_FFN: Final[Axis] = ("intermediate_size",)
_VOCAB: Final[Axis] = ("vocab_size",)
_QUERIES: Final[Axis] = ("num_attention_heads", "head_dim")
_KEYS: Final[Axis] = ("num_key_value_heads", "head_dim")
_HEAD: Final[Axis] = ("head_dim",)


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
        if config.get("head_dim") is None and config.get("model_type") in ("qwen3", "gemma3_text"):
            raise ValueError(
                f"{where}: field `head_dim` is missing; {config['model_type']} has one that does "
                "not follow from other fields"
            )
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
PROJECTIONS: Final[Mapping[str, tuple[Axis, Axis]]] = {
    "self_attn.q_proj": (_QUERIES, _HIDDEN),
    "self_attn.k_proj": (_KEYS, _HIDDEN),
    "self_attn.v_proj": (_KEYS, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _QUERIES),
    "mlp.gate_proj": (_FFN, _HIDDEN),
    "mlp.up_proj": (_FFN, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _FFN),
}


Kind = Literal["projection", "norm", "dense"]

# Norms of a layer besides those of projections.
_LAYER_NORMS: Final[Mapping[Architecture, Mapping[str, Axis]]] = {
    "llama": {"input_layernorm": _HIDDEN, "post_attention_layernorm": _HIDDEN},
    "bitnet": {
        "input_layernorm": _HIDDEN,
        "post_attention_layernorm": _HIDDEN,
        "self_attn.attn_sub_norm": _QUERIES,
        "mlp.ffn_sub_norm": _FFN,
    },
    "qwen3": {
        "input_layernorm": _HIDDEN,
        "post_attention_layernorm": _HIDDEN,
        "self_attn.q_norm": _HEAD,
        "self_attn.k_norm": _HEAD,
    },
    "gemma3_text": {
        "input_layernorm": _HIDDEN,
        "post_attention_layernorm": _HIDDEN,
        "pre_feedforward_layernorm": _HIDDEN,
        "post_feedforward_layernorm": _HIDDEN,
        "self_attn.q_norm": _HEAD,
        "self_attn.k_norm": _HEAD,
    },
}


def expected_tensors(
    arch: Architecture, n_layers: int, *, head: bool, projection_norms: bool
) -> Iterator[tuple[str, Kind, tuple[Axis, ...]]]:
    """Canonical name, kind and axes of every tensor but scales, in the order of the layers.

    Args:
        arch: The architecture.
        n_layers: Layers.
        head: Whether there is a head besides the embedding.
        projection_norms: Whether every projection has a norm of its own, as in the embedding
            models.
    """
    yield "model.embed_tokens.weight", "dense", (_VOCAB, _HIDDEN)
    for i in range(n_layers):
        layer = f"model.layers.{i}."
        for norm, axis in _LAYER_NORMS[arch].items():
            yield f"{layer}{norm}.weight", "norm", (axis,)
        for projection, axes in PROJECTIONS.items():
            yield f"{layer}{projection}.weight", "projection", axes
            if projection_norms:
                yield f"{layer}{projection}.norm.weight", "norm", axes[1:]
    yield "model.norm.weight", "norm", (_HIDDEN,)
    if head:
        yield "lm_head.weight", "dense", (_VOCAB, _HIDDEN)


def has_sub_norms(arch: Architecture) -> bool:
    """Whether there are norms before `o_proj` and `down_proj`."""
    return any("sub_norm" in norm for norm in _LAYER_NORMS[arch])


def core_config(
    config: Mapping[str, Any],
    arch: Architecture,
    *,
    tied: bool,
    activations: Activations,
    where: Path,
) -> dict[str, Any]:
    """config.json as the core takes it (`_core.Model`).

    Args:
        config: The content of config.json.
        arch: The architecture that runs; its `model_type`.
        tied: Whether the head is the embedding.
        activations: What projections multiply.
        where: The path of config.json, for messages.

    Raises:
        ValueError: A field asks for something that does not exist here.
    """
    core = {
        **config,
        "model_type": arch,
        "tie_word_embeddings": tied,
        "activations": activations,
    }
    if arch == "qwen3":
        _refuse_windows(config, where)
    if arch == "gemma3_text":
        core |= _gemma3(config, where)
    return core


def _refuse_windows(config: Mapping[str, Any], where: Path) -> None:
    kinds = config.get("layer_types")
    if config.get("use_sliding_window") or (kinds and set(kinds) != {"full_attention"}):
        raise ValueError(
            f"{where}: fields `use_sliding_window` and `layer_types` ask for attention to a window "
            f"of tokens ({config.get('use_sliding_window')!r}, {kinds!r}); Qwen3 is supported with "
            "full attention in every layer"
        )


# What a missing field means to transformers' Gemma3TextConfig: every sixth layer attends to
# everything, the others to so many tokens, with a rotary base of their own.
_GEMMA3_PATTERN: Final = 6
_GEMMA3_WINDOW: Final = 4096
_GEMMA3_LOCAL_BASE: Final = 10000.0


def _gemma3(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Gemma 3's fields by their names in the core: two kinds of layers, each with its RoPE."""
    core: dict[str, Any] = {
        "hidden_act": config.get("hidden_activation", "gelu_pytorch_tanh"),
        "sliding_window": config.get("sliding_window", _GEMMA3_WINDOW),
        "rope_local_base_freq": config.get("rope_local_base_freq", _GEMMA3_LOCAL_BASE),
    }
    n_layers = config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds is None:
        every = config.get("_sliding_window_pattern", _GEMMA3_PATTERN)
        every = config.get("sliding_window_pattern", every)
        if type(every) is not int or every < 1:
            raise ValueError(f"{where}: field `sliding_window_pattern` is {every!r}; wanted >= 1")
        windowed = core["sliding_window"] is not None
        kinds = [
            "sliding_attention" if windowed and (i + 1) % every else "full_attention"
            for i in range(n_layers)
        ]
    letters = {"sliding_attention": "s", "full_attention": "f"}
    if (
        not isinstance(kinds, list)
        or len(kinds) != n_layers
        or not all(isinstance(kind, str) and kind in letters for kind in kinds)
    ):
        raise ValueError(
            f"{where}: field `layer_types` is {kinds!r}; wanted sliding_attention or "
            f"full_attention for each of {n_layers} layers"
        )
    core["layer_kinds"] = "".join(letters[kind] for kind in kinds)
    # transformers 5 has the parameters of each kind side by side.
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and set(parameters) & set(letters):
        full, sliding = (
            parameters.get(kind) or {} for kind in ("full_attention", "sliding_attention")
        )
        core["rope_parameters"] = full
        for key, value in sliding.items():
            if (key, value) != ("rope_type", "default") and key != "rope_theta":
                raise ValueError(
                    f"{where}: field `rope_parameters.sliding_attention.{key}` is {value!r}; only "
                    "unscaled rotary embeddings are supported"
                )
        core["rope_local_base_freq"] = sliding.get("rope_theta", _GEMMA3_LOCAL_BASE)
    return core
