"""What goes into a solver (`LayerTask`, `SolveOptions`) and what comes out (`Solution`).

A solver chooses codes and scales for one weight matrix. Rows do not depend on each other: the loss is a sum over rows
and all of them share one H. So the linears that share an input are stacked and solved as one matrix, and a large matrix
is solved in ranges of rows (`pieces`).

Shapes: O out_features (the stacked rows of all linears that share the input), I in_features, G groups in a row.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from llmquant.quant.grid import QuantizedWeight, QuantScheme

_AT_ONCE = 2**24  # weights solved at a time: a solver holds up to six copies of them, and H and its factor


def rows_at_once(weight_OI: Tensor) -> int:
    """How many rows are solved at a time: as many as have `_AT_ONCE` weights, at least one; all on other devices."""
    rows, columns = weight_OI.shape
    return max(1, _AT_ONCE // columns) if weight_OI.device.type == "cpu" else max(1, rows)


def pieces(weight_OI: Tensor) -> list[slice]:
    """Ranges of rows of about equal length, with at most `_AT_ONCE` weights each; a single one for other devices."""
    rows = len(weight_OI)
    n = -(-rows // rows_at_once(weight_OI))
    bounds = [rows * i // n for i in range(n + 1)]
    return [slice(*ends) for ends in pairwise(bounds)]


@dataclass(frozen=True)
class SolveOptions:
    """Choices of the solver, which no decoder needs to know. The defaults are plain GPTQ; a recipe adds the rest."""

    grid: str = "hessian"  # hessian | absmax
    order: str = "descending"  # descending | natural
    damp: float | None = None  # damping as a share of mean(diag H); None: `default_damp`
    propagation: float = 0.0  # strength of error propagation, 0 to 1
    residual: float = 0.0  # b, the part of it that is for the residual
    refit: bool = False  # whether each sweep fits the scales to the codes, too
    sweeps: int = 0  # sweeps of coordinate descent on the codes
    curvature_damp: float = 0.2  # damping of H_O as a share of its mean diagonal
    on_bad_layer: str = "fail"  # fail | rtn: what to do with a layer that cannot be solved


Curvature = tuple[tuple[Tensor, Tensor], ...]  # (rows, H_O of these) of every block of rows


@dataclass(frozen=True)
class LayerTask:
    """All that a solver needs. With xhat the layer's input in the quantized model, x the same in the original one:

    weight_OI  the original weight W, float32 or float64
    H_II       E[xhat xhat^T]; None for a solver that needs no data
    drift_II   C - H with C = E[x xhat^T], for error propagation; None: there is none
    residual_OI   R = E[(r - rhat) xhat^T] of the residual r that the output is added to, to make up for its errors, too
    H_OO       of the rows (`quant/curvature.py`); empty: all outputs count alike

    ValueError where H or the group size does not fit the weight.
    """

    name: str
    weight_OI: Tensor
    H_II: Tensor | None
    n_tokens: int
    scheme: QuantScheme
    drift_II: Tensor | None = None
    residual_OI: Tensor | None = None
    H_OO: Curvature = ()

    def __post_init__(self) -> None:
        in_features = self.weight_OI.shape[1]
        if self.H_II is not None and tuple(self.H_II.shape) != (in_features, in_features):
            raise ValueError(f"{self.name}: H {tuple(self.H_II.shape)} does not fit in_features {in_features}")
        if self.H_OO and (n_rows := sum(len(rows) for rows, _ in self.H_OO)) != len(self.weight_OI):
            raise ValueError(f"{self.name}: H_O of {n_rows} rows, expected {len(self.weight_OI)}")
        if not self.scheme.divides(in_features):
            raise ValueError(f"{self.name}: group size {self.scheme.group_size} does not divide {in_features}")


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    weight     codes and scales
    loss_O     e^T H e of every row e of E = target - dequantized weight; zeros where H is None
    target_OI  what was rounded: the weight itself, or the weight corrected by error propagation
    notes      what the report should say of this layer
    """

    weight: QuantizedWeight
    loss_O: Tensor
    target_OI: Tensor
    notes: tuple[str, ...] = ()

    def rows(self, rows: slice) -> "Solution":
        """The solution of some rows: one linear of a stack."""
        return Solution(self.weight.rows(rows), self.loss_O[rows], self.target_OI[rows], self.notes)
