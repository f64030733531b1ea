"""What a file must read back as, and how far writing and checking have come.

For `to_gguf.py` and `to_packed.py`. A tensor that was written is remembered by a digest, not by
its bytes, so that checking a file needs no second look at the source and no memory.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.writers.layout import Slot

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is at hand."""

# Bytes of a tensor that are read at a time.
_CHUNK: Final = 1 << 22


class Digest:
    """A digest of an array that comes in parts."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def feed(self, part: NDArray[Any]) -> None:
        """Adds the next part, in C order."""
        self._hash.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)

    def end(self) -> bytes:
        """The digest of all parts."""
        return self._hash.digest()


def digest_of(array: NDArray[Any]) -> bytes:
    """The digest of a whole array."""
    digest = Digest()
    digest.feed(array)
    return digest.end()


def read(file: BinaryIO, offset: int, n_bytes: int) -> NDArray[np.uint8]:
    """Bytes of a file; fewer, if it ends before."""
    file.seek(offset)
    return np.frombuffer(file.read(n_bytes), np.uint8)


def digest_of_slot(file: BinaryIO, slot: Slot) -> bytes:
    """The digest of a tensor's bytes as they are in a file."""
    digest = Digest()
    for start in range(0, slot.n_bytes, _CHUNK):
        digest.feed(read(file, slot.offset + start, min(_CHUNK, slot.n_bytes - start)))
    return digest.end()


def differs(path: Path, what: str) -> RuntimeError:
    """The error for a file that is not what was written."""
    return RuntimeError(
        f"{path}: {what} reads back otherwise than it was written; the file is deleted. Check the "
        "disk and the memory of this machine, then try again"
    )


class Steps:
    """Tells whoever watches how far it has come.

    Args:
        n_bytes: Bytes to write; they count again when they are checked.
        progress: Who watches.
    """

    def __init__(self, n_bytes: int, progress: Progress | None) -> None:
        self._total = 2 * n_bytes
        self._done = 0
        self._what = ""
        self._progress = progress

    def at(self, what: str) -> None:
        """Names what is at hand."""
        self._what = what

    def advance(self, n_bytes: int) -> None:
        """Counts bytes."""
        self._done += n_bytes
        if self._progress:
            self._progress(self._done, self._total, self._what)
