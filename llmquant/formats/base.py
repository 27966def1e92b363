"""The interface of a format."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmquant.errors import FormatError, option
from llmquant.formats.facts import FACTS, GROUPS, Facts, formats_that
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
    method     the solver that chooses its codes; "" where they are chosen already
    """

    key: str
    module: str
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    scheme: QuantScheme
    method: str = ""

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


class Format(ABC):
    """A view of the canonical form. `name` is its key in FACTS, where all is said that needs no code."""

    name: ClassVar[str]

    @property
    def facts(self) -> Facts:
        return FACTS[self.name]

    def check(self, specs: Sequence[LinearSpec]) -> None:
        """FormatError, with the offender's name, where the format cannot hold these linears; before any work."""
        for spec in specs:
            self._check_one(spec)
        first = specs[0]
        for spec in specs:
            if not self.facts.mixes and spec.scheme != first.scheme:
                raise FormatError(
                    spec.module,
                    f"{spec.scheme.bits} bits, group size {spec.scheme.group_size}",
                    expected=f"{self.name} knows one scheme for all layers, as {first.module} has",
                    remedy=f"use {option('format')} compressed-tensors",
                )

    def _check_one(self, spec: LinearSpec) -> None:
        (rows, columns), scheme, facts = spec.shape, spec.scheme, self.facts
        holding = formats_that(lambda other: other.conv1d or not spec.transposed)
        if spec.transposed and not facts.conv1d:
            raise FormatError(
                spec.module,
                f"{self.name} cannot hold {spec.kind} layers",
                expected="nn.Linear",
                remedy=f"use {option('format')} {' or '.join(holding)}",
            )
        if scheme.bits not in facts.bits:
            raise FormatError(
                spec.module,
                f"{scheme.bits} bits in {self.name}",
                expected=" or ".join(map(str, facts.bits)),
                remedy=f"change {option('bits')}",
            )
        if not scheme.symmetric and scheme.bits not in facts.zero_points:
            able = [name for name in holding if scheme.bits in FACTS[name].zero_points]
            others = " or ".join(filter(None, (", ".join(able[:-1]), able[-1])))
            widths = " or ".join(map(str, facts.zero_points))
            raise FormatError(
                spec.module,
                "an asymmetric grid" + (f" of {scheme.bits} bits" if widths else "") + f" in {self.name}",
                expected="a symmetric grid" + (f", or {widths} bits" if widths else ""),
                remedy=f"leave {option('asymmetric')} out, or use {option('format')} {others}",
            )
        if facts.groups != GROUPS and scheme.group_size not in facts.groups:
            raise FormatError(
                spec.module,
                f"group size {scheme.group_size} in {self.name}",
                expected=" or ".join(map(str, facts.groups)),
                remedy=f"change {option('group_size')}",
            )
        if why := facts.why_unfit(rows, columns):
            any_shape = next(name for name in holding if FACTS[name].in_multiple == FACTS[name].out_multiple == 1)
            raise FormatError(
                spec.module,
                why,
                remedy=f"keep it in 16 bit with {option('unfit')} keep, or use {option('format')} {any_shape}",
            )

    @abstractmethod
    def layout(self, spec: LinearSpec) -> Layout:
        """Names, dtypes and shapes of the tensors that `tensors` will give for this linear."""

    @abstractmethod
    def tensors(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of one linear."""

    def loaded(self, spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
        """weight_OI in float32 as a loader of `tensors` computes it, roundings of the format included."""
        return weight.dequantize()

    @abstractmethod
    def config(self, specs: Sequence[LinearSpec], dense_linears: Sequence[str]) -> dict[str, Any]:
        """Entries for config.json. `dense_linears`: module names of all linears that stay as they are, or patterns of
        them (`Facts.patterns`)."""

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The model's own config.json as the format's runtimes want it; most take it as it is."""
        return config

    def weight_bits(self, spec: LinearSpec) -> int:
        """Stored bits of the weight: codes, scales and zeros."""
        return sum(8 * dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.layout(spec).values())

    @abstractmethod
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


def commonest(specs: Sequence[LinearSpec]) -> QuantScheme:
    """The scheme of most of the linears, by which a config calls those that it does not name."""
    return Counter(spec.scheme for spec in specs).most_common(1)[0][0]


def half_dtype(spec: LinearSpec) -> torch.dtype:
    """bf16 where the checkpoint is in bf16, else fp16; canonical scales are exact in both."""
    return torch.bfloat16 if spec.dtype == torch.bfloat16 else torch.float16
