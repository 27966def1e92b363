"""Round to nearest on the absmax grid: data-free, and the policy for layers that cannot be solved."""

import torch

from llmquant.grid import QuantizedWeight, absmax_scales, quantize_to_grid
from llmquant.solvers.base import LayerTask, Solution, SolveOptions


def solve_rtn(task: LayerTask, options: SolveOptions = SolveOptions()) -> Solution:  # noqa: B008 (frozen)
    """codes = clip(round(w / s)), s = absmax / (2^(bits-1) - 1/2) of the group. Uses no option.

    The loss is reported where the task has a Hessian.
    """
    scales_OG = absmax_scales(task.weight_OI, task.scheme)
    codes_OI = quantize_to_grid(task.weight_OI, scales_OG, task.scheme)
    weight = QuantizedWeight(codes_OI, scales_OG.float(), task.scheme)
    loss_O = torch.zeros(task.weight_OI.shape[0])
    if task.H_II is not None:
        error_OI = task.weight_OI - weight.dequantize(task.weight_OI.dtype)
        loss_O = ((error_OI @ task.H_II) * error_OI).sum(1)
    return Solution(weight, loss_O)
