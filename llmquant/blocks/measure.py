"""How well one linear was quantized: its errors, sizes and histograms."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmquant.formats import LinearSpec
from llmquant.quant.grid import QuantizedWeight
from llmquant.quant.hessian import quadratic
from llmquant.quant.histograms import histograms
from llmquant.quant.solvers.base import LayerTask, Solution, pieces
from llmquant.quant.solvers.rtn import round_to_nearest


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


@dataclass(frozen=True)
class Inputs:
    """What calibration says of the inputs that linears share: H_II = E[x x^T] over `n_tokens`; None: data-free."""

    H_II: Tensor | None
    n_tokens: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A solution, and how good it is, by rows: all that is kept of it, and that ranks tell each other.

    losses_3O  of every row: e^T H e with e of E = target - dequantized weight, the same of plain rounding, and w^T H w
               of the original; 0 without H
    """

    weight: QuantizedWeight
    losses_3O: Tensor
    notes: tuple[str, ...] = ()

    def rows(self, rows: slice | Tensor) -> "Found":
        """Of some rows: one linear of a stack."""
        return Found(self.weight.rows(rows), self.losses_3O[:, rows], self.notes)

    def to(self, device: torch.device) -> "Found":
        """The same on another device."""
        return Found(self.weight.to(device), self.losses_3O.to(device), self.notes)


def found(task: LayerTask, solution: Solution) -> Found:
    """A solution without its target, which is as large as the weight. In pieces of rows: of all rows at once their
    differences would be the peak of a run's memory."""
    losses_3O = solution.loss_O.new_zeros(3, len(solution.loss_O))
    losses_3O[0] = solution.loss_O
    if task.H_II is not None:
        for rows in pieces(task.weight_OI):
            plain_OI = round_to_nearest(task.weight_OI[rows], task.scheme)
            losses_3O[1, rows] = quadratic(solution.target_OI[rows] - plain_OI, task.H_II)
            losses_3O[2, rows] = quadratic(task.weight_OI[rows], task.H_II)
    return Found(solution.weight, losses_3O, solution.notes)


def measure(
    spec: LinearSpec, weight_OI: Tensor, dense_OI: Tensor, part: Found, inputs: Inputs, bits: float
) -> LayerReport:
    """The report of one linear: `weight_OI` as it was, `dense_OI` as the format's loader will see it, `bits` stored per
    weight."""
    power, (loss, rtn_loss, energy) = _square(weight_OI), (float(losses_O.sum()) for losses_O in part.losses_3O)
    errors = (_square(weight_OI[rows] - dense_OI[rows]) for rows in pieces(weight_OI))
    weight_error = sum(error / power for error in errors) if power else 0.0
    notes, spread = inputs.notes + part.notes, histograms(weight_OI, part.weight)
    relative = loss / energy if energy else 0.0
    if inputs.H_II is None or not all(map(math.isfinite, (loss, rtn_loss, relative))):
        # No Hessian, or one that overflowed and measures nothing.
        return LayerReport(spec.module, None, None, None, weight_error, bits, inputs.n_tokens, notes, spread)
    return LayerReport(spec.module, loss, rtn_loss, relative, weight_error, bits, inputs.n_tokens, notes, spread)


def _square(weight_OI: Tensor) -> float:
    """||W||^2, in float64 where squares of what float32 can hold are beyond it; that is fifty times slower.

    On the CPU where it takes float64: not every accelerator has it.
    """
    norms_O = torch.linalg.vector_norm(weight_OI, dim=1).cpu()
    if not 1e-15 < float(norms_O.max()) < math.inf:
        norms_O = torch.linalg.vector_norm(weight_OI.cpu(), dim=1, dtype=torch.float64)
    return float(norms_O.double().square().sum())
