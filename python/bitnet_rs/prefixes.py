"""Keys and values that are kept for sequences to come: found by tokens, dropped by use.

For the engine, which gives what a finished sequence has computed and takes what a new one can
begin with. Apart because it is a data structure of its own: it runs nothing, and how much memory
it may hold is the engine's to say.

What is found gives the same bits as computing it again would: keys and values depend on the
tokens before them alone, not on who computed them or in what chunks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet_rs import _core

# Shorter beginnings are computed again. Nearly all prompts share a BOS and the first words of a
# template; a page of memory for those is not worth it. It is also what entries are looked up by.
MIN_TOKENS = 16

# Most entries. Those with the same beginning are compared one by one, at 3 to 4 µs each (100 to 4,000 tokens).
MAX_ENTRIES = 512


def shared_prefix(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> int:
    """How many tokens two sequences have in common at their start."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


@dataclass(eq=False, slots=True)
class Entry:
    """The keys and values of `tokens`; its cache may hold more of a longer sequence."""

    tokens: NDArray[np.uint32]
    cache: _core.KvCache


class Prefixes:
    """Entries, the one used longest ago first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[int, Entry] = OrderedDict()  # by id(entry)
        self._beginning: dict[bytes, list[Entry]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def find(self, tokens: NDArray[np.uint32]) -> tuple[Entry | None, int]:
        """The entry that shares most with the start of `tokens`, and how many tokens that is.

        None and 0 where none shares at least `MIN_TOKENS`.
        """
        found: Entry | None = None
        most = 0
        for entry in self._beginning.get(_key(tokens), ()):
            n = shared_prefix(entry.tokens, tokens)
            if n > most:
                found, most = entry, n
        return found, most

    def touch(self, entry: Entry) -> None:
        """Counts an entry as just used."""
        if id(entry) in self._entries:
            self._entries.move_to_end(id(entry))

    def keep(self, tokens: NDArray[np.uint32], cache: _core.KvCache) -> None:
        """Keeps the keys and values of `tokens`, which `cache` holds; it is not written any more.

        Entries that are a beginning of it go: it serves for whatever they would.
        """
        if len(tokens) < MIN_TOKENS:
            return
        for entry in list(self._beginning.get(_key(tokens), ())):
            n = shared_prefix(entry.tokens, tokens)
            if n == len(tokens):
                self.touch(entry)
                return
            if n == len(entry.tokens):
                self._drop(entry)
        entry = Entry(tokens.copy(), cache)
        self._entries[id(entry)] = entry
        self._beginning.setdefault(_key(tokens), []).append(entry)
        while len(self._entries) > MAX_ENTRIES:
            self.drop_oldest()

    def drop_oldest(self) -> None:
        """Drops the entry that was used longest ago. There must be one."""
        self._drop(next(iter(self)))

    def clear(self) -> None:
        """Drops all entries."""
        self._entries.clear()
        self._beginning.clear()

    def _drop(self, entry: Entry) -> None:
        del self._entries[id(entry)]
        same = self._beginning[_key(entry.tokens)]
        same.remove(entry)
        if not same:
            del self._beginning[_key(entry.tokens)]


def _key(tokens: NDArray[np.uint32]) -> bytes:
    return tokens[:MIN_TOKENS].tobytes()
