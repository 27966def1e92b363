"""The bytes at the head of a GGUF file: header, metadata, table of tensors. Tensors are written later, one by one.

Version 3, little endian:
    magic, version, number of tensors, number of metadata entries
    for each entry: key, type, value
    for each tensor: name, number of dimensions, sizes (fastest first), type, offset from the start of the data
The data, and each tensor in it, begins at a multiple of 32. Source: docs/gguf.md of ggml.
"""

import struct
from dataclasses import dataclass
from typing import Any

import torch

from llmquant.errors import FormatError
from llmquant.source.header import TensorInfo

ALIGNMENT = 32
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. `shape` is that of its weights, however they are stored."""

    name: str
    kind: str  # a key of TYPES
    shape: tuple[int, ...]
    stored: tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of the bytes or floats that are written


def build_gguf(file: str, metadata: dict[str, Any], entries: list[Entry]) -> tuple[bytes, dict[str, TensorInfo]]:
    """The bytes before the data, and the place of every tensor in `file`.

    Metadata values: str, bool, int (uint32), float (float32), and lists of str, int (int32) or float (float32).
    FormatError for a value that none of these holds.
    """
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata)))
    for key, value in metadata.items():
        try:
            head += _string(key) + _value(value)
        except (struct.error, TypeError, UnicodeEncodeError) as error:
            raise FormatError(f"gguf: {key}", f"{str(value)[:60]!r} ({error})", expected="what GGUF can hold") from None
    offset, starts = 0, []
    for entry in entries:
        head += _string(entry.name) + struct.pack("<I", len(entry.shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(entry.shape))
        head += struct.pack("<IQ", TYPES[entry.kind], offset)
        starts.append(offset)
        dtype, shape = entry.stored
        offset += _aligned(dtype.itemsize * torch.Size(shape).numel())
    head += bytes(-len(head) % ALIGNMENT)
    places = {}
    for entry, start in zip(entries, starts, strict=True):
        dtype, shape = entry.stored
        begin = len(head) + start
        end = begin + dtype.itemsize * torch.Size(shape).numel()
        places[entry.name] = TensorInfo(entry.name, file, dtype, shape, begin, end)
    return bytes(head), places


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        if all(isinstance(item, str) for item in value):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        kind, code = ("f", 6) if any(isinstance(item, float) for item in value) else ("i", 5)
        return struct.pack("<IIQ", 9, code, len(value)) + struct.pack(f"<{len(value)}{kind}", *value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value)
