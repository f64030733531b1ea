"""Every family of ternary models, as tiny random checkpoints in the form that it is released in.

Against `_reference.py`, which has all forward passes in numpy. Formats of files are tested in
`test_loaders.py` and `test_gguf_models.py`; this is about what runs, and how it is told.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import bitnet_rs as br
from bitnet_rs import _core, _reference
from bitnet_rs.loaders import FileOptions, open_checkpoint
from bitnet_rs.loaders.ternary_values import collapse, is_ternary, recover
from checkpoints import Written, encode, write

IDS = (np.arange(14) * 37 % 1000).astype(np.uint32)

# Family: how its checkpoints are written; widths as ragged as the real ones where they are.
FAMILIES: dict[str, dict[str, Any]] = {
    "2B-4T": {},
    "2B-4T-bf16": {"form": "masters"},
    "1bitLLM large": {"form": "masters", "dtype": "F32", "names": "1bitllm", "head_dim": 24},
    "1bitLLM xl (K = 5460)": {
        "form": "masters",
        "dtype": "F16",
        "names": "1bitllm",
        "intermediate_size": 5460,
        "n_layers": 1,
    },
    "1bitLLM 3B (K = 8640, heads of 100)": {
        "form": "masters",
        "dtype": "F16",
        "names": "1bitllm",
        "intermediate_size": 8640,
        "head_dim": 100,
        "hidden_size": 200,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 1,
    },
    "Llama3-8B-1.58": {"architecture": "llama", "form": "divide", "tied": False},
    "Falcon3-1.58bit": {
        "architecture": "llama",
        "form": "divide",
        "tied": False,
        "head_dim": 40,
    },
    "Falcon-E, packed": {"architecture": "llama", "form": "divide", "tied": False},
    "Falcon-E, prequantized": {"architecture": "llama", "form": "masters", "tied": False},
    "Falcon-E, bfloat16": {"architecture": "llama", "form": "values", "tied": False},
    "TriLM 99M": {"architecture": "llama", "form": "values", "dtype": "F16", "tied": False},
    "TriLM 3.9B, shards by columns": {
        "architecture": "llama",
        "form": "values",
        "dtype": "F16",
        "tied": False,
        "scales": (1, 2),
        "hidden_size": 256,
        "intermediate_size": 512,
        "head_dim": 64,
    },
    "TriLM 3.9B, shards by rows": {
        "architecture": "llama",
        "form": "values",
        "dtype": "F16",
        "tied": False,
        "scales": (2, 1),
        "hidden_size": 192,
        "head_dim": 48,
    },
    "Ternary-Bonsai, unpacked": {
        "architecture": "qwen3",
        "form": "values",
        "dtype": "F16",
        "scales": (128, 1),
        "hidden_size": 128,
        "intermediate_size": 256,
        "head_dim": 32,
    },
    "bitnet-embedding-0.6b": {
        "architecture": "qwen3",
        "form": "masters",
        "projection_norms": True,
        "head_dim": 32,
    },
    "bitnet-embedding-270m": {
        "architecture": "gemma3_text",
        "form": "masters",
        "projection_norms": True,
        "prefix": "",
        "n_heads": 4,
        "n_kv_heads": 1,
        "head_dim": 32,
    },
}
FLOAT = ("Falcon-E, bfloat16", "TriLM", "Ternary-Bonsai")


def make(folder: Path, family: str) -> Written:
    written = write(folder, **FAMILIES[family])
    if family == "Falcon-E, prequantized":
        written.edit_config(quantization_config=...)
    return written


def opened(folder: Path, family: str, **options: Any) -> br.loaders.Checkpoint:
    masters = family == "Falcon-E, prequantized"
    return open_checkpoint(folder, options=FileOptions(masters=masters, **options))


def close(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> bool:
    """Equal but for roundings, and the few int8 codes that they may turn over."""
    apart = np.abs(found - wanted) / (1 + np.abs(wanted))
    return bool(np.median(apart) < 1e-5 and np.mean(apart < 1e-3) > 0.8 and apart.max() < 0.15)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_core_computes_what_the_reference_does(tmp_path: Path, family: str) -> None:
    make(tmp_path, family)
    checkpoint = opened(tmp_path, family)
    activations = "float" if family.startswith(FLOAT) else "int8"
    assert checkpoint.core_config["activations"] == activations
    assert checkpoint.lossless
    assert checkpoint.embedding == ("embedding" in family)
    core = _core.Model(checkpoint.core_config, checkpoint.weights, threads=2)
    found = core.forward([(IDS, core.new_cache(len(IDS), "f32"))], logits="all")
    wanted = _reference.forward(checkpoint.core_config, checkpoint.weights, IDS)
    assert np.abs(wanted).max() > 0.1
    if activations == "float":
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)
    else:
        assert close(found, wanted)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_that_threads_take_apart_change_no_bit(
    tmp_path: Path, family: str, threads: int
) -> None:
    make(tmp_path, family)
    checkpoint = opened(tmp_path, family)
    alone = _core.Model(checkpoint.core_config, checkpoint.weights, threads=1)
    core = _core.Model(checkpoint.core_config, checkpoint.weights, threads=threads)
    prompts = [IDS[: 3 + 2 * i] for i in range(5)]
    wanted = [alone.forward([(p, alone.new_cache(len(p)))], logits="last")[0] for p in prompts]
    caches = [core.new_cache(len(p)) for p in prompts]
    core.forward([(p[:-1], c) for p, c in zip(prompts, caches, strict=True)])
    # As in decoding: one token of each, so that no step need be shared.
    last = [(p[-1:], c) for p, c in zip(prompts, caches, strict=True)]
    tops = [None, 1, 0, 5, None]
    core.profile(True)
    for (ids, logits), full, top in zip(core.forward_top(last, tops), wanted, tops, strict=True):
        order = np.sort(np.argsort(-full, kind="stable")[: len(full) if top is None else top])
        assert ids is None or ids.tolist() == order.tolist()
        assert logits.tobytes() == full[order].tobytes()
    # Threads that share no step are busy all the time.
    [(count, wall, busy)] = [lap[1:] for lap in core.profile(False) if lap[0] == "down"]
    assert count == core.facts["n_layers"]
    assert busy / wall == pytest.approx(threads, rel=0.01)
    assert [len(c) for c in caches] == [len(p) for p in prompts]
    for cache in caches:
        cache.truncate(len(cache) - 1)
    assert core.forward(last).tobytes() == np.array(wanted).tobytes()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.startswith(FLOAT)])
def test_int8_activations_are_a_named_option(tmp_path: Path, family: str) -> None:
    make(tmp_path, family)
    checkpoint = opened(tmp_path, family, activations="int8")
    assert checkpoint.core_config["activations"] == "int8"
    scales = FAMILIES[family].get("scales", (1, 1))
    assert checkpoint.grouped == (scales != (1, 1))
    kernel = _core.grouped_kernels("int8")[0] if checkpoint.grouped else None
    core = _core.Model(checkpoint.core_config, checkpoint.weights, kernel=kernel, threads=2)
    found = core.forward([(IDS, core.new_cache(len(IDS), "f32"))], logits="all")
    wanted = _reference.forward(checkpoint.core_config, checkpoint.weights, IDS)
    assert close(found, wanted)
    exact = _reference.forward(
        {**checkpoint.core_config, "activations": "float"}, checkpoint.weights, IDS
    )
    assert np.abs(exact - wanted).max() > 1e-3  # it is an approximation


def test_print_says_which_activations(tmp_path: Path) -> None:
    make(tmp_path, "Ternary-Bonsai, unpacked")
    with br.load(tmp_path) as model:
        assert model.kernel.endswith("-i2g-float")
        assert model.facts["activations"] == "float"
        assert "lossless  yes" in repr(model)
        assert "says nothing of int8 activations" in repr(model)
        assert all(check.ok for check in model.verify().checks)
        with pytest.raises(ValueError, match="writes text, not one for embeddings"):
            model.embed("a")
    with br.load(tmp_path, activations="int8") as model:
        assert model.kernel.endswith("-i2g-int8")
        assert "activations='int8'" in repr(model)
        assert all(check.ok for check in model.verify().checks)
    make(tmp_path / "b", "2B-4T")
    with pytest.raises(ValueError, match=r"activations='float', but .* trained with int8"):
        br.load(tmp_path / "b", activations="float")
    with pytest.raises(ValueError, match="activations is 'int4'"):
        br.load(tmp_path / "b", activations="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kernel is 'generic-i2', and this model has float"):
        br.load(tmp_path, kernel="generic-i2")
    with pytest.raises(ValueError, match=r"kernel is 'generic-i2g-float', and this model has int8"):
        br.load(tmp_path / "b", kernel="generic-i2g-float")


# --- masters and values ---------------------------------------------------------------------------


def test_masters_that_nothing_declares_want_a_word(tmp_path: Path) -> None:
    written = make(tmp_path, "Falcon-E, prequantized")
    with pytest.raises(ValueError, match=r"not ternary, so nothing says .* masters=True"):
        open_checkpoint(tmp_path)
    with br.load(tmp_path, masters=True) as model:
        said = model.logits(IDS)
        assert "masters, quantized at load" in model.format
    written.edit_config(
        quantization_config={
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        }
    )
    with br.load(tmp_path) as model:
        assert (model.logits(IDS) == said).all()
    with pytest.raises(TypeError, match="masters is 1"):
        br.load(tmp_path, masters=1)  # type: ignore[arg-type]


def test_packed_weights_that_nothing_declares_are_refused(tmp_path: Path) -> None:
    write(tmp_path).edit_config(quantization_config=...)
    with pytest.raises(ValueError, match="whether the scales of the packed weights multiply"):
        open_checkpoint(tmp_path)


def test_mlx_is_refused_by_name(tmp_path: Path) -> None:
    written = make(tmp_path, "Ternary-Bonsai, unpacked")
    written.edit_config(quantization={"group_size": 128, "bits": 2})
    with pytest.raises(ValueError, match=r"`quantization` is of MLX, .* take the GGUF"):
        open_checkpoint(tmp_path)


def test_a_value_that_is_not_ternary_is_refused_where_it_stands(tmp_path: Path) -> None:
    written = make(tmp_path, "TriLM 3.9B, shards by columns")
    name = "model.layers.1.mlp.up_proj.weight"
    dtype, values = written.stored[name]
    values = values.copy()
    row, column = np.argwhere(values[:, 70:] != 0)[5] + [0, 70]
    values[row, column] *= 1.5
    written.edit_tensors({name: (dtype, values)})
    with pytest.raises(ValueError, match=rf"up_proj.weight is not ternary: in row {row}, the 64 "):
        br.load(tmp_path)
    values[row, column] = np.inf
    written.edit_tensors({name: (dtype, values)})
    with pytest.raises(ValueError, match=r"up_proj.weight holds NaN or infinity"):
        br.load(tmp_path)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("rows_apart", [False, True])
def test_trits_and_scales_are_recovered(groups: int, rows_apart: bool) -> None:  # noqa: FBT001
    rng = np.random.default_rng(groups)
    trits = rng.integers(-1, 2, (9, 384), np.int8)
    trits[2] = 0
    scales = rng.uniform(0.5, 2, (9 if rows_apart else 1, groups)).astype(np.float16)
    full = np.repeat(np.broadcast_to(scales, (9, groups)), 384 // groups, axis=1)
    found, found_scales = recover((trits * full).astype(np.float16))
    assert (found == trits).all()
    if groups == 1 and not rows_apart:
        assert found_scales.shape == (1,)
    else:
        assert found_scales.shape == (9, groups)
    wanted = np.broadcast_to(scales, (9, groups)).astype(np.float32)
    live = trits.reshape(9, groups, -1).any(axis=2)
    assert (np.broadcast_to(found_scales, (9, groups))[live] == wanted[live]).all()
    assert is_ternary((trits * full).astype(np.float32))


def test_floats_are_not_ternary() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (8, 128)).astype(np.float32)
    assert not is_ternary(values)
    assert not is_ternary(np.zeros((8, 128), np.float32))  # says nothing
    assert is_ternary(np.sign(values))
    with pytest.raises(ValueError, match="64 columns from 0 on hold 64 different magnitudes"):
        recover(values)
    assert collapse(np.zeros((3, 4), np.float32)).tolist() == [0]


# --- Gemma 3 and Qwen3 ----------------------------------------------------------------------------


@pytest.mark.parametrize("new_names", [False, True])
def test_gemma_layers_with_a_window_have_a_rope_of_their_own(
    tmp_path: Path,
    new_names: bool,  # noqa: FBT001
) -> None:
    written = write(tmp_path, **{**FAMILIES["bitnet-embedding-270m"], "n_layers": 3})
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    ropes: dict[str, Any] = {"rope_theta": 10000.0, "rope_local_base_freq": 100.0}
    if new_names:
        ropes = {
            "rope_theta": ...,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        }
    written.edit_config(layer_types=kinds, sliding_window=5, **ropes)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.core_config["layer_kinds"] == "sfs"
    core = _core.Model(checkpoint.core_config, checkpoint.weights, threads=1)
    found = core.forward([(IDS, core.new_cache(30, "f32"))], logits="all")
    wanted = _reference.forward(checkpoint.core_config, checkpoint.weights, IDS)
    assert close(found, wanted)
    for changes in ({"sliding_window": None, "layer_types": ["full_attention"] * 3}, {}):
        # Without windows, and with one that holds all: then the rotary base alone is another.
        window = {"sliding_window": 5000, "layer_types": kinds, **ropes, **changes}
        written.edit_config(**window)
        other = open_checkpoint(tmp_path)
        apart = _reference.forward(other.core_config, other.weights, IDS) - wanted
        assert np.abs(apart[:5]).max() > 0.01 if changes else (apart[:5] == 0).all()
        assert np.abs(apart[5:]).max() > 0.01


def test_a_window_moves_along_a_long_text(tmp_path: Path) -> None:
    """In one pass, in chunks and token by token: beyond blocks of keys, too."""
    written = write(
        tmp_path, **{**FAMILIES["bitnet-embedding-270m"], "max_position_embeddings": 400}
    )
    written.edit_config(layer_types=["sliding_attention"] * 2, sliding_window=20)
    checkpoint = open_checkpoint(tmp_path)
    core = _core.Model(checkpoint.core_config, checkpoint.weights, threads=2)
    ids = (np.arange(300) * 37 % 1000).astype(np.uint32)
    whole = core.forward([(ids, core.new_cache(300, "f16"))], logits="all")
    for step in (1, 7, 131):
        cache = core.new_cache(300, "f16")
        parts = [
            core.forward([(ids[at : at + step], cache)], logits="all") for at in range(0, 300, step)
        ]
        assert (np.concatenate(parts) == whole).all()
    # Two layers of 20 reach 38 tokens back: what is before them leaves no trace.
    ids[:200] = 3
    again = core.forward([(ids, core.new_cache(300, "f16"))], logits="all")
    assert (again[245:] == whole[245:]).all()
    assert not (again[200:220] == whole[200:220]).all()


def test_gemma_patterns() -> None:
    from bitnet_rs.loaders.families import core_config

    def kinds(**fields: Any) -> str:
        config = {"num_hidden_layers": 8, **fields}
        core = core_config(
            config, "gemma3_text", tied=True, activations="int8", where=Path("config.json")
        )
        return str(core["layer_kinds"])

    assert kinds() == "sssssfss"  # of 4096 tokens: transformers' default
    assert kinds(sliding_window=None) == "f" * 8
    assert kinds(sliding_window=512) == "sssssfss"
    assert kinds(sliding_window=512, sliding_window_pattern=2) == "sfsfsfsf"
    assert kinds(sliding_window=512, layer_types=["full_attention"] * 8) == "f" * 8
    for wrong in (["full_attention"] * 7, ["chunked_attention"] * 8, "full_attention", [3] * 8):
        with pytest.raises(ValueError, match="`layer_types` is"):
            kinds(layer_types=wrong)
    with pytest.raises(ValueError, match="`sliding_window_pattern` is 0"):
        kinds(sliding_window=512, sliding_window_pattern=0)
    with pytest.raises(ValueError, match=r"`rope_parameters.sliding_attention.factor` is 8"):
        kinds(rope_parameters={"sliding_attention": {"factor": 8.0}})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bitnet-embedding-270m", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
        ("bitnet-embedding-270m", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("bitnet-embedding-270m", {"use_bidirectional_attention": True}, "bidirectional"),
        ("bitnet-embedding-270m", {"hidden_activation": "silu"}, "gelu_pytorch_tanh"),
        ("bitnet-embedding-270m", {"head_dim": ...}, "`head_dim` is missing"),
        ("bitnet-embedding-0.6b", {"use_sliding_window": True}, "use_sliding_window"),
        ("bitnet-embedding-0.6b", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("bitnet-embedding-0.6b", {"attention_bias": True}, "attention_bias is true"),
        ("bitnet-embedding-0.6b", {"model_type": "qwen2"}, "`model_type` is 'qwen2'"),
    ],
)
def test_what_is_not_understood_is_refused_by_field(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    make(tmp_path, family).edit_config(**changes)
    with pytest.raises(ValueError, match=message):
        br.load(tmp_path)


def test_projections_with_and_without_norms_do_not_mix(tmp_path: Path) -> None:
    written = make(tmp_path, "bitnet-embedding-0.6b")
    written.edit_tensors({"model.layers.1.mlp.down_proj.norm.weight": None})
    with pytest.raises(KeyError, match=r"layers.1.mlp.down_proj.norm.weight is not in"):
        br.load(tmp_path)
    written = make(tmp_path / "b", "Ternary-Bonsai, unpacked")
    norm = encode(np.ones(256), "F16")
    written.edit_tensors({"model.layers.1.mlp.down_proj.norm.weight": norm})
    with pytest.raises(ValueError, match=r"unexpected tensor model.layers.1.mlp.down_proj.norm"):
        br.load(tmp_path / "b")


# --- embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bitnet-embedding-0.6b", "bitnet-embedding-270m"])
def test_embeddings(tmp_path: Path, family: str) -> None:
    write(tmp_path, **{**FAMILIES[family], "max_position_embeddings": 700})
    texts = ["one", "a second, longer text", "word " * 200, "and a last one"]
    with br.load(tmp_path, kv_dtype="f32") as model:
        found = model.embed(texts)
        width = model.facts["hidden_size"]
        assert found.shape == (4, width)
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.square(found).sum(axis=1), 1, rtol=1e-5)
        for text, row in zip(texts, found, strict=True):
            alone = model.embed(text)
            assert alone.shape == (width,)
            assert (alone == row).all()
        for text in texts[:2]:
            wanted = _reference.embed(
                model.checkpoint.core_config, model.checkpoint.weights, model.encode(text)
            )
            assert float(model.embed(text) @ wanted) > 0.9999
        assert len(model.encode(texts[2])) > 256  # more than a chunk
        assert model.embed([]).shape == (0, width)
        for wrong, error, message in (
            (3, TypeError, "wanted a str, or a list"),
            (["a", 3], TypeError, r"text\[1\] is a int"),
            ("", ValueError, "text is empty"),
            (["a", "word " * 800], ValueError, r"text\[1\] has \d+ tokens; the context holds 700"),
        ):
            with pytest.raises(error, match=message):
                model.embed(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"model for embeddings, .* use embed"):
            model.generate("a")


def test_a_body_without_a_prefix_is_the_same_model(tmp_path: Path) -> None:
    config = FAMILIES["bitnet-embedding-0.6b"]
    write(tmp_path / "a", **config)
    write(tmp_path / "b", **config, prefix="").edit_config(architectures=["Qwen3Model"])
    with br.load(tmp_path / "a") as a, br.load(tmp_path / "b") as b:
        assert (a.embed("some text") == b.embed("some text")).all()
    header = (tmp_path / "b" / "model.safetensors").read_bytes()[8:60]
    assert b"model." not in header.split(b"embed_tokens")[0]
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "qwen3"
