"""The numpy reference against Hugging Face transformers (float32, CPU)."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_rs import _reference
from bitnet_rs.loaders import open_checkpoint
from checkpoints import pack

DATA = Path(__file__).parent / "data"
MODELS = ["bitnet-online", "bitnet-packed", "llama-packed", "demo"]


@pytest.mark.parametrize("prompt", range(4))
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers(model: str, prompt: int) -> None:
    checkpoint = open_checkpoint("demo" if model == "demo" else DATA / model)
    with np.load(checkpoint.path / "golden.npz") as golden:
        ids, wanted = golden[f"ids_{prompt}"], golden[f"logits_{prompt}"]
    logits = _reference.forward(checkpoint.core_config, checkpoint.weights, ids)
    assert logits.dtype == np.float32
    assert logits.shape == wanted.shape
    difference = np.abs(logits - wanted)
    # Where float rounding puts one activation on the other side of an int8 boundary, that
    # position and what follows it move by some hundredths (tests/data/README.md).
    assert np.median(difference) < 1e-5
    assert (difference.max(axis=1) < 1e-4).mean() >= 0.8
    assert difference.max() < 0.15


def test_later_tokens_change_no_earlier_logits() -> None:
    checkpoint = open_checkpoint("demo")
    ids = np.arange(100, 112)
    whole = _reference.forward(checkpoint.core_config, checkpoint.weights, ids)
    part = _reference.forward(checkpoint.core_config, checkpoint.weights, ids[:5])
    np.testing.assert_allclose(whole[:5], part, atol=1e-4)


def test_absmax_rounds_half_to_even_and_survives_zeros() -> None:
    x = np.array([[127.0, 0.5, 1.5, 2.5, -2.5], [0, 0, 0, 0, 0]], np.float32)
    codes, divisor = _reference.absmax(x)
    assert codes.tolist() == [[127, 0, 2, 2, -2], [0, 0, 0, 0, 0]]
    assert divisor.ravel().tolist() == [1.0, np.float32(1) / np.float32(1e-5) * np.float32(127)]


def test_absmean_rounds_half_to_even_and_survives_zeros() -> None:
    trits, scale = _reference.absmean(np.array([[2.0, -0.5, 0.5, 1.0]], np.float32))
    assert (trits.tolist(), float(scale)) == ([[1, 0, 0, 1]], 1.0)
    trits, scale = _reference.absmean(np.zeros((2, 3), np.float32))
    assert not trits.any()
    assert scale == np.float32(1e-5)


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_unpack_reverses_pack(rows: int, cols: int, seed: int) -> None:
    trits = np.random.default_rng(seed).integers(-1, 2, (rows, cols), np.int8)
    found = _reference.unpack(pack(trits), rows)
    np.testing.assert_array_equal(found, trits, strict=True)


def test_unpack_of_the_worked_example() -> None:
    stored = np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], np.uint8)
    assert _reference.unpack(stored, 8).tolist() == [
        [0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1],
    ]  # fmt: skip


def test_projection_sums_are_exact() -> None:
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (9, 6000), np.int8)
    x = rng.normal(0, 1, (3, 6000)).astype(np.float32)
    x[:, 0] = 127.0  # a scale of 1, so that outputs are the integer sums
    codes = np.rint(x).astype(np.int64)
    wanted = codes @ trits.T.astype(np.int64)
    assert (_reference.project(x, trits, np.ones(1, np.float32), "int8") == wanted).all()
