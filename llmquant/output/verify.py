"""Re-read what was written, with a reader that shares no code with the writer, and compare it with what was computed.

The reader below is NumPy only: its own header parsing, its own unpacking, plain reads.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmquant.ahead import ahead
from llmquant.errors import VerifyError
from llmquant.formats import LinearSpec
from llmquant.formats.facts import FACTS, Facts
from llmquant.plan import Plan, Row
from llmquant.quant.grid import QuantizedWeight

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
    "U32": torch.uint32,
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

    @property
    def facts(self) -> Facts:
        return FACTS[self.format_name]

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
        self._note(name, digest(flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)))

    def quantized(self, spec: LinearSpec, weight: QuantizedWeight) -> None:
        if self.facts.dense:  # its weights are what can be compared
            dense = weight.dequantize(spec.dtype)
            self.copied(spec.key, dense.T if spec.transposed else dense)
        else:
            parts = [weight.codes_OI, weight.scales_OG, weight.zeros_OG]
            self._note(spec.key, digest(*[p.contiguous().numpy() for p in parts if p is not None]))


def verify_output(folder: Path, plan: Plan, record: Record) -> None:
    """VerifyError unless the folder's tensors are exactly the plan's, bit for bit the record's, and finite."""
    verify_places(folder, read_places(folder), plan, record)


def verify_places(folder: Path, places: Mapping[str, "Place"], plan: Plan, record: Record) -> None:
    """The same for tensors that have been found already."""
    if places.keys() != plan.layout.keys():
        odd = sorted(places.keys() ^ plan.layout.keys())[0]
        raise VerifyError(str(folder), f"tensor {odd} is {'unplanned' if odd in places else 'missing'}")
    for name, (dtype, shape) in plan.layout.items():
        if (_DTYPES[places[name].dtype], places[name].shape) != (dtype, shape):
            raise VerifyError(name, f"{places[name].dtype} {places[name].shape}", expected=f"{dtype} {shape}")
    decode = DECODERS.get(record.format_name)

    def check(row: Row) -> None:
        if row.spec is None or decode is None:
            if row.spec is not None and not np.isfinite(places[row.name].floats()).all():
                raise VerifyError(row.name, "a weight that is not finite was written")
            found = digest(places[row.name].raw())
        else:
            decoded = decode(row.spec, places)
            if not np.isfinite(decoded[1]).all() or (decoded[1] == 0).any():
                raise VerifyError(row.name, "a scale that is zero or not finite was written")
            found = digest(*decoded)
        if found != record.digests.get(row.name):
            raise VerifyError(
                row.name, "the bytes on disk do not decode to what was computed", remedy="do not use this output"
            )

    for _ in ahead(check, plan.rows):
        pass


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

    def is_finite(self) -> bool:
        """No NaN or Inf: in whole numbers, too, and in FP8, whose largest patterns are not looked for."""
        if self.dtype == "F64":
            return bool(np.isfinite(self.raw().view("<f8")).all())
        return self.dtype not in ("F32", "F16", "BF16") or bool(np.isfinite(self.floats()).all())


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


Decoded = tuple[NDArray[Any], ...]  # codes_OI int8, scales_OG float32 and, if asymmetric, zeros_OG int8


def _decode_compressed_tensors(spec: LinearSpec, places: Mapping[str, Place]) -> Decoded:
    packed, bits = places[f"{spec.prefix}weight_packed"], spec.scheme.bits
    shape = places[f"{spec.prefix}weight_shape"].raw().view("<i8")
    if tuple(shape) != spec.shape:
        raise VerifyError(spec.key, f"weight_shape {shape.tolist()}", expected=str(list(spec.shape)))
    rows, columns = spec.shape
    raw = packed.raw().reshape(rows, -1)
    if 8 % bits == 0:
        unsigned = np.empty((*raw.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            unsigned[..., i] = raw >> i * bits & (2**bits - 1)
        unsigned = unsigned.reshape(rows, -1)[:, :columns]
    else:
        stream = np.unpackbits(raw, axis=1, bitorder="little")[:, : columns * bits]
        unsigned = np.packbits(stream.reshape(rows, columns, bits), axis=2, bitorder="little")[..., 0]
    codes = (unsigned - np.uint8(2 ** (bits - 1))).view(np.int8)  # wraps round
    return codes, places[f"{spec.prefix}weight_scale"].floats()


def _decode_gptq(spec: LinearSpec, places: Mapping[str, Place]) -> Decoded:
    (rows, columns), bits = spec.shape, spec.scheme.bits
    word = np.dtype("<u4")
    qweight = places[f"{spec.prefix}qweight"].raw().view(word).reshape(-1, rows)
    shifts = np.arange(0, 32, bits, dtype=word)
    codes_IO = (qweight[:, None, :] >> shifts[None, :, None] & (2**bits - 1)).reshape(columns, rows)
    zeros = places[f"{spec.prefix}qzeros"].raw().view(word)[:, None] >> shifts & (2**bits - 1)
    if (zeros != 2 ** (bits - 1) - 1).any():
        raise VerifyError(spec.key, "a zero point off the middle was written")
    scales_GO = places[f"{spec.prefix}scales"].floats()
    group = places[f"{spec.prefix}g_idx"].raw().view("<i4")
    if (group != np.repeat(np.arange(len(scales_GO)), columns // len(scales_GO))).any():
        raise VerifyError(spec.key, "g_idx does not count the groups in order")
    return (codes_IO.T.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8), scales_GO.T


def _decode_awq(spec: LinearSpec, places: Mapping[str, Place]) -> Decoded:
    def column(place: Place) -> NDArray[np.int8]:
        words = place.raw().view("<u4").reshape(place.shape)
        # Output 8 i + j lies in word i: even j from the lowest nibble up, odd j from the fifth.
        nibbles = [words >> 4 * (j // 2 + 4 * (j % 2)) & 15 for j in range(8)]
        return (np.stack(nibbles, axis=-1).reshape(len(words), -1).T.astype(np.int16) - 8).astype(np.int8)

    codes, zeros = column(places[f"{spec.prefix}qweight"]), column(places[f"{spec.prefix}qzeros"])
    scales = places[f"{spec.prefix}scales"].floats().T
    if not spec.scheme.symmetric:
        return codes, scales, zeros
    if zeros.any():
        raise VerifyError(spec.key, "a zero point off the middle was written")
    return codes, scales


def _decode_mlx(spec: LinearSpec, places: Mapping[str, Place]) -> Decoded:
    (rows, columns), bits = spec.shape, spec.scheme.bits
    octets = places[f"{spec.prefix}weight"].raw().reshape(rows, -1)
    stream = np.unpackbits(octets, axis=1, bitorder="little").reshape(rows, columns, bits)
    codes = (stream.astype(np.int16) << np.arange(bits)).sum(-1) - 2 ** (bits - 1)
    scales, biases = (places[f"{spec.prefix}{part}"].floats() for part in ("scales", "biases"))
    if spec.scheme.symmetric:
        if (biases != -scales * 2.0 ** (bits - 1)).any():
            raise VerifyError(spec.key, "a bias that is not the scale's was written")
        return codes.astype(np.int8), scales
    if not np.isfinite(scales).all() or (scales == 0).any() or not np.isfinite(biases).all():
        raise VerifyError(spec.key, "a scale that is zero or not finite was written")
    steps = np.rint(-biases / scales)  # zeros + 2^(bits-1)
    if (_rounded(-steps * scales, places[f"{spec.prefix}biases"].dtype) != biases).any():
        raise VerifyError(spec.key, "a bias that is no multiple of its scale was written")
    return codes.astype(np.int8), scales, (steps - 2 ** (bits - 1)).astype(np.int8)


def _rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """To the nearest number of a safetensors dtype, halves to even."""
    if dtype != "BF16":
        return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)
    words = values.view(np.uint32)
    kept = (words + np.uint32(0x7FFF) + (words >> 16 & 1)) & np.uint32(0xFFFF0000)
    rounded: NDArray[np.float32] = kept.astype(np.uint32).view(np.float32)
    return rounded


def _decode_gguf(spec: LinearSpec, places: Mapping[str, Place]) -> Decoded:
    (rows, columns), groups = spec.shape, spec.scheme.groups(spec.shape[1])
    head = {True: ["d"], False: ["d", "m"]}[spec.scheme.symmetric]
    body = ("codes", "i1", 32) if spec.scheme.bits == 8 else ("codes", "u1", 16)
    kind = np.dtype([*((name, "<f2") for name in head), body])
    blocks = places[spec.key].raw().view(kind).reshape(rows, groups, -1)
    if any((blocks[name] != blocks[name][:, :, :1]).any() for name in head):
        raise VerifyError(spec.key, "blocks of one group differ in their scales")
    scales = blocks["d"][:, :, 0].astype(np.float32)
    octets = blocks["codes"].reshape(-1, body[2]).view(np.uint8)
    if spec.scheme.bits == 4:
        octets = np.concatenate([octets % 16, octets // 16], axis=1) - np.uint8(8)  # -8 .. 7 in two's complement
    codes = octets.view(np.int8).reshape(rows, columns)
    if spec.scheme.symmetric:
        return codes, scales
    minima = blocks["m"][:, :, 0]
    if not np.isfinite(scales).all() or (scales == 0).any() or not np.isfinite(minima).all():
        raise VerifyError(spec.key, "a scale that is zero or not finite was written")
    steps = np.rint(-minima.astype(np.float32) / scales)  # zeros + 8
    if ((-steps * scales).astype(np.float16) != minima).any():
        raise VerifyError(spec.key, "a minimum that is no multiple of its scale was written")
    return codes, scales, (steps - 8).astype(np.int8)


# Formats that hold codes; the others are compared as dense weights. The names are written here once more, and widths
# and layouts above, because a reader that took them from `formats/` would repeat a mistake made there.
DECODERS: dict[str, Callable[[LinearSpec, Mapping[str, Place]], Decoded]] = {
    "compressed-tensors": _decode_compressed_tensors,
    "gptq": _decode_gptq,
    "awq": _decode_awq,
    "mlx": _decode_mlx,
    "gguf": _decode_gguf,
}


def digest(*arrays: NDArray[Any]) -> str:
    """SHA-256 of the arrays' bytes, one after the other."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
