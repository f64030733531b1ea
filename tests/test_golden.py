"""The outside truth: what Hugging Face transformers computes, in float32, for the same files.

`tests/data/README.md` tells how the golden arrays were made and why positions may differ by
some hundredths: float rounding can put one activation on the other side of an int8 boundary.
"""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import bitnet_rs as br

DATA = Path(__file__).parent / "data"
NAMES = ["bitnet-online", "bitnet-packed", "llama-packed", "demo"]
N_PROMPTS = 4

MEDIAN, CLOSE, MOST = 1e-5, 1e-4, 0.15
# A step whose two best logits are closer than this may be decided either way by the above.
MARGIN = 0.1


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> Iterator[br.Model]:
    source = "demo" if request.param == "demo" else DATA / request.param
    with br.load(source, kv_dtype="f32") as loaded:
        yield loaded


def golden_of(model: br.Model) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    folder = model.checkpoint.path
    facts = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    with np.load(folder / "golden.npz") as arrays:
        return facts, dict(arrays)


@pytest.mark.parametrize("i", range(N_PROMPTS))
def test_prompts_encode_to_the_same_ids(model: br.Model, i: int) -> None:
    facts, arrays = golden_of(model)
    assert model.encode(facts["prompts"][i]) == arrays[f"ids_{i}"].tolist()


@pytest.mark.parametrize("i", range(N_PROMPTS))
def test_logits(model: br.Model, i: int) -> None:
    _, arrays = golden_of(model)
    expected = arrays[f"logits_{i}"]
    apart = np.abs(model.logits(arrays[f"ids_{i}"]) - expected)
    assert apart.shape == expected.shape
    assert np.median(apart) < MEDIAN
    assert np.mean(apart.max(axis=1) < CLOSE) >= 0.8
    assert apart.max() < MOST


@pytest.mark.parametrize("i", range(N_PROMPTS))
def test_greedy_tokens(model: br.Model, i: int) -> None:
    _, arrays = golden_of(model)
    ids, expected = arrays[f"ids_{i}"], arrays[f"greedy_{i}"]
    result = model.complete(
        ids, max_tokens=len(expected), temperature=0, repetition_penalty=1, ignore_eos=True
    )
    assert len(result.tokens) == len(expected)
    if f"margins_{i}" in arrays:
        margins = arrays[f"margins_{i}"]
    else:
        # Of our own logits along the golden tokens.
        rows = model.logits(np.concatenate([ids, expected[:-1]]))[len(ids) - 1 :]
        best = np.sort(rows, axis=1)[:, -2:]
        margins = best[:, 1] - best[:, 0]
    close = np.flatnonzero(margins < MARGIN)
    certain = int(close[0]) if len(close) else len(expected)
    assert result.tokens[:certain] == expected[:certain].tolist()


@pytest.fixture(scope="module")
def heldout() -> tuple[dict[str, Any], NDArray[np.uint32]]:
    """The protocol's facts and token ids."""
    text = lzma.decompress((DATA / "demo" / "heldout.txt.xz").read_bytes()).decode()
    with br.load("demo") as model:
        facts = golden_of(model)[0]["heldout"]
        ids = model.encode(text, add_special_tokens=False)[: facts["tokens"]]
    assert ids[:16] == facts["first_16_ids"]
    assert ids[-4:] == facts["last_4_ids"]
    return facts, np.array(ids, np.uint32)


@pytest.mark.parametrize(("kv_dtype", "within"), [("f32", 0.001), ("f16", 0.005)])
def test_heldout_perplexity(
    heldout: tuple[dict[str, Any], NDArray[np.uint32]],
    kv_dtype: Any,
    within: float,
    record_property: Any,
) -> None:
    facts, ids = heldout
    with br.load("demo", kv_dtype=kv_dtype) as model:
        bos = model.tokenizer.bos_token_id
        assert bos is not None
        nll = 0.0
        for at in range(0, len(ids), 511):
            piece = ids[at : at + 511]
            rows = model.logits(np.concatenate([[bos], piece[:-1]])).astype(np.float64)
            best = rows.max(axis=1)
            log_total = best + np.log(np.exp(rows - best[:, None]).sum(axis=1))
            nll += float((log_total - rows[np.arange(len(piece)), piece]).sum())
    perplexity = float(np.exp(nll / len(ids)))
    record_property("perplexity", perplexity)
    assert perplexity == pytest.approx(facts["perplexity"], rel=within)
