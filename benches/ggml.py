"""llama.cpp's own ternary products, by way of the library inside llama-cpp-python.

For test_kernels.py, which compares with them where the package is installed. Apart because it
calls a C library through ctypes: ggml's public functions (ggml.h), with one matrix product as
the whole graph. ggml quantizes activations in blocks of 256, so its products are near ours and
not equal to them.
"""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

# enum ggml_type.
F32: Final = 0
TYPES: Final = {"TQ1_0": 34, "TQ2_0": 35}


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def load() -> Any:
    """The functions of ggml-base and ggml-cpu; ImportError where they are not installed."""
    package = importlib.import_module("llama_cpp")
    folder = Path(str(package.__file__)).parent / "lib"
    libraries = []
    for name in ("ggml-base", "ggml-cpu"):
        found = sorted(folder.glob(f"*{name}*"))
        if not found:
            raise ImportError(f"llama-cpp-python has no {name} in {folder}")
        libraries.append(ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL))
    base, cpu = libraries
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    for owner, name, result, arguments in (
        (base, "ggml_init", pointer, [_InitParams]),
        (base, "ggml_free", None, [pointer]),
        (base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, i64, i64]),
        (base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        (base, "ggml_new_graph", pointer, [pointer]),
        (base, "ggml_build_forward_expand", None, [pointer, pointer]),
        (base, "ggml_get_data", pointer, [pointer]),
        (
            base,
            "ggml_quantize_chunk",
            ctypes.c_size_t,
            [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer],
        ),
        (cpu, "ggml_cpu_init", None, []),
        (cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
    ):
        function = getattr(owner, name)
        function.restype, function.argtypes = result, arguments
        setattr(base, name, function)
    base.ggml_cpu_init()
    return base


class Product:
    """A ternary matrix in a format of ggml, times `n` inputs."""

    def __init__(
        self, ggml: Any, trits: NDArray[np.int8], kind: str, n: int, *, threads: int
    ) -> None:
        rows, cols = trits.shape
        self._ggml, self._threads = ggml, threads
        # Weights in float32 at most, inputs, outputs, and the graph's own data and work space.
        size = 4 * (rows * cols + 2 * n * (rows + cols)) + (64 << 20)
        self._context = ggml.ggml_init(_InitParams(size, None, False))
        w = ggml.ggml_new_tensor_2d(self._context, TYPES[kind], cols, rows)
        self._x = ggml.ggml_new_tensor_2d(self._context, F32, cols, n)
        self._y = ggml.ggml_mul_mat(self._context, w, self._x)
        self._graph = ggml.ggml_new_graph(self._context)
        ggml.ggml_build_forward_expand(self._graph, self._y)
        weights = np.ascontiguousarray(trits, np.float32)
        ggml.ggml_quantize_chunk(
            TYPES[kind], weights.ctypes.data, ggml.ggml_get_data(w), 0, rows, cols, None
        )
        self._shape = (n, rows)

    def multiply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Shape (n, cols) to (n, rows)."""
        ctypes.memmove(self._ggml.ggml_get_data(self._x), x.ctypes.data, x.nbytes)
        self._ggml.ggml_graph_compute_with_ctx(self._context, self._graph, self._threads)
        y = np.empty(self._shape, np.float32)
        ctypes.memmove(y.ctypes.data, self._ggml.ggml_get_data(self._y), y.nbytes)
        return y

    def close(self) -> None:
        """Frees the matrix."""
        self._ggml.ggml_free(self._context)
