"""A strict reader of safetensors headers: names, dtypes, shapes and byte ranges. Nothing in a file is trusted.

Layout of a file: the length n of the header in 8 bytes, little endian; n bytes of JSON; then the bytes of the tensors,
without gaps. Source: the format's description at https://github.com/huggingface/safetensors
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from llmquant.errors import SourceError

MAX_HEADER_BYTES = 25 * 1024 * 1024  # largest header, index or config that is read
_MAX_TENSORS = 100_000  # most tensors in one file; parsing the header of that many takes a second and 100 MB

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U32": torch.uint32,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `start` and `end` are byte offsets from the beginning of `file`."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object in which no name occurs twice; SourceError for anything else.

    One byte of text can take a hundred bytes of memory once it is parsed. So text with more brackets and commas than
    the header of 100,000 tensors can have (3 and at most 11 for each) is not parsed at all.
    """
    data = text.encode() if isinstance(text, str) else text
    if data.count(b"[") + data.count(b"{") > 3 * _MAX_TENSORS or data.count(b",") > 11 * _MAX_TENSORS:
        raise SourceError(
            where, f"{len(data)} bytes of JSON with too many parts", expected=f"{_MAX_TENSORS} tensors at most"
        )
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise SourceError(where, f"not valid JSON ({error})", remedy="download the file again") from None
    if not isinstance(value, dict):
        raise SourceError(where, f"a JSON {type(value).__name__}", expected="a JSON object")
    return value


def parse_header(file: str, header: bytes, file_size: int) -> dict[str, TensorInfo]:
    """All tensors of a file, from the JSON bytes of its header. `file_size` is the size of the whole file.

    SourceError for unknown dtypes, shapes that do not fit the byte range, ranges that overlap, leave gaps or do not end
    where the file ends (a truncated download), and control characters in names.
    """
    table = parse_json(header, f"{file} (header)")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise SourceError(file, "__metadata__ is not an object")
    base = 8 + len(header)
    infos = [_tensor(file, name, entry, base) for name, entry in table.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    at = base
    for info in infos:
        if info.start != at:
            raise SourceError(
                f"{file}: {info.name[:200]}", f"bytes start at {info.start}", expected=f"{at}: no gap, no overlap"
            )
        at = info.end
    if at != file_size:
        raise SourceError(
            file,
            f"{file_size} bytes",
            expected=f"{at} by its header",
            remedy="download it again: it is truncated or damaged",
        )
    return {info.name: info for info in infos}


def _tensor(file: str, name: str, entry: Any, base: int) -> TensorInfo:
    where = f"{file}: {name[:200]!r}"
    if not name.isprintable() or not name:
        raise SourceError(where, "a tensor name that is empty or holds control characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise SourceError(where, "a malformed header entry", expected="dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SourceError(where, f"dtype {str(dtype)[:80]!r}", expected=f"one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 8:
        raise SourceError(where, f"shape {str(shape)[:80]}", expected="a short list of sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise SourceError(where, f"data_offsets {str(offsets)[:80]}", expected="[begin, end]")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise SourceError(where, f"{offsets[1] - offsets[0]} bytes", expected=f"{nbytes} for {dtype} {shape}")
    return TensorInfo(name, file, DTYPES[dtype], tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**62 for x in value)


def header_length(file: str, first_bytes: bytes, file_size: int) -> int:
    """Length of the JSON header, from the first 8 bytes of a file. SourceError if no such header can be there."""
    length = int.from_bytes(first_bytes[:8], "little")
    if len(first_bytes) < 8 or length > file_size - 8 or length > MAX_HEADER_BYTES or length < 2:
        raise SourceError(
            file,
            f"header of {length} bytes in a file of {file_size}",
            expected=f"at most {MAX_HEADER_BYTES} and inside the file",
            remedy="it is truncated or no safetensors file",
        )
    return length


def build_header(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorInfo]]:
    """The bytes of a header, its length in front, and the places of `tensors`.

    Tensors with larger elements come first, so that each one is aligned.

    >>> head, places = build_header({"a": (torch.int8, (3,)), "b": (torch.int32, (2,))})
    >>> [(p.name, p.start - len(head), p.end - len(head)) for p in places.values()]
    [('b', 0, 8), ('a', 8, 11)]
    """
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        dtype, shape = tensors[name]
        end = at + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, parse_header("(new file)", text, len(head) + at)
