"""Re-read a GGUF file with a reader that shares no code with the writer. NumPy and plain reads only."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llmquant.errors import SourceError, VerifyError, option
from llmquant.gguf.config import FREQS, Described
from llmquant.output.verify import Place, Record, verify_places
from llmquant.plan import Plan

ROPE = FREQS  # computed from the config; in the file only
# type number -> (dtype as safetensors would call it, weights in a block, bytes of a block)
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
_TYPES |= {2: ("U8", 32, 18), 3: ("U8", 32, 20), 8: ("U8", 32, 34)}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class PermutedPlace(Place):
    """A tensor whose rows are in llama.cpp's order; read in the checkpoint's.

    There, pair p of a head of size h is made of its rows p and p + h/2; here, of rows 2p and 2p + 1.
    """

    heads: int

    def raw(self) -> NDArray[np.uint8]:
        stored = super().raw().reshape(self.shape[0], -1)
        size = self.shape[0] // self.heads
        row = np.arange(self.shape[0])
        head, inside = row // size * size, row % size
        found: NDArray[np.uint8] = stored[head + inside % (size // 2) * 2 + inside // (size // 2)].reshape(-1)
        return found


def verify_gguf(file: Path, plan: Plan, record: Record, names: Mapping[str, str], heads: Mapping[str, int]) -> None:
    """VerifyError unless the file's tensors are the plan's and decode to what was recorded.

    names   name in the plan -> name in the file
    heads   number of heads of each tensor whose rows were permuted, by its name in the plan
    """
    _, stored = read_gguf(file)
    if odd := sorted(stored.keys() ^ set(names.values())):
        raise VerifyError(file.name, f"tensor {odd[0]} is {'unplanned' if odd[0] in stored else 'missing'}")
    places: dict[str, Place] = {}
    for key, name in names.items():
        p = stored[name]
        places[key] = PermutedPlace(p.file, p.dtype, p.shape, p.start, heads[key]) if key in heads else p
    verify_places(file, places, plan, record)


def gguf_places(root: Path) -> dict[str, Place]:
    """Tensors of the one GGUF file in a finished folder, by their names in the checkpoint it was made from."""
    files = sorted(root.glob("*.gguf"))
    if len(files) != 1:
        raise VerifyError(str(root), f"holds {len(files)} GGUF files", expected="one")
    metadata, stored = read_gguf(files[0])
    try:
        names = Described(files[0].name, metadata, {name: place.shape for name, place in stored.items()}).names
    except SourceError as error:
        raise VerifyError(str(root), error.message(option)) from None
    places: dict[str, Place] = {}
    for name, p in stored.items():
        key = name if name == ROPE else names.ours(name)
        if key is None or key in places:
            raise VerifyError(f"{files[0].name}: {name}", f"is no tensor of {names.architecture}, or a second one")
        heads = names.heads_of(key)
        places[key] = p if heads is None else PermutedPlace(p.file, p.dtype, p.shape, p.start, heads)
    return places


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Place]]:
    """Metadata and tensors of a GGUF file, which must fill it to its end."""
    try:
        with file.open("rb") as stream:
            magic, version, n_tensors, n_entries = struct.unpack("<4sIQQ", stream.read(24))
            if magic != b"GGUF" or version != 3:
                raise VerifyError(file.name, f"{magic!r} version {version}", expected="GGUF version 3")
            metadata: dict[str, Any] = {}
            for _ in range(n_entries):
                key = _text(stream)
                metadata[key] = _entry(stream, _number(stream, "I"))
            table = [_tensor(stream) for _ in range(n_tensors)]
            start = -(-stream.tell() // 32) * 32
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise VerifyError(file.name, f"its header cannot be read ({error})", expected="a GGUF file") from None
    places, end = {}, 0
    for name, (dtype, block, size), sizes, offset in table:
        if offset != -(-end // 32) * 32 or name in places:
            raise VerifyError(f"{file.name}: {name}", f"offset {offset}", expected=str(-(-end // 32) * 32))
        shape = (*sizes[:-1], sizes[-1] // block * size) if dtype == "U8" else sizes
        places[name] = Place(file, dtype, tuple(shape), start + offset)
        end = offset + prod(sizes) // block * size
    if file.stat().st_size != start + end:
        raise VerifyError(file.name, f"{file.stat().st_size} bytes", expected=str(start + end))
    return metadata, places


def _number(stream: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", stream.read(struct.calcsize(code)))[0]


def _text(stream: BinaryIO) -> str:
    length = _number(stream, "Q")
    if length > 2**24:
        raise KeyError(f"a string of {length} bytes")
    return stream.read(length).decode("utf-8")


def _entry(stream: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _text(stream)
    if kind == 9:
        inner, count = _number(stream, "I"), _number(stream, "Q")
        return [_entry(stream, inner) for _ in range(count)]  # ends with the file, whatever the count
    return _number(stream, _SCALARS[kind])


def _tensor(stream: BinaryIO) -> tuple[str, tuple[str, int, int], list[int], int]:
    name = _text(stream)
    sizes = [_number(stream, "Q") for _ in range(_number(stream, "I"))][::-1]
    return name, _TYPES[_number(stream, "I")], sizes, _number(stream, "Q")
