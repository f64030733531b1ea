"""`convert`: what it writes, read back by other eyes; what it refuses; what a crash leaves behind.

The readers here are written from the formats' definitions, weight by weight, and share nothing
with the package; the gguf and safetensors packages are the others.
"""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import bitnet_rs
from bitnet_rs import _core, _reference
from bitnet_rs.cli import main
from bitnet_rs.convert import Target, convert
from bitnet_rs.loaders import open_checkpoint
from bitnet_rs.loaders.gguf_model import unpermuted
from bitnet_rs.loaders.safetensors import to_float32
from bitnet_rs.tokenizer import Tokenizer
from bitnet_rs.writers import atomic, ggml_encode, gguf, to_gguf, to_packed
from bitnet_rs.writers.names import permute
from bitnet_rs.writers.packed import pack
from bitnet_rs.writers.readback import Steps
from bitnet_rs.writers.source import Source
from checkpoints import DATA, Architecture, Form, Written, decode, write
from checkpoints import pack as pack_by_definition

GGUF: list[Target] = ["gguf-i2_s", "gguf-tq2_0", "gguf-tq1_0"]
TARGETS: tuple[Target, ...] = get_args(Target)
UNHURRIED = settings(deadline=None, max_examples=30)

Q = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def source(folder: Path, architecture: Architecture = "bitnet", **options: Any) -> Written:
    """A checkpoint whose widths every format can hold, with rows that are no whole chunk."""
    sizes = {"hidden_size": 256, "n_heads": 4, "head_dim": 64, "intermediate_size": 512}
    act = options.pop("hidden_act", "relu2" if architecture == "bitnet" else "silu")
    written = write(folder, architecture=architecture, **{**sizes, **options})
    written.config["hidden_act"] = act
    written.edit_config()
    return written


def destination(folder: Path, to: Target) -> Path:
    return folder / ("out" if to == "safetensors-packed" else "out.gguf")


# --- readers from the definitions -----------------------------------------------------------------


SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


class Gguf:
    """A GGUF file: metadata, and (type, shape with the slowest axis first, bytes) by name."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._at = 0
        magic, version, n_tensors, n_keys = self._take("<4sIQQ")
        assert (magic, version) == (b"GGUF", 3)
        self.metadata = {self._string(): self._value(*self._take("<I")) for _ in range(n_keys)}
        infos = []
        for _ in range(n_tensors):
            name = self._string()
            (n_dims,) = self._take("<I")
            shape = self._take(f"<{n_dims}Q")[::-1]
            infos.append((name, shape, *self._take("<IQ")))
        start = -(-self._at // 32) * 32
        assert len(self._data) % 32 == 0
        self.tensors = {}
        for i, (name, shape, type_id, offset) in enumerate(infos):
            assert offset % 32 == 0
            end = infos[i + 1][3] if i + 1 < len(infos) else len(self._data) - start
            self.tensors[name] = type_id, shape, self._data[start + offset : start + end]

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        (text,) = self._take(f"{length}s")
        return str(text, "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._string()
        if kind == 9:
            element, n = self._take("<IQ")
            return [self._value(element) for _ in range(n)]
        return self._take("<" + SCALARS[kind])[0]

    def floats(self, name: str) -> NDArray[Any]:
        type_id, shape, data = self.tensors[name]
        dtype = {0: "<f4", 1: "<f2", 30: "<u2"}[type_id]
        n = int(np.prod(shape))
        return np.frombuffer(data, dtype, n).reshape(shape)

    def ternary(self, name: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Trits (rows, cols), and the scale of each weight's block, (rows, blocks) or (1, 1)."""
        type_id, (rows, cols), data = self.tensors[name]
        raw = np.frombuffer(data, np.uint8)
        if type_id == 36:
            n = rows * cols
            assert len(raw) == n // 4 + 32
            assert not raw[n // 4 + 4 :].any()
            scale = raw[n // 4 : n // 4 + 4].view("<f4").reshape(1, 1)
            trits = np.empty((n // 128, 128), np.int8)
            for p in range(128):
                byte = raw[: n // 4].reshape(-1, 32)[:, p % 32]
                trits[:, p] = (byte >> (6 - 2 * (p // 32)) & 3).astype(np.int8) - 1
            return trits.reshape(rows, cols), scale
        n_bytes = {34: 54, 35: 66}[type_id]
        blocks = raw[: rows * cols // 256 * n_bytes].reshape(-1, n_bytes)
        assert not raw[blocks.size :].any()
        scales = blocks[:, -2:].copy().view("<f2").astype(np.float32).reshape(rows, -1)
        place = _tq2_0 if type_id == 35 else _tq1_0
        trits = np.stack([place(blocks, p) for p in range(256)], axis=1)
        return trits.reshape(rows, cols), scales


def _tq2_0(blocks: NDArray[np.uint8], p: int) -> NDArray[np.int8]:
    half, part, byte = p // 128, p % 128 // 32, p % 32
    return (blocks[:, 32 * half + byte] >> 2 * part & 3).astype(np.int8) - 1


def _tq1_0(blocks: NDArray[np.uint8], p: int) -> NDArray[np.int8]:
    if p < 160:
        byte, digit = p % 32, p // 32
    elif p < 240:
        byte, digit = 32 + (p - 160) % 16, (p - 160) // 16
    else:
        byte, digit = 48 + (p - 240) % 4, (p - 240) // 4
    value = blocks[:, byte].astype(np.int64) * 3**digit % 256
    trits: NDArray[np.int8] = (value * 3 // 256 - 1).astype(np.int8)
    return trits


def names(n_layers: int, *, sub_norms: bool, head: bool) -> dict[str, str]:
    """GGUF names by canonical name."""
    table = {"model.embed_tokens.weight": "token_embd.weight"}
    table["model.norm.weight"] = "output_norm.weight"
    if head:
        table["lm_head.weight"] = "output.weight"
    inside = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    if sub_norms:
        inside |= {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}
    for i in range(n_layers):
        for canonical, short in inside.items():
            table[f"model.layers.{i}.{canonical}.weight"] = f"blk.{i}.{short}.weight"
    return table


def truth(written: Written, name: str) -> tuple[NDArray[np.int8], np.float32]:
    """Trits and scale that the core would use for a projection."""
    array = written.canonical[name]
    if array.dtype != np.uint8:
        return _reference.absmean(decode(written.stored[name]))
    rows = {"k_proj": 128, "v_proj": 128, "gate_proj": 512, "up_proj": 512}.get(
        name.split(".")[-2], 256
    )
    return _reference.unpack(array, rows), written.canonical[f"{name}_scale"][0]


def from_pairs(rows: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Row 2 i + j of a head in llama.cpp is row j * head_dim / 2 + i in Hugging Face."""
    out = np.empty_like(rows)
    head_dim = len(rows) // n_heads
    for row in range(len(rows)):
        head, place = divmod(row, head_dim)
        i, j = divmod(place, 2)
        out[head * head_dim + j * head_dim // 2 + i] = rows[row]
    return out


def assert_same_model(file: Gguf, written: Written, *, exact: bool = True) -> None:
    """Every tensor of the source is in the file, bit for bit; `exact`: the scales, too."""
    llama = file.metadata["general.architecture"] == "llama"
    head = "lm_head.weight" in written.canonical
    table = names(2, sub_norms=not llama, head=head)
    apart = {name for name in file.tensors if name.endswith(".scale")}
    assert set(file.tensors) - apart == set(table.values())
    for canonical, name in table.items():
        if "_proj" not in canonical:
            np.testing.assert_array_equal(
                file.floats(name), written.canonical[canonical], name, strict=True
            )
            continue
        trits, scales = file.ternary(name)
        wanted, scale = truth(written, canonical)
        if llama and "q_proj" in canonical:
            trits = from_pairs(trits, 4)
        if llama and "k_proj" in canonical:
            trits = from_pairs(trits, 2)
        np.testing.assert_array_equal(trits, wanted, name)
        scale_name = name.removesuffix("weight") + "scale"
        if scale_name in apart:
            assert (scales == 1).all()
            scales = file.floats(scale_name).reshape(1, 1)
        if exact:
            assert (scales == scale).all(), name
        else:
            assert (scales == np.float32(np.float16(scale))).all(), name


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", GGUF)
@pytest.mark.parametrize("form", ["multiply", "divide", "masters"])
@pytest.mark.parametrize(("architecture", "act"), [("bitnet", "silu"), ("llama", "silu")])
def test_gguf_holds_the_model_bit_for_bit(
    tmp_path: Path, architecture: Architecture, act: str, form: Form, to: Target
) -> None:
    written = source(tmp_path / "in", architecture, form=form, hidden_act=act)
    report = convert(tmp_path / "in", tmp_path / "out.gguf", to)
    file = Gguf(tmp_path / "out.gguf")
    assert file.metadata["general.architecture"] == architecture
    assert_same_model(file, written)
    assert report.lossless
    assert report.path == tmp_path / "out.gguf"
    assert report.n_bytes == report.path.stat().st_size
    # A scale that is no float16 stands apart, where the block has float16.
    apart = [name for name in file.tensors if name.endswith(".scale")]
    assert len(apart) == (14 if to != "gguf-i2_s" and form != "multiply" else 0)
    assert any(".scale" in note for note in report.notes) == bool(apart)
    assert any("masters" in note for note in report.notes) == (form == "masters")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("to", GGUF)
def test_relu2_is_bitnet_b158_and_its_floats_are_as_stored(
    tmp_path: Path, to: Target, dtype: str
) -> None:
    written = source(tmp_path / "in", dtype=dtype, tied=False)
    report = convert(tmp_path / "in", tmp_path / "out.gguf", to)
    file = Gguf(tmp_path / "out.gguf")
    assert file.metadata["general.architecture"] == "bitnet-b1.58"
    lossy = dtype == "F32" and to != "gguf-i2_s"
    assert_same_model(file, written, exact=not lossy)
    assert len(report.losses) == (14 if lossy else 0)
    wanted_type = {"BF16": 30, "F16": 1, "F32": 0}[dtype]
    assert file.tensors["token_embd.weight"][0] == wanted_type
    assert file.tensors["output.weight"][0] == wanted_type
    assert file.tensors["output_norm.weight"][0] == 0
    assert any("own head unread" in note for note in report.notes)


@pytest.mark.parametrize("to", GGUF)
def test_metadata(tmp_path: Path, to: Target) -> None:
    written = source(tmp_path / "in", "llama", head_dim=128, max_position_embeddings=96)
    written.edit_config(rope_theta=..., rope_parameters={"rope_theta": 5e5}, rms_norm_eps=1e-6)
    convert(tmp_path / "in", tmp_path / "out.gguf", to)
    metadata = Gguf(tmp_path / "out.gguf").metadata
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "in",
        "general.file_type": {"gguf-i2_s": 40, "gguf-tq2_0": 37, "gguf-tq1_0": 36}[to],
        "general.quantization_version": 2,
        "bitnet-rs.activations": "int8",
        "llama.vocab_size": 1024,
        "llama.context_length": 96,
        "llama.embedding_length": 256,
        "llama.block_count": 2,
        "llama.feed_forward_length": 512,
        "llama.rope.dimension_count": 128,
        "llama.rope.freq_base": 500000.0,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        # Heads that are wider than hidden_size / heads.
        "llama.attention.key_length": 128,
        "llama.attention.value_length": 128,
    }
    assert {k: v for k, v in metadata.items() if not k.startswith("tokenizer.")} == wanted


def test_the_real_tools_wrote_the_same_bytes() -> None:
    model = np.load(DATA / "gguf" / "f16-truth.npz")
    matrices = [name.removesuffix(".trits") for name in model.files if name.endswith(".trits")]
    assert len(matrices) == 14
    files = {kind: Gguf(DATA / "gguf" / f"{kind}.gguf") for kind in ("I2_S", "TQ1_0", "TQ2_0")}
    for name in matrices:
        trits, scale = model[f"{name}.trits"], model[f"{name}.scale"]
        i2_s = b"".join(part.tobytes() for part in ggml_encode.encode_i2_s(trits, float(scale)))
        theirs = files["I2_S"].tensors[f"{name}.weight"][2]
        assert i2_s[:-28] == theirs[: len(i2_s) - 28]  # beyond the scale they have what was there
        for kind, encoder in ggml_encode.BLOCK_ENCODERS.items():
            ours = b"".join(p.tobytes() for p in encoder(trits, scale.astype("<f2").reshape(1, 1)))
            assert ours == files[kind].tensors[f"{name}.weight"][2][: len(ours)]


@UNHURRIED
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 4), st.floats(0, 1))
def test_blocks_are_those_of_ggmls_quantizer(
    seed: int, rows: int, blocks: int, density: float
) -> None:
    from gguf import GGMLQuantizationType, quants

    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (rows, 256 * blocks), np.int8)
    trits *= (rng.random((rows, blocks)) < density).repeat(256, axis=1)  # some blocks are zeros
    scales = rng.uniform(1e-4, 100, (rows, blocks)).astype(np.float16)
    weights = trits * scales.astype(np.float32).repeat(256, axis=1)
    for kind, encoder in ggml_encode.BLOCK_ENCODERS.items():
        ours = b"".join(part.tobytes() for part in encoder(trits, scales))
        assert ours == quants.quantize(weights, GGMLQuantizationType[kind]).tobytes()


def test_chunks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    trits = np.random.default_rng(0).integers(-1, 2, (37, 512), np.int8)
    scales = np.linspace(0.5, 2, 74, dtype=np.float16).reshape(37, 2)

    def everything() -> list[bytes]:
        encoders = ggml_encode.BLOCK_ENCODERS.values()
        parts = [ggml_encode.encode_i2_s(trits, 0.5), *(e(trits, scales) for e in encoders)]
        return [b"".join(part.tobytes() for part in chunks) for chunks in parts]

    whole = everything()
    monkeypatch.setattr(ggml_encode, "_CHUNK", 3 * 512)
    assert everything() == whole


@pytest.mark.parametrize("to", ["gguf-tq2_0", "gguf-tq1_0"])
def test_the_gguf_package_reads_the_file(tmp_path: Path, to: Target) -> None:
    import gguf as package

    written = source(tmp_path / "in", "llama")
    convert(tmp_path / "in", tmp_path / "out.gguf", to)
    reader = package.GGUFReader(tmp_path / "out.gguf")
    field = reader.get_field("general.architecture")
    assert field is not None
    assert field.contents() == "llama"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == set(names(2, sub_norms=False, head=False).values())
    up = tensors["blk.1.ffn_up.weight"]
    assert up.tensor_type.name == to.removeprefix("gguf-").upper()
    assert up.shape.tolist() == [256, 512]
    trits, scale = truth(written, "model.layers.1.mlp.up_proj.weight")
    np.testing.assert_array_equal(
        package.quants.dequantize(up.data, up.tensor_type), trits * np.float32(scale)
    )


@pytest.mark.parametrize("form", ["multiply", "divide", "masters"])
@pytest.mark.parametrize("architecture", ["bitnet", "llama"])
def test_packed_safetensors_load_to_the_same_weights(
    tmp_path: Path, architecture: Architecture, form: Form
) -> None:
    written = write(
        tmp_path / "in", architecture=architecture, form=form, tied=False, intermediate_size=501
    )
    report = convert(tmp_path / "in", tmp_path / "out", "safetensors-packed")
    assert report.lossless
    files = list((tmp_path / "out").iterdir())
    assert report.n_bytes == sum(file.stat().st_size for file in files)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format == "safetensors, 2-bit packed, scale multiplies" == report.format
    for name, array in written.canonical.items():
        if name.endswith("_proj.weight") and form == "masters":
            trits, scale = _reference.absmean(decode(written.stored[name]))
            np.testing.assert_array_equal(checkpoint.weights[name], pack_by_definition(trits))
            assert checkpoint.weights[f"{name}_scale"] == scale
        else:
            np.testing.assert_array_equal(checkpoint.weights[name], array, name, strict=True)
    assert any("multiples of 4" in note for note in report.notes)
    assert Tokenizer.from_folder(tmp_path / "out").vocab_size == 1024
    assert checkpoint.generation_config["eos_token_id"] == [1022, 1023]
    ids = [3, 500, 77, 1000]
    logits = bitnet_rs.load(tmp_path / "in", threads=1).logits(ids)
    again = bitnet_rs.load(tmp_path / "out", threads=1).logits(ids)
    np.testing.assert_array_equal(logits, again)


def test_transformers_packed_the_same_masters_to_the_same_bytes(tmp_path: Path) -> None:
    convert(DATA / "bitnet-online", tmp_path / "out", "safetensors-packed")
    ours = open_checkpoint(tmp_path / "out").weights
    theirs = open_checkpoint(DATA / "bitnet-packed").weights
    assert sorted(ours) == sorted(theirs)
    for name in theirs:
        if name.endswith("_scale"):  # theirs is rounded to bfloat16
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2**-8)
        else:
            np.testing.assert_array_equal(ours[name], theirs[name], name, strict=True)


def test_packed_safetensors_are_read_by_their_package(tmp_path: Path) -> None:
    from safetensors import safe_open

    written = write(tmp_path / "in", dtype="F32")
    convert(tmp_path / "in", tmp_path / "out", "safetensors-packed")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(written.canonical)
        for name, array in written.canonical.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_a_packed_config_says_what_it_is(tmp_path: Path) -> None:
    written = write(tmp_path / "in", form="masters", dtype="F32", names="1bitllm")
    written.edit_config(auto_map={"AutoModelForCausalLM": "modeling_bitnet.X"}, torch_dtype="x")
    convert(tmp_path / "in", tmp_path / "out", "safetensors-packed")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BitNetForCausalLM"]
    assert config["model_type"] == "bitnet"
    assert config["hidden_act"] == "silu"
    assert config["torch_dtype"] == "x"
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"] == {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": None,
    }
    assert not {"auto_map", "weight_bits", "input_bits"} & set(config)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
@UNHURRIED
def test_packing(rows: int, cols: int, seed: int) -> None:
    trits = np.random.default_rng(seed).integers(-1, 2, (rows, cols), np.int8)
    np.testing.assert_array_equal(pack(trits), pack_by_definition(trits), strict=True)


def test_permutations_undo_each_other() -> None:
    rows = np.arange(24 * 5).reshape(24, 5)
    for n_heads in (1, 2, 3, 4, 6):
        np.testing.assert_array_equal(from_pairs(permute(rows, n_heads), n_heads), rows)
        np.testing.assert_array_equal(unpermuted(permute(rows, n_heads), n_heads), rows)


def test_names_of_qwen3(tmp_path: Path) -> None:
    written = source(tmp_path / "in", "llama")
    weights = Grouped(written, None)
    norms = {
        f"model.layers.0.self_attn.{x}_norm.weight": f"blk.0.attn_{x}_norm.weight" for x in "qk"
    }
    for module, short in {
        "self_attn.q_proj": "attn_q",
        "self_attn.o_proj": "attn_output",
        "mlp.down_proj": "ffn_down",
    }.items():
        norms[f"model.layers.0.{module}.norm.weight"] = f"blk.0.{short}_norm_in.weight"
    for i, name in enumerate(norms):
        weights.arrays[name] = np.full(4, i, np.float32)
    config = open_checkpoint(tmp_path / "in").core_config | {"model_type": "qwen3", "head_dim": 64}
    job = to_gguf.GgufJob(Source(weights, config), ggml_encode.TQ2_0, "x", {})
    job.run(tmp_path / "out.gguf", Steps(job.n_bytes, None), overwrite=False)
    file = Gguf(tmp_path / "out.gguf")
    assert file.metadata["general.architecture"] == "qwen3"
    assert file.metadata["qwen3.attention.key_length"] == 64
    assert set(file.tensors) == {*names(2, sub_norms=False, head=False).values(), *norms.values()}
    for canonical, name in norms.items():
        np.testing.assert_array_equal(file.floats(name), weights[canonical])
    trits, _ = file.ternary("blk.1.attn_q.weight")
    np.testing.assert_array_equal(trits, weights[Q])  # not permuted
    weights.arrays["model.layers.0.self_attn.rotary.weight"] = np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"rotary.weight has no name in GGUF.*safetensors-packed"):
        to_gguf.GgufJob(Source(weights, config), ggml_encode.TQ2_0, "x", {})


TEXTS = ["Hello world!", "  spaces and 1234 digits\n\n", "snow ☃ and 𪛖", "<|eot_id|>a"]


def test_tokenizers_come_along(tmp_path: Path) -> None:
    source(tmp_path / "in", vocab_size=1030)
    wanted = Tokenizer.from_folder(tmp_path / "in")
    report = convert(tmp_path / "in", tmp_path / "out.gguf", "gguf-i2_s")
    assert not any("without a tokenizer" in note for note in report.notes)
    assert len(Gguf(tmp_path / "out.gguf").metadata["tokenizer.ggml.tokens"]) == 1030
    convert(tmp_path / "out.gguf", tmp_path / "back", "safetensors-packed")
    for path in (tmp_path / "out.gguf", tmp_path / "back"):
        found = Tokenizer.of(open_checkpoint(path))
        assert [found.encode(text) for text in TEXTS] == [wanted.encode(text) for text in TEXTS]
        assert found.special_tokens["bos_token"] == wanted.bos_token
        assert found.chat_template == wanted.chat_template


def test_a_tokenizer_that_gguf_has_no_name_for_stays_behind(tmp_path: Path) -> None:
    source(tmp_path / "in")
    file = tmp_path / "in" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(content))
    report = convert(tmp_path / "in", tmp_path / "b.gguf", "gguf-i2_s")
    assert any("without a tokenizer" in note and "Whitespace" in note for note in report.notes)
    assert not [k for k in Gguf(tmp_path / "b.gguf").metadata if k.startswith("tokenizer.")]


def run_logits(path: Path) -> NDArray[np.float32]:
    checkpoint = open_checkpoint(path)
    core = _core.Model(checkpoint.core_config, checkpoint.weights, threads=2)
    ids = np.arange(12, dtype=np.uint32) * 31
    return core.forward([(ids, core.new_cache(12, "f32"))], logits="all")


@pytest.mark.parametrize("architecture", ["bitnet", "llama", "qwen3", "gemma3_text"])
def test_every_format_gives_the_same_logits_and_so_does_the_way_back(
    tmp_path: Path, architecture: Any
) -> None:
    """One random checkpoint in every format, and each of those in packed safetensors again."""
    norms = architecture in ("qwen3", "gemma3_text")
    source(
        tmp_path / "in",
        architecture=architecture,
        form="masters" if norms else "multiply",
        projection_norms=norms,
        n_layers=1,
    )
    right = run_logits(tmp_path / "in")
    for to in TARGETS:
        path = tmp_path / (to if to == "safetensors-packed" else f"{to}.gguf")
        report = convert(tmp_path / "in", path, to)
        back = tmp_path / f"{to}-back"
        convert(path, back, "safetensors-packed")
        # Scales of masters are float32, which bitnet-b1.58 has no room for in llama.cpp's blocks.
        assert report.lossless
        assert (run_logits(path) == right).all(), to
        assert (run_logits(back) == right).all(), to
    with bitnet_rs.load(tmp_path / "gguf-i2_s.gguf") as model:
        assert model.notes == ()
        metadata = model.checkpoint.gguf_metadata
        arch = metadata["general.architecture"] if metadata else ""
        assert metadata
        assert metadata.get(f"{arch}.pooling_type") == (3 if norms else None)
        if norms:
            assert model.embed("a text").shape == (256,)
        else:
            assert model.generate("a text", max_tokens=3)


def test_windows_of_gemma_layers(tmp_path: Path) -> None:
    written = source(
        tmp_path / "in",
        architecture="gemma3_text",
        form="masters",
        projection_norms=True,
        n_layers=7,
        n_kv_heads=1,
    )
    for i, (pattern, kinds) in enumerate([(6, "sssssfs"), (3, "ssfssfs")]):
        written.edit_config(
            sliding_window=5, sliding_window_pattern=pattern, rope_local_base_freq=100.0
        )
        for to in TARGETS:
            path = tmp_path / (f"{to}{i}" if to == "safetensors-packed" else f"{to}{i}.gguf")
            convert(tmp_path / "in", path, to)
            assert open_checkpoint(path).core_config["layer_kinds"] == kinds
            assert (run_logits(path) == run_logits(tmp_path / "in")).all()


def test_what_is_rounded_is_told_and_no_more(tmp_path: Path) -> None:
    """Scales that float16 does not hold, in the one architecture that cannot keep them apart."""
    source(tmp_path / "in", form="masters")
    report = convert(tmp_path / "in", tmp_path / "a.gguf", "gguf-tq2_0")
    assert {loss.name.rsplit(".", 2)[1] for loss in report.losses} >= {"q_proj", "down_proj"}
    assert max(loss.relative_error for loss in report.losses) < 2**-11
    a, b = open_checkpoint(tmp_path / "in").weights, open_checkpoint(tmp_path / "a.gguf").weights
    trits, scale = _core._absmean(to_float32(a[Q]))
    assert (b[Q] == trits).all()
    assert b[f"{Q}_scale"][0] == np.float32(np.float16(scale))
    right, found = run_logits(tmp_path / "in"), run_logits(tmp_path / "a.gguf")
    assert 0 < np.abs(found - right).max() < 0.15 * np.abs(right).max()


def test_float_activations_are_written_down(tmp_path: Path) -> None:
    source(tmp_path / "in", architecture="llama", form="values", dtype="F16", n_layers=1)
    for to in TARGETS:
        path = tmp_path / (to if to == "safetensors-packed" else f"{to}.gguf")
        report = convert(tmp_path / "in", path, to)
        checkpoint = open_checkpoint(path)
        assert checkpoint.core_config["activations"] == "float"
        assert checkpoint.lossless_reason.startswith("trained with ternary weights and float")
        assert (run_logits(path) == run_logits(tmp_path / "in")).all()
        if to == "safetensors-packed":
            assert any("transformers would quantize" in note for note in report.notes)
    convert(tmp_path / "in", tmp_path / "int8.gguf", "gguf-tq2_0", activations="int8")
    assert open_checkpoint(tmp_path / "int8.gguf").core_config["activations"] == "int8"
    packed = tmp_path / "safetensors-packed" / "config.json"
    packed.write_text(packed.read_text().replace('"float"', '"int4"'))
    with pytest.raises(ValueError, match="`bitnet_rs_activations` is 'int4'"):
        open_checkpoint(tmp_path / "safetensors-packed")


def test_checkpoints_without_a_tokenizer(tmp_path: Path) -> None:
    source(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").unlink()
    for to in TARGETS:
        report = convert(tmp_path / "in", destination(tmp_path, to), to)
        assert any("without a tokenizer" in note for note in report.notes)
        destination(tmp_path, to).rename(tmp_path / to)


def test_the_bundled_model_and_a_second_round(tmp_path: Path) -> None:
    convert("demo", tmp_path / "a", "safetensors-packed")
    convert(tmp_path / "a", tmp_path / "b", "safetensors-packed")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert bitnet_rs.load(tmp_path / "b").chat is not None


def test_progress_counts_every_byte_twice(tmp_path: Path) -> None:
    source(tmp_path / "in", "llama", form="divide")
    for to in TARGETS:
        calls: list[tuple[int, int, str]] = []
        report = convert(
            tmp_path / "in",
            destination(tmp_path, to),
            to,
            progress=lambda *call, calls=calls: calls.append(call),
        )
        done = [call[0] for call in calls]
        assert done == sorted(done)
        assert calls[-1][:2] == (2 * report.n_bytes, 2 * report.n_bytes)
        assert {total for _, total, _ in calls} == {2 * report.n_bytes}
        assert Q in {what for _, _, what in calls}
        destination(tmp_path, to).rename(tmp_path / f"done-{to}")


@pytest.mark.parametrize("to", TARGETS)
def test_memory_is_that_of_a_tensor(tmp_path: Path, to: Target) -> None:
    source(tmp_path / "in", "llama", n_layers=12, intermediate_size=2048, hidden_size=256)
    largest = 2048 * 256  # as int8
    n_weights = 12 * (3 * largest + 3 * 256 * 256)
    tracemalloc.start()
    convert(tmp_path / "in", destination(tmp_path, to), to)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * largest + 1_000_000 < n_weights / 4


# --- group scales --------------------------------------------------------------------------------


class Grouped(Mapping[str, NDArray[Any]]):
    """The weights of a checkpoint as int8 with scales of a given shape."""

    def __init__(self, written: Written, groups: Callable[[int], int] | None) -> None:
        rng = np.random.default_rng(1)
        self.arrays: dict[str, NDArray[Any]] = {}
        for name, array in written.canonical.items():
            if name.endswith("_proj.weight"):
                trits, _ = truth(written, name)
                n = groups(trits.shape[1]) if groups else 1
                scales = rng.uniform(0.5, 2, (len(trits), n)).astype(np.float16)
                self.arrays[name] = trits
                self.arrays[f"{name}_scale"] = scales.astype(np.float32)
            elif not name.endswith("_scale"):
                self.arrays[name] = array

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def __iter__(self) -> Any:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


@pytest.mark.parametrize("groups", [None, lambda cols: cols // 256], ids=["rows", "blocks"])
@pytest.mark.parametrize("architecture", ["bitnet", "llama"])
@pytest.mark.parametrize("to", ["gguf-tq2_0", "gguf-tq1_0"])
def test_scales_of_rows_and_blocks_are_kept(
    tmp_path: Path, to: str, architecture: Architecture, groups: Any
) -> None:
    written = source(tmp_path / "in", architecture)
    weights = Grouped(written, groups)
    model = Source(weights, open_checkpoint(tmp_path / "in").core_config)
    job = to_gguf.GgufJob(model, to_gguf.ENCODINGS[to], "x", {})
    job.run(tmp_path / "out.gguf", Steps(job.n_bytes, None), overwrite=False)
    assert job.losses == {}
    file = Gguf(tmp_path / "out.gguf")
    for canonical, name in names(2, sub_norms=architecture == "bitnet", head=False).items():
        if "_proj" not in canonical:
            continue
        trits, scales = file.ternary(name)
        if architecture == "llama" and ("q_proj" in canonical or "k_proj" in canonical):
            n_heads = 4 if "q_proj" in canonical else 2
            trits, scales = from_pairs(trits, n_heads), from_pairs(scales, n_heads)
        np.testing.assert_array_equal(trits, weights[canonical])
        wanted = np.broadcast_to(weights[f"{canonical}_scale"], scales.shape)
        np.testing.assert_array_equal(scales, wanted)


def test_group_scales_that_a_format_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    written = source(tmp_path / "in", "llama")
    config = open_checkpoint(tmp_path / "in").core_config
    rows, halves = Grouped(written, None), Grouped(written, lambda cols: cols // 128)
    with pytest.raises(ValueError, match=r"I2_S matrix has one scale.*q_proj.*11 more.*tq2_0"):
        to_gguf.GgufJob(Source(rows, config), ggml_encode.I2_S, "x", {})
    with pytest.raises(ValueError, match=r"packed matrix has one scale.*q_proj.*tq2_0"):
        to_packed.PackedJob(Source(rows, config), {})
    with pytest.raises(ValueError, match=r"TQ1_0 has one scale for each 256.*each 128: .*q_proj"):
        to_gguf.GgufJob(Source(halves, config), ggml_encode.TQ1_0, "x", {})
    rows.arrays[f"{Q}_scale"] = np.ones((256, 3), np.float32) + np.arange(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"q_proj.weight_scale has shape \[256, 3\]"):
        Source(rows, config)
    for wrong in (np.nan, np.inf, -1.0):
        rows.arrays[f"{Q}_scale"] = np.full((256, 1), wrong, np.float32)
        with pytest.raises(ValueError, match=r"q_proj.weight_scale holds .*not below zero"):
            Source(rows, config)


def test_equal_scales_are_one(tmp_path: Path) -> None:
    written = source(tmp_path / "in", "llama")
    weights = Grouped(written, None)
    for name in list(weights.arrays):
        if name.endswith("_scale"):
            weights.arrays[name] = np.full_like(weights[name], 0.1)
    model = Source(weights, open_checkpoint(tmp_path / "in").core_config)
    job = to_gguf.GgufJob(model, ggml_encode.I2_S, "x", {})
    job.run(tmp_path / "out.gguf", Steps(job.n_bytes, None), overwrite=False)
    assert Gguf(tmp_path / "out.gguf").ternary("blk.0.attn_q.weight")[1] == np.float32(0.1)


# --- losses --------------------------------------------------------------------------------------


def test_what_is_rounded_is_told(tmp_path: Path) -> None:
    written = source(tmp_path / "in", form="divide")
    written.edit_config(rope_theta=1e10 / 3)
    report = convert(tmp_path / "in", tmp_path / "out.gguf", "gguf-tq2_0")
    wanted = {}
    for name in written.canonical:
        if name.endswith("_proj.weight"):
            scale = float(truth(written, name)[1])
            error = abs(float(np.float16(scale)) - scale) / scale
            if error:
                wanted[name] = error
    wanted["bitnet-b1.58.rope.freq_base"] = abs(float(np.float32(1e10 / 3)) - 1e10 / 3) / 1e10 * 3
    assert len(wanted) > 10
    assert {loss.name: loss.relative_error for loss in report.losses} == pytest.approx(wanted)
    assert not report.lossless
    assert report.to_dict()["lossless"] is False
    assert json.loads(json.dumps(report.to_dict()))["losses"][0]["name"] in wanted
    (loss,) = convert(tmp_path / "in", tmp_path / "b.gguf", "gguf-i2_s").losses
    assert loss == next(known for known in report.losses if known.name == loss.name)
    assert loss.name == "bitnet-b1.58.rope.freq_base"


@pytest.mark.parametrize("scale", [1e5, 1e-9])
def test_scales_beyond_float16_are_refused_or_stand_apart(tmp_path: Path, scale: float) -> None:
    for act in ("relu2", "silu"):
        written = source(tmp_path / act, hidden_act=act, dtype="F32")
        written.edit_tensors({f"{Q}_scale": ("F32", np.array([scale], np.float32))})
    with pytest.raises(ValueError, match=rf"tensor {Q} has the scale .*beyond the float16.*i2_s"):
        convert(tmp_path / "relu2", tmp_path / "out.gguf", "gguf-tq2_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["relu2", "silu"]
    assert convert(tmp_path / "silu", tmp_path / "out.gguf", "gguf-tq2_0").lossless
    file = Gguf(tmp_path / "out.gguf")
    assert file.floats("blk.1.attn_q.scale") == np.float32(scale)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", GGUF)
def test_widths_are_refused_by_name(tmp_path: Path, to: Target) -> None:
    source(tmp_path / "in", intermediate_size=500)
    with pytest.raises(
        ValueError, match=r"multiples of (128|256) .* 500: .*down_proj.*written as safetensors"
    ):
        convert(tmp_path / "in", tmp_path / "out.gguf", to)
    assert not list(tmp_path.glob("*out*"))


def test_the_formats_that_would_do_are_named(tmp_path: Path) -> None:
    source(tmp_path / "in", intermediate_size=640)
    with pytest.raises(ValueError, match=r"written as gguf-i2_s or safetensors-packed$"):
        convert(tmp_path / "in", tmp_path / "out.gguf", "gguf-tq2_0")
    convert(tmp_path / "in", tmp_path / "out.gguf", "gguf-i2_s")


def test_models_without_a_name_in_gguf_are_refused(tmp_path: Path) -> None:
    source(tmp_path / "in", "llama", hidden_act="relu2")
    with pytest.raises(ValueError, match=r"`hidden_act` 'relu2'.*llama with silu.*packed"):
        convert(tmp_path / "in", tmp_path / "out.gguf", "gguf-i2_s")
    convert(tmp_path / "in", tmp_path / "out", "safetensors-packed")


def test_configs_that_the_core_refuses_are_refused(tmp_path: Path) -> None:
    written = source(tmp_path / "in")
    written.edit_config(rope_scaling={"rope_type": "linear", "factor": 2.0})
    for to in TARGETS:
        with pytest.raises(ValueError, match="rope_scaling"):
            convert(tmp_path / "in", destination(tmp_path, to), to)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("to", TARGETS)
def test_damaged_tensors_are_refused_by_name(tmp_path: Path, to: Target) -> None:
    written = source(tmp_path / "in")
    dtype, array = written.stored[DOWN]
    array = array.copy()
    array[5, 7] |= 0b110000
    written.edit_tensors({DOWN: (dtype, array)})
    # 256 rows, so a quarter is 64: bits 4 and 5 of byte row 5 are row 2 * 64 + 5.
    with pytest.raises(ValueError, match=rf"tensor {DOWN}: the code of row 133, column 7 is 3"):
        convert(tmp_path / "in", destination(tmp_path, to), to)
    masters = source(tmp_path / "masters", form="masters", dtype="F32")
    dtype, array = masters.stored[DOWN]
    array = array.copy()
    array[5, 7] = np.nan
    masters.edit_tensors({DOWN: (dtype, array)})
    with pytest.raises(ValueError, match=rf"tensor {DOWN}: "):
        convert(tmp_path / "masters", destination(tmp_path, to), to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "masters"]


def test_padding_rows_may_hold_anything(tmp_path: Path) -> None:
    written = write(tmp_path / "in", intermediate_size=501)
    name = "model.layers.0.mlp.gate_proj.weight"
    dtype, array = written.stored[name]
    array = array.copy()
    array[-1] |= 0b11000000  # 501 rows: the last quarter is short
    written.edit_tensors({name: (dtype, array)})
    convert(tmp_path / "in", tmp_path / "out", "safetensors-packed")


def test_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to is 'gguf-q4_0'; wanted one of gguf-i2_s"):
        convert("demo", tmp_path / "out.gguf", "gguf-q4_0")  # type: ignore[arg-type]


# --- destinations --------------------------------------------------------------------------------


@pytest.mark.parametrize("to", TARGETS)
def test_what_is_there_is_replaced_only_if_asked(tmp_path: Path, to: Target) -> None:
    source(tmp_path / "in")
    source(tmp_path / "other", seed=1)
    path = destination(tmp_path, to)
    first = convert(tmp_path / "in", path, to)
    with pytest.raises(FileExistsError, match="is there already"):
        convert(tmp_path / "other", path, to)
    convert(tmp_path / "other", tmp_path / f"fresh{path.suffix}", to)
    again = convert(tmp_path / "other", path, to, overwrite=True)
    assert again.n_bytes == first.n_bytes or to.startswith("gguf")  # names differ in length
    if to == "safetensors-packed":
        found = (path / "model.safetensors").read_bytes()
        assert found == (tmp_path / "fresh" / "model.safetensors").read_bytes()
    else:
        assert path.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_folders_that_are_more_than_a_checkpoint_are_not_replaced(tmp_path: Path) -> None:
    source(tmp_path / "in")
    home = tmp_path / "home"
    home.mkdir()
    convert(tmp_path / "in", home, "safetensors-packed", overwrite=True)  # empty
    (home / "photos").mkdir()
    with pytest.raises(ValueError, match=r"home holds photos, so it is more than a checkpoint"):
        convert(tmp_path / "in", home, "safetensors-packed", overwrite=True)
    (home / "photos").rmdir()
    (home / "config.json").unlink()
    with pytest.raises(ValueError, match=r"home has no config.json"):
        convert(tmp_path / "in", home, "safetensors-packed", overwrite=True)
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with pytest.raises(ValueError, match="is no folder"):
            convert(tmp_path / "in", tmp_path / name, "safetensors-packed", overwrite=True)


def test_source_and_destination_are_kept_apart(tmp_path: Path) -> None:
    source(tmp_path / "in" / "model")
    model = tmp_path / "in" / "model"
    with pytest.raises(ValueError, match="is the source itself"):
        convert(
            model, tmp_path / "in" / ".." / "in" / "model", "safetensors-packed", overwrite=True
        )
    for to in TARGETS:
        with pytest.raises(ValueError, match="lies in the source"):
            convert(model, destination(model, to), to)
    (tmp_path / "in" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="more than a checkpoint"):
        convert(model, tmp_path / "in", "safetensors-packed", overwrite=True)
    assert open_checkpoint(model).weights[Q].size


@pytest.mark.parametrize(
    ("dst", "to", "error", "words"),
    [
        ("absent/out.gguf", "gguf-i2_s", FileNotFoundError, "absent: no such folder; create it"),
        ("absent/out", "safetensors-packed", FileNotFoundError, "no such folder"),
        ("out.bin", "gguf-i2_s", ValueError, "ends in .gguf; call it out.bin.gguf"),
        ("in", "gguf-i2_s", ValueError, "in is a folder; name a file in it, such as .*model.gguf"),
        ("out.gguf", "safetensors-packed", ValueError, "a folder of files; name it without .gguf"),
        ("..", "safetensors-packed", ValueError, "has no name"),
        ("", "gguf-i2_s", ValueError, "dst is ''"),
        ("~nobody-here/x.gguf", "gguf-i2_s", FileNotFoundError, "home folder of a user"),
    ],
)
def test_destinations_that_cannot_be(
    tmp_path: Path, dst: str, to: Target, error: type[Exception], words: str
) -> None:
    source(tmp_path / "in")
    path = f"{tmp_path}/{dst}" if dst and dst[0] != "~" else dst
    for model in (tmp_path / "in", "no/such-model"):  # it is seen before any download
        with pytest.raises(error, match=words):
            convert(model, path, to)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("to", TARGETS)
def test_folders_that_cannot_be_written(
    tmp_path: Path, to: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path / "in")
    (tmp_path / "closed").mkdir()

    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    # Not by the folder's mode: the tests may run as root, whom none stops.
    monkeypatch.setattr(Path, "mkdir", refuse)
    original = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *a, **k: (
            refuse(self) if "x" in mode else original(self, mode, *a, **k)
        ),
    )
    with pytest.raises(PermissionError, match=r"closed: cannot write there \(Permission denied\)"):
        convert(tmp_path / "in", destination(tmp_path / "closed", to), to)


@pytest.mark.parametrize("to", TARGETS)
def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, to: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    source(tmp_path / "in")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError, match=r"0.0 MB are free and 0.\d MB are needed"):
        convert(tmp_path / "in", destination(tmp_path, to), to)


# --- interruptions -------------------------------------------------------------------------------


class FullDisk:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room -= memoryview(data).nbytes
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)


@pytest.mark.parametrize("room", [100, 300_000])
@pytest.mark.parametrize("to", TARGETS)
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, to: Target, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path / "in")
    module = to_packed if to == "safetensors-packed" else to_gguf
    original = module.TensorWriter
    monkeypatch.setattr(
        module,
        "TensorWriter",
        lambda file, *rest: original(FullDisk(file, room), *rest),
    )
    with pytest.raises(OSError, match=r"out.*cannot be written \(No space left.*removed.*Free"):
        convert(tmp_path / "in", destination(tmp_path, to), to)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])  # writing, checking, all done but the name
@pytest.mark.parametrize("to", TARGETS)
def test_ctrl_c_leaves_what_was_there(tmp_path: Path, to: Target, share: float) -> None:
    source(tmp_path / "in")
    path = destination(tmp_path, to)

    def stop(done: int, total: int, _: str) -> None:
        if done >= share * total:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", path, to, progress=stop)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
    convert(tmp_path / "in", path, to)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in", path, to, overwrite=True, progress=stop)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["in", path.name])


KILLED = """
import os, signal, sys
import bitnet_rs

def stop(done, total, _):
    if done >= 0.4 * total:
        os.kill(os.getpid(), signal.SIGKILL)

bitnet_rs.convert(sys.argv[1], sys.argv[2], sys.argv[3], progress=stop)
"""


@pytest.mark.parametrize("to", ["gguf-i2_s", "safetensors-packed"])
def test_a_killed_process_leaves_nothing_under_the_name(tmp_path: Path, to: Target) -> None:
    source(tmp_path / "in")
    path = destination(tmp_path, to)
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(path), to], timeout=60, check=False
    )
    assert child.returncode == -signal.SIGKILL
    assert not path.exists()
    (left,) = (entry for entry in tmp_path.iterdir() if entry.name != "in")
    assert left.name.startswith(f".{path.name}.")
    assert left.name.endswith(".tmp")
    # Temporaries of processes that live, and of other destinations, stay.
    pid = left.name.split("-")[-1].removesuffix(".tmp")
    alive = left.with_name(left.name.replace(f"-{pid}.", f"-{os.getppid()}."))
    other = left.with_name(left.name.replace("out", "other", 1))
    alive.write_text("x")
    other.write_text("x")
    # A temporary with this process's pid is from an earlier process that had it.
    left.with_name(left.name.replace(f"-{pid}.", f"-{os.getpid()}.")).write_text("x")
    convert(tmp_path / "in", path, to)
    found = {entry.name for entry in tmp_path.iterdir()}
    assert found == {"in", path.name, alive.name, other.name}


def test_two_at_once_in_one_process(tmp_path: Path) -> None:
    source(tmp_path / "in")
    for to in TARGETS:
        path = destination(tmp_path, to)
        errors: list[Path] = []

        def again(*_: Any, path: Path = path, to: Target = to, errors: list[Any] = errors) -> None:
            if not errors:
                with pytest.raises(FileExistsError, match="being written by this process already"):
                    convert(tmp_path / "in", path, to)
                errors.append(path)

        convert(tmp_path / "in", path, to, progress=again)
        assert errors == [path]
        assert path.exists()
        path.rename(tmp_path / to)


def test_a_destination_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    source(tmp_path / "in")
    for to in TARGETS:
        path = destination(tmp_path, to)

        def appear(done: int, total: int, _: str, path: Path = path) -> None:
            if done == total:
                path.write_text("someone else's")

        with pytest.raises(FileExistsError, match="appeared while it was being written"):
            convert(tmp_path / "in", path, to, progress=appear)
        assert path.read_text() == "someone else's"
        path.unlink()
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("to", "name", "at"),
    [
        ("gguf-i2_s", None, 9),
        ("gguf-i2_s", "token_embd.weight", 77),
        ("gguf-i2_s", "blk.0.attn_q.weight", 1000),
        ("gguf-i2_s", "blk.0.attn_q.weight", -32),  # the scale
        ("gguf-i2_s", "blk.0.attn_q.weight", -1),  # the zeros behind it
        ("gguf-i2_s", "blk.1.ffn_down.weight", 0),
        ("gguf-tq2_0", "blk.0.attn_k.weight", 3),
        ("gguf-tq2_0", "blk.0.attn_k.weight", 64),  # the scale of a block
        ("gguf-tq2_0", "blk.0.attn_k.scale", 1),
        ("gguf-tq1_0", "blk.1.ffn_up.weight", 50),
        ("gguf-tq1_0", "output_norm.weight", -1),
        ("safetensors-packed", Q, 30),
        ("safetensors-packed", f"{Q}_scale", 0),
        ("safetensors-packed", "model.norm.weight", -2),
    ],
)
def test_what_a_bad_disk_does_is_seen(
    tmp_path: Path, to: Target, name: str | None, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path / "in", "llama", form="divide")
    module: Any = to_packed if to == "safetensors-packed" else to_gguf
    layouts = []
    original_writer = module.TensorWriter

    def remember(file: BinaryIO, layout: Any, *rest: Any) -> Any:
        layouts.append(layout)
        return original_writer(file, layout, *rest)

    original = module.sync

    def spoil(file: Any) -> None:
        original(file)
        if not layouts:
            return
        slot = layouts[0].slots[name] if name else None
        place = slot.offset + at + (slot.n_bytes if at < 0 else 0) if slot else at
        with Path(file.name).open("r+b") as again:
            again.seek(place)
            (byte,) = again.read(1)
            again.seek(place)
            again.write(bytes([byte ^ 0x80]))

    monkeypatch.setattr(module, "TensorWriter", remember)
    monkeypatch.setattr(module, "sync", spoil)
    with pytest.raises(RuntimeError, match=r"reads back otherwise.*the file is deleted"):
        convert(tmp_path / "in", destination(tmp_path, to), to)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_a_file_that_ends_early_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(tmp_path / "in", "llama")
    original = atomic.sync
    cuts = (100_000, 40, 0)
    for cut in cuts:

        def spoil(file: BinaryIO, cut: int = cut) -> None:
            original(file)
            os.truncate(file.name, cut)

        monkeypatch.setattr(to_gguf, "sync", spoil)
        with pytest.raises(RuntimeError, match="reads back otherwise"):
            convert(tmp_path / "in", tmp_path / "out.gguf", "gguf-tq2_0")


# --- the container -------------------------------------------------------------------------------


def test_every_type_of_metadata(tmp_path: Path) -> None:
    import gguf as package

    values: dict[str, Any] = {
        "a.text": "grüße",
        "a.empty": "",
        "a.bool": True,
        "a.count": 4_000_000_000,
        "a.below": -5,
        "a.float": 0.1,
        "a.texts": ["x", "", "ß"],
        "a.bools": [True, False],
        "a.ints": [1, -2],
        "a.floats": [0.5, 1.5],
        "a.none": [],
        "a.array": np.array([1.25, -2], np.float32),
        "a.bytes": np.array([0, 255], np.uint8),
        "a.longs": np.array([-(2**60)], np.int64),
        "a.flags": np.array([True, False]),
    }
    metadata = {key: gguf.typed(value, key) for key, value in values.items()}
    metadata["a.wide"] = gguf.Value(gguf.ValueType.FLOAT64, 0.1)
    spec = gguf.TensorSpec("t", 0, (3, 5), 60)
    layout = gguf.compose(metadata, [spec, gguf.TensorSpec("u", 0, (1,), 4)])
    assert layout.slots["u"].offset == layout.slots["t"].offset + 64
    path = tmp_path / "x.gguf"
    path.write_bytes(layout.header + bytes(layout.n_bytes - len(layout.header)))
    read = Gguf(path)
    values["a.float"] = float(np.float32(0.1))
    assert {k: v for k, v in read.metadata.items() if k != "a.wide"} == {
        k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()
    }
    assert read.metadata["a.wide"] == 0.1
    assert read.tensors["t"][1] == (3, 5)
    reader = package.GGUFReader(path)
    for key in ("a.text", "a.count", "a.below", "a.texts", "a.longs", "a.wide"):
        field = reader.get_field(key)
        assert field is not None
        assert field.contents() == read.metadata[key]


@pytest.mark.parametrize(
    "value", [None, {"a": 1}, [1, "x"], [[1]], np.zeros((2, 2)), np.array(["x"]), b"x"]
)
def test_metadata_that_gguf_cannot_hold(value: Any) -> None:
    with pytest.raises(ValueError, match=r"metadata a.b is a .* that GGUF cannot hold"):
        gguf.typed(value, "a.b")


@pytest.mark.parametrize("value", [2**32, [2**31], [-(2**31) - 1], 1e300])
def test_metadata_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match=r"metadata a.b is .*does not fit (u?int32|float32)"):
        gguf.compose({"a.b": gguf.typed(value, "a.b")}, [])


def test_names_and_strings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"metadata a\.b holds a lone surrogate at position 1"):
        gguf.compose({"a.b": gguf.typed("x\ud800", "a.b")}, [])
    twice = [gguf.TensorSpec("t", 0, (1,), 4)] * 2
    with pytest.raises(ValueError, match="tensor t is there twice"):
        gguf.compose({}, twice)


# --- the command ---------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["convert", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source(tmp_path / "in", form="divide")
    out = str(tmp_path / "out.gguf")
    assert command(str(tmp_path / "in"), out, "--to", "gguf-tq1_0") == 0
    shown = capsys.readouterr()
    assert f"{out}: GGUF, TQ1_0, 0.8 MB, read back and the same\n" in shown.out
    assert "rounded: 14 of its numbers or tensors, by up to 0.0004" in shown.out
    assert "and 9 more by less; --json lists all" in shown.out
    assert "note: llama.cpp does not know architecture bitnet-b1.58" in shown.out
    assert shown.err == ""
    assert command(str(tmp_path / "in"), out, "--to", "gguf-i2_s") == 1
    assert "out.gguf is there already" in capsys.readouterr().err
    assert command(str(tmp_path / "in"), out, "--to", "gguf-i2_s", "--overwrite", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "GGUF, I2_S"
    assert report["losses"] == []
    assert report["lossless"] is True
    assert report["n_bytes"] == Path(out).stat().st_size
    assert command(str(tmp_path / "in"), str(tmp_path / "p"), "--to", "safetensors-packed") == 0
    assert "lossless: all weights" in capsys.readouterr().out
    assert command(str(tmp_path / "in"), out) == 2
    assert command(str(tmp_path / "in"), out, "--to", "gguf-q4_0") == 2


def test_a_progress_bar_is_shown_on_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path / "in")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out.gguf"), "--to", "gguf-i2_s"]
    assert command(*arguments) == 0
    shown = capsys.readouterr()
    assert "Writing out.gguf" in shown.err
    assert "Writing" not in shown.out
