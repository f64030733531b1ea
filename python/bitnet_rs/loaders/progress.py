"""A progress bar while the core takes the weights of a large checkpoint.

For `load`. Apart because it is about who watches, not about files: it wraps the weights, counts
those that are taken, and imports rich only where the bar is seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from numpy.typing import NDArray

from bitnet_rs.loaders import Checkpoint

# Smaller models are loaded before a progress bar could be read.
_PROGRESS_BYTES: Final = 500_000_000


class _Counted(Mapping[str, NDArray[Any]]):
    """Weights that count how many of them were taken."""

    def __init__(self, weights: Mapping[str, NDArray[Any]], on_taken: Callable[[], None]) -> None:
        self._weights = weights
        self._on_taken = on_taken

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor = self._weights[name]
        self._on_taken()
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@contextmanager
def show_progress(checkpoint: Checkpoint) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The checkpoint's weights, under a progress bar where someone may be waiting for them."""
    if checkpoint.n_files_bytes < _PROGRESS_BYTES or not sys.stderr.isatty():
        yield checkpoint.weights
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"Loading {checkpoint.name}", total=len(checkpoint.weights))
        yield _Counted(checkpoint.weights, lambda: bar.advance(task))
