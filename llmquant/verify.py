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
from llmquant.formats import LinearSpec
from llmquant.grid import QuantizedWeight
from llmquant.plan import Plan

_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


@dataclass
class Record:
    """Digests of everything that went into the output, taken when it was computed."""

    format_name: str
    digests: dict[str, str] = field(default_factory=dict)

    def copied(self, name: str, tensor: Tensor) -> None:
        flat = tensor.contiguous().reshape(-1)
        self.digests[name] = _digest(flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8))

    def quantized(self, spec: LinearSpec, weight: QuantizedWeight) -> None:
        if self.format_name == "fake":  # holds no codes; its dense weights are what can be compared
            dense = weight.dequantize(spec.dtype)
            self.copied(spec.key, dense.T if spec.transposed else dense)
        else:
            codes, scales = weight.codes_OI.cpu().contiguous().numpy(), weight.scales_OG.cpu().contiguous().numpy()
            self.digests[spec.key] = _digest(codes, scales)


def verify_output(folder: Path, plan: Plan, record: Record) -> None:
    """VerifyError unless the folder's tensors are exactly the plan's, bit for bit the record's, and finite."""
    places = read_places(folder)
    if places.keys() != plan.layout.keys():
        odd = sorted(places.keys() ^ plan.layout.keys())[0]
        raise VerifyError(str(folder), f"tensor {odd} is {'unplanned' if odd in places else 'missing'}")
    decode = DECODERS.get(record.format_name)
    for row in plan.rows:
        if row.spec is None or decode is None:
            found = _digest(places[row.name].raw())
        else:
            codes, scales = decode(row.spec, places)
            if not np.isfinite(scales).all() or (scales == 0).any():
                raise VerifyError(row.name, "a scale that is zero or not finite was written")
            found = _digest(codes, scales)
        if found != record.digests[row.name]:
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

    def raw(self) -> NDArray[np.uint8]:
        return np.fromfile(self.file, np.uint8, prod(self.shape) * _SIZES[self.dtype], offset=self.start)

    def floats(self) -> NDArray[np.float32]:
        raw = self.raw()
        if self.dtype == "BF16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return raw.view({"F32": "<f4", "F16": "<f2"}[self.dtype]).astype(np.float32).reshape(self.shape)


def read_places(folder: Path) -> dict[str, Place]:
    """All tensors of a folder's safetensors files, checked against the index where there is one."""
    places: dict[str, Place] = {}
    for file in sorted(folder.glob("*.safetensors")):
        length = int(np.fromfile(file, "<u8", 1)[0])
        header: dict[str, Any] = json.loads(np.fromfile(file, np.uint8, length, offset=8).tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in places:
                raise VerifyError(f"{file.name}: {name}", "lies in two files")
            places[name] = Place(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        end = max((8 + length + entry["data_offsets"][1] for entry in header.values()), default=8 + length)
        if end != file.stat().st_size:
            raise VerifyError(file.name, f"{file.stat().st_size} bytes", expected=str(end))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if weight_map != {name: place.file.name for name, place in places.items()}:
            raise VerifyError(index.name, "does not name the file of every tensor")
    return places


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
