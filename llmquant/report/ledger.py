"""What report.json says of every layer and every tensor.

The ledger (`tensors`) has a row for each tensor of the original, and a reason in each: nothing is left out silently.
`layers` has an entry for each linear that was quantized, with its errors. Errors are shares: 0.01 is one percent of the
layer's own output or weights.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from llmquant.quant.grid import QuantScheme
from llmquant.source.names import without_numbers

# How the reasons of tensors that are in no decoder block begin.
_OUTSIDE = ("outside the decoder blocks", "not a parameter of the model class")
_SHOWN = 4  # kinds of tensors in a warning
_DTYPES = ("bfloat16", "float16", "float32")  # of weights that are quantized


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width from `low` to `high`."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Histograms:
    """Of the weights before quantization, of the codes, and of log2 |scale|."""

    weights: Histogram
    codes: Histogram
    scales: Histogram


@dataclass(frozen=True)
class Layer:
    """How well one linear was quantized; `name` is its module's.

    loss, rtn_loss   mean squared output error per token, of ours and of plain rounding
    relative_error   loss as a share of the mean squared output; all three are None without calibration
    weight_error     ||W - W_quantized||^2 / ||W||^2
    """

    name: str
    loss: float | None
    rtn_loss: float | None
    relative_error: float | None
    weight_error: float
    bits_per_weight: float
    n_tokens: int
    notes: tuple[str, ...]
    histograms: Histograms | None = None


@dataclass(frozen=True)
class TensorRow:
    """The ledger's row of one tensor of the original: what was done with it, and why.

    Bits, group size and symmetry are there where it was quantized; `notes` say what was unusual about that.
    """

    name: str
    action: Literal["quantized", "copied", "left out"]
    reason: str
    dtype: str
    shape: tuple[int, ...]
    module: str | None = None  # its name in the model, where it was quantized; reports of older versions have none
    bits: int | None = None
    group_size: int | None = None  # -1: one group per row
    symmetric: bool | None = None
    method: str | None = None  # of its solver, where a rule of the recipe decided on it
    notes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.action == "quantized" and None in (self.bits, self.group_size, self.symmetric):
            raise ValueError("is quantized, without bits, group_size or symmetric")
        if (scheme := self.scheme) is None:
            return
        if len(self.shape) != 2 or self.dtype not in _DTYPES:
            raise ValueError(f"is quantized, but {self.dtype} of {len(self.shape)} dimensions")
        if scheme.bits not in range(1, 9) or (scheme.group_size < 1 and scheme.group_size != -1):
            raise ValueError(f"is quantized to {scheme.bits} bits in groups of {scheme.group_size}")

    @property
    def scheme(self) -> QuantScheme | None:
        """Bits, group size and symmetry of a quantized tensor; None of the others."""
        if self.action != "quantized" or self.bits is None or self.group_size is None or self.symmetric is None:
            return None
        return QuantScheme(self.bits, self.group_size, self.symmetric)

    @property
    def of_module(self) -> str:
        """The name in the model under which `layers` lists the linear; its own where the row names none."""
        return self.module or self.name.removesuffix(".weight")


class Judged(Protocol):
    """A row of the plan or of a report."""

    @property
    def name(self) -> str: ...
    @property
    def action(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def mostly_dense(rows: Iterable[Judged]) -> list[str]:
    """What must be said where less than half of the parameters in the decoder blocks are quantized; else empty.

    First how much is, then the largest kinds that are not, and why.
    """
    kept, quantized = Counter[tuple[str, str]](), 0
    for row in rows:
        if row.action == "quantized":
            quantized += math.prod(row.shape)
        elif not row.reason.startswith(_OUTSIDE):
            kept[without_numbers(row.name), row.reason] += math.prod(row.shape)
    total = quantized + kept.total()
    if 2 * quantized >= total:
        return []
    largest = [
        f"{name} ({size / total:.0%}: {why})"
        for place, ((name, why), size) in enumerate(kept.most_common(_SHOWN))
        if not place or 100 * size >= total
    ]
    more = f" and {len(kept) - len(largest)} more kinds" if len(kept) > len(largest) else ""
    share = math.floor(100 * quantized / total)
    return [f"only {share}% of the parameters in the decoder blocks are quantized", f"{', '.join(largest)}{more}"]
