"""Round to nearest on the plain grid: data-free, and the policy for layers that cannot be solved."""

import torch
from torch import Tensor

from llmquant.quant.grid import QuantizedWeight, QuantScheme, plain_grid, quantize_to_grid
from llmquant.quant.solvers.base import LayerTask, Solution, SolveOptions


def solve_rtn(task: LayerTask, options: SolveOptions = SolveOptions()) -> Solution:  # noqa: B008 (frozen)
    """codes = clip(round(w / s) + z), s = absmax / (2^(bits-1) - 1/2) of the group and z = 0, or the min-max grid.
    Uses no option.

    The loss is reported where the task has a Hessian.
    """
    scales_OG, zeros_OG = plain_grid(task.weight_OI, task.scheme)
    codes_OI = quantize_to_grid(task.weight_OI, scales_OG, task.scheme, zeros_OG)
    weight = QuantizedWeight(codes_OI, scales_OG.float(), task.scheme, zeros_OG)
    loss_O = torch.zeros(task.weight_OI.shape[0])
    if task.H_II is not None:
        error_OI = task.weight_OI - weight.dequantize(task.weight_OI.dtype)
        loss_O = ((error_OI @ task.H_II) * error_OI).sum(1)
    return Solution(weight, loss_O, task.weight_OI)


def round_to_nearest(weight_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """Dequantized weight_OI on the absmax (or min-max) grid of each group, in the dtype it came in."""
    scales_OG, zeros_OG = plain_grid(weight_OI.float(), scheme)
    codes_OI = quantize_to_grid(weight_OI.float(), scales_OG, scheme, zeros_OG)
    return QuantizedWeight(codes_OI, scales_OG, scheme, zeros_OG).dequantize(weight_OI.dtype)
