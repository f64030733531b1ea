"""The Rust core, as Python sees it: two classes and a handful of functions.

Private: the public API is `bitnet_rs`. Only numpy arrays, numbers, strings and
one plain dict cross this line. Every function that computes releases the GIL.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Self, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "KvCache",
    "Model",
    "_PackedMatrix",
    "__version__",
    "_absmean",
    "_exp",
    "_gemm",
    "_gemv",
    "_kernels_for",
    "_rms_norm",
    "batch_inputs",
    "build_profile",
    "cpu_features",
    "grouped_kernels",
    "kernels",
    "kv_bytes",
    "kv_page",
    "measure_kernels",
    "projections",
    "read_bandwidth",
    "sample",
]

__version__: Final[str]
build_profile: Final[str]

batch_inputs: Final[list[int]]
"""Numbers of tokens in a step from which on the entries of `batch_kernels` are used."""

kv_page: Final[int]
"""Tokens whose keys and values are taken, and shared, together."""

def kernels() -> list[str]:
    """Names of the kernels this CPU can run, fastest first; the last is scalar.

    `BITNET_RS_ISA` caps the instruction sets that count as present.
    """

def grouped_kernels(activations: Literal["int8", "float"]) -> list[str]:
    """Names of the kernels for matrices with several scales, fastest first; the last is scalar.

    Those for float activations are the only ones for models that keep their activations in
    float32; they take matrices with one scale, too. All for the same activations give the same
    bits.

    Raises:
        ValueError: Activations of another name.
    """

def cpu_features() -> list[str]:
    """Instruction sets in use by this process, such as `avx2` or `avx512vnni`."""

def projections(config: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Shapes of the ternary matrices that a token is multiplied by: (rows, columns, how many).

    Raises:
        ValueError: A field of the config is missing or out of range; the message names it.
    """

def measure_kernels(
    projections: Sequence[tuple[int, int, int]], threads: int, budget_s: float
) -> list[tuple[str, list[float]]]:
    """Runs the kernels on matrices of these shapes, for about `budget_s` seconds.

    Returns:
        (kernel, seconds for one token: alone, then in steps of each of `batch_inputs` tokens), in
        the order of `kernels()`. Kernels that turn out several times slower than the best are left
        out.

    Raises:
        ValueError: A shape or another argument out of range.
        RuntimeError: The threads cannot be started.
    """

def read_bandwidth(threads: int, n_bytes: int = ...) -> float:
    """Measured speed of reading memory with `threads` threads, in GB/s (1e9 bytes)."""

def kv_bytes(caches: Sequence[KvCache]) -> int:
    """Bytes of memory that different caches take now; what several share counts once.

    Raises:
        RuntimeError: A cache is in use by another thread, or stands twice in `caches`.
    """

def sample(
    logits: NDArray[np.float32],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    draw: float,
) -> int:
    """Draws a position of a row of logits, as `sampling.py` defines it.

    Args:
        logits: Contiguous, shape (n,), 1 <= n <= 2^23.
        temperature: Above 0.
        top_k: 0 keeps all, as does n or more.
        top_p: Above 0; 1 keeps all.
        min_p: 0 keeps all; up to 1.
        draw: A uniform number in [0, 1).

    Raises:
        ValueError: An argument out of range.
        RuntimeError: The logits hold NaN or +inf, or nothing above -inf.
    """

@final
class Model:
    """A ternary transformer: immutable after construction, shared freely between threads.

    Args:
        config: The content of `config.json`, and what loaders add: `activations`, `int8` (when
            absent) or `float`, and for gemma3_text `layer_kinds`, `s` (sliding) or `f` (full) for
            each layer.
        weights: Tensors by canonical name (see `loaders/names.py`), asked for one at a
            time and each at most once. Ternary matrices: int8 of -1/0/+1, shape
            (rows, cols), or uint8 of shape (R, cols) with R = ceil(rows / 4), as Hugging Face
            packs them: bits 2i and 2i + 1 of byte [r, c] are the trit of row i * R + r, plus
            one; rows past the last are padding. Either has a float32 scale of shape (1,) under
            `<name>_scale` that multiplies, or scales of shape (rows, groups), each for
            cols / groups columns of a row, a multiple of 64 where groups > 1 (kernels of the
            layout i2g). Or masters (float32, float16, or bfloat16 as uint16)
            without a scale, quantized here by their absolute mean. Norms: float32, 1-D.
            Embeddings and head: float32, float16 or bfloat16 as uint16, shape (vocab_size,
            hidden_size); where they are not writeable (mapped from a file), they are held on to,
            else copied.
        kernel: A name from `kernels()` or `grouped_kernels()`, for the config's activations; the
            first of them when None.
        batch_kernels: The kernels for steps of each of `batch_inputs` tokens and more; `kernel`
            when None. All must read the same layout (the second part of the name).
        threads: Threads that compute; all CPUs this process may use when None.

    Raises:
        KeyError: A tensor is missing.
        ValueError: The config or a tensor does not fit; the message names it.
    """

    def __new__(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, NDArray[Any]],
        *,
        kernel: str | None = None,
        batch_kernels: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> Self: ...
    @property
    def kernel(self) -> str: ...
    @property
    def batch_kernels(self) -> list[str]: ...
    @property
    def threads(self) -> int: ...
    @property
    def facts(self) -> dict[str, int | float | str]:
        """Plain facts about the loaded model.

        Keys: `architecture`, `n_layers`, `hidden_size`, `intermediate_size`, `n_heads`,
        `n_kv_heads`, `head_dim`, `vocab_size`, `max_positions`, `ternary_params` (weights in
        ternary matrices), `params` (all), `ternary_bytes` (packed, in memory), `head_bytes`
        (lm_head rows, read for all logits of a token), `scan_bytes` (their int8 form, read for
        the best logits of a token), `bytes_per_token` (weights read to decode one token
        greedily), `packed_bytes` (all weights in memory, mapped ones included).
        """

    def new_cache(self, capacity: int, kv_dtype: Literal["f16", "f32"] = "f16") -> KvCache:
        """An empty KV cache for up to `capacity` tokens; memory is taken as it fills."""

    def forward(
        self,
        batch: Sequence[tuple[NDArray[np.uint32], KvCache]],
        *,
        logits: Literal["last", "all"] = "last",
    ) -> NDArray[np.float32]:
        """Appends each segment's tokens to its cache and computes logits.

        Args:
            batch: Segments of (token ids, cache), of any lengths >= 1; a cache may stand in
                one segment only.
            logits: One row for the last token of each segment, or one for every token.

        Returns:
            float32, shape (rows, vocab_size), segments in order.

        Raises:
            ValueError: A token id out of range, an empty segment, a cache that is full
                or belongs to another model. No cache is changed.
            RuntimeError: A cache is in use by another thread, or stands twice in the batch.
        """

    def forward_top(
        self,
        batch: Sequence[tuple[NDArray[np.uint32], KvCache]],
        top: Sequence[int | None],
    ) -> list[tuple[NDArray[np.uint32] | None, NDArray[np.float32]]]:
        """As `forward`, for some logits of the last token of each segment.

        Args:
            batch: As for `forward`.
            top: For each segment, how many of the best logits; 0: none at all; None: all. The
                best are found in int8 rows, and proven to be what the full head gives, bit for
                bit: half the reading.

        Returns:
            For each segment, token ids in ascending order and their logits: the `top` best,
            lower ids first among equals. For None, the ids are None and the logits a whole row.

        Raises:
            ValueError, RuntimeError: As `forward`; not one of `top` for each segment.
        """

    def forward_hidden(
        self, batch: Sequence[tuple[NDArray[np.uint32], KvCache]]
    ) -> NDArray[np.float32]:
        """As `forward`, but for what the head would take: the final norm's output.

        Returns:
            Shape (segments, hidden_size): that of the last token of each segment.

        Raises:
            ValueError, RuntimeError: As `forward`.
        """

    @property
    def head_use(self) -> dict[str, int]:
        """How the best logits were found, since the model was loaded.

        Keys: `scans` (tokens they were asked for), `full` (of these, where all logits were
        computed after all), `rescored` (rows rescored for the others).
        """

    def profile(self, on: bool) -> list[tuple[str, int, float, float]]:
        """Switches the measuring of forward passes on or off.

        Returns:
            What was measured since it was switched on: (part of the pass, how often, seconds
            on the clock, seconds of all threads in its tasks; 0 where one thread works alone).
        """

@final
class KvCache:
    """Keys and values of one sequence. Safe to share; one `forward` at a time."""

    def __len__(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def n_bytes(self) -> int:
        """Bytes that `capacity` tokens take."""

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on. Longer than the cache: ValueError."""

    def fork(self, length: int, capacity: int) -> KvCache:
        """A cache of its own that begins with the first `length` tokens of this one.

        The two share memory, 128 tokens at a time, until one of them writes to it.

        Raises:
            ValueError: `length` is more than there are, or than `capacity`.
            RuntimeError: The cache is in use by another thread, or there is no memory.
        """

@final
class _PackedMatrix:
    """A matrix in the layout of a kernel: for tests and benchmarks. Underscored: not API.

    Args:
        values: Trits or other levels, shape (rows, cols).
        scale: Multiplies them.
        kernel: A name from `kernels()`, or `_kernels_for(levels)`.
        threads: Threads that multiply.
        levels: The 2 to 8 integers from -127 to 127 that values take; -1, 0 and 1 when None.
        group_scales: Instead of `scale`, shape (rows, groups): for kernels of `grouped_kernels`.

    Raises:
        ValueError: Values that are no levels, an unknown kernel, a scale that is not finite.
    """

    def __new__(
        cls,
        values: NDArray[np.int8],
        scale: float,
        kernel: str,
        *,
        threads: int = 1,
        levels: Sequence[int] | None = None,
        group_scales: NDArray[np.float32] | None = None,
    ) -> Self: ...
    @property
    def n_bytes(self) -> int:
        """Bytes of the packed matrix."""

    def unpack(self) -> NDArray[np.int8]:
        """The values again."""

    def multiply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Quantizes the rows of `x`, shape (n, cols), and multiplies: shape (n, rows)."""

def _kernels_for(levels: Sequence[int]) -> list[str]:
    """As `kernels()`, for matrices of these levels: element-wise tables, unless they are -1, 0, 1."""

# One function per op, for tests against _reference.py. Underscored: not API.
def _gemv(
    trits: NDArray[np.int8], scale: float, x: NDArray[np.float32], kernel: str
) -> NDArray[np.float32]: ...
def _gemm(
    trits: NDArray[np.int8], scale: float, x: NDArray[np.float32], kernel: str
) -> NDArray[np.float32]: ...
def _absmean(w: NDArray[np.float32]) -> tuple[NDArray[np.int8], float]: ...
def _rms_norm(
    x: NDArray[np.float32], weight: NDArray[np.float32], eps: float
) -> NDArray[np.float32]: ...
def _exp(x: NDArray[np.float32]) -> NDArray[np.float32]: ...
