"""Re-read what was written, with a reader that shares no code with the writer, and compare it with what was computed.

The reader below is NumPy only: its own header parsing, its own unpacking, plain reads.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmquant.errors import VerifyError
from llmquant.formats import DENSE, LinearSpec
from llmquant.grid import QuantizedWeight
from llmquant.plan import Plan

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass
class Record:
    """Digests of everything that went into the output, taken when it was computed."""

    format_name: str
    digests: dict[str, str] = field(default_factory=dict)

    _new: list[str] = field(default_factory=list)

    def take_new(self) -> dict[str, str]:
        """Digests since the last call."""
        new, self._new = {name: self.digests[name] for name in self._new}, []
        return new

    def restore(self, digests: dict[str, str]) -> None:
        """Digests that an earlier run took."""
        self.digests |= digests

    def _note(self, name: str, digest: str) -> None:
        self.digests[name] = digest
        self._new.append(name)

    def copied(self, name: str, tensor: Tensor) -> None:
        flat = tensor.contiguous().reshape(-1)
        self._note(name, _digest(flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)))

    def quantized(self, spec: LinearSpec, weight: QuantizedWeight) -> None:
        if self.format_name in DENSE:  # its weights are what can be compared
            dense = weight.dequantize(spec.dtype)
            self.copied(spec.key, dense.T if spec.transposed else dense)
        else:
            codes, scales = weight.codes_OI.cpu().contiguous().numpy(), weight.scales_OG.cpu().contiguous().numpy()
            self._note(spec.key, _digest(codes, scales))


def verify_output(folder: Path, plan: Plan, record: Record) -> None:
    """VerifyError unless the folder's tensors are exactly the plan's, bit for bit the record's, and finite."""
    places = read_places(folder)
    if places.keys() != plan.layout.keys():
        odd = sorted(places.keys() ^ plan.layout.keys())[0]
        raise VerifyError(str(folder), f"tensor {odd} is {'unplanned' if odd in places else 'missing'}")
    for name, (dtype, shape) in plan.layout.items():
        if (_DTYPES[places[name].dtype], places[name].shape) != (dtype, shape):
            raise VerifyError(name, f"{places[name].dtype} {places[name].shape}", expected=f"{dtype} {shape}")
    decode = DECODERS.get(record.format_name)
    for row in plan.rows:
        if row.spec is None or decode is None:
            if row.spec is not None and not np.isfinite(places[row.name].floats()).all():
                raise VerifyError(row.name, "a weight that is not finite was written")
            found = _digest(places[row.name].raw())
        else:
            codes, scales = decode(row.spec, places)
            if not np.isfinite(scales).all() or (scales == 0).any():
                raise VerifyError(row.name, "a scale that is zero or not finite was written")
            found = _digest(codes, scales)
        if found != record.digests.get(row.name):
            raise VerifyError(
                row.name, "the bytes on disk do not decode to what was computed", remedy="do not use this output"
            )


@dataclass(frozen=True)
class Place:
    """One tensor on disk."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize

    def raw(self) -> NDArray[np.uint8]:
        return np.fromfile(self.file, np.uint8, self.nbytes, offset=self.start)

    def floats(self) -> NDArray[np.float32]:
        raw = self.raw()
        if self.dtype == "BF16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return raw.view({"F32": "<f4", "F16": "<f2"}[self.dtype]).astype(np.float32).reshape(self.shape)


def read_places(folder: Path) -> dict[str, Place]:
    """All tensors of a folder's safetensors files, as stock loaders would find them: by the index or the one name."""
    places: dict[str, Place] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, place in _read_header(file).items():
            if name in places:
                raise VerifyError(f"{file.name}: {name}", "lies in two files")
            places[name] = place
    _check_index(folder, places)
    return places


def _read_header(file: Path) -> dict[str, Place]:
    """The tensors of one file, which must lie one behind the other up to its end."""
    size, places = file.stat().st_size, {}
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(min(length, size)))
        header.pop("__metadata__", None)
        at = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            place = Place(file, entry["dtype"], tuple(entry["shape"]), 8 + length + at)
            if entry["data_offsets"] != [at, at + place.nbytes]:
                got, expected = entry["data_offsets"], [at, at + place.nbytes]
                raise VerifyError(f"{file.name}: {name}", f"data_offsets {got}", expected=str(expected))
            places[name] = place
            at += place.nbytes
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VerifyError(file.name, f"its header cannot be read ({error})", expected="a safetensors file") from None
    if 8 + length + at != size:
        raise VerifyError(file.name, f"{size} bytes", expected=str(8 + length + at))
    return places


def _check_index(folder: Path, places: dict[str, Place]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if odd := {place.file.name for place in places.values()} - {"model.safetensors"}:
            raise VerifyError(sorted(odd)[0], "no index names it", expected=index.name)
        return
    try:
        table = json.loads(index.read_bytes())
        weight_map, total = table["weight_map"], table["metadata"]["total_size"]
    except (ValueError, TypeError, KeyError) as error:
        raise VerifyError(index.name, f"cannot be read ({error})") from None
    if weight_map != {name: place.file.name for name, place in places.items()}:
        raise VerifyError(index.name, "does not name the file of every tensor")
    if total != (nbytes := sum(place.nbytes for place in places.values())):
        raise VerifyError(index.name, f"total_size {total}", expected=str(nbytes))


Decoded = tuple[NDArray[np.int8], NDArray[np.float32]]


def _decode_compressed_tensors(spec: LinearSpec, places: dict[str, Place]) -> Decoded:
    packed, bits = places[f"{spec.prefix}weight_packed"], spec.scheme.bits
    shape = places[f"{spec.prefix}weight_shape"].raw().view("<i8")
    if tuple(shape) != spec.shape:
        raise VerifyError(spec.key, f"weight_shape {shape.tolist()}", expected=str(list(spec.shape)))
    rows, columns = spec.shape
    stream = np.unpackbits(packed.raw().reshape(rows, -1), axis=1, bitorder="little")[:, : columns * bits]
    unsigned = np.packbits(stream.reshape(rows, columns, bits), axis=2, bitorder="little")[..., 0]
    codes = (unsigned.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return codes, places[f"{spec.prefix}weight_scale"].floats()


# Formats that hold codes; the others are compared as dense weights.
DECODERS: dict[str, Callable[[LinearSpec, dict[str, Place]], Decoded]] = {
    "compressed-tensors": _decode_compressed_tensors
}


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
