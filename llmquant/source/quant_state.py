"""bitsandbytes' 4-bit weights: the JSON beside each of them, checked against the tensors that it speaks of.

A weight W of n numbers is stored as
  W                                       ceil(n / 2) bytes, a code of 4 bits in each half
  W.quant_map                             float [16], what the codes stand for
  W.absmax                                float [ceil(n / blocksize)], a scale per block
  W.quant_state.bitsandbytes__nf4         uint8, the JSON of shape, blocksize, dtype and quant_type
With double quantization, absmax is uint8 codes; `nested_quant_map` [256], `nested_absmax` per block of
`nested_blocksize` codes, and `nested_offset` say what they stand for. All of it is a stranger's: nothing is read
before its size is known to be right.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from llmquant.errors import SourceError
from llmquant.source.header import TensorInfo, parse_json

MARK = ".quant_state.bitsandbytes__"
_MAX_BYTES = 2**16  # of JSON; real ones have 200
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32")}
_KINDS = ("nf4", "fp4")
_MAX_BLOCK = 2**16  # bitsandbytes has up to 4096; a scale is written out for each number of its block


@dataclass(frozen=True)
class Nested:
    """How the scales themselves are quantized."""

    blocksize: int
    offset: float


@dataclass(frozen=True)
class QuantState:
    """How one weight is stored. `parts` are the tensors it is made of, by name."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    nested: Nested | None
    parts: tuple[str, ...]


def read_state(name: str, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> QuantState:
    """The state in the tensor `name`; SourceError unless it fits the tensors of its weight."""
    info, weight = tensors[name], name.rpartition(MARK)[0]
    if info.dtype != torch.uint8 or not 0 < info.nbytes <= _MAX_BYTES:
        _refuse(name, f"{info.nbytes} bytes of {info.dtype}", f"JSON as uint8, at most {_MAX_BYTES}")
    state = _Fields(name, parse_json(bytes(read(name).reshape(-1).tolist()), name))
    kind, dtype = state.one_of("quant_type", _KINDS), _DTYPES[state.one_of("dtype", tuple(_DTYPES))]
    shape, blocksize = state.shape(), state.blocksize("blocksize")
    size = math.prod(shape)
    parts = {leaf: f"{weight}.{leaf}" for leaf in ("absmax", "quant_map")}
    nested = None
    if f"{weight}.nested_absmax" in tensors or any(key.startswith("nested_") for key in state.table):
        parts |= {leaf: f"{weight}.{leaf}" for leaf in ("nested_absmax", "nested_quant_map")}
        nested = Nested(state.blocksize("nested_blocksize"), state.number("nested_offset"))
    if missing := [part for part in (weight, *parts.values()) if part not in tensors]:
        raise SourceError(missing[0], f"is missing beside {name.rpartition('.')[2]}")
    codes = tensors[weight]
    # Stored as another dtype than uint8, the last element may be half empty.
    if not size <= 2 * codes.nbytes < size + 2 * max(2, codes.dtype.itemsize):
        _refuse(weight, f"{codes.nbytes} bytes", f"4 bits for each of {list(shape)}")
    blocks = -(-size // blocksize)
    sizes = {"absmax": blocks, "quant_map": 16}
    if nested is not None:
        sizes |= {"nested_absmax": -(-blocks // nested.blocksize), "nested_quant_map": 256}
    for leaf, count in sizes.items():
        part = tensors[parts[leaf]]
        whole = leaf == "absmax" and nested is not None
        if part.shape != (count,) or (part.dtype != torch.uint8 if whole else part.dtype not in _DTYPES.values()):
            expected = f"{count} {'codes as uint8' if whole else 'numbers'}"
            _refuse(part.name, f"{part.dtype} {list(part.shape)}", expected)
    return QuantState(kind, shape, dtype, blocksize, nested, (weight, *parts.values(), name))


@dataclass(frozen=True)
class _Fields:
    """The JSON, field by field."""

    where: str
    table: dict[str, Any]

    def shape(self) -> tuple[int, ...]:
        found = self.table.get("shape")
        if not isinstance(found, list) or not 0 < len(found) <= 8 or any(type(n) is not int or n < 1 for n in found):
            self._refuse("shape", "a short list of sizes above 0")
        return tuple(found)

    def blocksize(self, key: str) -> int:
        found = self.table.get(key)
        if type(found) is not int or not 0 < found <= _MAX_BLOCK:
            self._refuse(key, f"a whole number from 1 to {_MAX_BLOCK}")
        return found

    def number(self, key: str) -> float:
        found = self.table.get(key)
        if not isinstance(found, int | float) or isinstance(found, bool) or not abs(found) <= 1e30:  # nor NaN
            self._refuse(key, "a finite number")
        return float(found)

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        found = self.table.get(key)
        if not isinstance(found, str) or found not in known:
            self._refuse(key, " or ".join(known))
        return found

    def _refuse(self, key: str, expected: str) -> NoReturn:
        got = repr(self.table[key])[:80] if key in self.table else "missing"
        _refuse(self.where, f"{key} {got}", expected)


def _refuse(where: str, got: str, expected: str) -> NoReturn:
    raise SourceError(where, got, expected=expected)
