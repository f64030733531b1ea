"""The Rust core: against the numpy reference, against itself bit for bit, and on bad input."""

import gc
import os
import platform
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitnet_rs import _core, _reference
from bitnet_rs._reference import unpack
from bitnet_rs.loaders import Checkpoint, open_checkpoint
from checkpoints import DATA, Architecture, Form, write

KERNELS = _core.kernels()
FAST = settings(deadline=None, max_examples=60)

Ids = NDArray[np.uint32]


def assert_same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    assert a.dtype == b.dtype == np.float32
    assert a.shape == b.shape
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def ids_of(n: int, vocab: int = 1024, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, vocab, n, np.uint32)


def run(model: _core.Model, ids: Ids, kv_dtype: Any = "f32") -> NDArray[np.float32]:
    """Logits of every token, in one chunk."""
    return model.forward([(ids, model.new_cache(len(ids), kv_dtype))], logits="all")


# --- the ops -------------------------------------------------------------------------------------


def test_the_last_kernel_is_the_scalar_one() -> None:
    assert KERNELS[-1] == "generic-i2"
    assert len(set(KERNELS)) == len(KERNELS)


@st.composite
def products(draw: st.DrawFn) -> tuple[NDArray[np.int8], float, NDArray[np.float32]]:
    """Trits (rows, K), their scale, and inputs (n, K), some of them adversarial."""
    rows, cols = draw(st.integers(1, 70)), draw(st.integers(1, 600))
    n = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    trits = rng.integers(-1, 2, (rows, cols), np.int8)
    x = rng.normal(0, 1, (n, cols)).astype(np.float32)
    kind = draw(st.sampled_from(["normal", "ties", "extreme", "outlier", "zeros", "tiny", "huge"]))
    if kind == "ties":  # a scale of 1: x * s is k + 1/2 for many
        x = (rng.integers(-253, 254, x.shape) / 2).astype(np.float32)
        x[:, 0] = 127
    elif kind == "extreme":  # every product has the largest magnitude, and one sign
        trits[:] = 1
        x[:] = -3.7
    elif kind == "outlier":
        x[:, -1] = 1e4
    elif kind in ("zeros", "tiny", "huge"):
        x *= np.float32({"zeros": 0, "tiny": 1e-38, "huge": 1e36}[kind])
    return trits, draw(st.sampled_from([1.0, 0.0123, 3e4, 1e-6])), x


@FAST
@given(products())
def test_gemm_and_gemv_are_the_exact_formula_on_every_kernel(
    product: tuple[NDArray[np.int8], float, NDArray[np.float32]],
) -> None:
    trits, scale, x = product
    codes, divisor = _reference.absmax(x)
    sums = codes.astype(np.int64) @ trits.T.astype(np.int64)
    with np.errstate(over="ignore"):
        wanted = sums.astype(np.float32) / divisor * np.float32(scale)
    for kernel in KERNELS:
        assert_same_bits(_core._gemm(trits, scale, x, kernel), wanted)
        assert_same_bits(_core._gemv(trits, scale, x[0], kernel), wanted[0])


@st.composite
def level_products(draw: st.DrawFn) -> tuple[list[int], NDArray[np.int8], NDArray[np.float32]]:
    """Two to eight levels, a matrix of them, and inputs."""
    half = draw(st.lists(st.integers(1, 127), min_size=1, max_size=3, unique=True))
    mirrored = sorted({*half, *(-v for v in half), *draw(st.sampled_from([(), (0,)]))})
    free = st.lists(st.integers(-127, 127), min_size=2, max_size=8, unique=True)
    levels = draw(st.one_of(free, st.just(mirrored)))
    rows, cols, n = draw(st.integers(1, 70)), draw(st.integers(1, 300)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.choice(np.array(levels, np.int8), (rows, cols))
    return levels, values, rng.normal(0, 1, (n, cols)).astype(np.float32)


@FAST
@given(level_products())
def test_matrices_of_any_levels_are_multiplied_exactly(
    product: tuple[list[int], NDArray[np.int8], NDArray[np.float32]],
) -> None:
    levels, values, x = product
    codes, divisor = _reference.absmax(x)
    sums = codes.astype(np.int64) @ values.T.astype(np.int64)
    wanted = sums.astype(np.float32) / divisor * np.float32(0.3)
    kernels = _core._kernels_for(levels)
    assert kernels[-1].startswith("generic")
    for kernel in kernels:
        packed = _core._PackedMatrix(values, 0.3, kernel, threads=2, levels=levels)
        assert_same_bits(packed.multiply(x), wanted)
        assert_same_bits(packed.multiply(x[:1]), wanted[:1])
        np.testing.assert_array_equal(packed.unpack(), values)


def test_matrices_of_any_levels_refuse_what_does_not_fit() -> None:
    values = np.ones((2, 3), np.int8)
    for kernel, levels, message in [
        ("generic-i2", [-3, 1], "unknown kernel"),
        ("generic-elut", [-3, 3], "holds 1"),
        ("generic-elut", [1], "wanted 2 to 8"),
        ("generic-elut", [1, 1], "twice"),
        ("generic-elut", [-128, 1], "-127"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core._PackedMatrix(values, 1.0, kernel, levels=levels)
    packed = _core._PackedMatrix(values, 1.0, KERNELS[0])
    for wrong in (np.ones((0, 3), np.float32), np.ones((1, 4), np.float32)):
        with pytest.raises(ValueError, match="wanted at least one row of 3"):
            packed.multiply(wrong)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cols", [131_071, 100_003])
def test_the_widest_sums_stay_exact(kernel: str, cols: int) -> None:
    trits = np.ones((3, cols), np.int8)
    trits[1] = -1
    trits[2, ::2] = 0
    x = np.full((2, cols), -2.5, np.float32)
    x[1] *= -1
    y = _core._gemm(trits, 1.0, x, kernel)
    divisor = np.float32(1) / np.float32(2.5) * np.float32(127)
    code = int(np.rint(np.float32(-2.5) * divisor))
    for row in range(3):
        total = code * int(trits[row].astype(np.int64).sum())
        assert y[0, row] == np.float32(total) / divisor
        assert y[1, row] == np.float32(-total) / divisor


def test_matrices_whose_sums_may_not_be_exact_are_refused() -> None:
    with pytest.raises(ValueError, match="131072"):
        _core._gemv(np.zeros((1, 131_072), np.int8), 1.0, np.zeros(131_072, np.float32), KERNELS[0])


@FAST
@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 2**32 - 1), st.floats(-8, 4))
def test_absmean_is_that_of_the_reference(rows: int, cols: int, seed: int, size: float) -> None:
    w = np.random.default_rng(seed).normal(0, 10**size, (rows, cols)).astype(np.float32)
    trits, scale = _core._absmean(w)
    mean = np.abs(w).mean(dtype=np.float64)
    assert scale == pytest.approx(max(mean, 1e-5), rel=1e-7)
    wanted = np.clip(np.rint(w * (np.float32(1) / np.float32(scale))), -1, 1)
    np.testing.assert_array_equal(trits, wanted.astype(np.int8), strict=True)


@FAST
@given(st.integers(1, 600), st.integers(0, 2**32 - 1), st.floats(-15, 15))
def test_rms_norm_has_the_bits_of_the_reference(n: int, seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 10**size, n).astype(np.float32)
    weight = rng.uniform(-2, 2, n).astype(np.float32)
    weight[rng.integers(n)] = 1e-32  # a dead channel
    y = _core._rms_norm(x, weight, 1e-5)
    assert_same_bits(y, _reference.rms_norm(x[None], weight, 1e-5)[0])
    wide = x.astype(np.float64)
    right = weight * wide / np.sqrt(np.mean(wide * wide) + np.float64(np.float32(1e-5)))
    np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-37)


def test_exp_is_within_one_ulp() -> None:
    x = np.random.default_rng(0).uniform(-104, 89, 200_000).astype(np.float32)
    x = np.concatenate([x, np.linspace(-1e-3, 1e-3, 10_001, dtype=np.float32)])
    right = np.exp(x.astype(np.float64))
    inside = right < np.finfo(np.float32).max
    ulp = np.spacing(right[inside].astype(np.float32)).astype(np.float64)
    assert (np.abs(_core._exp(x)[inside] - right[inside]) / ulp).max() < 1
    ends = np.array([0, -np.inf, np.inf, -200, 200, np.nan], np.float32)
    np.testing.assert_array_equal(_core._exp(ends), [1, 0, np.inf, 0, np.inf, np.nan])


def test_ops_refuse_what_does_not_fit() -> None:
    trits, x = np.zeros((4, 8), np.int8), np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"avx9-i2.*generic-i2"):
        _core._gemv(trits, 1.0, x, "avx9-i2")
    with pytest.raises(ValueError, match=r"7 columns; wanted 8"):
        _core._gemv(trits, 1.0, x[:7], KERNELS[0])
    with pytest.raises(ValueError, match=r"row 2 holds 2; ternary values are -1, 0 and 1"):
        _core._gemv(
            np.repeat(np.array([[0], [1], [2], [0]], np.int8), 8, axis=1), 1.0, x, KERNELS[0]
        )
    with pytest.raises(ValueError, match="scale of NaN"):
        _core._gemv(trits, float("nan"), x, KERNELS[0])
    with pytest.raises(ValueError, match="columns"):
        _core._gemm(np.zeros((4, 0), np.int8), 1.0, np.zeros((2, 0), np.float32), KERNELS[0])
    with pytest.raises(ValueError, match="row"):
        _core._gemm(np.zeros((0, 8), np.int8), 1.0, x[None], KERNELS[0])
    for wrong in (x.astype(np.float64), x[None], list(x)):
        with pytest.raises(TypeError):
            _core._gemv(trits, 1.0, wrong, KERNELS[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        _core._absmean(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ValueError, match="x has 8 elements, weight 7"):
        _core._rms_norm(x, x[:7], 1e-5)


def in_fortran_order(a: NDArray[Any]) -> NDArray[Any]:
    return np.asfortranarray(a)


def with_gaps(a: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(a, 2, axis=1)[:, ::2]


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)])
def test_absmean_of_nothing_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one element"):
        _core._absmean(np.zeros(shape, np.float32))


@pytest.mark.parametrize("order", [in_fortran_order, with_gaps])
def test_ops_refuse_arrays_that_are_not_in_c_order(
    order: Callable[[NDArray[Any]], NDArray[Any]],
) -> None:
    trits, x = np.eye(4, 8, dtype=np.int8), np.ones((3, 8), np.float32)
    with pytest.raises(ValueError, match="ascontiguousarray"):
        _core._gemm(order(trits), 1.0, x, KERNELS[0])
    with pytest.raises(ValueError, match="ascontiguousarray"):
        _core._gemm(trits, 1.0, order(x), KERNELS[0])
    with pytest.raises(ValueError, match="ascontiguousarray"):
        _core._absmean(order(x))


# --- against the reference -----------------------------------------------------------------------

SHAPES: dict[str, dict[str, int]] = {
    "grouped": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 20, "hidden_size": 80},
    "wide heads": {"n_heads": 3, "n_kv_heads": 1, "head_dim": 96, "hidden_size": 100},
    "1bitLLM 3B's head": {"n_heads": 2, "n_kv_heads": 2, "head_dim": 100, "hidden_size": 200},
    "ragged": {
        "n_heads": 5,
        "n_kv_heads": 5,
        "head_dim": 6,
        "hidden_size": 33,
        "intermediate_size": 131,
        "vocab_size": 77,
    },
}


def opened(folder: Path, **options: Any) -> Checkpoint:
    write(folder, **options)
    return open_checkpoint(folder)


def assert_near_reference(checkpoint: Checkpoint, n: int) -> None:
    ids = ids_of(n, checkpoint.core_config["vocab_size"])
    wanted = _reference.forward(checkpoint.core_config, checkpoint.weights, ids)
    model = _core.Model(checkpoint.core_config, checkpoint.weights)
    assert model.facts["architecture"] == checkpoint.core_config["model_type"]
    logits = run(model, ids)
    assert logits.dtype == np.float32
    assert logits.shape == wanted.shape
    difference = np.abs(logits - wanted) / np.abs(wanted).max()
    # exp differs in the last bit, which may move an activation to the next int8 code.
    assert np.median(difference) < 1e-5
    assert (difference.max(axis=1) < 1e-4).mean() >= 0.8
    assert difference.max() < 0.15


@pytest.mark.parametrize("form", ["multiply", "divide", "masters"])
@pytest.mark.parametrize("architecture", ["bitnet", "llama"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_every_architecture_and_form(
    tmp_path: Path, shape: str, architecture: Architecture, form: Form
) -> None:
    tied = form == "multiply"
    checkpoint = opened(tmp_path, architecture=architecture, form=form, tied=tied, **SHAPES[shape])
    assert_near_reference(checkpoint, 20)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_masters_of_every_float_type_with_1bitllm_names(tmp_path: Path, dtype: str) -> None:
    checkpoint = opened(tmp_path, form="masters", dtype=dtype, names="1bitllm")
    assert checkpoint.core_config["hidden_act"] == "silu"
    assert_near_reference(checkpoint, 20)


def test_sequences_longer_than_a_block_of_keys(tmp_path: Path) -> None:
    assert_near_reference(opened(tmp_path, n_layers=1), 300)


def test_f16_keys_and_values_stay_close() -> None:
    checkpoint = open_checkpoint("demo")
    model = _core.Model(checkpoint.core_config, checkpoint.weights)
    ids = ids_of(40, 4096)
    single, half = run(model, ids, "f32"), run(model, ids, "f16")
    assert not np.array_equal(single, half)
    assert np.median(np.abs(single - half)) < 0.05


# --- the same bits -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bitnet", "llama"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("bits")
    return opened(folder, architecture=request.param, tied=request.param == "bitnet", head_dim=24)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> _core.Model:
    return _core.Model(checkpoint.core_config, checkpoint.weights, threads=2)


IDS = ids_of(150)


@pytest.fixture(scope="module", params=["f16", "f32"])
def kv_dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def truth(model: _core.Model, kv_dtype: Any) -> NDArray[np.float32]:
    return run(model, IDS, kv_dtype)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_and_threads_change_no_bit(
    checkpoint: Checkpoint, truth: NDArray[np.float32], kv_dtype: Any, kernel: str, threads: int
) -> None:
    model = _core.Model(checkpoint.core_config, checkpoint.weights, kernel=kernel, threads=threads)
    assert (model.kernel, model.threads) == (kernel, threads)
    assert_same_bits(run(model, IDS, kv_dtype), truth)


@settings(deadline=None, max_examples=15)
@given(cuts=st.lists(st.integers(1, len(IDS) - 1), max_size=6, unique=True))
def test_chunks_change_no_bit(
    model: _core.Model, truth: NDArray[np.float32], kv_dtype: Any, cuts: list[int]
) -> None:
    cache = model.new_cache(len(IDS) + 3, kv_dtype)
    parts = [model.forward([(part, cache)], logits="all") for part in np.split(IDS, sorted(cuts))]
    assert_same_bits(np.concatenate(parts), truth)


def test_token_by_token_changes_no_bit(
    model: _core.Model, truth: NDArray[np.float32], kv_dtype: Any
) -> None:
    cache = model.new_cache(len(IDS), kv_dtype)
    for i in range(len(IDS)):
        assert_same_bits(model.forward([(IDS[i : i + 1], cache)]), truth[i : i + 1])
        assert len(cache) == i + 1


def test_last_is_the_last_row_of_all(
    model: _core.Model, truth: NDArray[np.float32], kv_dtype: Any
) -> None:
    cache = model.new_cache(len(IDS), kv_dtype)
    assert_same_bits(model.forward([(IDS, cache)], logits="last"), truth[-1:])


@settings(deadline=None, max_examples=10)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_a_ragged_batch_changes_no_bit(
    model: _core.Model, kv_dtype: Any, lengths: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sequences = [ids_of(length, seed=seed + i) for i, length in enumerate(lengths)]
    alone = [run(model, ids, kv_dtype) for ids in sequences]
    caches = [model.new_cache(64, kv_dtype) for _ in sequences]
    done = [0] * len(sequences)
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        # every open sequence advances by another random number of tokens: prefill and decode mixed
        batch, rows = [], []
        for i, ids in enumerate(sequences):
            n = min(int(rng.choice([1, 1, 5, 30])), len(ids) - done[i])
            if n:
                batch.append((ids[done[i] : done[i] + n], caches[i]))
                rows.append(alone[i][done[i] : done[i] + n])
                done[i] += n
        assert_same_bits(model.forward(batch, logits="all"), np.concatenate(rows))


def test_batches_return_one_row_for_each_segment(model: _core.Model, kv_dtype: Any) -> None:
    lengths = (3, 1, 20)
    batch = [(ids_of(n, seed=n), model.new_cache(32, kv_dtype)) for n in lengths]
    rows = model.forward(batch)
    assert rows.shape == (3, 1024)
    for row, n in zip(rows, lengths, strict=True):
        assert_same_bits(row, run(model, ids_of(n, seed=n), kv_dtype)[-1])


def test_truncated_caches_go_on_as_if_nothing_had_been(
    model: _core.Model, truth: NDArray[np.float32], kv_dtype: Any
) -> None:
    cache = model.new_cache(len(IDS), kv_dtype)
    model.forward([(IDS[:90], cache)])
    model.forward([(ids_of(50, seed=9), cache)])
    cache.truncate(70)
    assert len(cache) == 70
    assert_same_bits(model.forward([(IDS[70:], cache)], logits="all"), truth[70:])
    cache.truncate(0)
    assert_same_bits(model.forward([(IDS, cache)], logits="all"), truth)


def test_python_threads_share_a_model(
    model: _core.Model, truth: NDArray[np.float32], kv_dtype: Any
) -> None:
    results: list[NDArray[np.float32]] = []

    def work() -> None:
        for _ in range(3):
            results.append(run(model, IDS, kv_dtype))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    for result in results:
        assert_same_bits(result, truth)


DIGEST = """
import hashlib, sys
import numpy as np
from bitnet_rs import _core
from bitnet_rs.loaders import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
digest = hashlib.sha256()
for kernel in _core.kernels():
    model = _core.Model(checkpoint.core_config, checkpoint.weights, kernel=kernel)
    ids = (np.arange(140, dtype=np.uint32) * 37) % 1000
    for kv_dtype in ("f16", "f32"):
        logits = model.forward([(ids, model.new_cache(200, kv_dtype))], logits="all")
        digest.update(logits.tobytes())
    print(kernel, digest.hexdigest())
    digest = hashlib.sha256()
"""


def script(code: str, *arguments: str, **environment: str) -> str:
    """Runs Python code in a process of its own; its output."""
    python = Path(_core.__file__).parent.parent
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(python), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def digests(folder: Path, isa: str) -> dict[str, str]:
    lines = script(DIGEST, str(folder), BITNET_RS_ISA=isa).splitlines()
    return dict(line.split() for line in lines)


@pytest.mark.parametrize("model", ["bitnet-packed", "llama-packed"])
def test_instruction_sets_change_no_bit(model: str) -> None:
    generic = digests(DATA / model, "generic")
    assert list(generic)[-1] == "generic-i2"
    assert all(kernel.startswith("generic-") for kernel in generic)
    assert len(set(generic.values())) == 1
    best = digests(DATA / model, "")
    if not os.environ.get("BITNET_RS_ISA"):  # else KERNELS are fewer
        assert list(best) == KERNELS
    assert set(best.values()) == set(generic.values())
    # Each level has the kernels below it; one that this CPU lacks is as the highest it has.
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    known = set(generic)
    for isa in ("ssse3", "avx2", "avxvnni", "avx512") if x86 else ("neon", "dotprod"):
        found = digests(DATA / model, isa)
        assert known <= set(found) <= set(best)
        assert set(found.values()) == set(generic.values())
        known = set(found)


FORK = """
import os, sys
import numpy as np
from bitnet_rs import _core
from bitnet_rs.loaders import open_checkpoint
checkpoint = open_checkpoint("demo")
ids = np.array([1, 2, 3], np.uint32)
def run(model):
    return model.forward([(ids, model.new_cache(3))])
model = _core.Model(checkpoint.core_config, checkpoint.weights, threads=2)
wanted = run(model)
if pid := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
try:
    run(model)
except RuntimeError as error:
    assert "load the model after the fork" in str(error), error
else:
    raise AssertionError("threads that no longer exist were used")
again = _core.Model(checkpoint.core_config, checkpoint.weights, threads=2)
assert (run(again) == wanted).all()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_model_does_not_hang_after_a_fork() -> None:
    script(FORK)


FORK_BEFORE_USE = """
import os, sys
import numpy as np
from bitnet_rs import _core
from bitnet_rs.loaders import open_checkpoint
checkpoint = open_checkpoint("demo")
model = _core.Model(checkpoint.core_config, checkpoint.weights, threads=2)
child = os.fork()
row = model.forward([(np.array([1, 2, 3], np.uint32), model.new_cache(3))])
assert np.isfinite(row).all()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_model_can_be_loaded_before_a_fork_and_used_after_it() -> None:
    script(FORK_BEFORE_USE)


OUT_OF_MEMORY = """
import resource
from bitnet_rs import _core
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    _core.read_bandwidth(1, 8 << 30)
except RuntimeError as error:
    assert "memory" in str(error), error
else:
    raise AssertionError("8 GiB were had where 2 are allowed")
"""


def test_a_buffer_that_cannot_be_had_is_an_error() -> None:
    script(OUT_OF_MEMORY)


@pytest.mark.parametrize("depth", [5, 20_000])
def test_objects_nested_in_a_config_are_no_trouble(checkpoint: Checkpoint, depth: int) -> None:
    nested: dict[str, Any] = {}
    for _ in range(depth):
        nested = {"inner": nested}
    config = {**checkpoint.core_config, "unused": nested}
    assert int(_core.Model(config, checkpoint.weights).facts["n_layers"]) > 0
    while nested:  # python's own destructor would recurse
        nested = nested["inner"]
    config["unused"] = config
    assert int(_core.Model(config, checkpoint.weights).facts["n_layers"]) > 0


def test_a_plain_dict_without_a_tensor_is_told_which(checkpoint: Checkpoint) -> None:
    weights = {name: checkpoint.weights[name] for name in checkpoint.weights}
    del weights["model.norm.weight"]
    with pytest.raises(KeyError, match=r'tensor "model.norm.weight" is missing'):
        _core.Model(checkpoint.core_config, weights)


def test_a_cache_of_a_twin_is_refused(checkpoint: Checkpoint) -> None:
    twins = [_core.Model(checkpoint.core_config, checkpoint.weights) for _ in range(2)]
    cache = twins[0].new_cache(4)
    with pytest.raises(ValueError, match="another model"):
        twins[1].forward([(np.array([1], np.uint32), cache)])
    assert len(cache) == 0


def test_the_interpreter_runs_while_the_core_computes(checkpoint: Checkpoint) -> None:
    model = _core.Model(checkpoint.core_config, checkpoint.weights, kernel="generic-i2", threads=1)
    cache = model.new_cache(2000)
    ids = ids_of(1500)
    thread = threading.Thread(target=lambda: model.forward([(ids, cache)]))
    busy = 0
    thread.start()
    while thread.is_alive():
        try:
            len(cache)
        except RuntimeError as error:
            busy += "in use by another thread" in str(error)
    thread.join()
    assert busy > 0
    assert len(cache) == len(ids)


# --- loading -------------------------------------------------------------------------------------


class Watched(Mapping[str, NDArray[Any]]):
    """Weights that notice how they are read."""

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self.weights = weights
        self.asked: list[str] = []
        self.alive: list[weakref.ref[NDArray[Any]]] = []
        self.most_alive = 0

    def __getitem__(self, name: str) -> NDArray[Any]:
        self.asked.append(name)
        array = self.weights[name].copy()
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(array)]
        self.most_alive = max(self.most_alive, len(self.alive))
        return array

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("the core need not list the weights")

    def __len__(self) -> int:
        return len(self.weights)


def test_tensors_are_asked_for_once_and_one_at_a_time(checkpoint: Checkpoint) -> None:
    watched = Watched(checkpoint.weights)
    gc.collect()
    _core.Model(checkpoint.core_config, watched)
    assert sorted(watched.asked) == sorted(checkpoint.weights)
    assert watched.most_alive == 1


@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_best_logits_are_the_full_heads(
    checkpoint: Checkpoint, threads: int, kv_dtype: Literal["f16", "f32"]
) -> None:
    model = _core.Model(checkpoint.core_config, checkpoint.weights, threads=threads)
    rng = np.random.default_rng(5)
    vocab = int(model.facts["vocab_size"])
    prompts = [rng.integers(vocab, size=n, dtype=np.uint32) for n in (1, 9, 2, 30, 1, 4)]
    tops = [1, None, 40, 0, vocab + 5, 300]
    caches = [model.new_cache(40, kv_dtype) for _ in prompts]
    found = model.forward_top(list(zip(prompts, caches, strict=True)), tops)
    for prompt, top, (ids, logits) in zip(prompts, tops, found, strict=True):
        full = model.forward([(prompt, model.new_cache(40, kv_dtype))])[0]
        if top is None:
            assert ids is None
            np.testing.assert_array_equal(logits.view(np.uint32), full.view(np.uint32))
            continue
        wanted = np.sort(np.argsort(-full, kind="stable")[:top])
        assert ids is not None
        assert ids.dtype == np.uint32
        np.testing.assert_array_equal(ids, wanted)
        np.testing.assert_array_equal(logits.view(np.uint32), full[wanted].view(np.uint32))
    used = model.head_use
    assert used["scans"] == 4
    assert used["full"] >= 2  # 300 and all of them are more than a scan is for
    # Where it is for one of two, each token was found by the few rows that may be the best.
    assert used["rescored"] < (used["scans"] - used["full"]) * vocab


def test_tops_have_to_fit_the_batch(checkpoint: Checkpoint) -> None:
    model = _core.Model(checkpoint.core_config, checkpoint.weights)
    batch = [(np.array([1], np.uint32), model.new_cache(4))]
    for tops in ([], [1, 1]):
        with pytest.raises(ValueError, match="wants for 1 segments"):
            model.forward_top(batch, tops)
    with pytest.raises((TypeError, OverflowError)):
        model.forward_top(batch, [-1])
    assert len(batch[0][1]) == 0


def test_arrays_that_may_change_are_copied(checkpoint: Checkpoint) -> None:
    weights = {name: np.array(array) for name, array in checkpoint.weights.items()}
    model = _core.Model(checkpoint.core_config, weights)
    ids = np.array([3, 1, 4], np.uint32)
    before = model.forward([(ids, model.new_cache(3))])
    for array in weights.values():
        array.fill(0)
    np.testing.assert_array_equal(before, model.forward([(ids, model.new_cache(3))]))


def test_profiles_add_up(checkpoint: Checkpoint) -> None:
    model = _core.Model(checkpoint.core_config, checkpoint.weights, threads=2)
    batch = [(np.array([1], np.uint32), model.new_cache(9))]
    model.forward_top(batch, [1])
    assert model.profile(True) == []
    model.forward_top(batch, [1])
    model.forward(batch)
    laps = {name: (count, wall, busy) for name, count, wall, busy in model.profile(False)}
    layers = int(model.facts["n_layers"])
    assert laps["q, k, v"][0] == laps["down"][0] == 2 * layers
    assert laps["head: scan"][0] == laps["head, all logits"][0] == 1
    assert all(wall > 0 for _, wall, _ in laps.values())
    # Two threads cannot be busy for longer than twice what the clock says.
    assert all(busy <= 2.1 * wall + 1e-5 for _, wall, busy in laps.values())
    model.forward_top(batch, [1])
    assert model.profile(False) == []


@pytest.mark.parametrize("rows", [500, 501, 502, 503])
def test_packed_trits_are_those_of_int8(tmp_path: Path, rows: int) -> None:
    checkpoint = opened(tmp_path, intermediate_size=rows)
    packed = dict(checkpoint.weights)
    trits = {
        name: unpack(w, rows if "gate" in name or "up_" in name else 4 * len(w))
        for name, w in packed.items()
        if w.dtype == np.uint8
    }
    assert len(trits) == 14
    ids = np.arange(9, dtype=np.uint32)
    for kernel in KERNELS:
        logits = []
        for weights in (packed, {**packed, **trits}):
            model = _core.Model(checkpoint.core_config, weights, kernel=kernel, threads=2)
            logits.append(model.forward([(ids, model.new_cache(9))], logits="all"))
        np.testing.assert_array_equal(logits[0], logits[1], kernel)


def test_code_3_in_a_file_names_the_tensor(tmp_path: Path) -> None:
    written = write(tmp_path)
    stored = written.stored[Q][1].copy()
    stored[3, 4] = 0xFF
    written.edit_tensors({Q: ("U8", stored)})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=rf'tensor "{Q}": has the code 3 in byte \[3, 4\]'):
        _core.Model(checkpoint.core_config, checkpoint.weights)


def test_facts_count_weights_and_bytes(tmp_path: Path) -> None:
    for tied in (True, False):
        checkpoint = opened(
            tmp_path / str(tied), tied=tied, form="masters", max_position_embeddings=99
        )
        model = _core.Model(checkpoint.core_config, checkpoint.weights)
        sizes = {name: array.size for name, array in checkpoint.weights.items()}
        ternary = sum(n for name, n in sizes.items() if "_proj" in name)
        norms = 4 * sum(n for name, n in sizes.items() if "norm" in name)
        head = 2 * 1024 * 80
        scan = 1024 * (128 + 12)  # two chunks of 64 columns, three bounds
        facts: dict[str, Any] = model.facts
        assert facts["params"] == sum(sizes.values())
        assert facts["ternary_params"] == ternary
        assert facts["ternary_bytes"] >= ternary / 5  # t5 is the first of the generic ones
        assert facts["head_bytes"] == head
        assert facts["scan_bytes"] == scan
        assert facts["bytes_per_token"] == facts["ternary_bytes"] + norms + scan
        embeddings = head if tied else 2 * head
        assert facts["packed_bytes"] == facts["ternary_bytes"] + norms + embeddings + scan
        wanted = {
            "n_layers": 2,
            "hidden_size": 80,
            "intermediate_size": 500,
            "n_heads": 4,
            "n_kv_heads": 2,
            "head_dim": 20,
            "vocab_size": 1024,
            "max_positions": 99,
        }
        assert {key: facts[key] for key in wanted} == wanted


def test_kernels_and_threads_are_checked(checkpoint: Checkpoint) -> None:
    def load(**options: Any) -> _core.Model:
        return _core.Model(checkpoint.core_config, checkpoint.weights, **options)

    assert load().kernel == KERNELS[0]
    assert load(threads=1).threads == 1
    with pytest.raises(ValueError, match=r"nonsense.*generic-i2"):
        load(kernel="nonsense")
    with pytest.raises(ValueError, match="thread"):
        load(threads=0)
    with pytest.raises((OverflowError, ValueError)):
        load(threads=-1)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, r"model_type is \"gpt2\"; wanted \"bitnet\", .* or \"qwen3\""),
    ({"activations": "int4"}, r"activations is \"int4\"; wanted \"int8\" or \"float\""),
    ({"model_type": ...}, "model_type is missing"),
    ({"hidden_act": "gelu"}, r"hidden_act is \"gelu\"; wanted .*\"silu\""),
    ({"hidden_act": ...}, "hidden_act is missing"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": -80}, "hidden_size is -80"),
    ({"hidden_size": 80.0}, "hidden_size is 80"),
    ({"hidden_size": True}, "hidden_size is true"),
    ({"hidden_size": "80"}, 'hidden_size is "80"'),
    ({"hidden_size": 10**30}, "hidden_size is 10000"),
    ({"hidden_size": 200_000}, "131072"),
    ({"intermediate_size": [500]}, "intermediate_size is a list"),
    ({"num_hidden_layers": ...}, "num_hidden_layers is missing"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads is 3; wanted a divisor of 4"),
    ({"num_attention_heads": 3, "head_dim": ...}, "head_dim"),
    ({"head_dim": 25}, r"head_dim is 25; wanted an even number"),
    ({"vocab_size": 2**40}, "vocab_size"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_theta": ...}, "rope_theta is missing"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling.rope_type is \"llama3\""),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling.type is \"linear\""),
    ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling.factor is not supported"),
    ({"rope_scaling": "yarn"}, r"rope_scaling is \"yarn\""),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.rope_type"),
    ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"attention_bias": True}, "attention_bias is true; biases are not supported"),
    ({"mlp_bias": True}, "mlp_bias is true"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_configs_that_are_not_understood(
    checkpoint: Checkpoint, changes: dict[str, Any], message: str
) -> None:
    config = {**checkpoint.core_config, **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        _core.Model(config, checkpoint.weights)


def test_rope_theta_in_either_place(checkpoint: Checkpoint) -> None:
    config = {**checkpoint.core_config}
    theta = config.pop("rope_theta")
    old = _core.Model({**config, "rope_theta": theta, "rope_scaling": None}, checkpoint.weights)
    parameters = {"rope_type": "default", "rope_theta": theta}
    new = _core.Model({**config, "rope_parameters": parameters}, checkpoint.weights)
    assert_same_bits(run(old, IDS[:9]), run(new, IDS[:9]))


LAYER = "model.layers.1."
Q = LAYER + "self_attn.q_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"

BAD_TENSORS: list[tuple[str, Callable[[NDArray[Any]], Any], str]] = [
    (Q, lambda w: w[:-1], r"has shape \[23, 80\]; wanted \[24, 80\]"),
    (Q, lambda w: unpack(w, 95), r"has shape \[95, 80\]; wanted \[96, 80\]"),
    (Q, lambda w: w[None], r"has shape \[1, 24, 80\]"),
    (Q, lambda w: w.reshape(-1), r"has shape \[1920\]"),
    (Q, lambda w: w.astype(np.int32), "dtype int32; wanted int8"),
    (Q, lambda w: w.view(np.int8), r"has shape \[24, 80\]; wanted \[96, 80\]"),
    (Q, lambda w: unpack(w, 96).astype(np.float32), "dtype float32 and a"),
    (Q, lambda w: np.asfortranarray(w), "not contiguous"),
    (Q, lambda w: unpack(w, 96) + np.int8(2), r"row 0 holds \d; ternary values are"),
    (Q, lambda w: w | np.uint8(0xC0), r"has the code 3 in byte \[0, 0\]; .*only 0, 1 and 2"),
    (Q, lambda w: w.tolist(), "is not a numpy array"),
    (f"{Q}_scale", lambda s: np.repeat(s, 2), r"has shape \[2\]"),
    (f"{Q}_scale", lambda s: s * np.float32("nan"), "NaN|infinit|finite"),
    (f"{Q}_scale", lambda s: s.astype(np.float16), "dtype float16; wanted float32"),
    (NORM, lambda w: w[:-1], r"has shape \[79\]; wanted \[80\]"),
    (NORM, lambda w: w.astype(np.float64), "dtype float64"),
    (NORM, lambda w: w * np.float32("inf"), "infinities or NaNs"),
    (EMBEDDING, lambda w: w.T.copy(), r"has shape \[80, 1024\]; wanted \[1024, 80\]"),
    (EMBEDDING, lambda w: w.astype(np.int8), "dtype int8; wanted float32"),
    (EMBEDDING, lambda w: w.astype(np.int8), "dtype int8; wanted float32"),
    (EMBEDDING, lambda w: w.astype(np.uint8), "dtype uint8; wanted float32"),
    (EMBEDDING, lambda w: np.full_like(w, 0x7FC0), "NaN|infinit|finite"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD_TENSORS)
def test_tensors_that_do_not_fit(
    checkpoint: Checkpoint, name: str, change: Callable[[NDArray[Any]], Any], message: str
) -> None:
    weights = dict(checkpoint.weights)
    weights[name] = change(weights[name])
    with pytest.raises(ValueError, match=message) as error:
        _core.Model(checkpoint.core_config, weights)
    assert f'"{name}"' in str(error.value)


def test_an_unaligned_tensor_is_refused(checkpoint: Checkpoint) -> None:
    weights = dict(checkpoint.weights)
    norm = weights[NORM]
    raw = np.zeros(norm.nbytes + 1, np.uint8)
    raw[1:] = norm.view(np.uint8)
    weights[NORM] = raw[1:].view(np.float32)
    assert not weights[NORM].flags.aligned
    with pytest.raises(ValueError, match=f'"{NORM}" is not contiguous and aligned'):
        _core.Model(checkpoint.core_config, weights)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_masters_that_are_not_finite(tmp_path: Path, value: float) -> None:
    for dtype in ("F32", "F16", "BF16"):
        checkpoint = opened(tmp_path / dtype, form="masters", dtype=dtype)
        weights = dict(checkpoint.weights)
        w = weights[Q] = weights[Q].copy()
        w[3, 5] = {"F32": value, "F16": value, "BF16": 0x7F80 if value == np.inf else 0x7FC0}[dtype]
        with pytest.raises(ValueError, match=f'"{Q}".*holds infinities or NaNs'):
            _core.Model(checkpoint.core_config, weights)


@pytest.mark.parametrize(
    "name", [Q, NORM, EMBEDDING, LAYER + "mlp.down_proj.weight", LAYER + "input_layernorm.weight"]
)
def test_missing_tensors_are_key_errors(checkpoint: Checkpoint, name: str) -> None:
    weights = {key: array for key, array in checkpoint.weights.items() if key != name}
    with pytest.raises(KeyError, match=name):
        _core.Model(checkpoint.core_config, weights)


def test_trits_without_a_scale(checkpoint: Checkpoint) -> None:
    weights = {key: array for key, array in checkpoint.weights.items() if key != f"{Q}_scale"}
    with pytest.raises(ValueError, match=rf'"{Q}".*holds trits, but there is no "{Q}_scale"'):
        _core.Model(checkpoint.core_config, weights)


def test_errors_of_the_weights_reach_the_caller(checkpoint: Checkpoint) -> None:
    class Broken(Watched):
        def __getitem__(self, name: str) -> NDArray[Any]:
            if name == Q:
                raise OSError("the disk is gone")
            return super().__getitem__(name)

    with pytest.raises(OSError, match=r"^the disk is gone$"):
        _core.Model(checkpoint.core_config, Broken(checkpoint.weights))


# --- forward on bad input ------------------------------------------------------------------------


def two_caches(model: _core.Model) -> tuple[_core.KvCache, _core.KvCache]:
    caches = model.new_cache(16), model.new_cache(16)
    model.forward([(IDS[:5], cache) for cache in caches])
    return caches


Batch = Callable[[_core.KvCache, _core.KvCache], Any]
BAD_BATCHES: dict[str, tuple[Batch, Any, str]] = {
    "token": (lambda a, b: [(IDS[:2], a), (np.array([7, 1024], np.uint32), b)], ValueError, "token id 1024"),
    "largest": (lambda a, b: [(IDS[:2], a), (np.array([2**32 - 1], np.uint32), b)], ValueError, "4294967295"),
    "empty segment": (lambda a, b: [(IDS[:2], a), (IDS[:0], b)], ValueError, "segment 1 has no tokens"),
    "empty batch": (lambda a, b: [], ValueError, "empty batch"),
    "full": (lambda a, b: [(IDS[:2], a), (IDS[:12], b)], ValueError, "room for 11"),
    "twice": (lambda a, b: [(IDS[:2], a), (IDS[:2], b), (IDS[:2], a)], RuntimeError, "twice"),
    "int64": (lambda a, b: [(IDS[:2].astype(np.int64), a)], TypeError, "mismatch|instance"),
    "list": (lambda a, b: [([1, 2], a)], TypeError, "mismatch|instance"),
    "2-D": (lambda a, b: [(IDS[None, :2], a)], TypeError, "mismatch|instance"),
    "no cache": (lambda a, b: [(IDS[:2], None)], TypeError, "mismatch|instance"),
    "no pair": (lambda a, b: [IDS[:2]], (TypeError, ValueError), "tuple"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_change_no_cache(model: _core.Model, case: str) -> None:
    batch, error, message = BAD_BATCHES[case]
    a, b = two_caches(model)
    before = model.new_cache(16)
    model.forward([(IDS[:5], before)])
    wanted = model.forward([(IDS[5:9], before)], logits="all")
    with pytest.raises(error, match=message):
        model.forward(batch(a, b))
    assert (len(a), len(b)) == (5, 5)
    for cache in (a, b):
        assert_same_bits(model.forward([(IDS[5:9], cache)], logits="all"), wanted)


def test_strided_ids_are_refused_or_right(model: _core.Model) -> None:
    cache = model.new_cache(16)
    with pytest.raises((TypeError, ValueError), match="contiguous"):
        model.forward([(IDS[:10:2], cache)])
    assert len(cache) == 0


def test_logits_is_last_or_all(model: _core.Model) -> None:
    with pytest.raises(ValueError, match='logits is "first"; wanted "last" or "all"'):
        model.forward([(IDS[:2], model.new_cache(2))], logits="first")  # type: ignore[arg-type]


def test_a_cache_of_another_model_is_refused(model: _core.Model, tmp_path: Path) -> None:
    other = opened(tmp_path, n_layers=1, head_dim=24)
    cache = _core.Model(other.core_config, other.weights).new_cache(16)
    with pytest.raises(ValueError, match="cache of segment 0 belongs to another model"):
        model.forward([(IDS[:2], cache)])
    assert len(cache) == 0


def test_a_cache_can_be_filled_to_the_last_place(model: _core.Model) -> None:
    cache = model.new_cache(7)
    model.forward([(IDS[:7], cache)])
    assert (len(cache), cache.capacity) == (7, 7)
    with pytest.raises(ValueError, match="room for 0"):
        model.forward([(IDS[:1], cache)])


def test_caches_are_checked(model: _core.Model) -> None:
    with pytest.raises(ValueError, match="capacity of 0"):
        model.new_cache(0)
    with pytest.raises(ValueError, match=r'kv_dtype is "f8"; wanted "f16" or "f32"'):
        model.new_cache(4, "f8")  # type: ignore[arg-type]
    with pytest.raises((OverflowError, ValueError)):
        model.new_cache(-1)
    cache = model.new_cache(8)
    model.forward([(IDS[:3], cache)])
    with pytest.raises(ValueError, match="cannot truncate 3 tokens to 4"):
        cache.truncate(4)
    assert len(cache) == 3


def test_a_huge_cache_costs_only_what_it_holds(model: _core.Model) -> None:
    cache = model.new_cache(10**9)
    assert cache.n_bytes > 10**11
    model.forward([(IDS[:3], cache)])
    assert len(cache) == 3


def test_f32_caches_take_twice_the_bytes(model: _core.Model) -> None:
    assert model.new_cache(64, "f32").n_bytes == 2 * model.new_cache(64, "f16").n_bytes
