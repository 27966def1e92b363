"""`kernels.descend` for CPUs: neighbouring rows of the weight side by side, a few at a time, with their group in cache.

Shapes: g group_size, O out_features; tensors lie transposed, [g, O].
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmquant.quant.kernels.cpu import array, compiled

_ROWS = 64  # of the weight, at a time


def descend(
    H_gg: Tensor, gradient_gO: Tensor, level_gO: Tensor, scale_O: Tensor, low_O: Tensor, high_O: Tensor
) -> Tensor:
    n_rows = gradient_gO.shape[1]
    gradient, level = gradient_gO.cpu().contiguous(), level_gO.cpu().contiguous()
    step = torch.empty_like(level)
    low, high, scale = (array(x.to(level.dtype).expand(n_rows)) for x in (low_O, high_O, scale_O))
    _descend(array(H_gg), gradient.numpy(), level.numpy(), step.numpy(), scale, low, high)
    gradient_gO.copy_(gradient)  # nothing where it is the same tensor
    level_gO.copy_(level)
    return step.to(level_gO.device)


@compiled
def _descend(H: Any, gradient: Any, level: Any, step: Any, scale: Any, low: Any, high: Any) -> None:
    n_columns, n_rows = gradient.shape
    G, moved = np.empty((n_columns, _ROWS), gradient.dtype), np.empty(_ROWS, gradient.dtype)
    for first in range(0, n_rows, _ROWS):
        n = min(_ROWS, n_rows - first)
        for j in range(n_columns):
            for row in range(n):
                G[j, row] = gradient[j, first + row]
        for j in range(n_columns):
            # 1. The best level of the column, and its step.
            curvature = H[j, j]
            for row in range(n):
                at = first + row
                best = np.rint(level[j, at] + G[j, row] / (scale[at] * curvature))
                best = min(max(best, low[at]), high[at])
                moved[row] = (best - level[j, at]) * scale[at]
                level[j, at], step[j, at] = best, moved[row]
            # 2. What it does to the gradient.
            for other in range(n_columns):
                share, changed = H[other, j], G[other]
                for row in range(n):
                    changed[row] -= share * moved[row]
        for j in range(n_columns):
            for row in range(n):
                gradient[j, first + row] = G[j, row]
