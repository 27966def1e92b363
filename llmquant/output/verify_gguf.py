"""Re-read a GGUF file with a reader that shares no code with the writer. NumPy and plain reads only."""

import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llmquant.errors import VerifyError
from llmquant.formats import LinearSpec
from llmquant.output.gguf_spec import ROPE, Expected, Order
from llmquant.output.verify import Place, Record, verify_places
from llmquant.plan import Plan

# (bits, symmetric) of most linears -> llama.cpp's number for "mostly of this type"
_FILE_TYPES = {(4, True): 2, (4, False): 3, (8, True): 7}
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


def verify_gguf(file: Path, plan: Plan, record: Record, config: Mapping[str, Any]) -> None:
    """VerifyError unless the file is right for the model of this config.json, and its tensors are the recorded ones.

    Names, order of rows and metadata are those of `gguf_spec.py`, never of the writer.
    """
    metadata, stored = read_gguf(file)
    expected = Expected(file.name, config)
    check_header(expected, metadata, stored, plan.specs)
    places = in_checkpoint(file.name, stored, [row.name for row in plan.rows], expected.order)
    verify_places(file, places, plan, record)


def check_header(
    expected: Expected, metadata: Mapping[str, Any], stored: Mapping[str, Place], specs: Sequence[LinearSpec]
) -> None:
    """VerifyError unless the tensors' names, the metadata and the factors of rope are the expected ones."""
    embedding = stored.get("token_embd.weight")
    expected.check(metadata, stored, embedding.shape[0] if embedding is not None else 0)
    if ROPE in stored:
        expected.check_rope(stored[ROPE].floats())
    counts = Counter((spec.scheme.bits, spec.scheme.symmetric) for spec in specs)
    types = {_FILE_TYPES.get(kind) for kind, count in counts.items() if count == max(counts.values())}
    if (found := metadata.get("general.file_type")) not in types:
        wanted = " or ".join(map(str, types))
        raise VerifyError(f"{expected.where}: general.file_type", str(found), expected=wanted)


def in_checkpoint(where: str, stored: Mapping[str, Place], keys: Iterable[str], order: Order) -> dict[str, Place]:
    """The file's tensors by their names in the checkpoint, among `keys`; rows in the checkpoint's order."""
    places, left = dict[str, Place](), dict(stored)
    for key in keys:
        if (place := left.pop(order.stored_name(key) or "", None)) is None:
            continue
        heads = order.heads_of(key)
        if heads is not None and place.shape[0] % (2 * heads):
            raise VerifyError(f"{where}: {key}", f"{place.shape[0]} rows", expected=f"those of {heads} heads")
        places[key] = (
            place if heads is None else PermutedPlace(place.file, place.dtype, place.shape, place.start, heads)
        )
    if left:
        raise VerifyError(f"{where}: {min(left)}", "is no tensor of the checkpoint, or a second one")
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
                if (key := _text(stream)) in metadata:
                    raise KeyError(f"{key} is there twice")
                metadata[key] = _entry(stream, _number(stream, "I"))
            if (alignment := metadata.get("general.alignment", 32)) != 32:
                raise KeyError(f"an alignment of {alignment}")
            table = [_tensor(stream) for _ in range(n_tensors)]
            start = -(-stream.tell() // 32) * 32
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise VerifyError(file.name, f"its header cannot be read ({error})", expected="a GGUF file") from None
    places, end = {}, 0
    for name, (dtype, block, size), sizes, offset in table:
        if not sizes or sizes[-1] % block:  # readers would disagree on the bytes of a row
            raise VerifyError(f"{file.name}: {name}", f"sizes {sizes}", expected=f"rows of whole blocks of {block}")
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
