"""A checkpoint as a GGUF file: planned, written, read back.

For `convert.py`. `gguf.py` has the container, `ggml_encode.py` the types and `names.py` the names;
here they meet a source. What a type cannot hold is refused while planning; what it holds less
exactly is kept in `losses`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders import ggml_trits
from bitnet_rs.loaders.gguf_model import permuted_heads, unpermuted
from bitnet_rs.writers import gguf
from bitnet_rs.writers.atomic import new_file, sync
from bitnet_rs.writers.ggml_encode import (
    BLOCK_ENCODERS,
    I2_S,
    TQ1_0,
    TQ2_0,
    Encoding,
    encode_i2_s,
)
from bitnet_rs.writers.gguf import TensorSpec, Value
from bitnet_rs.writers.layout import Slot, TensorWriter
from bitnet_rs.writers.names import (
    FLOAT_TYPES,
    Target,
    metadata_of,
    name_in_file,
    permute,
    rope_theta,
    target_of,
)
from bitnet_rs.writers.readback import Digest, Steps, differs, digest_of, digest_of_slot, read
from bitnet_rs.writers.source import Float, Matrix, Source, listed, refuse_groups, refuse_zero

ENCODINGS: Final[Mapping[str, Encoding]] = {
    "gguf-i2_s": I2_S,
    "gguf-tq2_0": TQ2_0,
    "gguf-tq1_0": TQ1_0,
}

# Weights that are decoded at a time when a file is checked.
_CHUNK: Final = 1 << 22


@dataclass(frozen=True)
class _Part:
    """A tensor of the source and what it becomes.

    Attributes:
        tensor: The tensor.
        name: Its name in the file.
        scale_name: The tensor that has its scale, if one has.
        n_heads: Heads whose rows are permuted; 0 where rows stay as they are.
    """

    tensor: Matrix | Float
    name: str
    scale_name: str | None = None
    n_heads: int = 0


@dataclass(frozen=True)
class _Written:
    """What a tensor must read back as.

    Attributes:
        digest: Of the trits, in the order of the source, or of the floats.
        scales: Float32 of shape (1,), or float16 that broadcasts to (rows, blocks).
        apart: The scale in the tensor that has it.
    """

    digest: bytes
    scales: NDArray[Any] | None = None
    apart: NDArray[np.float32] | None = None


class GgufJob:
    """A GGUF file to be written.

    Args:
        source: The tensors.
        encoding: The type of the ternary matrices.
        name: What the model is called.
        metadata: Metadata besides the model's own: the tokenizer.

    Attributes:
        format: The format in words.
        losses: Relative errors of what was rounded, by tensor or metadata key; complete when it
            is written.
        notes: What a user of the file should know.
        n_bytes: Bytes that will be written.

    Raises:
        ValueError: The format cannot hold the source.
    """

    def __init__(
        self, source: Source, encoding: Encoding, name: str, metadata: Mapping[str, Value]
    ) -> None:
        self._source = source
        self._encoding = encoding
        self._target = target_of(source.config)
        _refuse_widths(source, encoding)
        self._parts = [self._part(tensor) for tensor in source.tensors]
        own = metadata_of(
            source.config,
            source.dims,
            self._target,
            name,
            encoding.file_type,
            embedding=any(t.name.endswith("_proj.norm.weight") for t in source.tensors),
        )
        specs = [spec for part in self._parts for spec in self._specs(part)]
        self._layout = gguf.compose(own | dict(metadata), specs)
        self.n_bytes: Final = self._layout.n_bytes
        self.format: Final = f"GGUF, {encoding.name}"
        self.losses: Final[dict[str, float]] = {}
        theta = rope_theta(source.config)
        if float(np.float32(theta)) != theta:
            error = abs(float(np.float32(theta)) - theta) / theta
            self.losses[f"{self._target.arch.name}.rope.freq_base"] = error
        apart = any(part.scale_name for part in self._parts)
        self.notes: Final = list(_notes(source, self._target, encoding, scales_apart=apart))

    def run(self, path: Path, steps: Steps, *, overwrite: bool) -> None:
        """Writes the file, and checks it before it gets its name.

        Raises:
            OSError: It cannot be written.
            RuntimeError: It does not read back as it was written.
            ValueError: A tensor's content is impossible, or a scale lies beyond the type.
        """
        with new_file(path, overwrite=overwrite) as file:
            written = self._write(file, steps)
            sync(file)
            self._check(file, path, written, steps)

    def _part(self, tensor: Matrix | Float) -> _Part:
        name = name_in_file(tensor.name, self._target.arch)
        if isinstance(tensor, Float):
            return _Part(tensor, name)
        scale_name = None
        if self._encoding.block_scales and self._target.scale_tensors and _beyond_float16(tensor):
            scale_name = f"{name.removesuffix('.weight')}.scale"
        n_heads = 0
        if self._target.arch.permuted:
            n_heads = permuted_heads(tensor.name, self._source.dims)
        return _Part(tensor, name, scale_name, n_heads)

    def _specs(self, part: _Part) -> Iterator[TensorSpec]:
        tensor = part.tensor
        if isinstance(tensor, Float):
            yield TensorSpec(part.name, FLOAT_TYPES[tensor.dtype], tensor.shape, tensor.n_bytes)
            return
        shape = (tensor.rows, tensor.cols)
        yield TensorSpec(part.name, self._encoding.type_id, shape, self._encoding.n_bytes(*shape))
        if part.scale_name:
            yield TensorSpec(part.scale_name, FLOAT_TYPES["float32"], (1,), 4)

    def _write(self, file: BinaryIO, steps: Steps) -> dict[str, _Written]:
        writer = TensorWriter(file, self._layout, steps.advance)
        written = {}
        for part in self._parts:
            steps.at(part.tensor.name)
            if isinstance(part.tensor, Float):
                array = self._source.read_floats(part.tensor)
                written[part.name] = _Written(digest_of(array))
                writer.write(part.name, [array])
            else:
                written[part.name] = self._write_matrix(writer, part, part.tensor)
        writer.finish()
        return written

    def _write_matrix(self, writer: TensorWriter, part: _Part, matrix: Matrix) -> _Written:
        trits, scales = self._source.read_trits(matrix)
        digest = digest_of(trits)
        if part.n_heads:
            trits = permute(trits, part.n_heads)
        if not self._encoding.block_scales:
            refuse_zero(matrix.name, float(scales[0]))
            writer.write(part.name, encode_i2_s(trits, float(scales[0])))
            return _Written(digest, scales)
        encode = BLOCK_ENCODERS[self._encoding.name]
        if part.scale_name:
            refuse_zero(matrix.name, float(scales[0]))
            ones = np.ones((1, 1), np.float16)
            writer.write(part.name, encode(trits, ones))
            writer.write(part.scale_name, [scales.astype("<f4")])
            return _Written(digest, ones, scales)
        of_blocks = self._round(matrix, scales)
        if part.n_heads and len(of_blocks) > 1:
            of_blocks = permute(of_blocks, part.n_heads)
        writer.write(part.name, encode(trits, of_blocks))
        return _Written(digest, of_blocks)

    def _round(self, matrix: Matrix, scales: NDArray[np.float32]) -> NDArray[np.float16]:
        """Scales of blocks in float16, shape (1 or rows, blocks); keeps what that loses."""
        with np.errstate(over="ignore", under="ignore"):
            halves = scales.reshape(-1, scales.shape[-1]).astype(np.float16)
        exact = scales.reshape(halves.shape).astype(np.float64)
        lost = ~np.isfinite(halves) | ((halves == 0) & (exact != 0))
        if lost.any():
            raise ValueError(
                f"tensor {matrix.name} has the scale {exact[lost][0]:.9g}, beyond the float16 that "
                f"{self._encoding.name} has for it. gguf-i2_s and safetensors-packed have float32, "
                "one for a matrix"
            )
        used = exact != 0
        error = np.abs(halves[used].astype(np.float64) - exact[used]) / exact[used]
        if error.max(initial=0.0):
            self.losses[matrix.name] = float(error.max())
        # A group is one block or several: `_refuse_widths` saw to it.
        per_group = matrix.cols // self._encoding.block // halves.shape[1]
        return np.repeat(halves, per_group, axis=1)

    def _check(
        self, file: BinaryIO, path: Path, written: Mapping[str, _Written], steps: Steps
    ) -> None:
        """Decodes the file and compares it with what the source gave."""
        header = self._layout.header
        if read(file, 0, len(header)).tobytes() != header:
            raise differs(path, "the header")
        steps.advance(len(header))
        position = len(header)
        for part in self._parts:
            steps.at(part.tensor.name)
            slot = self._layout.slots[part.name]
            if isinstance(part.tensor, Float):
                same = digest_of_slot(file, slot) == written[part.name].digest
            else:
                same = self._same(file, part, part.tensor, written[part.name])
            if not same:
                raise differs(path, f"tensor {part.name}")
            last = self._layout.slots[part.scale_name] if part.scale_name else slot
            steps.advance(last.offset + last.n_bytes - position)
            position = last.offset + last.n_bytes
        steps.advance(self._layout.n_bytes - position)

    def _same(self, file: BinaryIO, part: _Part, matrix: Matrix, wanted: _Written) -> bool:
        slot, encoding = self._layout.slots[part.name], self._encoding
        trits, scales = _Trits(part.n_heads), wanted.scales
        assert scales is not None
        if encoding.block_scales:
            units = ggml_trits.units_of(encoding.name, matrix.cols)
        else:
            units = ggml_trits.i2_s("x86", matrix.cols)
        row_bytes = (slot.n_bytes - encoding.tail_bytes) // matrix.rows
        step = max(1, _CHUNK // matrix.cols)
        for first in range(0, matrix.rows, step):
            n_rows = min(step, matrix.rows - first)
            data = read(file, slot.offset + first * row_bytes, n_rows * row_bytes)
            if len(data) != n_rows * row_bytes:
                return False
            try:
                rows = ggml_trits.unpack(data, (n_rows, matrix.cols), units)
            except ggml_trits.DamagedError:
                return False
            trits.feed(rows)
            if units.scales is not None:
                found = units.scales(data.reshape(-1, units.n_bytes)).reshape(n_rows, -1)
                d = scales if len(scales) == 1 else scales[first : first + n_rows]
                used = rows.reshape(*found.shape, -1).any(axis=2)
                if not np.array_equal(found, np.where(used, d, 0)):
                    return False
        if not encoding.block_scales and not _same_tail(file, slot, encoding, scales):
            return False
        if part.scale_name and wanted.apart is not None:
            apart = self._layout.slots[part.scale_name]
            stored = read(file, apart.offset, apart.n_bytes)
            if stored.tobytes() != wanted.apart.astype("<f4").tobytes():
                return False
        return trits.digest() == wanted.digest


class _Trits:
    """The digest of trits in the order of the source, which come in chunks of the file's rows."""

    def __init__(self, n_heads: int) -> None:
        self._n_heads = n_heads
        self._digest = Digest()
        self._held: list[NDArray[np.int8]] = []

    def feed(self, rows: NDArray[np.int8]) -> None:
        if self._n_heads:
            self._held.append(rows)  # a head's rows may lie in two chunks
        else:
            self._digest.feed(rows)

    def digest(self) -> bytes:
        if self._n_heads:
            self._digest.feed(unpermuted(np.concatenate(self._held), self._n_heads))
        return self._digest.end()


def _same_tail(file: BinaryIO, slot: Slot, encoding: Encoding, scales: NDArray[np.float32]) -> bool:
    """Whether a matrix ends with its scale and zeros."""
    tail = read(file, slot.offset + slot.n_bytes - encoding.tail_bytes, encoding.tail_bytes)
    return tail.tobytes() == scales.astype("<f4").tobytes().ljust(encoding.tail_bytes, b"\0")


def _refuse_widths(source: Source, encoding: Encoding) -> None:
    """Rows are whole blocks, and so are groups of weights that share a scale."""
    if not encoding.block_scales:
        refuse_groups(source, f"an {encoding.name} matrix")
    wrong = [matrix for matrix in source.matrices if matrix.cols % encoding.block]
    if wrong:
        others = [
            target
            for target, other in ENCODINGS.items()
            if all(
                matrix.group % other.block == 0 and (other.block_scales or matrix.n_scales == 1)
                for matrix in source.matrices
            )
        ]
        if all(matrix.n_scales == 1 for matrix in source.matrices):
            others.append("safetensors-packed")
        widths = " or ".join(map(str, sorted({matrix.cols for matrix in wrong})))
        raise ValueError(
            f"{encoding.name} wants rows in multiples of {encoding.block} weights, and these have "
            f"{widths}: {listed(m.name for m in wrong)}. This model can be written as "
            f"{' or '.join(others) or 'none of the formats here'}"
        )
    grouped = [matrix for matrix in source.matrices if matrix.group % encoding.block]
    if grouped:
        raise ValueError(
            f"{encoding.name} has one scale for each {encoding.block} weights, and these have one "
            f"for each {grouped[0].group}: {listed(m.name for m in grouped)}. None of the formats "
            "here holds that; load the source as it is"
        )


def _beyond_float16(matrix: Matrix) -> bool:
    """Whether its one scale does not fit float16, or may not: that of masters is not known yet."""
    if matrix.scales is None:
        return True
    if matrix.n_scales > 1:
        return False
    with np.errstate(over="ignore", under="ignore"):
        return bool(matrix.scales.astype(np.float16).astype(np.float32)[0] != matrix.scales[0])


def _notes(
    source: Source, target: Target, encoding: Encoding, *, scales_apart: bool
) -> Iterator[str]:
    if encoding == I2_S:
        yield "I2_S in the layout of x86: of other programs bitnet.cpp reads it, llama.cpp does not"
    elif target.in_llama_cpp:
        yield (
            "llama.cpp quantizes activations in blocks of 256, not whole as the model was trained, "
            "so that its answers may differ"
        )
    else:
        yield f"llama.cpp does not know architecture {target.arch.name}; bitnet.cpp does"
    if scales_apart:
        yield (
            "scales that float16 does not hold are in tensors of their own, .scale: llama.cpp of "
            "2026 multiplies by them; where they are not known, the file is refused"
        )
    if target.tied and not source.config["tie_word_embeddings"]:
        yield (
            f"other programs take the embedding for the head in architecture {target.arch.name} and "
            "leave this model's own head unread: their answers are wrong, if they open it"
        )
    embedding = next((t for t in source.tensors if t.name == "model.embed_tokens.weight"), None)
    if encoding == I2_S and isinstance(embedding, Float) and embedding.dtype == "uint16":
        yield "embeddings are bfloat16, as in the source; older bitnet.cpp wants float16"
