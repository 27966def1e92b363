"""How well one linear was quantized: its errors, sizes and histograms."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmquant.formats import FORMATS, LinearSpec
from llmquant.quant.grid import QuantizedWeight
from llmquant.quant.hessian import quadratic
from llmquant.quant.histograms import histograms
from llmquant.quant.solvers.base import pieces
from llmquant.quant.solvers.rtn import round_to_nearest
from llmquant.recipe import Recipe


@dataclass(frozen=True)
class LayerReport:
    """How well one linear was quantized.

    loss and rtn_loss are mean squared output errors per token, tr(E H E^T), of ours and of plain rounding;
    relative_error is loss / tr(W H W^T). All None without calibration.
    """

    name: str
    loss: float | None
    rtn_loss: float | None
    relative_error: float | None
    weight_error: float  # ||E||^2 / ||W||^2
    bits_per_weight: float
    n_tokens: int
    notes: tuple[str, ...]
    histograms: dict[str, dict[str, Any]]  # of weights, codes and log2 |scale|: `histograms.histograms`

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LayerReport":
        """Inverse of `as_dict`."""
        return cls(**values | {"notes": tuple(values["notes"])})


def measure(
    spec: LinearSpec,
    weight_OI: Tensor,
    quantized: QuantizedWeight,
    dense_OI: Tensor,
    target_OI: Tensor,
    loss: float,
    H_II: Tensor | None,
    n_tokens: int,
    recipe: Recipe,
    notes: tuple[str, ...],
) -> LayerReport:
    power = _square(weight_OI)
    weight_error = rtn_loss = energy = 0.0
    for part in pieces(weight_OI):  # differences of all rows at once would be the peak of a run's memory
        weight_error += _square(weight_OI[part] - dense_OI[part]) / power if power else 0.0
        if H_II is not None:
            plain_OI = round_to_nearest(weight_OI[part], spec.scheme)
            rtn_loss += float(quadratic(target_OI[part] - plain_OI, H_II).sum())
            energy += float(quadratic(weight_OI[part], H_II).sum())
    rows, columns = spec.shape
    bits = FORMATS[recipe.format].weight_bits(spec) / (rows * columns)
    spread = histograms(weight_OI, quantized)
    if H_II is None:
        return LayerReport(spec.module, None, None, None, weight_error, bits, 0, notes, spread)
    relative = loss / energy if energy else 0.0
    if not all(map(math.isfinite, (loss, rtn_loss, relative))):  # a Hessian that overflowed measures nothing
        return LayerReport(spec.module, None, None, None, weight_error, bits, n_tokens, notes, spread)
    return LayerReport(spec.module, loss, rtn_loss, relative, weight_error, bits, n_tokens, notes, spread)


def _square(weight_OI: Tensor) -> float:
    """||W||^2, in float64 where squares of what float32 can hold are beyond it; that is fifty times slower."""
    norms_O = torch.linalg.vector_norm(weight_OI, dim=1)
    if not 1e-15 < float(norms_O.max()) < math.inf:
        norms_O = torch.linalg.vector_norm(weight_OI, dim=1, dtype=torch.float64)
    return float(norms_O.double().square().sum())
