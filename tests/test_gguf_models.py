"""Whole models in GGUF files: the same numbers from every format, and from safetensors.

Blocks and containers are tested in `test_gguf.py`. The golden files were written by bitnet.cpp,
llama.cpp and ik_llama.cpp (tests/data/README.md); the others here are written by `ggufs.py`.
"""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import bitnet_rs as br
import ggufs
from bitnet_rs import _core, _reference
from bitnet_rs.loaders import Checkpoint, FileOptions, open_checkpoint
from bitnet_rs.loaders.options import GgmlOptions
from checkpoints import DATA, Written, decode, write
from ggufs import Stored, Typed

GOLDEN = sorted((DATA / "gguf").glob("*.gguf"))
IDS = (np.arange(16) * 29 % 250).astype(np.uint32)

Trits = NDArray[np.int8]


def logits(checkpoint: Checkpoint) -> NDArray[np.float32]:
    kernel = None
    if checkpoint.grouped:
        kernel = _core.grouped_kernels("int8")[0]
    core = _core.Model(checkpoint.core_config, checkpoint.weights, kernel=kernel, threads=2)
    return core.forward([(IDS, core.new_cache(len(IDS), "f32"))], logits="all")


# --- files of the real tools ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth() -> dict[str, NDArray[Any]]:
    with np.load(DATA / "gguf" / "f16-truth.npz") as arrays:
        return dict(arrays)


def test_there_are_golden_files() -> None:
    names = ["I2_S", "IQ1_BN", "IQ2_BN", "IQ2_BN_R4", "TQ1_0", "TQ2_0", "f16"]
    assert [path.stem for path in GOLDEN] == names


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_trits_scales_and_floats(path: Path, truth: dict[str, NDArray[Any]]) -> None:
    weights = open_checkpoint(path).weights
    canonical = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "attn_sub_norm": "self_attn.attn_sub_norm",
        "ffn_sub_norm": "mlp.ffn_sub_norm",
    }  # fmt: skip
    whole = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
    seen = set()
    for key, wanted in truth.items():
        block, _, rest = key.partition(".")
        name = whole.get(block)
        if name is None:
            layer, part, what = rest.split(".")
            end = {"weight": ".weight", "trits": ".weight", "scale": ".weight_scale"}[what]
            name = f"model.layers.{layer}.{canonical[part]}{end}"
        found = weights[name]
        seen.add(name)
        if key.endswith("trits"):
            assert found.dtype == np.int8
            assert (found == wanted).all(), key
        elif key.endswith("scale"):
            assert found.shape == (1,)
            assert found[0] == np.float32(wanted), key
        else:
            assert (found.astype(np.float32) == wanted.astype(np.float32)).all(), key
    assert seen == set(weights)


def test_golden_logits(truth: dict[str, NDArray[Any]]) -> None:
    checkpoints = [open_checkpoint(path) for path in GOLDEN]
    first = logits(checkpoints[0])
    wanted = _reference.forward(checkpoints[0].core_config, checkpoints[0].weights, IDS)
    assert np.median(np.abs(first - wanted)) < 1e-5
    assert np.abs(first - wanted).max() < 0.1
    for checkpoint in checkpoints:
        assert checkpoint.core_config["hidden_act"] == "silu"  # arch `bitnet`
        assert not checkpoint.grouped
        assert (logits(checkpoint) == first).all(), checkpoint.path


def test_a_golden_file_loads_runs_and_verifies() -> None:
    path = DATA / "gguf" / "TQ2_0.gguf"
    with br.load(path) as model:
        assert model.format.startswith("GGUF v3 `bitnet`, TQ2_0")
        assert model.logits(IDS).shape == (len(IDS), model.vocab_size)
        assert all(check.ok for check in model.verify().checks)
        assert model.checkpoint.tensors()[0][1] in ("F16", "F32", "TQ2_0")


# --- one model in every format --------------------------------------------------------------------

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
FLOAT_IDS = {"float32": 0, "float16": 1, "uint16": 30}


def gguf_name(name: str, parts: Mapping[str, str]) -> str:
    if name in WHOLE:
        return WHOLE[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    part, norm_in = rest.removesuffix(".weight"), ""
    if part.endswith("_proj.norm"):
        part, norm_in = part.removesuffix(".norm"), "_norm_in"
    return f"blk.{layer}.{parts[part]}{norm_in}.weight"


def floats(array: NDArray[Any]) -> Stored:
    return Stored(FLOAT_IDS[array.dtype.name], array.shape, array.tobytes())


def metadata(written: Written, arch: str, **more: Any) -> dict[str, Any]:
    config = written.config
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    fields = {
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": config["rope_theta"],
        "vocab_size": config["vocab_size"],
    }
    named = {f"{arch}.{key}": value for key, value in {**fields, **more}.items()}
    return {"general.architecture": arch, **{k: v for k, v in named.items() if v is not ...}}


Encoder = Callable[[Trits, NDArray[np.float32]], Stored]


def as_gguf(
    written: Written,
    path: Path,
    arch: str,
    encoder: Encoder,
    *,
    changes: Mapping[str, Stored | None] | None = None,
    heads: tuple[int, int] | None = None,
    **more: Any,
) -> Path:
    """Writes a checkpoint of `checkpoints.write` as GGUF.

    Args:
        written: The checkpoint.
        path: Where to.
        arch: `general.architecture`.
        encoder: Trits and scales to a tensor.
        changes: Tensors to be replaced, added, or (None) left out.
        heads: Of queries and keys, where their rows are permuted.
        **more: Fields of the architecture; `...` leaves one out.
    """
    parts = PARTS | GEMMA if arch == "gemma3" else PARTS
    tensors: dict[str, Stored] = {}
    for name, array in written.canonical.items():
        if name.endswith("_scale"):
            continue
        on_disk = gguf_name(name, parts)
        if f"{name}_scale" not in written.canonical:
            tensors[on_disk] = floats(array)
            continue
        scales = written.canonical[f"{name}_scale"]
        trits = trits_of(written, name)
        if heads and on_disk.endswith(("attn_q.weight", "attn_k.weight")):
            n = heads["attn_k" in on_disk]
            trits = permuted(trits, n)
            scales = permuted(scales, n) if scales.size > 1 else scales
        tensors[on_disk] = encoder(trits, scales)
    for on_disk, tensor in (changes or {}).items():
        if tensor is None:
            del tensors[on_disk]
        else:
            tensors[on_disk] = tensor
    return ggufs.write(path, metadata(written, arch, **more), tensors)


def trits_of(written: Written, name: str) -> Trits:
    array = written.canonical[name]
    return _reference.unpack(array, 4 * len(array)) if array.dtype == np.uint8 else array


def permuted(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """As llama.cpp's converter interleaves the halves of each head's rows."""
    parts = rows.reshape(heads, 2, -1, rows.shape[1])
    return parts.swapaxes(1, 2).reshape(rows.shape)


def blocks(
    type_id: int, encode: Callable[[Trits, NDArray[Any]], bytes], block: int | None
) -> Encoder:
    """An encoder of types with a scale for each block, or (None) for each row."""

    def encoder(trits: Trits, scales: NDArray[np.float32]) -> Stored:
        rows, cols = trits.shape
        n = cols // block if block else 1
        if scales.size == 1:
            full = np.full((rows, n), scales.reshape(()), np.float32)
        else:
            full = np.repeat(scales, n // scales.shape[1], axis=1)
        return Stored(type_id, trits.shape, encode(trits, full.reshape(-1)))

    return encoder


def whole(type_id: int, encode: Callable[[Trits, float], bytes]) -> Encoder:
    return lambda trits, scales: Stored(type_id, trits.shape, encode(trits, float(scales[0])))


def values(dtype: Any) -> Encoder:
    return lambda trits, scales: floats((trits * scales).astype(dtype))


TILES = {(rows, cols): (64, 64, 32) for rows in (64, 128, 256, 512) for cols in (256, 512)}
TL2_TILES = dict.fromkeys(TILES, (64, 96, 32))
FORMATS: dict[str, tuple[Encoder, dict[str, Any]]] = {
    "I2_S x86": (whole(36, ggufs.i2_s), {}),
    "I2_S arm": (
        whole(36, lambda t, s: ggufs.i2_s(t, s, "arm")),
        {"i2s_layout": "arm"},
    ),
    "I2_S rows4": (
        whole(36, lambda t, s: ggufs.i2_s(t, s, "rows4")),
        {"i2s_layout": "rows4"},
    ),
    "TL1": (whole(38, lambda t, s: ggufs.tl1(t, s, TILES[t.shape])), {"tl_tiles": TILES}),
    "TL2": (whole(39, lambda t, s: ggufs.tl2(t, s, TL2_TILES[t.shape])), {"tl_tiles": TL2_TILES}),
    "TQ1_0": (blocks(34, ggufs.tq1_0, 256), {}),
    "TQ2_0": (blocks(35, ggufs.tq2_0, 256), {}),
    "Q2_0": (blocks(42, ggufs.q2_0, 64), {}),
    "Q2_0_g128": (blocks(42, lambda t, s: ggufs.q2_0(t, s, 128), 128), {}),
    "STQ1_0": (blocks(43, ggufs.stq1_0, 256), {}),
    "STQ1_0 by its old id": (blocks(42, ggufs.stq1_0, 256), {}),
    "IQ1_BN": (blocks(134, ggufs.iq1_bn, None), {}),
    "IQ2_BN": (blocks(135, ggufs.iq2_bn, None), {}),
    "IQ2_BN_R4": (blocks(335, ggufs.iq2_bn_r4, None), {}),
    "F16": (values(np.float16), {}),
    "F32": (values(np.float32), {}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A packed BitNet whose trits every format can hold, with scales that float16 holds."""
    written = write(
        tmp_path_factory.mktemp("model"),
        dtype="F16",
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        n_layers=1,
    )
    rng = np.random.default_rng(5)
    canonical = {}
    for name, array in written.canonical.items():
        canonical[name] = array
        if array.dtype == np.uint8:
            canonical[name] = ggufs.sparse_trits(rng, 4 * len(array), array.shape[1])
    return dataclasses.replace(written, canonical=canonical)


@pytest.fixture(scope="module")
def right(model: Written) -> NDArray[np.float32]:
    config = {**model.config, "tie_word_embeddings": True}
    core = _core.Model(config, model.canonical, threads=1)
    return core.forward([(IDS, core.new_cache(len(IDS), "f32"))], logits="all")


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_holds_the_same_model(
    tmp_path: Path, model: Written, right: NDArray[np.float32], format_: str
) -> None:
    encoder, options = FORMATS[format_]
    path = as_gguf(model, tmp_path / "model.gguf", "bitnet-b1.58", encoder)
    checkpoint = open_checkpoint(path, options=FileOptions(ggml=GgmlOptions(**options)))
    assert checkpoint.core_config["hidden_act"] == "relu2"
    assert checkpoint.core_config["activations"] == "int8"
    assert not checkpoint.grouped
    weights = checkpoint.weights
    assert sorted(weights) == sorted(model.canonical)
    for name, wanted in model.canonical.items():
        found = weights[name]
        assert found.shape == wanted.shape, name
        assert (found == wanted).all(), name
    assert (logits(checkpoint) == right).all()
    kind = format_.split()[0]
    expected = kind if kind not in ("F16", "F32") else f"ternary values in {kind}"
    assert expected in checkpoint.format


def test_a_file_of_another_layout_is_another_model(
    tmp_path: Path, model: Written, right: NDArray[np.float32]
) -> None:
    encoder, _ = FORMATS["I2_S arm"]
    path = as_gguf(model, tmp_path / "model.gguf", "bitnet-b1.58", encoder)
    assert not (logits(open_checkpoint(path)) == right).all()
    with br.load(path, i2s_layout="arm") as arm:
        np.testing.assert_array_equal(arm.logits(IDS)[0], arm.logits(IDS[:1])[0])
        assert "arm layout" in repr(arm)
    with pytest.raises(ValueError, match="x86, arm, rows4"):
        br.load(path, i2s_layout="riscv")  # type: ignore[arg-type]


def test_a_trained_model_in_another_layout_is_warned_of(tmp_path: Path) -> None:
    from bitnet_rs.loaders.ggml_types import read_scales, read_trits, resolve_types
    from bitnet_rs.loaders.gguf import open_gguf

    br.convert("demo", tmp_path / "x86.gguf", "gguf-i2_s")
    file = open_gguf(tmp_path / "x86.gguf")
    arm = {}
    for name, type_ in resolve_types(file).items():
        if type_.name == "I2_S":
            tensor = file.tensors[name]
            trits, scale = read_trits(tensor, type_), read_scales(tensor, type_)
            arm[name] = Stored(36, trits.shape, ggufs.i2_s(trits, float(scale[0]), "arm"))
    fields = {k: v for k, v in file.metadata.items() if not k.startswith("tokenizer.")}
    rewrite(tmp_path / "x86.gguf", tmp_path / "arm.gguf", fields, **arm)
    with pytest.warns(UserWarning, match="arm"), br.load(tmp_path / "arm.gguf") as wrong:
        assert "arm" in repr(wrong).split("note")[1]
    for path, layout in (("arm.gguf", "arm"), ("x86.gguf", "x86")):
        with br.load(tmp_path / path, i2s_layout=layout) as right:  # type: ignore[arg-type]
            assert not any("layout" in note for note in right.notes)
    command = [sys.executable, "-m", "bitnet_rs", "verify", str(tmp_path / "arm.gguf"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("warning: ")
    assert done.stderr.count("\n") == 1


def test_tiles_have_to_be_given(tmp_path: Path, model: Written) -> None:
    encoder, _ = FORMATS["TL1"]
    path = as_gguf(model, tmp_path / "model.gguf", "bitnet-b1.58", encoder)
    with pytest.raises(ValueError, match=r"TL1.*tl_tiles"):
        open_checkpoint(path)
    with br.load(path, tl_tiles=TILES) as loaded:
        assert "TL1" in loaded.format


# --- architectures --------------------------------------------------------------------------------


def test_the_name_of_the_architecture_decides_the_activation(
    tmp_path: Path, model: Written
) -> None:
    for arch, act in (("bitnet", "silu"), ("bitnet-25", "relu2"), ("bitnet-b1.58", "relu2")):
        path = as_gguf(model, tmp_path / f"{arch}.gguf", arch, FORMATS["I2_S x86"][0])
        assert open_checkpoint(path).core_config["hidden_act"] == act


def same_as_safetensors(written: Written, path: Path, **options: Any) -> None:
    """The same bits from a GGUF file as from the folder that it was made of."""
    ours = open_checkpoint(path, options=FileOptions(**options))
    theirs = open_checkpoint(written.folder, options=FileOptions(**options))
    assert (logits(ours) == logits(theirs)).all()
    wanted = _reference.forward(ours.core_config, ours.weights, IDS)
    assert np.median(np.abs(logits(ours) - wanted)) < 1e-4


def test_llama_rows_are_permuted(tmp_path: Path) -> None:
    written = write(
        tmp_path / "hf",
        architecture="llama",
        form="divide",
        tied=False,
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
    )
    path = as_gguf(written, tmp_path / "a.gguf", "llama", FORMATS["I2_S x86"][0], heads=(4, 2))
    same_as_safetensors(written, path)
    assert open_checkpoint(path).core_config["tie_word_embeddings"] is False
    straight = as_gguf(written, tmp_path / "b.gguf", "llama", FORMATS["I2_S x86"][0])
    assert np.abs(logits(open_checkpoint(straight)) - logits(open_checkpoint(path))).max() > 0.1


def test_several_scales_and_float_activations(tmp_path: Path) -> None:
    """TriLM as llama.cpp's TQ2_0: shards of rows, which the file permutes, and of columns."""
    for i, scales in enumerate([(2, 1), (1, 2), (128, 1)]):
        written = write(
            tmp_path / f"hf{i}",
            architecture="llama",
            form="values",
            dtype="F16",
            tied=False,
            scales=scales,
            hidden_size=512,
            intermediate_size=512,
            head_dim=128,
            n_layers=1,
        )
        path = as_gguf(written, tmp_path / f"{i}.gguf", "llama", FORMATS["TQ2_0"][0], heads=(4, 2))
        same_as_safetensors(written, path)
        checkpoint = open_checkpoint(path)
        assert checkpoint.core_config["activations"] == "float"
        assert "says nothing of int8" in checkpoint.lossless_reason
        same_as_safetensors(written, path, activations="int8")


def test_bonsai_with_ternary_embeddings(tmp_path: Path) -> None:
    written = write(
        tmp_path / "hf",
        architecture="qwen3",
        form="values",
        dtype="F16",
        scales=(64, 2),
        hidden_size=256,
        intermediate_size=256,
        head_dim=64,
        n_layers=1,
    )
    encoder, _ = FORMATS["Q2_0_g128"]
    rng = np.random.default_rng(3)
    trits = rng.integers(-1, 2, (1024, 256), np.int8)
    scales = rng.uniform(0.5, 2, (1024, 2)).astype(np.float16).astype(np.float32)
    embedding = (trits.reshape(1024, 2, 128) * scales[:, :, None]).reshape(1024, 256)
    path = as_gguf(
        written,
        tmp_path / "a.gguf",
        "qwen3",
        encoder,
        changes={"token_embd.weight": encoder(trits, scales)},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.core_config["activations"] == "float"
    assert checkpoint.lossless_reason.startswith("trained with ternary weights and float")
    found = checkpoint.weights["model.embed_tokens.weight"]
    assert found.dtype == np.float16
    assert (found == embedding).all()
    written.edit_tensors({"model.embed_tokens.weight": ("F16", embedding.astype(np.float16))})
    same_as_safetensors(written, path)


@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_embedding_models(tmp_path: Path, arch: str) -> None:
    """As microsoft's converter writes them: I2_S, norms with the one added, float16 norms."""
    written = write(
        tmp_path / "hf",
        architecture="qwen3" if arch == "qwen3" else "gemma3_text",
        form="masters",
        projection_norms=True,
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        n_layers=1,
    )
    canonical = dict(written.canonical)
    for name in [n for n in canonical if n.endswith("_proj.weight")]:
        trits, scale = _core._absmean(decode(written.stored[name]))
        canonical[name], canonical[f"{name}_scale"] = trits, np.array([scale], np.float32)
    masters = dataclasses.replace(written, canonical=canonical)
    path = as_gguf(masters, tmp_path / "a.gguf", arch, FORMATS["I2_S x86"][0])
    checkpoint = open_checkpoint(path)
    assert checkpoint.embedding
    assert checkpoint.notes == ()
    same_as_safetensors(written, path)
    pooled = as_gguf(masters, tmp_path / "b.gguf", arch, FORMATS["I2_S x86"][0], pooling_type=1)
    assert "pooling_type` is 1; embed() takes the last token, 3" in open_checkpoint(pooled).notes[0]
    core = _core.Model(checkpoint.core_config, checkpoint.weights, threads=1)
    hidden = core.forward_hidden([(IDS, core.new_cache(len(IDS), "f32"))])[0]
    wanted = _reference.embed(checkpoint.core_config, checkpoint.weights, IDS)
    assert float(hidden @ wanted / np.sqrt(hidden @ hidden)) > 0.9999


def test_gemma_windows_in_metadata(tmp_path: Path) -> None:
    written = write(
        tmp_path / "hf",
        architecture="gemma3_text",
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        n_layers=7,
    )
    window: dict[str, Any] = {"attention.sliding_window": 40}
    path = as_gguf(written, tmp_path / "a.gguf", "gemma3", FORMATS["I2_S x86"][0], **window)
    checkpoint = open_checkpoint(path, options=FileOptions(activations="int8"))
    assert checkpoint.core_config["layer_kinds"] == "sssssfs"
    assert checkpoint.core_config["rope_local_base_freq"] == 10000.0
    window = {"attention.sliding_window": 4}
    path = as_gguf(written, tmp_path / "b.gguf", "gemma3", FORMATS["I2_S x86"][0], **window)
    assert np.abs(logits(open_checkpoint(path)) - logits(checkpoint)).max() > 0.01


# --- scales apart, heads, masters -----------------------------------------------------------------


def test_scales_in_tensors_of_their_own(
    tmp_path: Path, model: Written, right: NDArray[np.float32]
) -> None:
    """As llama.cpp's `bitnet`: blocks with a scale of 1, and `.scale`."""
    ones = blocks(35, lambda t, s: ggufs.tq2_0(t, np.ones_like(s)), 256)
    scales = {
        gguf_name(name.removesuffix("_scale"), PARTS).removesuffix("weight") + "scale": floats(s)
        for name, s in model.canonical.items()
        if name.endswith("_scale")
    }
    path = as_gguf(model, tmp_path / "a.gguf", "bitnet-b1.58", ones, changes=scales)
    assert (logits(open_checkpoint(path)) == right).all()
    wrong = {"blk.0.attn_q.scale": floats(np.zeros(1, np.float32))}
    path = as_gguf(model, tmp_path / "b.gguf", "bitnet-b1.58", ones, changes=scales | wrong)
    with pytest.raises(ValueError, match=r"attn_q.scale is 0.0; a scale is"):
        logits(open_checkpoint(path))
    wrong = {"blk.0.attn_q.scale": floats(np.ones(2, np.float32))}
    path = as_gguf(model, tmp_path / "c.gguf", "bitnet-b1.58", ones, changes=scales | wrong)
    with pytest.raises(ValueError, match=r"attn_q.scale \[2\]: wanted one float32 number"):
        open_checkpoint(path)


def test_a_head_that_is_the_embedding_again(
    tmp_path: Path, model: Written, right: NDArray[np.float32]
) -> None:
    encoder, _ = FORMATS["I2_S x86"]
    embedding = model.canonical["model.embed_tokens.weight"]
    path = as_gguf(
        model,
        tmp_path / "a.gguf",
        "bitnet-25",
        encoder,
        changes={"output.weight": floats(embedding)},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.core_config["tie_word_embeddings"]
    assert "lm_head.weight" not in checkpoint.weights
    assert (logits(checkpoint) == right).all()
    other = {"output.weight": floats(embedding[::-1].copy())}
    checkpoint = open_checkpoint(
        as_gguf(model, tmp_path / "b.gguf", "bitnet-25", encoder, changes=other)
    )
    assert not checkpoint.core_config["tie_word_embeddings"]
    assert (logits(checkpoint) == right[:, ::-1]).all()


def test_masters_in_a_gguf_file(tmp_path: Path) -> None:
    written = write(tmp_path / "hf", architecture="llama", form="masters", dtype="F32", tied=False)
    tensors = dict(written.canonical)
    for name, rows in written.canonical.items():
        if "q_proj" in name or "k_proj" in name:
            tensors[name] = permuted(rows, 4 if "q_proj" in name else 2)
    path = as_gguf(
        dataclasses.replace(written, canonical=tensors),
        tmp_path / "a.gguf",
        "llama",
        FORMATS["F32"][0],
    )
    same_as_safetensors(written, path, masters=True)
    with pytest.raises(ValueError, match=r"attn_q.weight is not ternary.*masters=True"):
        logits(open_checkpoint(path))


def test_what_the_file_says_of_activations(tmp_path: Path, model: Written) -> None:
    encoder, _ = FORMATS["TQ2_0"]
    path = as_gguf(model, tmp_path / "a.gguf", "bitnet-b1.58", encoder)
    fields = metadata(model, "bitnet-b1.58")
    tensors = {name: Stored(t.type_id, t.shape, b"") for name, t in gguf_tensors(path).items()}
    assert tensors
    for value, found in (("int8", "int8"), ("float", "float")):
        again = tmp_path / f"{value}.gguf"
        rewrite(path, again, {**fields, "bitnet-rs.activations": value})
        assert open_checkpoint(again).core_config["activations"] == found
    rewrite(path, tmp_path / "c.gguf", {**fields, "bitnet-rs.activations": "int4"})
    with pytest.raises(ValueError, match=r"`bitnet-rs.activations` is 'int4'"):
        open_checkpoint(tmp_path / "c.gguf")


def gguf_tensors(path: Path) -> Mapping[str, Any]:
    from bitnet_rs.loaders.gguf import open_gguf

    return open_gguf(path).tensors


def rewrite(path: Path, to: Path, fields: Mapping[str, Any], **more: Stored | None) -> None:
    """Writes a file again with other metadata."""
    tensors = {
        name: Stored(t.type_id, t.shape, t.read(t.room).tobytes())
        for name, t in gguf_tensors(path).items()
    }
    for name, tensor in more.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    ggufs.write(to, fields, tensors)


# --- refusals -------------------------------------------------------------------------------------

ARCH = "bitnet-b1.58"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gpt2"}, r"`general.architecture` is 'gpt2'; supported: bitnet,"),
        ({"general.architecture": 3}, r"`general.architecture` is 3"),
        ({f"{ARCH}.embedding_length": ...}, r"embedding_length` is None; wanted a positive"),
        ({f"{ARCH}.embedding_length": 0}, r"embedding_length` is 0"),
        ({f"{ARCH}.embedding_length": 512}, r"token_embd.weight has shape \[1024, 256\]; the meta"),
        ({f"{ARCH}.embedding_length": "256"}, r"embedding_length` is '256'"),
        ({f"{ARCH}.block_count": 2}, r"blk.1.attn_norm.weight is not in the file"),
        ({f"{ARCH}.attention.head_count_kv": 3}, r"attn_k.weight has shape"),
        (
            {f"{ARCH}.attention.head_count": Typed("[u32]", [4, 4, 2])},
            r"head_count` is .*same for all layers",
        ),
        (
            {f"{ARCH}.attention.value_length": 32},
            r"value_length` is 32; wanted the width of a head",
        ),
        ({f"{ARCH}.rope.dimension_count": 32}, r"rope.dimension_count` is 32"),
        ({f"{ARCH}.rope.scaling.type": "yarn", f"{ARCH}.rope.scaling.factor": 4.0}, "no scaling"),
        ({f"{ARCH}.attention.layer_norm_rms_epsilon": ...}, r"layer_norm_rms_epsilon` is None"),
        ({f"{ARCH}.rope.freq_base": float("nan")}, r"rope.freq_base` is nan"),
    ],
)
def test_metadata_that_is_not_understood(
    tmp_path: Path, model: Written, changes: dict[str, Any], message: str
) -> None:
    path = as_gguf(model, tmp_path / "a.gguf", ARCH, FORMATS["I2_S x86"][0])
    fields = {**metadata(model, ARCH), **changes}
    rewrite(path, tmp_path / "b.gguf", {k: v for k, v in fields.items() if v is not ...})
    with pytest.raises((ValueError, KeyError), match=message):
        open_checkpoint(tmp_path / "b.gguf")


def test_metadata_that_may_be_missing_or_say_nothing_new(
    tmp_path: Path, model: Written, right: NDArray[np.float32]
) -> None:
    path = as_gguf(model, tmp_path / "a.gguf", ARCH, FORMATS["I2_S x86"][0])
    fields = metadata(model, ARCH)
    for key in ("attention.key_length", "attention.value_length", "vocab_size", "rope.freq_base"):
        del fields[f"{ARCH}.{key}"]
    fields |= {
        f"{ARCH}.rope.scaling.type": "linear",
        f"{ARCH}.rope.scaling.factor": 1.0,
        f"{ARCH}.attention.head_count": Typed("[u32]", [4]),
        "general.file_type": 40,
        "general.name": "a model",
    }
    factors = floats(np.ones(32, np.float32))
    rewrite(path, tmp_path / "b.gguf", fields, **{"rope_freqs.weight": factors})
    assert (logits(open_checkpoint(tmp_path / "b.gguf")) == right).all()
    factors = floats(np.full(32, 8, np.float32))
    rewrite(path, tmp_path / "c.gguf", fields, **{"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"rope_freqs.weight; it scales rotary embeddings"):
        open_checkpoint(tmp_path / "c.gguf")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blk.0.ffn_up.weight", None, r"blk.0.ffn_up.weight is not in the file"),
        ("token_embd.weight", None, r"token_embd.weight is not in the file"),
        ("blk.0.ffn_norm.weight", (128,), r"ffn_norm.weight has shape \[128\]; .* want.*\[256\]"),
        ("blk.0.attn_q.bias", (256,), r"unexpected tensor blk.0.attn_q.bias"),
        ("blk.7.attn_norm.weight", (256,), r"unexpected tensor blk.7.*`block_count` is 1"),
        ("blk.0.attn_q_norm.weight", (64,), r"unexpected tensor .*has no such tensor"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, model: Written, name: str, tensor: tuple[int, ...] | None, message: str
) -> None:
    stored = None if tensor is None else floats(np.ones(tensor, np.float32))
    path = as_gguf(model, tmp_path / "a.gguf", ARCH, FORMATS["I2_S x86"][0], changes={name: stored})
    with pytest.raises((ValueError, KeyError), match=message):
        open_checkpoint(path)


def test_norms_are_checked(tmp_path: Path, model: Written) -> None:
    bad = np.ones(256, np.float32)
    bad[7] = np.nan
    path = as_gguf(
        model,
        tmp_path / "a.gguf",
        ARCH,
        FORMATS["I2_S x86"][0],
        changes={"blk.0.attn_norm.weight": floats(bad)},
    )
    with pytest.raises(ValueError, match=r"attn_norm.weight holds NaN"):
        br.load(path)


def test_inspection_tells_what_a_refused_file_is(tmp_path: Path, model: Written) -> None:
    from bitnet_rs.inspection import inspect

    good = inspect(DATA / "gguf" / "IQ1_BN.gguf")
    assert good.refused is None
    assert good.container == "GGUF v3"
    assert good.architecture == good.runs_as == "bitnet"
    assert good.activations == "int8"
    assert "IQ1_BN" in (good.format or "")
    assert {kind.type for kind in good.tensors} == {"F16", "F32", "IQ1_BN"}
    path = as_gguf(model, tmp_path / "a.gguf", ARCH, FORMATS["I2_S x86"][0])
    rewrite(path, tmp_path / "b.gguf", {"general.architecture": "mamba", "general.name": "N"})
    bad = inspect(tmp_path / "b.gguf")
    assert bad.refused is not None
    assert "'mamba'; supported" in bad.refused
    assert (bad.title, bad.architecture, bad.runs_as) == ("N", "mamba", None)
    assert sum(kind.tensors for kind in bad.tensors) == len(gguf_tensors(path))
    folder = tmp_path / "hf"
    shutil.copytree(model.folder, folder)
    model_again = dataclasses.replace(model, folder=folder)
    model_again.edit_config(hidden_act=..., architectures=["FalconForCausalLM"])
    found = inspect(folder)
    assert found.container == "safetensors"
    assert "`architectures` is ['FalconForCausalLM']" in (found.refused or "")
    (tmp_path / "junk.gguf").write_bytes(b"GGUFjunk")
    with pytest.raises(ValueError, match=r"junk\.gguf"):
        inspect(tmp_path / "junk.gguf")
