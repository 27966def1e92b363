"""`kernels.search` for CPUs: a group's weights stay in the core's cache while all candidates are tried.

Shapes: N groups of all rows, g group_size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmquant.quant.kernels.cpu import array, compiled, compiled_in_any_order
from llmquant.quant.scales import SCALE_MAX, SCALE_MIN


def search(
    weight_OI: Tensor,
    importance_I: Tensor,
    full_OG: Tensor,
    zeros_OG: Tensor | None,
    code_range: tuple[int, int],
    coarse: Sequence[float],
    fine: Sequence[float],
) -> tuple[Tensor, Tensor | None]:
    n_groups, dtype = full_OG.shape[1], weight_OI.dtype
    full = array(full_OG.to(dtype)).reshape(-1)
    weights, importance = array(weight_OI).reshape(len(full), -1), array(importance_I.to(dtype)).reshape(n_groups, -1)
    scales = np.empty_like(full)
    zeros = np.zeros_like(full) if zeros_OG is None else array(zeros_OG.to(dtype)).reshape(-1)
    ratios, steps, bounds = (np.array(numbers, full.dtype) for numbers in (coarse, fine, code_range))
    _search(weights, importance, full, scales, zeros, ratios, steps, bounds, zeros_OG is not None)
    found = torch.from_numpy(scales).view(full_OG.shape).to(full_OG)
    return found, None if zeros_OG is None else torch.from_numpy(zeros).view(full_OG.shape).to(zeros_OG)


@compiled
def _round_scale(scale: Any) -> Any:
    """A bf16 number of 2^-17 to 65280, halves to even, with its sign."""
    magnitude = np.float32(min(max(abs(scale), SCALE_MIN), SCALE_MAX))
    bits = magnitude.view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    rounded = np.uint32(bits).view(np.float32)
    return -rounded if scale < 0 else rounded


@compiled_in_any_order
def _error(weight: Any, importance: Any, scale: Any, low: Any, high: Any) -> Any:
    """sum h |e|^2.5 of a group."""
    error = weight[0] * 0
    for j in range(len(weight)):
        level = min(max(np.rint(weight[j] / scale), low), high)
        e = abs(weight[j] - level * scale)
        error += np.sqrt(e) * e * e * importance[j]
    return error


@compiled
def _search(
    weights: Any, importances: Any, fulls: Any, scales: Any, zeros: Any, coarse: Any, fine: Any, code_range: Any,
    asymmetric: Any,
) -> None:  # fmt: skip
    low, high = code_range
    one = np.float32(1)
    for n in range(len(weights)):
        weight, importance, full = weights[n], importances[n % len(importances)], fulls[n]
        scale, zero, best, least = _round_scale(full), zeros[n], one, np.float32(np.inf)
        for stage in range(2):
            centre, start = best, zero
            ratios = coarse if stage == 0 else fine
            # Symmetric: both signs at first. Asymmetric: the zero point and its neighbours.
            n_others = 3 if asymmetric else 2 - stage
            for number in range(len(ratios)):
                ratio = ratios[number]
                if stage == 1:
                    ratio = centre + ratio if asymmetric else centre * (one + ratio / abs(centre))
                for other in range(n_others):
                    tried_ratio, tried_zero = ratio, start
                    if asymmetric:
                        move = np.float32(-1 if other == 2 else other)
                        tried_zero = min(max(start + move, low), high)
                    elif other == 1:
                        tried_ratio = -ratio
                    tried = _round_scale(full * tried_ratio)
                    error = _error(weight, importance, tried, low - tried_zero, high - tried_zero)
                    if error < least:
                        least, scale, best, zero = error, tried, tried_ratio, tried_zero
        scales[n], zeros[n] = scale, zero
