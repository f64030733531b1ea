"""Checkpoint folders: every form of the weights, and every way they can be wrong."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitnet_rs import _reference
from bitnet_rs.loaders import open_checkpoint
from bitnet_rs.loaders.safetensors import read_header, to_float32
from checkpoints import DATA, Architecture, Form, Written, decode, encode, save, write

LAYER = "model.layers.1."
Q = LAYER + "self_attn.q_proj.weight"  # 80 rows, 80 columns in `write`'s default shape
UP = LAYER + "mlp.up_proj.weight"  # 500 rows, 80 columns

UNHURRIED = settings(deadline=None)  # a busy machine is no failure


def assert_holds(folder: Path, wanted: dict[str, NDArray[Any]]) -> None:
    weights = open_checkpoint(folder).weights
    assert sorted(weights) == sorted(wanted)
    for name, array in wanted.items():
        found = weights[name]
        assert found.dtype == array.dtype, name
        assert found.flags.aligned, name
        assert found.flags.c_contiguous, name
        np.testing.assert_array_equal(found, array, name, strict=True)


# --- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("form", ["multiply", "divide", "masters"])
@pytest.mark.parametrize("architecture", ["bitnet", "llama"])
def test_every_form_gives_the_weights_it_was_written_from(
    tmp_path: Path, architecture: Architecture, form: Form, dtype: str, shards: int
) -> None:
    written = write(
        tmp_path,
        architecture=architecture,
        form=form,
        dtype=dtype,
        shards=shards,
        tied=shards == 1,
        head_dim=24,  # 96 wide attention in an 80 wide model
    )
    assert_holds(tmp_path, written.canonical)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.name == str(tmp_path)
    assert checkpoint.path == tmp_path
    assert checkpoint.config == written.config
    assert checkpoint.core_config["model_type"] == architecture
    assert checkpoint.core_config["tie_word_embeddings"] is (shards == 1)
    assert checkpoint.generation_config["eos_token_id"] == [1022, 1023]
    assert checkpoint.lossless
    assert sorted(checkpoint.tensors()) == sorted(
        (name, dtype, array.shape) for name, (dtype, array) in written.stored.items()
    )
    files = tmp_path.glob("*.safetensors")
    assert checkpoint.n_files_bytes == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("form", "dtype", "words"),
    [
        ("multiply", "BF16", "safetensors, 2-bit packed, scale multiplies"),
        ("divide", "BF16", "safetensors, 2-bit packed, scale divides"),
        ("masters", "BF16", "safetensors, bfloat16 masters, quantized at load"),
        ("masters", "F16", "safetensors, float16 masters, quantized at load"),
        ("masters", "F32", "safetensors, float32 masters, quantized at load"),
    ],
)
def test_the_format_is_told(tmp_path: Path, form: Form, dtype: str, words: str) -> None:
    write(tmp_path, form=form, dtype=dtype)
    assert open_checkpoint(tmp_path).format == words


@pytest.mark.parametrize("rows", [125, 126, 127, 501])
def test_rows_that_are_no_multiple_of_four(tmp_path: Path, rows: int) -> None:
    assert_holds(tmp_path, write(tmp_path, intermediate_size=rows).canonical)


def test_names_of_1bitllm(tmp_path: Path) -> None:
    written = write(tmp_path, form="masters", dtype="F32", names="1bitllm")
    assert any("inner_attn_ln" in name for name in written.stored)
    assert_holds(tmp_path, written.canonical)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.core_config["model_type"] == "bitnet"
    assert checkpoint.core_config["hidden_act"] == "silu"


def test_a_dividing_scale_is_inverted_once_in_float32(tmp_path: Path) -> None:
    written = write(tmp_path, form="divide", dtype="BF16")
    scale = decode(written.stored[f"{Q}_scale"])
    found = open_checkpoint(tmp_path).weights[f"{Q}_scale"]
    assert found.dtype == np.float32
    assert found.shape == (1,)
    assert found[0] == np.float32(1) / scale[0]


def test_a_scale_may_be_a_scalar(tmp_path: Path) -> None:
    written = write(tmp_path)
    dtype, array = written.stored[f"{Q}_scale"]
    written.edit_tensors({f"{Q}_scale": (dtype, array.reshape(()))})
    assert_holds(tmp_path, written.canonical)


@pytest.mark.parametrize("linear_class", ["bitlinear", ...])
def test_linear_class_bitlinear_divides_and_is_the_default(
    tmp_path: Path, linear_class: object
) -> None:
    written = write(tmp_path, form="divide")
    fields = {"quant_method": "bitnet"} | (
        {} if linear_class is ... else {"linear_class": linear_class}
    )
    written.edit_config(quantization_config=fields)
    assert_holds(tmp_path, written.canonical)


@pytest.mark.parametrize("model", ["bitnet-online", "bitnet-packed", "llama-packed"])
def test_checkpoints_that_transformers_wrote(model: str) -> None:
    checkpoint = open_checkpoint(DATA / model)
    for name, array in checkpoint.weights.items():
        assert array.size > 0, name
    gate = checkpoint.weights["model.layers.0.mlp.gate_proj.weight"]
    assert gate.dtype == (np.uint16 if "online" in model else np.uint8)


def test_the_packed_checkpoint_is_the_online_one_quantized() -> None:
    online = open_checkpoint(DATA / "bitnet-online").weights
    packed = open_checkpoint(DATA / "bitnet-packed").weights
    for name in online:
        if "_proj" not in name:
            np.testing.assert_array_equal(online[name], packed[name])
            continue
        w = to_float32(online[name])
        mean = np.float32(np.abs(w).mean(dtype=np.float64))
        trits = np.clip(np.rint(w * (np.float32(1) / mean)), -1, 1)
        np.testing.assert_array_equal(trits, _reference.unpack(packed[name], len(w)))
        # the packed file has it in bfloat16
        assert packed[f"{name}_scale"][0] == pytest.approx(mean, rel=2**-8)


# --- the lazy mapping ----------------------------------------------------------------------------


def test_a_missing_name_tells_tensor_and_folder(tmp_path: Path) -> None:
    write(tmp_path)
    weights = open_checkpoint(tmp_path).weights
    with pytest.raises(
        KeyError, match=rf"tensor lm_head.weight is not in the checkpoint {tmp_path}"
    ):
        weights["lm_head.weight"]


def test_membership_and_iteration_read_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    weights = open_checkpoint(tmp_path).weights
    (tmp_path / "model.safetensors").unlink()
    assert f"{Q}_scale" in weights
    assert "lm_head.weight" not in weights
    assert len(list(weights)) == len(weights)
    with pytest.raises(FileNotFoundError):
        weights[Q]


def test_masters_have_no_scale(tmp_path: Path) -> None:
    write(tmp_path, form="masters")
    weights = open_checkpoint(tmp_path).weights
    assert Q in weights
    assert f"{Q}_scale" not in weights


def test_tensors_are_mapped_and_not_kept(tmp_path: Path) -> None:
    write(tmp_path, hidden_size=320, head_dim=80, intermediate_size=2000, form="masters")
    weights = open_checkpoint(tmp_path).weights
    largest = max(array.nbytes for array in weights.values())
    tracemalloc.start()
    for array in weights.values():
        array.max()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < largest / 2


@pytest.mark.parametrize("form", ["multiply", "masters"])
def test_mapped_tensors_are_read_only_and_outlive_the_next(tmp_path: Path, form: Form) -> None:
    written = write(tmp_path, form=form)
    weights = open_checkpoint(tmp_path).weights
    kept = {name: weights[name] for name in (Q, UP, "model.embed_tokens.weight")}
    for name, array in kept.items():
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, written.canonical[name], name)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells resident pages on Linux")
def test_a_tensor_leaves_memory_when_the_next_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = np.ones(64 << 20, np.uint8)
    save(path, {"x": ("U8", values), "y": ("U8", values[:5])})
    # In a process of its own: it counts all pages of files, code among them.
    script = """
import mmap, sys
from pathlib import Path
from bitnet_rs.loaders.safetensors import Reader, read_header

def resident():
    return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE >> 20

tensors, reader = read_header(Path(sys.argv[1])), Reader()
before = resident()
x = reader.read(tensors["x"])
assert x.sum() == x.size
read = resident()
y = reader.read(tensors["y"])
after = resident()
assert y.sum() == y.size
assert x.sum() == x.size
print(read - before, after - before, resident() - before)
"""
    command = [sys.executable, "-c", script, str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    read, after, again = map(int, found.stdout.split())
    assert read >= 60
    assert after <= 16
    assert again >= 60


@pytest.mark.parametrize("pad", range(4))
def test_tensors_at_odd_offsets_are_aligned(tmp_path: Path, pad: int) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = tmp_path / "x.safetensors"
    save(path, {"pad": ("U8", np.zeros(pad, np.uint8)), "x": ("F32", values)})
    array = read_header(path)["x"].read()
    assert array.flags.aligned
    np.testing.assert_array_equal(array, values, strict=True)


@pytest.mark.parametrize("n", [0, 1])
def test_small_tensors(tmp_path: Path, n: int) -> None:
    path = tmp_path / "x.safetensors"
    save(path, {"x": ("I8", np.full((n, 3), 7, np.int8)), "y": ("F16", np.array(1.5, np.float16))})
    tensors = read_header(path)
    assert tensors["x"].read().tolist() == [[7, 7, 7]] * n
    assert tensors["y"].read() == 1.5


def test_unsupported_dtypes_are_listed_but_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, {"x": ("F64", np.zeros(3))})
    tensors = read_header(path)
    assert tensors["x"].dtype == "F64"
    with pytest.raises(ValueError, match=r"x.safetensors: tensor x has dtype F64; supported: F32"):
        tensors["x"].read()


@UNHURRIED
@given(st.floats(width=16, allow_nan=False))
def test_half_floats_widen_exactly(value: float) -> None:
    assert to_float32(np.array([value], np.float16))[0] == value
    bits = np.array([value], np.float32).view(np.uint16)[1:]  # little-endian: the upper half
    assert to_float32(bits).view(np.uint32)[0] == int(bits[0]) << 16


# --- broken files --------------------------------------------------------------------------------


@UNHURRIED
@given(st.integers(0, 2**32))
def test_a_file_truncated_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    write(folder, hidden_size=4, head_dim=1, intermediate_size=4, n_layers=1, vocab_size=8)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: cut % len(content)])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        open_checkpoint(folder)


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight ends beyond the file"):
        checkpoint.weights["model.norm.weight"]


def test_no_weights_at_all(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors and no .*found no weight"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"found pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: no config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json: not valid JSON"),
        ("[]", r"config\.json: holds a list; wanted a JSON object"),
        (b"\xff\xfe{}", r"config\.json: not UTF-8 text"),
        (f'{{"x": {"[" * 100_000}', r"config\.json: not valid JSON \(nested too deeply\)"),
        (f'{{"architectures": {"[" * 400}{"]" * 400}}}', r"config\.json: nested more than 64"),
        (f'{{"hidden_size": {"9" * 5000}}}', r"config\.json: holds an integer of thousands"),
    ],
)
def test_config_that_is_no_json_object(tmp_path: Path, content: str | bytes, message: str) -> None:
    write(tmp_path)
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_generation_config_may_be_absent_but_not_broken(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "generation_config.json"
    path.unlink()
    assert open_checkpoint(tmp_path).generation_config == {}
    for content in ("nonsense", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"generation_config\.json: not valid JSON"):
            open_checkpoint(tmp_path)


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    write(tmp_path, shards=2, seed=1)
    written = write(tmp_path, seed=2)
    assert_holds(tmp_path, written.canonical)


def index_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_a_missing_shard(tmp_path: Path) -> None:
    write(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors: no such file"):
        open_checkpoint(tmp_path)


def test_a_truncated_shard(tmp_path: Path) -> None:
    write(tmp_path, shards=2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: not a whole"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    write(tmp_path, shards=2)
    path, index = index_of(tmp_path)
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q] = shards[1 - shards.index(index["weight_map"][Q])]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"tensor {Q} is said to be in .*does not hold it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[" * 100_000, "9" * 5000],
    ids=range(7),
)
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    write(tmp_path, shards=2)
    index_of(tmp_path)[0].write_text(content)
    with pytest.raises(
        ValueError, match=r"index\.json: (not valid JSON|holds a|field `weight_map` must)"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "x.bin", 3, ""])
def test_an_index_that_leads_elsewhere(tmp_path: Path, shard: object) -> None:
    write(tmp_path, shards=2)
    path, index = index_of(tmp_path)
    index["weight_map"][Q] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"tensor {Q} is said to be in .*wanted the name"):
        open_checkpoint(tmp_path)


def test_a_header_whose_sizes_disagree(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, {"x": ("F32", np.zeros(4, np.float32))})
    path.write_bytes(path.read_bytes().replace(b'"shape": [4]', b'"shape": [3]'))
    with pytest.raises(ValueError, match=r"x\.safetensors: not a whole safetensors file"):
        read_header(path)


# --- tensors that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        Q,
        f"{UP}_scale",
        LAYER + "input_layernorm.weight",
        LAYER + "mlp.ffn_sub_norm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor(tmp_path: Path, name: str) -> None:
    written = write(tmp_path, tied=False)
    written.edit_tensors({name: None})
    with pytest.raises(KeyError, match=rf"tensor {name} is not in the checkpoint {tmp_path}"):
        open_checkpoint(tmp_path)


BAD_TENSORS: list[tuple[str, tuple[str, NDArray[Any]], str]] = [
    (Q, ("U8", np.zeros((80, 80), np.uint8)), r"has shape \[80, 80\].* want \[20, 80\] \(.* = 80 rows"),
    (Q, ("U8", np.zeros((20, 81), np.uint8)), r"has shape \[20, 81\].* want \[20, 80\]"),
    (Q, encode(np.ones((80, 80)), "BF16"), r"is BF16 \[80, 80\].* packed, so wanted U8"),
    (Q, ("I8", np.ones((20, 80), np.int8)), r"is I8 \[20, 80\].* packed, so wanted U8"),
    (f"{Q}_scale", encode(np.ones(80), "BF16"), r"has shape \[80\].* want \[1\]"),
    (f"{Q}_scale", ("U8", np.ones(1, np.uint8)), r"has dtype U8; supported: F32, F16, BF16"),
    ("model.norm.weight", encode(np.ones(81), "BF16"), r"has shape \[81\].* want \[80\]"),
    ("model.norm.weight", ("F64", np.ones(80)), r"has dtype F64; supported: F32, F16, BF16"),
    (LAYER + "mlp.ffn_sub_norm.weight", encode(np.ones(80), "F32"), r"\[80\].* want \[500\]"),
    ("model.embed_tokens.weight", encode(np.ones((80, 1024)), "F16"), r"want \[1024, 80\]"),
    ("model.embed_tokens.weight", ("I8", np.ones((1024, 80), np.int8)), r"has dtype I8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tensor", "message"), BAD_TENSORS)
def test_a_tensor_of_the_wrong_shape_or_dtype(
    tmp_path: Path, name: str, tensor: tuple[str, NDArray[Any]], message: str
) -> None:
    written = write(tmp_path)
    written.edit_tensors({name: tensor})
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: tensor {name} .*{message}"
    ) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_wrong_shape_names_the_fields_that_it_follows_from(tmp_path: Path) -> None:
    write(tmp_path, architecture="llama").edit_config(head_dim=2147483646)
    with pytest.raises(
        ValueError,
        match=r"want \[2147483646, 80\] \(`num_attention_heads` 4 x `head_dim` 2147483646 = "
        r"8589934584 rows, four to a byte; `hidden_size` 80\)",
    ):
        open_checkpoint(tmp_path)
    write(tmp_path).edit_config(num_key_value_heads=3)
    with pytest.raises(
        ValueError, match=r"`num_key_value_heads` 3 x `head_dim` 20 \(= `hidden_size` / `num_att"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("form", ["multiply", "divide"])
def test_an_impossible_scale(tmp_path: Path, form: Form, value: float) -> None:
    written = write(tmp_path, form=form)
    written.edit_tensors({f"{Q}_scale": encode(np.array([value]), "BF16")})
    weights = open_checkpoint(tmp_path).weights
    with pytest.raises(ValueError, match=rf"tensor {Q}_scale is .*finite number above zero"):
        weights[f"{Q}_scale"]


def test_a_scale_whose_reciprocal_overflows(tmp_path: Path) -> None:
    written = write(tmp_path, form="divide")
    written.edit_tensors({f"{Q}_scale": ("F32", np.array([1e-40], np.float32))})
    with pytest.raises(ValueError, match=rf"tensor {Q}_scale is .*finite number above zero"):
        open_checkpoint(tmp_path).weights[f"{Q}_scale"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_norm_that_is_not_finite(tmp_path: Path, value: float) -> None:
    written = write(tmp_path)
    norm = np.ones(80)
    norm[7] = value
    written.edit_tensors({"model.norm.weight": encode(norm, "BF16")})
    weights = open_checkpoint(tmp_path).weights
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight holds NaN or infinity"):
        weights["model.norm.weight"]


def test_dead_channels_of_a_norm_survive(tmp_path: Path) -> None:
    written = write(tmp_path)
    norm = np.ones(500)
    norm[3] = 1e-32
    name = LAYER + "mlp.ffn_sub_norm.weight"
    written.edit_tensors({name: encode(norm, "BF16")})
    found = open_checkpoint(tmp_path).weights[name]
    assert found.dtype == np.float32
    assert found[3] == pytest.approx(1e-32, rel=0.01)


UNEXPECTED = [
    (Q.replace("weight", "bias"), "no such tensor"),
    (Q.replace("weight", "rms_norm.weight"), "no such tensor"),
    ("model.layers.2.input_layernorm.weight", "`num_hidden_layers` 2"),
    ("model.layers.0.self_attn.q_norm.weight", "no such tensor"),
    ("lm_head.bias", "no such tensor"),
]


@pytest.mark.parametrize(("name", "why"), UNEXPECTED)
def test_a_tensor_that_nobody_would_read(tmp_path: Path, name: str, why: str) -> None:
    written = write(tmp_path)
    written.edit_tensors({name: encode(np.ones(80), "BF16")})
    with pytest.raises(ValueError, match=rf"unexpected tensor {name}; .*{why}"):
        open_checkpoint(tmp_path)


def test_stored_rope_frequencies_are_ignored(tmp_path: Path) -> None:
    written = write(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    written.edit_tensors({name: encode(np.ones(10), "F32")})
    assert_holds(tmp_path, written.canonical)


def test_a_tensor_under_two_names(tmp_path: Path) -> None:
    written = write(tmp_path)
    written.edit_tensors({LAYER + "mlp.ffn_layernorm.weight": encode(np.ones(500), "BF16")})
    with pytest.raises(ValueError, match=r"ffn_sub_norm.weight and .*ffn_layernorm.* two names"):
        open_checkpoint(tmp_path)


def test_masters_with_a_scale(tmp_path: Path) -> None:
    written = write(tmp_path, form="masters")
    written.edit_tensors({f"{Q}_scale": encode(np.ones(1), "BF16")})
    with pytest.raises(ValueError, match=rf"unexpected tensor {Q}_scale; .*masters.*no scale"):
        open_checkpoint(tmp_path)


def test_packed_weights_that_are_declared_masters(tmp_path: Path) -> None:
    written = write(tmp_path)
    fields = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    written.edit_config(quantization_config={**fields, "quantization_mode": "online"})
    with pytest.raises(ValueError, match=r"q_proj.weight is U8 .*float masters.*\"offline\""):
        open_checkpoint(tmp_path)


def test_sub_norms_in_a_llama(tmp_path: Path) -> None:
    written = write(tmp_path)
    written.edit_config(architectures=["LlamaForCausalLM"], model_type="llama")
    with pytest.raises(ValueError, match=r"unexpected tensor .*sub_norm.*BitNetForCausalLM"):
        open_checkpoint(tmp_path)


# --- the head ------------------------------------------------------------------------------------


def test_an_undeclared_head_is_tied_only_where_the_file_has_none(tmp_path: Path) -> None:
    for tied in (True, False):
        folder = tmp_path / str(tied)
        write(folder, tied=tied).edit_config(tie_word_embeddings=...)
        checkpoint = open_checkpoint(folder)
        assert "tie_word_embeddings" not in checkpoint.config
        assert checkpoint.core_config["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in checkpoint.weights) is not tied


def test_a_tied_head_may_be_stored_twice_if_it_is_the_same(tmp_path: Path) -> None:
    written = write(tmp_path)
    embedding = written.stored["model.embed_tokens.weight"]
    written.edit_tensors({"lm_head.weight": embedding})
    assert_holds(tmp_path, written.canonical)
    other = embedding[1].copy()
    other[-1, -1] += 1
    written.edit_tensors({"lm_head.weight": ("BF16", other)})
    with pytest.raises(ValueError, match=r"`tie_word_embeddings` is true, but .*differs"):
        open_checkpoint(tmp_path)


def test_an_untied_head_that_is_missing(tmp_path: Path) -> None:
    write(tmp_path).edit_config(tie_word_embeddings=False)
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        open_checkpoint(tmp_path)


# --- config.json ---------------------------------------------------------------------------------


def quantization(**fields: object) -> dict[str, object]:
    return {"quantization_config": {"quant_method": "bitnet", **fields}}


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["MistralForCausalLM"]}, r"`architectures` is \['MistralForCausalLM'\]; supp"),
    ({"architectures": []}, r"`architectures` is \[\]; supported: one of BitNetForCausalLM"),
    ({"architectures": "BitNetForCausalLM"}, r"`architectures` is 'BitNetForCausalLM'"),
    ({"architectures": [3]}, r"`architectures` is \[3\]"),
    ({"architectures": [["BitNetForCausalLM"]]}, r"`architectures` is \[\['BitNetForCausalLM'\]\]"),
    ({"architectures": ..., "model_type": "gpt2"}, r"`architectures` is None"),
    ({"architectures": ..., "model_type": ["bitnet"]}, r"`architectures` is None"),
    ({"model_type": "mistral"}, r"`model_type` is 'mistral'; BitNetForCausalLM wants 'bitnet'"),
    ({"quantization_config": "bitnet"}, r"`quantization_config` is 'bitnet'; wanted an object"),
    (quantization(quant_method="gptq"), r"`quantization_config.quant_method` is 'gptq'; supported"),
    (quantization(linear_class="bitblas"), r"`quantization_config.linear_class` is 'bitblas'; supp"),
    (quantization(linear_class=["bitlinear"]), r"`quantization_config.linear_class` is \["),
    (quantization(quantization_mode="qat"), r"`quantization_config.quantization_mode` is 'qat'"),
    (quantization(use_rms_norm=True), r"`quantization_config.use_rms_norm` is true"),
    (quantization(modules_to_not_convert="lm_head"), r"modules_to_not_convert` is 'lm_head'; wanted"),
    (quantization(modules_to_not_convert=["q_proj"]), r"modules_to_not_convert` keeps 'q_proj'"),
    (quantization(modules_to_not_convert=["model.layers.1"]), r"keeps 'model.layers.1' in float"),
    (quantization(modules_to_not_convert=["model.layers.*.mlp"]), r"keeps 'model.layers.*.mlp'"),
    (quantization(modules_to_not_convert=["(("]), r"has the entry '\(\('; wanted names of modules"),
    (quantization(modules_to_not_convert=["(.+)+X"]), r"has the entry '\(\.\+\)\+X'; wanted"),
    (quantization(modules_to_not_convert=["X" * 10**5 + "\n"]), r"has the entry 'X+\.\.\..*; wanted"),
    (quantization(modules_to_not_convert=["lm_head", "model.layers.12.mlp"]), r"keeps 'model"),
    (quantization(modules_to_not_convert=["model.layers.*7.self_attn.q_proj"]), r"keeps 'model"),
    (quantization(modules_to_not_convert=[".*o_proj"]), r"keeps '\.\*o_proj' in float"),
    (quantization(modules_to_not_convert=["*"]), r"keeps '\*' in float"),
    (quantization(modules_to_not_convert=[""]), r"keeps '' in float"),
    (quantization(modules_to_not_convert=["model.layers....mlpx*.up"]), r"keeps 'model"),
    ({"hidden_size": ...}, r"`hidden_size` is None; wanted a positive integer"),
    ({"hidden_size": "80"}, r"`hidden_size` is '80'; wanted a positive integer"),
    ({"num_hidden_layers": 0}, r"`num_hidden_layers` is 0; wanted"),
    ({"num_attention_heads": True}, r"`num_attention_heads` is True; wanted"),
    ({"num_key_value_heads": 1.5}, r"`num_key_value_heads` is 1.5; wanted"),
    ({"intermediate_size": -500}, r"`intermediate_size` is -500; wanted"),
    ({"vocab_size": [1024]}, r"`vocab_size` is \[1024\]; wanted"),
    ({"num_attention_heads": 3}, r"`hidden_size` 80 is no multiple of `num_attention_heads` 3"),
    ({"tie_word_embeddings": "yes"}, r"`tie_word_embeddings` is 'yes'; wanted true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_a_config_that_is_not_understood(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path).edit_config(**changes)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


# The last two would take a backtracking matcher longer than anyone waits.
DEAD_PATTERNS = [
    *(".*lm_head", "*norm*", "model.embed_tokens", "layers.0", "model.layers.0.mlp.x_*proj"),
    *("model" + ".*" * 5000 + "X", "a*" * 50_000 + "X"),
]


@pytest.mark.parametrize(
    "modules", [None, [], ["lm_head"], ["lm_head", "vision_tower"], DEAD_PATTERNS]
)
def test_dead_entries_of_modules_to_not_convert(tmp_path: Path, modules: list[str] | None) -> None:
    written = write(tmp_path, form="divide")
    written.edit_config(**quantization(modules_to_not_convert=modules))
    assert_holds(tmp_path, written.canonical)


@pytest.mark.parametrize("architecture", ["bitnet", "llama"])
def test_float_weights_without_a_claim_to_be_ternary(
    tmp_path: Path, architecture: Architecture
) -> None:
    written = write(tmp_path, architecture=architecture, form="masters")
    written.edit_config(quantization_config=...)
    with pytest.raises(
        ValueError, match=r"`quantization_config` is missing.*not.*\"online\"|`quantiz"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("field", ["weight_bits", "input_bits"])
def test_other_bit_widths_of_1bitllm(tmp_path: Path, field: str) -> None:
    written = write(tmp_path, form="masters", names="1bitllm")
    written.edit_config(**{field: 4})
    with pytest.raises(ValueError, match=rf"`{field}` is 4; supported: "):
        open_checkpoint(tmp_path)


def without_defaults(written: Written) -> None:
    written.edit_config(num_key_value_heads=..., architectures=...)


def with_nulls(written: Written) -> None:
    written.edit_config(head_dim=None, num_key_value_heads=None)


@pytest.mark.parametrize("edit", [without_defaults, with_nulls])
def test_fields_that_follow_from_others(tmp_path: Path, edit: Callable[[Written], None]) -> None:
    written = write(tmp_path, n_kv_heads=4)
    edit(written)
    assert_holds(tmp_path, written.canonical)
