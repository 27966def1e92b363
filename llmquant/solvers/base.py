"""What goes into a solver and what comes out.

Shapes: O out_features (the rows of all linears that share the input, stacked), I in_features, G groups.
"""

from dataclasses import dataclass

from torch import Tensor

from llmquant.grid import QuantizedWeight, QuantScheme


@dataclass(frozen=True)
class SolveOptions:
    """Choices of the solver that no decoder needs to know."""

    grid: str = "hessian"  # hessian | absmax
    order: str = "descending"  # descending | natural
    damp: float | None = None  # share of mean(diag H); None: by tokens per input dimension
    block_size: int = 128
    on_bad_layer: str = "fail"  # fail | rtn


@dataclass(frozen=True)
class LayerTask:
    """All that a solver needs: weight_OI float, H_II = E[x x^T] of the quantized prefix (None: data-free)."""

    name: str
    weight_OI: Tensor
    H_II: Tensor | None
    n_tokens: int
    scheme: QuantScheme

    def __post_init__(self) -> None:
        in_features = self.weight_OI.shape[1]
        if self.H_II is not None and tuple(self.H_II.shape) != (in_features, in_features):
            raise ValueError(f"{self.name}: H {tuple(self.H_II.shape)} does not fit in_features {in_features}")
        if not self.scheme.divides(in_features):
            raise ValueError(f"{self.name}: group size {self.scheme.group_size} does not divide {in_features}")


@dataclass(frozen=True)
class Solution:
    """codes and scales, and the loss tr(E H E^T) of each row, E = weight - dequantized (zeros where H is None)."""

    weight: QuantizedWeight
    loss_O: Tensor
    notes: tuple[str, ...] = ()
