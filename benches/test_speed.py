"""Speed of what users call, by pytest-benchmark: `make bench`. No assertion is about time."""

from collections.abc import Iterator

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import bitnet_rs
from bitnet_rs import SamplingParams, _core
from bitnet_rs.engine import choose

PROMPT = "Once upon a time there was"


@pytest.fixture(scope="module")
def model() -> Iterator[bitnet_rs.Model]:
    with bitnet_rs.load("demo") as model:
        yield model


def test_load_demo(benchmark: BenchmarkFixture) -> None:
    assert benchmark(lambda: bitnet_rs.load("demo")).vocab_size == 4096


def test_generate_64_tokens(benchmark: BenchmarkFixture, model: bitnet_rs.Model) -> None:
    done = benchmark(lambda: model.complete(PROMPT, max_tokens=64, temperature=0, ignore_eos=True))
    assert len(done.tokens) == 64


def test_prefill_256_tokens(benchmark: BenchmarkFixture, model: bitnet_rs.Model) -> None:
    ids = np.arange(256, dtype=np.uint32)

    def prefill() -> int:
        return len(model.core.forward([(ids, model.new_cache(256))]))

    assert benchmark(prefill) == 1


@pytest.mark.parametrize("spread", [3.0, 0.3], ids=["peaked", "flat"])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.95}, {"top_k": 40}], ids=str)
def test_sample_of_128256(
    benchmark: BenchmarkFixture, spread: float, options: dict[str, float]
) -> None:
    rng = np.random.default_rng(0)
    row = rng.normal(0, spread, 128_256).astype(np.float32)
    row[rng.integers(0, len(row), 20)] += 5 * spread
    params = SamplingParams(temperature=0.8, seed=0, **options)  # type: ignore[arg-type]
    draws = params.rng()
    assert benchmark(choose, row, params, draws) < len(row)


@pytest.mark.parametrize("kernel", _core.kernels())
@pytest.mark.parametrize("n", [1, 16])
def test_product(benchmark: BenchmarkFixture, kernel: str, n: int) -> None:
    # Includes packing: the speed of one call across the boundary, not of the kernel.
    rng = np.random.default_rng(0)
    trits = rng.integers(-1, 2, (640, 2560), dtype=np.int8)
    x = rng.standard_normal((n, 2560), dtype=np.float32)
    assert benchmark(_core._gemm, trits, 1.0, x, kernel).shape == (n, 640)
