"""Round to nearest (RTN): every weight goes to the nearest level of the plain grid.

Why keep it. It needs no text and no forward pass, it is the baseline that any better method must beat, and it is the
fallback for layers that cannot be solved (`--on-bad-layer rtn`). The price: at 4 bits its divergence from the original
model is several times that of GPTQ, because it treats all inputs as equally large and unrelated.

`solve_nearest` searches the grid, which clips some weights where that costs less than coarse steps for all. It is for
matrices that have no inputs to describe by a Hessian: an embedding is looked up row by row.

Shapes: O out_features, I in_features, G groups in a row.
"""

from torch import Tensor

from llmquant.quant.grid import QuantizedWeight, QuantScheme, plain_grid, quantize_to_grid, search_grid
from llmquant.quant.solvers.base import LayerTask, Solution, SolveOptions


def solve_rtn(task: LayerTask, options: SolveOptions = SolveOptions()) -> Solution:  # noqa: B008 (frozen)
    """codes = clip(round(w / s) + z) on `plain_grid`. Uses no option; computes the loss if the task has a Hessian."""
    return _rounded(task, *plain_grid(task.weight_OI, task.scheme))


def solve_nearest(task: LayerTask, options: SolveOptions = SolveOptions()) -> Solution:  # noqa: B008 (frozen)
    """The same on `search_grid` with equal importances.

    >>> import torch
    >>> task = LayerTask("w", torch.tensor([[1.0, -1.0, 1.0, 4.0]]), None, 0, QuantScheme(2, -1))
    >>> solve_rtn(task).weight.codes_OI.tolist(), solve_nearest(task).weight.codes_OI.tolist()
    ([[0, 0, 0, 1]], [[-1, 1, -1, -2]])
    """
    return _rounded(task, *search_grid(task.weight_OI, task.weight_OI.new_ones(task.weight_OI.shape[1]), task.scheme))


def _rounded(task: LayerTask, scales_OG: Tensor, zeros_OG: Tensor | None) -> Solution:
    codes_OI = quantize_to_grid(task.weight_OI, scales_OG, task.scheme, zeros_OG)
    weight = QuantizedWeight(codes_OI, scales_OG.float(), task.scheme, zeros_OG)
    loss_O = task.weight_OI.new_zeros(task.weight_OI.shape[0])
    if task.H_II is not None:
        error_OI = task.weight_OI - weight.dequantize(task.weight_OI.dtype)
        loss_O = ((error_OI @ task.H_II) * error_OI).sum(1)
    return Solution(weight, loss_O, task.weight_OI)


def round_to_nearest(weight_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """weight_OI quantized on `plain_grid` and dequantized again, in the dtype it came in.

    >>> import torch
    >>> round_to_nearest(torch.tensor([[7.5, -1.2, 0.4]]), QuantScheme(4, -1)).tolist()
    [[7.0, -1.0, 0.0]]
    """
    scales_OG, zeros_OG = plain_grid(weight_OI.float(), scheme)
    codes_OI = quantize_to_grid(weight_OI.float(), scales_OG, scheme, zeros_OG)
    return QuantizedWeight(codes_OI, scales_OG, scheme, zeros_OG).dequantize(weight_OI.dtype)
