"""GGUF files: their metadata, and where each tensor lies.

For `ggml_types.py`, which knows what the bytes of a tensor mean, and for whoever makes a model of
the metadata. Apart because it knows the container and nothing of models or weights. The layout is
that of ggml's `docs/gguf.md`: a header, metadata, tensor infos, then aligned tensor data.

A file may come from anywhere. Every count and length is compared with the bytes that are left
before anything is allocated for it, so a file of a kilobyte cannot ask for more than a few.
"""

import math
import mmap
import re
import reprlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.loaders.mapped import Mapper

_MAGIC: Final = b"GGUF"
_CURE: Final = "download or copy the file again"
_DEFAULT_ALIGNMENT: Final = 32  # where general.alignment is absent

# Value types of metadata by their id: the name, and the code that struct and numpy share.
_SCALARS: Final[Mapping[int, tuple[str, str]]] = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9

# Real files have some hundred tensors and a header of 10 MB, with half a million strings at most.
# These limits bound the memory that a header may take, whatever the size of the file.
_MOST_HEADER_BYTES: Final = 1 << 27
_MOST_FIELDS: Final = 1 << 16
_MOST_TENSORS: Final = 1 << 18
_MOST_STRINGS: Final = 1 << 22
_LONGEST_NAME: Final = (1 << 16) - 1  # the format's own limit for keys
_MOST_DIMENSIONS: Final = 4
_ALIGNMENTS: Final = [1 << i for i in range(3, 17)]

# Names of split files, as llama-gguf-split writes them.
_PART: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        name: Its name.
        type_id: The id of its ggml type. What the id means is for `ggml_types.resolve_types`.
        shape: Its shape, slowest dimension first, as numpy has it: (rows, cols) of a matrix.
            ggml lists them the other way round. Never empty: a scalar is (1,).
        file: The file that holds it.
        offset: Bytes from the start of the file to its first byte.
        room: Bytes from there to the next tensor, or to the end of the file.
    """

    name: str
    type_id: int
    shape: tuple[int, ...]
    file: Path
    offset: int
    room: int

    def read(self, n_bytes: int, mapper: Mapper | None = None) -> NDArray[np.uint8]:
        """Maps the first bytes of the tensor read-only; dropping the array unmaps them.

        Args:
            n_bytes: How many.
            mapper: One for many tensors lets go of the pages of the one before.

        Raises:
            ValueError: There are fewer, or the file shrank since it was opened.
        """
        if not 0 <= n_bytes <= self.room:
            raise ValueError(
                f"{self.file}: tensor {shown(self.name)} takes {n_bytes} bytes, and there are "
                f"{self.room} up to the next tensor or the end of the file; {_CURE}"
            )
        what = f"tensor {shown(self.name)}"
        return (mapper or Mapper()).map(self.file, self.offset, n_bytes, what)


@dataclass(frozen=True)
class GgufFile:
    """A validated GGUF file, or all parts of a split one; no weight is in memory.

    Attributes:
        path: The file; of a split one the first part.
        version: 2 or 3.
        metadata: Values by key: Python scalars and strings; arrays are numpy arrays of numbers or
            bools, or lists of strings. Of a split file, the first part's.
        tensors: Tensors by name, in the order of the file.
        n_bytes: Size of the file, or of all its parts.
        alignment: What the offsets of tensors are multiples of, `general.alignment`.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, GgufTensor] = field(repr=False)
    n_bytes: int
    alignment: int = _DEFAULT_ALIGNMENT


def shown(name: str) -> str:
    """A name out of a file as messages show it: quoted and cut where it could upset a terminal."""
    return name if name.isprintable() and 0 < len(name) <= 100 else reprlib.repr(name)


def open_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file and validates all that can be without knowing its types.

    Of a split file (`split.count`), name the first part; the others are found beside it.

    Args:
        path: A GGUF file of version 2 or 3, little-endian.

    Raises:
        FileNotFoundError: No such file, or a part of a split file is missing.
        ValueError: Not a GGUF file, truncated, malformed, or of a kind that is not supported.
    """
    first = _open_part(path)
    count = _count(first, "split.count", 1)
    if count <= 1:
        return first
    tensors = dict(first.tensors)
    n_bytes = first.n_bytes
    for i, part_path in enumerate(_parts(path, count)):
        part = first if i == 0 else _open_part(part_path)
        place = _count(part, "split.no", -1), _count(part, "split.count", 1)
        if place != (i, count):
            raise ValueError(
                f"{part_path}: fields `split.no` and `split.count` are {place[0]} and "
                f"{place[1]}; wanted {i} and {count}; download all parts again, from one revision"
            )
        if part is first:
            continue
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise ValueError(
                f"{part_path}: tensor {shown(min(twice))} is in an earlier part, too; "
                "download all parts again, from one revision"
            )
        tensors |= part.tensors
        n_bytes += part.n_bytes
    wanted = _count(first, "split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise ValueError(
            f"{path}: field `split.tensors.count` is {wanted}, but the {count} parts "
            f"hold {len(tensors)} tensors; download all parts again, from one revision"
        )
    return GgufFile(path, first.version, first.metadata, tensors, n_bytes, first.alignment)


def _count(part: GgufFile, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if not _is_int(value):
        raise ValueError(
            f"{part.path}: field `{key}` is {shown(str(value))}; wanted an integer; {_CURE}"
        )
    return int(value)


def _parts(path: Path, count: int) -> Iterator[Path]:
    name = _PART.fullmatch(path.name)
    if not name or (int(name[2]), int(name[3])) != (1, count):
        raise ValueError(
            f"{path}: is one of {count} parts of a split file; name the first one, and keep the "
            f"names they were published with: ...-00001-of-{count:05}.gguf"
        )
    for i in range(count):
        part = path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise FileNotFoundError(
                f"{part}: no such file, but {path.name} is the first of {count} parts; "
                "download it too"
            )
        yield part


def _open_part(path: Path) -> GgufFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        version = _version(start, size, path)
        # Only the pages of the header are read.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            header = _Header(memory, path)
            metadata, infos, alignment = header.read()
            at = header.at
    tensors = _locate(infos, -(-at // alignment) * alignment, size, alignment, path)
    return GgufFile(path, version, metadata, tensors, size, alignment)


def _version(start: bytes, size: int, path: Path) -> int:
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
        )
    if start[:4] != _MAGIC:
        raise ValueError(f"{path}: starts with {start[:4]!r}; wanted a GGUF file, {_MAGIC!r}")
    if len(start) < 24:
        raise ValueError(f"{path}: has {size} bytes, less than any GGUF file; {_CURE}")
    (version,) = struct.unpack_from("<I", start, 4)
    if version and version & 0xFFFF == 0:
        raise ValueError(
            f"{path}: is a big-endian GGUF file; wanted a little-endian one. Use the published "
            "file, or convert it with gguf-py's `gguf_convert_endian.py FILE little`"
        )
    if version not in (2, 3):
        cure = "convert the model again with a current converter" if version == 1 else _CURE
        raise ValueError(f"{path}: is GGUF version {version}; wanted 2 or 3. {cure.capitalize()}")
    return int(version)


@dataclass(frozen=True)
class _Info:
    """A tensor info as the file has it, with the shape turned round."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int


class _Header:
    """Reads a header front to back. `at` is the offset of what comes next."""

    def __init__(self, memory: mmap.mmap, path: Path) -> None:
        self.at = 8  # after magic and version
        self._memory = memory
        self._path = path
        self._end = min(len(memory), _MOST_HEADER_BYTES)
        self._strings_left = _MOST_STRINGS

    def read(self) -> tuple[dict[str, Any], list[_Info], int]:
        """Metadata, tensor infos and alignment."""
        n_tensors = self._number("Q", "the number of tensors")
        n_fields = self._number("Q", "the number of metadata fields")
        # The least that a tensor info and a field take.
        self._limit(n_tensors, _MOST_TENSORS, 8 + 1 + 4 + 8 + 4 + 8, "tensors")
        self._limit(n_fields, _MOST_FIELDS, 8 + 1 + 4 + 1, "metadata fields")
        metadata: dict[str, Any] = {}
        for i in range(n_fields):
            key = self._name(f"the key of metadata field {i + 1} of {n_fields}")
            if key in metadata:
                self._refuse(f"metadata field `{shown(key)}` comes twice")
            metadata[key] = self._value(f"metadata field `{shown(key)}`")
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not _is_int(alignment) or alignment not in _ALIGNMENTS:
            self._refuse(
                f"metadata field `general.alignment` is {shown(str(alignment))}",
                f"a power of two from {_ALIGNMENTS[0]} to {_ALIGNMENTS[-1]}",
            )
        infos = [self._info(i, n_tensors) for i in range(n_tensors)]
        return metadata, infos, alignment

    def _refuse(self, found: str, wanted: str = "") -> NoReturn:
        wanted = f"; wanted {wanted}" if wanted else ""
        raise ValueError(f"{self._path}: {found}{wanted}; {_CURE}")

    def _limit(self, n: int, most: int, least_bytes: int, what: str) -> None:
        left = self._end - self.at
        if n > most or n * least_bytes > left:
            self._refuse(
                f"declares {n} {what}, with {left} bytes left for them",
                f"at most {min(most, left // least_bytes)}",
            )

    def _claim(self, n_bytes: int, what: str) -> int:
        """Steps over bytes that must be there; returns the offset of the first."""
        at = self.at
        if n_bytes > self._end - at:
            self._refuse(
                f"{what} takes {n_bytes} bytes from offset {at} on, and the "
                + ("file" if self._end == len(self._memory) else "largest header that is read")
                + f" ends at {self._end}"
            )
        self.at = at + n_bytes
        return at

    def _number(self, code: str, what: str) -> Any:
        at = self._claim(struct.calcsize(f"<{code}"), what)
        return struct.unpack_from(f"<{code}", self._memory, at)[0]

    def _string(self, what: str) -> str:
        length = self._number("Q", f"the length of {what}")
        at = self._claim(length, what)
        try:
            return str(self._memory[at : at + length], "utf-8")
        except UnicodeDecodeError as error:
            self._refuse(f"{what} is not UTF-8 text ({error.reason} at offset {at + error.start})")

    def _name(self, what: str) -> str:
        name = self._string(what)
        if not 0 < len(name) <= _LONGEST_NAME:
            self._refuse(f"{what} has {len(name)} characters", f"1 to {_LONGEST_NAME}")
        return name

    def _value(self, what: str) -> Any:
        type_id = self._number("I", f"the type of {what}")
        if type_id == _STRING:
            return self._string(what)
        if type_id == _ARRAY:
            return self._array(what)
        if type_id not in _SCALARS:
            self._refuse(f"{what} has value type {type_id}", "one of 0 to 12")
        if type_id == _BOOL:
            byte = self._number("B", what)
            if byte > 1:
                self._refuse(f"{what} is the bool {byte}", "0 or 1")
            return byte == 1
        return self._number(_SCALARS[type_id][1], what)

    def _array(self, what: str) -> list[str] | NDArray[Any]:
        type_id = self._number("I", f"the type of {what}")
        n = self._number("Q", f"the length of {what}")
        if type_id == _STRING:
            return self._strings(n, what)
        if type_id == _ARRAY:
            self._refuse(f"{what} is an array of arrays", "an array of numbers, bools or strings")
        if type_id not in _SCALARS:
            self._refuse(f"{what} is an array of value type {type_id}", "one of 0 to 8 or 10 to 12")
        dtype = np.dtype(f"<{_SCALARS[type_id][1]}")
        at = self._claim(n * dtype.itemsize, what)
        stored = np.frombuffer(self._memory[at : self.at], np.uint8)
        if type_id == _BOOL and n and stored.max() > 1:
            self._refuse(f"{what} holds the bool {stored.max()}", "0 or 1")
        return stored.view(dtype)

    def _strings(self, n: int, what: str) -> list[str]:
        self._limit(n, self._strings_left, 8, f"strings in {what}")
        self._strings_left -= n
        # Vocabularies have hundreds of thousands: this is the one loop where time shows.
        memory, at, end = self._memory, self.at, self._end
        length_at = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        try:
            for _ in range(n):
                begin = at + 8
                at = begin + length_at(memory, at)[0]
                if at > end:
                    break
                strings.append(str(memory[begin:at], "utf-8"))
        except (UnicodeDecodeError, struct.error) as error:
            self._refuse(f"string {len(strings) + 1} of {n} in {what} is damaged ({error})")
        if at > end:
            self._refuse(f"string {len(strings) + 1} of {n} in {what} ends beyond the header")
        self.at = at
        return strings

    def _info(self, i: int, n: int) -> _Info:
        name = self._name(f"the name of tensor {i + 1} of {n}")
        what = f"tensor {shown(name)}"
        n_dims = self._number("I", f"the number of dimensions of {what}")
        if n_dims > _MOST_DIMENSIONS:
            self._refuse(f"{what} has {n_dims} dimensions", f"at most {_MOST_DIMENSIONS}")
        dims = [self._number("Q", f"the shape of {what}") for _ in range(n_dims)]
        type_id = self._number("I", f"the type of {what}")
        offset = self._number("Q", f"the offset of {what}")
        # A scalar has none in files of gguf-py, such as the scales of TL1 and TL2; to ggml it is
        # one weight in one dimension.
        return _Info(name, type_id, tuple(reversed(dims)) or (1,), offset)


def _locate(
    infos: list[_Info], start: int, size: int, alignment: int, path: Path
) -> dict[str, GgufTensor]:
    """Checks where tensors lie, and finds the room that each has.

    Args:
        infos: In the order of the file.
        start: Where tensor data starts, which offsets count from.
        size: Bytes of the file.
        alignment: What offsets are multiples of.
        path: For messages.
    """
    tensors: dict[str, GgufTensor] = {}
    offsets = sorted({info.offset for info in infos})
    ends = dict(pairwise([*offsets, size - start]))
    taken: dict[int, str] = {}
    for info in infos:
        what = f"{path}: tensor {shown(info.name)}"
        if info.name in tensors:
            raise ValueError(f"{what} comes twice; {_CURE}")
        if info.offset % alignment:
            raise ValueError(
                f"{what} has offset {info.offset}; wanted a multiple of the alignment, "
                f"{alignment}; {_CURE}"
            )
        if start + info.offset >= size:
            raise ValueError(
                f"{what} starts at {start + info.offset}, and the file ends at {size}; {_CURE}"
            )
        if info.offset in taken:
            raise ValueError(
                f"{what} has offset {info.offset}, as has tensor "
                f"{shown(taken[info.offset])}; {_CURE}"
            )
        taken[info.offset] = info.name
        room = ends[info.offset] - info.offset
        n_weights = math.prod(info.shape)
        if not n_weights:
            raise ValueError(
                f"{what} has shape {list(info.shape)}; wanted no dimension of 0; {_CURE}"
            )
        # No type has less than a bit a weight.
        if n_weights > 8 * room:
            raise ValueError(
                f"{what} has shape {list(info.shape)}, which is {n_weights} weights, in {room} "
                f"bytes up to the next tensor or the end of the file; {_CURE}"
            )
        tensors[info.name] = GgufTensor(
            info.name, info.type_id, info.shape, path, start + info.offset, room
        )
    return tensors


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
