"""Each kernel beside numpy and, where installed, torch and llama.cpp: `make bench`.

A product as Python sees it: activations in float32 in, outputs in float32 out, so quantizing them
is part of ours. numpy and torch multiply the same matrix in float32 (torch in bfloat16 too). No
assertion is about time; the results are compared, so that like is timed with like.

numpy is as fast as its BLAS: on machines where OPENBLAS_CORETYPE is set, unset it for this.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import ggml
import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from bitnet_rs import _core, machine

# gate_proj of the 2B, 3B and 8B models.
SHAPES = {"2b": (6912, 2560), "3b": (8640, 3200), "8b": (14336, 4096)}
TOKENS = (1, 4, 16, 512)
# Rows of the larger products: arithmetic decides there, the same for every row.
MOST_ROWS = 1024
THREADS = machine.choose_threads(None)

Product = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@lru_cache(maxsize=1)
def trits(rows: int, cols: int) -> NDArray[np.int8]:
    return np.random.default_rng(0).integers(-1, 2, (rows, cols), np.int8)


def ours(kernel: str) -> Callable[[NDArray[np.int8], int], Product]:
    def make(w: NDArray[np.int8], _: int) -> Product:
        return _core._PackedMatrix(w, 1.0, kernel, threads=THREADS).multiply

    return make


def numpy_f32(w: NDArray[np.int8], _: int) -> Product:
    weights = np.ascontiguousarray(w.T, np.float32)
    return lambda x: x @ weights


def torch_linear(dtype: str) -> Callable[[NDArray[np.int8], int], Product]:
    def make(w: NDArray[np.int8], _: int) -> Product:
        torch: Any = pytest.importorskip("torch")
        torch.set_num_threads(THREADS)
        weights = torch.from_numpy(w).to(getattr(torch, dtype))

        def multiply(x: NDArray[np.float32]) -> NDArray[np.float32]:
            with torch.inference_mode():
                inputs = torch.from_numpy(x).to(weights.dtype)
                result: NDArray[np.float32] = (
                    torch.nn.functional.linear(inputs, weights).float().numpy()
                )
                return result

        return multiply

    return make


def llama_cpp(kind: str) -> Callable[[NDArray[np.int8], int], Product]:
    def make(w: NDArray[np.int8], n: int) -> Product:
        pytest.importorskip("llama_cpp")
        return ggml.Product(ggml.load(), w, kind, n, threads=THREADS).multiply

    return make


CANDIDATES = {
    **{name: ours(name) for name in _core.kernels()},
    "numpy-f32": numpy_f32,
    "torch-f32": torch_linear("float32"),
    "torch-bf16": torch_linear("bfloat16"),
    "llama.cpp-TQ1_0": llama_cpp("TQ1_0"),
    "llama.cpp-TQ2_0": llama_cpp("TQ2_0"),
}


# Scalar kernels take seconds for a large product, where their speed is no news.
CASES = [
    (shape, n, candidate)
    for shape in SHAPES
    for n in TOKENS
    for candidate in CANDIDATES
    if n <= 4 or not candidate.startswith("generic")
]


@pytest.mark.parametrize(("shape", "n", "candidate"), CASES)
def test_product(benchmark: BenchmarkFixture, shape: str, n: int, candidate: str) -> None:
    rows, cols = SHAPES[shape]
    w = trits(rows if n == 1 else min(rows, MOST_ROWS), cols)
    x = np.random.default_rng(1).standard_normal((n, cols)).astype(np.float32)
    multiply = CANDIDATES[candidate](w, n)
    benchmark.group = f"{shape}: {w.shape[0]} x {cols}, {n} tokens, {THREADS} threads"
    benchmark.name = candidate
    benchmark.extra_info["multiply_adds"] = n * w.size
    y = benchmark(multiply, x)
    right = x[:1] @ w.T.astype(np.float32)
    # int8 activations and bfloat16 differ from float32 by about a hundredth of a typical output.
    assert np.abs(y[:1] - right).mean() < 0.05 * np.abs(right).mean()
