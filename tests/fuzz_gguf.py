"""Damaged checkpoints by the thousand: every one must load, or fail quickly with a clear error.

For `test_gguf.py`, which runs some thousands, and for `make fuzz`, which runs 200,000. Small valid
GGUF and safetensors files are damaged: each field of a header set to extreme values, cut at every
byte, and at random. What opens is read whole. Anything but success or a ValueError,
FileNotFoundError or KeyError that names the file is a failure, and so are a second or 16 MB for a
file of a few kilobytes.
"""

import argparse
import json
import random
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints
import ggufs
from bitnet_rs.loaders.ggml_types import read_floats, read_scales, read_trits, resolve_types
from bitnet_rs.loaders.gguf import open_gguf
from bitnet_rs.loaders.i2s_layout import looks_like_another_layout
from bitnet_rs.loaders.mapped import Mapper
from bitnet_rs.loaders.options import GgmlOptions
from bitnet_rs.loaders.safetensors import Reader, open_folder, read_header
from bitnet_rs.loaders.ternary_values import collapse

SECONDS = 1.0
BYTES = 16 << 20
EXTREMES = [
    *(0, 1, 2, 3, 7, 8, 9, 13, 31, 33, 255, 256, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1),
]
# Infinities and a NaN, of float16 and of float32, and the codes that are no trits.
SPECIAL = [b"\x00\x7c", b"\x00\xfc", b"\x01\x7e", b"\x00\x00\x80\x7f", b"\xff" * 4, b"\x00" * 4]


@dataclass(frozen=True)
class Seed:
    """A valid file.

    Attributes:
        name: Its file name.
        data: Its bytes.
        fields: Offset and size of each number in its header.
        read: Opens it in a folder and reads it whole.
    """

    name: str
    data: bytes
    fields: list[tuple[int, int]]
    read: Callable[[Path], None]


def read_gguf(path: Path) -> None:
    file = open_gguf(path)
    types = resolve_types(
        file, GgmlOptions(tl_tiles={(64, 256): (64, 64, 32), (32, 288): (32, 96, 32)})
    )
    mapper = Mapper()
    for name, tensor in file.tensors.items():
        if types[name].kind == "float":
            assert read_floats(tensor, types[name], mapper).shape == tensor.shape
            continue
        trits = read_trits(tensor, types[name], mapper)
        assert trits.shape == tensor.shape
        assert np.abs(trits).max() <= 1
        scales = read_scales(tensor, types[name], mapper)
        assert np.isfinite(scales).all()
        assert collapse(scales).size <= scales.size
    looks_like_another_layout(file, types)


def read_safetensors(path: Path) -> None:
    read_header(path)
    reader = Reader()
    for info in open_folder(path.parent).values():
        assert reader.read(info).shape == info.shape


def seeds() -> list[Seed]:
    rng = np.random.default_rng(0)

    def trits(rows: int, cols: int) -> ggufs.Trits:
        return rng.integers(-1, 2, (rows, cols), np.int8)

    def scales(n: int) -> Any:
        return rng.uniform(0.5, 2, n).astype(np.float16)

    def quantized(type_id: int, n_bytes: int, *halves: int) -> ggufs.Stored:
        block = rng.integers(0, 256, n_bytes, np.uint8)
        for at in halves:
            block[at : at + 2] = np.array([0.5], np.float16).view(np.uint8)
        return ggufs.Stored(type_id, (1, 32 if n_bytes < 100 else 256), block.tobytes())

    def floats(type_id: int, dtype: str, n: int) -> ggufs.Stored:
        return ggufs.Stored(type_id, (n,), rng.uniform(0.5, 2, n).astype(dtype).tobytes())

    tiny = ggufs.gguf(
        {"general.architecture": "x", "a": ggufs.Typed("[u16]", [1, 2])},
        {"t": ggufs.Stored(0, (2, 3), bytes(24)), "q": ggufs.Stored(1, (4,), bytes(8))},
    )
    metadata = {
        "general.architecture": "bitnet",
        "general.alignment": 32,
        **{f"x.{kind}": ggufs.Typed(kind, 1) for kind in ggufs.SCALARS},
        **{f"x.{kind}s": ggufs.Typed(f"[{kind}]", [0, 1]) for kind in ggufs.SCALARS},
        "tokenizer.ggml.tokens": ["a", "b", "é", ""],
        "split.count": ggufs.Typed("u16", 1),
    }
    i2_s = ggufs.gguf(
        metadata,
        {
            "blk.0.attn_norm.weight": floats(0, "<f4", 128),
            "blk.0.attn_q.weight": ggufs.Stored(36, (4, 128), ggufs.i2_s(trits(4, 128), 0.5)),
            "token_embd.weight": floats(30, "<u2", 128),
            "blk.0.attn_v.weight": ggufs.Stored(36, (4, 128), ggufs.i2_s(trits(4, 128), 0.5)),
        },
    )
    rows = trits(4, 64)
    blocks = ggufs.gguf(
        {"general.architecture": "bitnet"},
        {
            "tq1": ggufs.Stored(34, (1, 256), ggufs.tq1_0(trits(1, 256), scales(1))),
            "tq2": ggufs.Stored(35, (2, 256), ggufs.tq2_0(trits(2, 256), scales(2))),
            "iq1": ggufs.Stored(134, (4, 64), ggufs.iq1_bn(rows, scales(4))),
            "iq2": ggufs.Stored(135, (4, 64), ggufs.iq2_bn(rows, scales(4))),
            "iq2_r4": ggufs.Stored(335, (4, 64), ggufs.iq2_bn_r4(rows, scales(4))),
            "q1": ggufs.Stored(41, (1, 128), ggufs.q1_0(trits(1, 128), scales(1))),
            "q2": ggufs.Stored(42, (9, 128), ggufs.q2_0(trits(9, 128), scales(9), 128)),
            "stq1": ggufs.Stored(
                43, (1, 256), ggufs.stq1_0(ggufs.sparse_trits(rng, 1, 256), scales(1))
            ),
            "q8": quantized(8, 34, 0),
            "q4": quantized(12, 144, 0, 2),
            "q6": quantized(14, 210, 208),
        },
    )
    tiles = ggufs.gguf(
        {"general.architecture": "bitnet"},
        {
            "tl1": ggufs.Stored(38, (64, 256), ggufs.tl1(trits(64, 256), 0.5, (64, 64, 32))),
            "tl2": ggufs.Stored(39, (32, 288), ggufs.tl2(trits(32, 288), 0.5, (32, 96, 32))),
        },
    )
    apart = ggufs.gguf(
        {"general.architecture": "bitnet"},
        {
            "w": ggufs.Stored(38, (64, 256), ggufs.tl1(trits(64, 256), 0, (64, 64, 32))[:-32]),
            "w_scale": ggufs.Stored(0, (), np.array([0.5], "<f4").tobytes()),
        },
    )
    names = {
        "tiny.gguf": tiny,
        "apart.gguf": apart,
        "i2_s.gguf": i2_s,
        "blocks.gguf": blocks,
        "tiles.gguf": tiles,
    }
    found = [Seed(name, data, gguf_fields(data), read_gguf) for name, data in names.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        checkpoints.save(
            path,
            {
                "a": ("F32", np.zeros((2, 3), np.float32)),
                "b": ("BF16", np.zeros(5, np.uint16)),
                "c": ("U8", np.zeros((3, 1), np.uint8)),
            },
        )
        data = path.read_bytes()
    found.append(Seed(path.name, data, [(0, 8)], read_safetensors))
    return found


def gguf_fields(data: bytes) -> list[tuple[int, int]]:
    """Offset and size of each number of a valid header."""
    fields: list[tuple[int, int]] = []
    at = 4

    def number(size: int) -> int:
        nonlocal at
        fields.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text() -> None:
        nonlocal at
        length = number(8)
        at += length

    sizes = {type_id: struct.calcsize(code) for type_id, code in ggufs.SCALARS.values()}

    def value(type_id: int) -> None:
        if type_id == 9:
            inner = number(4)
            for _ in range(number(8)):
                value(inner)
        elif type_id == 8:
            text()
        else:
            number(sizes[type_id])

    number(4)
    n_tensors, n_fields = number(8), number(8)
    for _ in range(n_fields):
        text()
        value(number(4))
    for _ in range(n_tensors):
        text()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return fields


def damaged(found: list[Seed], rng: random.Random) -> Iterator[tuple[Seed, bytes]]:
    """Each field of each seed at each extreme, and the smallest cut anywhere; then at random."""
    systematic = [
        (seed, at, size, value) for seed in found for at, size in seed.fields for value in EXTREMES
    ]
    rng.shuffle(systematic)
    cuts = [(seed, n) for seed in (found[0], found[-1]) for n in range(len(seed.data))]
    yield from ((seed, seed.data[:n]) for seed, n in cuts)
    i = 0
    while True:
        # Half of each, so that even few cases have some of both.
        if i < len(systematic):
            seed, at, size, value = systematic[i]
            yield seed, set_number(seed.data, at, size, value)
            i += 1
        seed = rng.choice(found)
        data = seed.data
        for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
            data = mutated(data, seed, found, rng)
        yield seed, data


def set_number(data: bytes, at: int, size: int, value: int) -> bytes:
    number: bytes = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return data[:at] + number + data[at + size :]


def mutated(data: bytes, seed: Seed, found: list[Seed], rng: random.Random) -> bytes:
    kind = rng.randrange(7)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        field_at, size = rng.choice(seed.fields)
        around = int.from_bytes(data[field_at : field_at + size], "little")
        value = rng.choice([*EXTREMES, around + 1, around - 1, 2 * around, rng.getrandbits(64)])
        return set_number(data, field_at, size, value)
    if kind == 1:
        new = rng.choice([*SPECIAL, *(rng.randbytes(n) for n in (1, 1, 2, 4, 8))])
        return data[:at] + new + data[at + len(new) :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + rng.randbytes(rng.randrange(40)) + data[at:]
    if kind == 4:
        return data[:at] + data[at + rng.randrange(40) :]
    if kind == 5:
        begin = rng.randrange(len(data) + 1)
        return data[:at] + data[begin : begin + rng.randrange(200)] + data[at:]
    other = rng.choice(found).data
    return data[:at] + other[min(at, len(other)) :]


def check(seed: Seed, data: bytes, folder: Path, *, trace: bool = True) -> str:
    """Reads damaged data; returns `read` or the name of the error that it was refused with."""
    path = folder / seed.name
    path.write_bytes(data)
    if trace:
        tracemalloc.start()
    began = time.perf_counter()
    outcome, message = "read", seed.name
    try:
        seed.read(path)
    except (ValueError, FileNotFoundError, KeyError) as error:
        outcome, message = type(error).__name__, str(error)
    finally:
        seconds = time.perf_counter() - began
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Errors of Python and numpy are ValueErrors, too; none of them names the file.
    assert seed.name in message, f"the error names no file: {message[:300]}"
    assert len(message) < 3000, f"the error goes on and on: {message[:300]}"
    assert seconds < SECONDS, f"took {seconds:.1f} s"
    assert peak < BYTES, f"took {peak >> 20} MB"
    return outcome


def run(
    n: int,
    seed: int = 0,
    *,
    trace_every: int = 1,
    report: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """Reads `n` damaged files.

    Args:
        n: How many.
        seed: Of what is damaged how.
        trace_every: Memory is measured at one of so many, which takes as long as reading does.
        report: Called with a line from time to time.

    Returns:
        How many were read and how many refused, by the error's name.

    Raises:
        AssertionError: One misbehaved; the message has the file in hexadecimal.
    """
    rng = random.Random(seed)
    found = seeds()
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = Path(name)
        for original in found:
            assert check(original, original.data, folder) == "read", original.name
        for i, (original, data) in zip(range(n), damaged(found, rng), strict=False):
            try:
                outcome = check(original, data, folder, trace=i % trace_every == 0)
            except BaseException as error:
                raise AssertionError(
                    f"case {i} of seed {seed}, from {original.name}: {error!r}\n{data.hex()}"
                ) from error
            counts[outcome] = counts.get(outcome, 0) + 1
            if report and i % 10_000 == 9_999:
                report(f"{i + 1} files: {json.dumps(counts)}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("n", type=int, nargs="?", default=200_000, help="how many files")
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged how")
    args = parser.parse_args()
    counts = run(args.n, args.seed, report=lambda line: print(line, flush=True))
    sys.stdout.write(f"{args.n} files, no failure: {json.dumps(counts)}\n")


if __name__ == "__main__":
    main()
