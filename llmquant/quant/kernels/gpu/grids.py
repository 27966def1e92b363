"""`kernels.search` for GPUs, all candidates of a group in one launch: its weights are read once.

Shapes: N groups of all rows, g group_size.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmquant.quant.kernels.gpu.numbers import level_of, round_scale

_AT_ONCE = 2048  # weights in a program


def search(
    weight_OI: Tensor,
    importance_I: Tensor,
    full_OG: Tensor,
    zeros_OG: Tensor | None,
    code_range: tuple[int, int],
    coarse: Sequence[float],
    fine: Sequence[float],
) -> tuple[Tensor, Tensor | None]:
    group = weight_OI.shape[1] // full_OG.shape[1]
    width = triton.next_power_of_2(group)
    at_once = max(1, _AT_ONCE // width)
    scales_OG = torch.empty_like(full_OG)
    found_OG = torch.zeros_like(full_OG) if zeros_OG is None else zeros_OG.to(full_OG.dtype).contiguous()
    _search[(triton.cdiv(full_OG.numel(), at_once),)](
        weight_OI.contiguous(),
        importance_I.to(weight_OI.dtype).contiguous(),
        full_OG.contiguous(),
        scales_OG,
        found_OG,
        torch.tensor(coarse, device=weight_OI.device),
        torch.tensor(fine, device=weight_OI.device),
        full_OG.numel(),
        full_OG.shape[1],
        group,
        len(coarse),
        len(fine),
        *code_range,
        HAS_ZEROS=zeros_OG is not None,
        GROUPS=at_once,
        WIDTH=width,
    )
    return scales_OG, None if zeros_OG is None else found_OG.to(zeros_OG.dtype)


@triton.jit
def _error(weight, importance, scale, zero, code_min, code_max):
    """sum h |e|^2.5 of every group, [GROUPS, 1]."""
    level = level_of(weight, scale, code_min - zero, code_max - zero)
    error = tl.abs(weight - level * scale)
    return tl.sum(tl.sqrt(error) * error * error * importance, axis=1, keep_dims=True)


@triton.jit
def _search(
    weights,
    importances,
    fulls,
    scales,
    zeros,
    coarse,
    fine,
    n,
    n_groups,
    group,
    n_coarse,
    n_fine,
    code_min,
    code_max,
    HAS_ZEROS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    at = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    inside = (at < n) & (j < group)
    weight = tl.load(weights + at.to(tl.int64) * group + j, mask=inside, other=0.0)
    importance = tl.load(importances + (at % n_groups) * group + j, mask=inside, other=0.0)
    full = tl.load(fulls + at, mask=at < n, other=1.0)
    start = tl.load(zeros + at, mask=at < n, other=0.0)
    scale, zero = round_scale(full), tl.zeros_like(full)
    least, best = tl.full((GROUPS, 1), float("inf"), tl.float32), tl.full((GROUPS, 1), 1.0, tl.float32)
    for stage in tl.static_range(2):
        centre = best
        if stage == 1:
            start = zero
        for number in range(n_coarse if stage == 0 else n_fine):
            if stage == 0:
                ratio = tl.load(coarse + number) + tl.zeros_like(full)
            else:
                step = tl.load(fine + number)
                ratio = (
                    centre + step if HAS_ZEROS else centre * (1 + tl.div_rn(step + tl.zeros_like(full), tl.abs(centre)))
                )
            # Symmetric: both signs at first. Asymmetric: the zero point and its neighbours.
            for other in range(3 if HAS_ZEROS else (2 if stage == 0 else 1)):
                tried_ratio, tried_zero = ratio, start
                if HAS_ZEROS:
                    move = tl.where(other == 2, -1, other)
                    tried_zero = tl.minimum(tl.maximum(start + move, code_min), code_max)
                else:
                    tried_ratio = tl.where(other == 1, -ratio, ratio)
                tried = round_scale(full * tried_ratio)
                error = _error(weight, importance, tried, tried_zero, code_min, code_max)
                better = error < least
                least, scale = tl.where(better, error, least), tl.where(better, tried, scale)
                best, zero = tl.where(better, tried_ratio, best), tl.where(better, tried_zero, zero)
    tl.store(scales + at, scale, mask=at < n)
    tl.store(zeros + at, zero, mask=at < n)
