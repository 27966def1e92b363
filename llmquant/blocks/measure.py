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

    loss_O     e^T H e of every row e of E = target - dequantized weight; 0 without H, as are the others
    rtn_loss_O the same of plain rounding
    energy_O   w^T H w of the original rows
    """

    weight: QuantizedWeight
    loss_O: Tensor
    rtn_loss_O: Tensor
    energy_O: Tensor
    notes: tuple[str, ...] = ()

    def rows(self, rows: slice) -> "Found":
        """Of some rows: one linear of a stack."""
        losses = self.loss_O[rows], self.rtn_loss_O[rows], self.energy_O[rows]
        return Found(self.weight.rows(rows), *losses, self.notes)

    def to(self, device: torch.device) -> "Found":
        """The same on another device."""
        losses = self.loss_O.to(device), self.rtn_loss_O.to(device), self.energy_O.to(device)
        return Found(self.weight.to(device), *losses, self.notes)


def found(task: LayerTask, solution: Solution) -> Found:
    """A solution without its target, which is as large as the weight. In pieces of rows: of all rows at once their
    differences would be the peak of a run's memory."""
    loss_O, H_II = solution.loss_O, task.H_II
    rtn_loss_O, energy_O = torch.zeros_like(loss_O), torch.zeros_like(loss_O)
    for rows in pieces(task.weight_OI) if H_II is not None else ():
        assert H_II is not None
        plain_OI = round_to_nearest(task.weight_OI[rows], task.scheme)
        rtn_loss_O[rows] = quadratic(solution.target_OI[rows] - plain_OI, H_II)
        energy_O[rows] = quadratic(task.weight_OI[rows], H_II)
    return Found(solution.weight, loss_O, rtn_loss_O, energy_O, solution.notes)


def measure(
    spec: LinearSpec, weight_OI: Tensor, dense_OI: Tensor, part: Found, inputs: Inputs, bits: float
) -> LayerReport:
    """The report of one linear: `weight_OI` as it was, `dense_OI` as the format's loader will see it, `bits` stored per
    weight."""
    power, loss = _square(weight_OI), float(part.loss_O.sum())
    rtn_loss, energy = float(part.rtn_loss_O.sum()), float(part.energy_O.sum())
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
