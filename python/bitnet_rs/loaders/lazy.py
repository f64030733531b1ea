"""Tensors by canonical name that are read when they are asked for.

For the loaders of every container, which differ in how one tensor is read and in nothing else of
this. Apart from them for that reason.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

_Entry = TypeVar("_Entry")


class LazyWeights(Mapping[str, NDArray[Any]], Generic[_Entry]):
    """A mapping over entries that say where each tensor is.

    Args:
        entries: By canonical name.
        path: The folder or file, for messages.
    """

    def __init__(self, entries: Mapping[str, _Entry], path: Path) -> None:
        self._entries = entries
        self._path = path

    @abstractmethod
    def _read(self, name: str, entry: _Entry) -> NDArray[Any]:
        """Reads one tensor."""

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._entries:
            raise KeyError(f"tensor {name} is not in the checkpoint {self._path}")
        return self._read(name, self._entries[name])

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor

    def __repr__(self) -> str:
        return f"<{len(self)} tensors of {self._path}>"
