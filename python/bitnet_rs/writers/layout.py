"""A header, then tensors at offsets that were fixed beforehand, written as they come.

For `gguf.py` and `packed.py`, which compose layouts, and for `convert.py`, which fills them.
Apart because both containers are the same thing once their header is made.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from numpy.typing import NDArray

Chunk = bytes | NDArray[Any]
"""Bytes to write: as such, or a C-contiguous little-endian array."""


@dataclass(frozen=True)
class Slot:
    """The place of a tensor.

    Attributes:
        offset: Bytes from the start of the file.
        n_bytes: Its size.
    """

    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Layout:
    """A file before its tensors are there.

    Attributes:
        header: The first bytes of the file.
        slots: Tensors by name, in the order of their offsets. Gaps between them are zeros.
        n_bytes: Size of the whole file.
    """

    header: bytes
    slots: Mapping[str, Slot]
    n_bytes: int


class TensorWriter:
    """Writes a file of a given layout, front to back.

    Args:
        file: Empty, open for writing.
        layout: What goes where.
        on_written: Called with the number of bytes after every chunk.

    Raises:
        RuntimeError: A tensor comes out of order or has another size than was laid out, which is a
            mistake of the program.
    """

    def __init__(
        self, file: BinaryIO, layout: Layout, on_written: Callable[[int], None] | None = None
    ) -> None:
        self._file = file
        self._layout = layout
        self._left = list(layout.slots)[::-1]
        self._position = 0
        self._on_written = on_written
        self._put(layout.header)

    def write(self, name: str, chunks: Iterable[Chunk]) -> None:
        """Writes the next tensor."""
        if not self._left or self._left.pop() != name:
            raise RuntimeError(f"tensor {name} was not laid out to come now")
        slot = self._layout.slots[name]
        self._pad(slot.offset)
        for chunk in chunks:
            self._put(chunk)
        if self._position != slot.offset + slot.n_bytes:
            raise RuntimeError(
                f"tensor {name} came out as {self._position - slot.offset} bytes; "
                f"laid out were {slot.n_bytes}"
            )

    def finish(self) -> None:
        """Makes sure that nothing is missing."""
        if self._left:
            raise RuntimeError(f"tensor {self._left[-1]} was laid out and not written")
        self._pad(self._layout.n_bytes)

    def _pad(self, position: int) -> None:
        self._put(bytes(position - self._position))

    def _put(self, chunk: Chunk) -> None:
        n_bytes = len(chunk) if isinstance(chunk, bytes) else chunk.nbytes
        if n_bytes == 0:
            return
        self._file.write(chunk if isinstance(chunk, bytes) else chunk.data)
        self._position += n_bytes
        if self._on_written:
            self._on_written(n_bytes)
