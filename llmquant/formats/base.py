"""The interface of a format."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmquant.errors import FormatError, option
from llmquant.quant.grid import QuantizedWeight, QuantScheme

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # tensor name -> dtype and shape


@dataclass(frozen=True)
class LinearSpec:
    """One linear that is to be quantized.

    key        its weight's name in the checkpoint, ending in `.weight`
    module     its name in the model
    kind       class of the module: Linear, a subclass of it, or Conv1D
    shape      (out_features, in_features), whatever the checkpoint's own layout
    dtype      of the weight in the checkpoint; scales are stored in it
    """

    key: str
    module: str
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: QuantScheme

    @property
    def transposed(self) -> bool:
        """Whether the checkpoint holds the weight as [in_features, out_features]."""
        return self.kind == "Conv1D"

    @property
    def param(self) -> str:
        """The weight's name in the model."""
        return f"{self.module}.weight"

    @property
    def prefix(self) -> str:
        return self.key.removesuffix("weight")


class Format(Protocol):
    """A view of the canonical form."""

    def check(self, specs: Sequence[LinearSpec]) -> None:
        """FormatError where the format cannot hold these linears; called before any work."""

    def layout(self, spec: LinearSpec) -> Layout:
        """Names, dtypes and shapes of the tensors that `tensors` will give for this linear."""

    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of one linear."""

    def loaded(self, spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
        """weight_OI in float32 as a loader of `tensors` computes it, roundings of the format included."""

    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        """Entries for config.json. `dense_linears`: module names of all linears that stay as they are."""

    def weight_bits(self, spec: LinearSpec) -> int:
        """Stored bits of the weight: codes, scales and zeros."""

    def read(self, spec: LinearSpec, read: Callable[[str], Tensor]) -> QuantizedWeight | Tensor:
        """Inverse of `tensors`, from a reader of stored tensors by name; a dense weight_OI where nothing is packed."""


def unsigned(weight: QuantizedWeight) -> Tensor:
    """codes_OI + 2^(bits-1) as uint8: 0 .. 2^bits - 1."""
    shifted: Tensor = weight.codes_OI.short() + 2 ** (weight.scheme.bits - 1)
    return shifted.to(torch.uint8)


def from_minima(weight: QuantizedWeight, minima_OG: Tensor) -> Tensor:
    """weight_OI = u s + m in float32, with the unsigned codes u and a minimum of each group."""
    rows, columns = weight.codes_OI.shape
    u = unsigned(weight).view(rows, weight.scales_OG.shape[1], -1).float()
    return u.mul_(weight.scales_OG[..., None]).add_(minima_OG[..., None]).view(rows, columns)


def signed(codes_OI: Tensor, bits: int) -> Tensor:
    """Inverse of `unsigned`."""
    shifted: Tensor = codes_OI.short() - 2 ** (bits - 1)
    return shifted.to(torch.int8)


def in_block(module: str) -> tuple[str, str] | None:
    """The block of a linear and its name in there, by the first number in its path; None outside any list.

    >>> in_block("model.layers.3.mlp.up_proj"), in_block("lm_head")
    (('model.layers.3', 'mlp.up_proj'), None)
    """
    match = re.match(r"(.*?\.\d+)\.(.+)", module)
    return None if match is None else (match[1], match[2])


def half_dtype(spec: LinearSpec) -> torch.dtype:
    """bf16 where the checkpoint is in bf16, else fp16; canonical scales are exact in both."""
    return torch.bfloat16 if spec.dtype == torch.bfloat16 else torch.float16


def require_plain(
    name: str,
    specs: Sequence[LinearSpec],
    *,
    bits: Sequence[int],
    in_multiple: int,
    out_multiple: int,
    one_scheme: bool,
    asymmetric: bool = False,
) -> None:
    """FormatError, with the offender's name, where a linear is not one that the format `name` can hold."""
    for spec in specs:
        rows, columns = spec.shape
        where, scheme = spec.module, spec.scheme
        if spec.transposed:
            raise FormatError(
                where,
                f"{name} cannot hold {spec.kind} layers",
                expected="nn.Linear",
                remedy=f"use {option('format')} fake",
            )
        if scheme.bits not in bits:
            raise FormatError(
                where,
                f"{scheme.bits} bits in {name}",
                expected=" or ".join(map(str, bits)),
                remedy=f"change {option('bits')}",
            )
        if not scheme.symmetric and not asymmetric:
            raise FormatError(
                where,
                f"an asymmetric grid in {name}",
                expected="a symmetric grid",
                remedy=f"leave {option('asymmetric')} out, or use {option('format')} awq, mlx, gguf or fake",
            )
        if columns % in_multiple or rows % out_multiple:
            raise FormatError(
                where,
                f"{rows} outputs, {columns} inputs in {name}",
                expected=f"multiples of {out_multiple} and {in_multiple}",
                remedy=f"keep it in 16 bit with {option('ignore')}, or use {option('format')} compressed-tensors",
            )
        if one_scheme and scheme != specs[0].scheme:
            raise FormatError(
                where,
                f"{scheme.bits} bits, group size {scheme.group_size}",
                expected=f"{name} knows one scheme for all layers, as {specs[0].module} has",
                remedy=f"use {option('format')} compressed-tensors",
            )
