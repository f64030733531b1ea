"""Parts of files as arrays, without copying them: mapped, used, and let go.

For the containers, `safetensors.py` and `gguf.py`, which know where a tensor lies but not how the
system pages it in. Apart because peak memory while loading is decided here: the packed model plus
about one tensor. Advice to the system about what will be read (`MADV_SEQUENTIAL`, `WILLNEED`,
`POPULATE_READ`) made no difference that could be told from noise, whether or not the file was in
the page cache.
"""

import mmap
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Mapper:
    """Maps parts of files read-only, one after another.

    Who asks for the next part is done with the one before, or keeps it to look pieces of it up.
    In either case its pages are let go: they would count as memory of this process until the
    array is dropped, and the system's page cache, which has them anyway, gives them back to
    whoever reads them again.
    """

    def __init__(self) -> None:
        self._before: weakref.ref[mmap.mmap] | None = None

    def map(self, file: Path, offset: int, n_bytes: int, what: str) -> NDArray[np.uint8]:
        """Maps bytes of a file; dropping the array unmaps them.

        Args:
            file: The file.
            offset: Bytes from its start to the first one.
            n_bytes: How many.
            what: What lies there, for messages: `tensor output.weight`.

        Returns:
            A read-only array of that many bytes. It costs no memory until it is read, since
            mappings share the file's page cache.

        Raises:
            ValueError: The file ends before them, so it shrank since it was opened.
        """
        self._let_go()
        if not n_bytes:
            return np.empty(0, np.uint8)
        skip = offset % mmap.ALLOCATIONGRANULARITY  # mappings start at whole pages
        try:
            with file.open("rb") as opened:
                memory = mmap.mmap(
                    opened.fileno(), skip + n_bytes, access=mmap.ACCESS_READ, offset=offset - skip
                )
        except ValueError as error:
            raise ValueError(
                f"{file}: {what} ends beyond the file, which has changed since "
                "it was opened; download or copy it again"
            ) from error
        self._before = weakref.ref(memory)
        return np.frombuffer(memory, np.uint8, n_bytes, skip)

    def _let_go(self) -> None:
        memory = self._before() if self._before else None
        # The pages are a file's and nobody wrote to them: to let them go loses nothing.
        if memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            memory.madvise(mmap.MADV_DONTNEED)


def as_typed(data: NDArray[np.uint8], dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Sees mapped bytes as an array of numbers.

    Args:
        data: The bytes; as many as `shape` wants.
        dtype: A numpy type of fixed width.
        shape: The shape of the result.

    Returns:
        A read-only, aligned, C-contiguous array: the same memory, or a copy where that is not
        aligned, since no format promises it and the core wants it.
    """
    array: NDArray[Any] = data.view(dtype).reshape(shape)
    if not array.flags.aligned:
        array = array.copy()
        array.flags.writeable = False  # as what is mapped: the core need not copy it again
    return array
