"""What goes into a solver and what comes out.

Shapes: O out_features (the rows of all linears that share the input, stacked), I in_features, G groups.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from llmquant.quant.grid import QuantizedWeight, QuantScheme

_AT_ONCE = 2**24  # weights: a solver holds up to six copies of them, and H and its factor beside


def pieces(weight_OI: Tensor) -> list[slice]:
    """Even ranges of rows, which are problems of their own, of at most `_AT_ONCE` weights on the CPU."""
    rows, columns = weight_OI.shape
    n = -(-rows * columns // _AT_ONCE) if weight_OI.device.type == "cpu" else 1
    bounds = [rows * i // n for i in range(n + 1)]
    return [slice(*ends) for ends in pairwise(bounds)]


@dataclass(frozen=True)
class SolveOptions:
    """Choices of the solver that no decoder needs to know. The defaults are GPTQ without what a recipe adds."""

    grid: str = "hessian"  # hessian | absmax
    order: str = "descending"  # descending | natural
    damp: float | None = None  # share of mean(diag H); None: by tokens per input dimension
    propagation: float = 0.0  # strength of error propagation, 0 to 1
    refit: bool = False  # scales fitted again to the codes
    sweeps: int = 0  # of coordinate descent on the codes
    block_size: int = 512
    on_bad_layer: str = "fail"  # fail | rtn


@dataclass(frozen=True)
class LayerTask:
    """All that a solver needs.

    weight_OI  float
    H_II       E[x^ x^^T] of the inputs x^ that come from the quantized prefix; None: data-free
    drift_OI   W (C - H) with C = E[x x^^T], x the same inputs in the original model; None: no error propagation
    drift_II   C - H itself in its place, less work where O > I
    """

    name: str
    weight_OI: Tensor
    H_II: Tensor | None
    n_tokens: int
    scheme: QuantScheme
    drift_OI: Tensor | None = None
    drift_II: Tensor | None = None

    def __post_init__(self) -> None:
        in_features = self.weight_OI.shape[1]
        if self.H_II is not None and tuple(self.H_II.shape) != (in_features, in_features):
            raise ValueError(f"{self.name}: H {tuple(self.H_II.shape)} does not fit in_features {in_features}")
        if not self.scheme.divides(in_features):
            raise ValueError(f"{self.name}: group size {self.scheme.group_size} does not divide {in_features}")


@dataclass(frozen=True)
class Solution:
    """codes and scales, and the loss tr(E H E^T) of each row, E = target - dequantized (zeros where H is None).

    The target is the weight itself, or what error propagation made of it.
    """

    weight: QuantizedWeight
    loss_O: Tensor
    target_OI: Tensor
    notes: tuple[str, ...] = ()

    def rows(self, rows: slice) -> "Solution":
        """The solution of some rows: one linear of a stack."""
        return Solution(self.weight.rows(rows), self.loss_O[rows], self.target_OI[rows], self.notes)
