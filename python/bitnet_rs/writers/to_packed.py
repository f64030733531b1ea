"""A checkpoint as a folder of packed safetensors: planned, written, read back.

For `convert.py`. `packed.py` has the format; here it meets a source. The folder is checked by
opening it as any checkpoint is opened.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders import open_checkpoint
from bitnet_rs.loaders.names import stored_less_one
from bitnet_rs.loaders.safetensors import SINGLE_FILE
from bitnet_rs.writers import packed
from bitnet_rs.writers.atomic import new_folder, sync
from bitnet_rs.writers.layout import TensorWriter
from bitnet_rs.writers.packed import StoredTensor
from bitnet_rs.writers.readback import Steps, differs, digest_of
from bitnet_rs.writers.source import (
    DTYPES,
    Float,
    Matrix,
    Source,
    listed,
    refuse_groups,
    refuse_zero,
)


class PackedJob:
    """Packed safetensors to be written.

    Args:
        source: The tensors.
        files: Content of the other files, by name.

    Attributes:
        format: The format in words.
        losses: Always empty: the format holds everything.
        notes: What a user of the folder should know.
        n_bytes: Bytes that will be written.

    Raises:
        ValueError: The format cannot hold the source.
    """

    format: Final = "safetensors, 2-bit packed, scale multiplies"
    losses: Final[Mapping[str, float]] = {}

    def __init__(self, source: Source, files: Mapping[str, bytes]) -> None:
        refuse_groups(source, "a packed matrix")
        self._source = source
        self._files = files
        self._layout = packed.compose([s for tensor in source.tensors for s in _stored(tensor)])
        self.n_bytes: Final = self._layout.n_bytes + sum(map(len, files.values()))
        odd = [matrix.name for matrix in source.matrices if matrix.rows % 4]
        self.notes: Final = (
            ["transformers opens only rows in multiples of 4, which these have not: " + listed(odd)]
            if odd
            else []
        )

    def run(self, path: Path, steps: Steps, *, overwrite: bool) -> None:
        """Writes the folder, and checks it before it gets its name.

        Raises:
            OSError: It cannot be written.
            RuntimeError: It does not read back as it was written.
            ValueError: A tensor's content is impossible.
        """
        with new_folder(path, overwrite=overwrite) as folder:
            for name, content in self._files.items():
                with (folder / name).open("xb") as file:
                    file.write(content)
                    sync(file)
                steps.advance(2 * len(content))
            with (folder / SINGLE_FILE).open("xb") as file:
                written = self._write(file, steps)
                sync(file)
            try:
                self._check(folder, path, written, steps)
            except (ValueError, KeyError) as error:  # what the loaders say to damaged files
                raise differs(path, "the checkpoint") from error

    def _write(
        self, file: BinaryIO, steps: Steps
    ) -> dict[str, tuple[bytes, NDArray[np.float32] | None]]:
        """Writes all tensors; returns the digest of each, and the scale of the ternary ones."""
        writer = TensorWriter(file, self._layout, steps.advance)
        written: dict[str, tuple[bytes, NDArray[np.float32] | None]] = {}
        for tensor in self._source.tensors:
            steps.at(tensor.name)
            if isinstance(tensor, Float):
                array = self._source.read_floats(tensor)
                written[tensor.name] = digest_of(array), None
                if stored_less_one(tensor.name, self._source.config["model_type"]):
                    # The difference is exact, and so is its sum with one.
                    array = array - np.float32(1)
                writer.write(tensor.name, [array])
            else:
                trits, scale = self._source.read_trits(tensor)
                refuse_zero(tensor.name, float(scale[0]))
                written[tensor.name] = digest_of(trits), scale
                writer.write(tensor.name, [packed.pack(trits)])
                writer.write(f"{tensor.name}_scale", [scale.astype("<f4")])
        writer.finish()
        return written

    def _check(
        self,
        folder: Path,
        path: Path,
        written: Mapping[str, tuple[bytes, NDArray[np.float32] | None]],
        steps: Steps,
    ) -> None:
        checkpoint = open_checkpoint(folder)
        found = Source(checkpoint.weights, checkpoint.core_config)
        if {tensor.name for tensor in found.tensors} != set(written):
            raise differs(path, "the list of tensors")
        for tensor in found.tensors:
            steps.at(tensor.name)
            digest, wanted_scale = written[tensor.name]
            if isinstance(tensor, Float):
                same = digest_of(found.read_floats(tensor)) == digest
            else:
                trits, scale = found.read_trits(tensor)
                same = digest_of(trits) == digest and scale == wanted_scale
            if not same:
                raise differs(path, f"tensor {tensor.name}")
            steps.advance(sum(stored.n_bytes for stored in _stored(tensor)))
        steps.advance(len(self._layout.header))


def _stored(tensor: Matrix | Float) -> Iterator[StoredTensor]:
    """What a tensor becomes in the file."""
    if isinstance(tensor, Float):
        yield StoredTensor(tensor.name, DTYPES[tensor.dtype], tensor.shape, tensor.n_bytes)
    else:
        shape = (-(-tensor.rows // 4), tensor.cols)
        yield StoredTensor(tensor.name, "U8", shape, shape[0] * shape[1])
        yield StoredTensor(f"{tensor.name}_scale", "F32", (1,), 4)
