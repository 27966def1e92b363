"""A strict reader of GGUF headers: metadata, and name, type, shape and byte range of every tensor. Nothing is trusted.

It reads versions 2 and 3, little endian; `gguf/file.py` describes the layout, and shares no code with this. Every count
and length is compared with the file's size before anything is read by it.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, BinaryIO, NoReturn

import numpy as np

from llmquant.errors import SourceError

MAX_HEADER_BYTES = 64 * 1024 * 1024  # vocabulary and merges of 256,000 tokens take about 10 MB
_MAX_ITEMS = 2_000_000  # most items of all arrays together
_MAX_ENTRIES = 100_000  # most entries of metadata, and most tensors


@dataclass(frozen=True)
class BlockType:
    """A type of block: `nbytes` bytes hold `weights` weights of a row."""

    name: str
    weights: int
    nbytes: int


# The numbers of ggml's types, from its header ggml.h; numbers that are missing belong to types that it has removed.
BLOCK_TYPES = {
    number: BlockType(*block)
    for number, block in {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
    }.items()
}
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor. `shape` is that of its weights, rows first; `start` and `end` are byte offsets in the file."""

    name: str
    block: BlockType
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GGUFHeader:
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_header(stream: BinaryIO, file: str, size: int) -> GGUFHeader:
    """The header of a file of `size` bytes; `stream` stands at its beginning.

    SourceError for other versions and byte orders, unknown types, names that occur twice, and tensors that overlap,
    leave gaps or do not end where the file ends (a truncated download).
    """
    return _Header(stream, file, size).read()


@dataclass
class _Header:
    stream: BinaryIO
    file: str
    size: int
    at: int = 0
    n_items: int = 0
    where: str = field(init=False)

    def __post_init__(self) -> None:
        self.where = self.file

    def read(self) -> GGUFHeader:
        if self.take(4) != b"GGUF":
            self.refuse("does not begin with GGUF", expected="a GGUF file")
        version = self.number("<u4")
        if version not in (2, 3):
            big = version in (2 << 24, 3 << 24)
            self.refuse("is big-endian" if big else f"version {version}", expected="version 2 or 3, little-endian")
        n_tensors, n_entries = self.number("<u8"), self.number("<u8")
        for count, what in ((n_tensors, "tensors"), (n_entries, "entries of metadata")):
            if count > _MAX_ENTRIES:
                self.refuse(f"{count} {what}", expected=f"at most {_MAX_ENTRIES}")
        metadata: dict[str, Any] = {}
        for _ in range(n_entries):
            self.where = self.file
            key = self.name()
            if key in metadata:
                self.refuse(f"metadata {key!r} occurs twice")
            self.where = f"{self.file}: {key!r}"
            metadata[key] = self.value(self.number("<u4"))
        infos = [self.tensor() for _ in range(n_tensors)]
        self.where = self.file
        return GGUFHeader(metadata, self.places(infos, self.alignment(metadata)))

    # -- metadata --------------------------------------------------------------------------------------
    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array(self.number("<u4"), self.number("<u8"))
        if kind not in _SCALARS:
            self.refuse(f"metadata of type {kind}", expected="0 to 12")
        if kind == _BOOL and (byte := self.number("u1")) > 1:
            self.refuse(f"a bool of {byte}", expected="0 or 1")
        return bool(byte) if kind == _BOOL else self.number(_SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        self.n_items += count
        if self.n_items > _MAX_ITEMS:
            self.refuse(f"an array of {count} items", expected=f"at most {_MAX_ITEMS} in all arrays")
        if kind == _STRING:
            return [self.text() for _ in range(count)]  # `take` stops at the end of the file, whatever the count
        if kind not in _SCALARS:
            self.refuse(f"an array of type {kind}", expected="numbers or strings")
        dtype = np.dtype(_SCALARS[kind])
        items: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return items

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
            self.refuse(f"general.alignment {str(alignment)[:40]}", expected="a power of two")
        return alignment

    # -- tensors ---------------------------------------------------------------------------------------
    def tensor(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        """Name, type, shape and offset of one tensor in the table."""
        self.where = self.file
        name = self.name()
        self.where = f"{self.file}: {name!r}"
        n_sizes = self.number("<u4")
        if not 1 <= n_sizes <= 4:
            self.refuse(f"{n_sizes} dimensions", expected="1 to 4")
        sizes = [self.number("<u8") for _ in range(n_sizes)]
        number, offset = self.number("<u4"), self.number("<u8")
        if number not in BLOCK_TYPES:
            known = ", ".join(block.name for block in BLOCK_TYPES.values())
            self.refuse(f"type {number}", expected=f"one of {known}", remedy="a newer llmquant may know it")
        block = BLOCK_TYPES[number]
        if not all(0 < size < 2**48 for size in sizes) or sizes[0] % block.weights:
            self.refuse(f"sizes {sizes} in {block.name}", expected=f"rows of whole blocks of {block.weights}")
        return name, block, tuple(reversed(sizes)), offset

    def places(self, infos: list[tuple[str, BlockType, tuple[int, ...], int]], alignment: int) -> dict[str, GGUFTensor]:
        """Where the tensors lie: one after the other, each at a multiple of the alignment, up to the file's end."""
        base = self.at + -self.at % alignment
        tensors: dict[str, GGUFTensor] = {}
        begin = end = 0
        for name, block, shape, offset in infos:
            self.where = f"{self.file}: {name!r}"
            if name in tensors:
                self.refuse("a second tensor of this name")
            begin = end + -end % alignment
            if offset != begin:
                self.refuse(f"its bytes start at {offset}", expected=f"{begin}: no gap, no overlap")
            end = begin + prod(shape) // block.weights * block.nbytes
            tensors[name] = GGUFTensor(name, block, shape, base + begin, base + end)
        self.where = self.file
        if not base + end <= self.size <= base + end + -end % alignment:
            self.refuse(
                f"{self.size} bytes",
                expected=f"{base + end} by its header",
                remedy="download it again: it is truncated or damaged",
            )
        return tensors

    # -- bytes -----------------------------------------------------------------------------------------
    def take(self, count: int) -> bytes:
        if count > min(self.size, MAX_HEADER_BYTES) - self.at:
            self.refuse(
                f"its header goes on behind byte {min(self.size, MAX_HEADER_BYTES)}",
                expected=f"a header inside the file, of at most {MAX_HEADER_BYTES} bytes",
                remedy="download it again: it is truncated or damaged",
            )
        data = self.stream.read(count)
        if len(data) != count:
            self.refuse("the file ended early", remedy="it changed while it was read")
        self.at += count
        return data

    def number(self, dtype: str) -> Any:
        code = np.dtype(dtype)
        value = np.frombuffer(self.take(code.itemsize), code)[0]
        # 1e-6 was written as a float32. The decimal number that was meant is the shortest one with that float32.
        return float(str(value)) if dtype == "<f4" else value.item()

    def text(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        data = self.take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"text that is not UTF-8 ({data[:20]!r})")

    def name(self) -> str:
        name = self.text()
        if not name.isprintable() or not 0 < len(name) <= 256:
            self.refuse(f"a name of {len(name)} characters, or with control characters", expected="a short name")
        return name

    def refuse(self, got: str, *, expected: str = "", remedy: str = "") -> NoReturn:
        raise SourceError(self.where, got, expected=expected, remedy=remedy)
