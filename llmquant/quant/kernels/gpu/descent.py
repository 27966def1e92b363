"""`kernels.descend` for GPUs, a strip of columns in one launch.

Shapes: g group_size, B columns of a strip, O out_features; tensors lie transposed, [g, O].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmquant.quant.kernels.gpu.numbers import level_of

_STRIP = 32  # columns that reach each other one by one; steps from farther away come by products
_ROWS = 64  # of the weight, in a program


def descend(
    H_gg: Tensor, gradient_gO: Tensor, level_gO: Tensor, scale_O: Tensor, low_O: Tensor, high_O: Tensor
) -> Tensor:
    step_gO = torch.zeros_like(level_gO)  # all three contiguous: a kernel takes them by one stride
    for start in range(0, len(H_gg), _STRIP):
        # 1. The gradient of a strip of columns, after the steps of all columns before it.
        strip = slice(start, min(start + _STRIP, len(H_gg)))
        gradient_gO[strip].addmm_(H_gg[strip, :start], step_gO[:start], alpha=-1)
        n_columns, n_rows = gradient_gO[strip].shape
        _descend[(triton.cdiv(n_rows, _ROWS),)](
            H_gg[strip, strip],
            gradient_gO[strip],
            level_gO[strip],
            step_gO[strip],
            scale_O,
            low_O,
            high_O,
            n_rows,
            n_columns,
            H_gg.stride(0),
            MANY_BOUNDS=len(low_O) > 1,
            COLUMNS=triton.next_power_of_2(n_columns),
            ROWS=_ROWS,
        )
    # 2. The gradient of each strip still lacks the steps of its own columns and of those after it.
    for start in range(0, len(H_gg), _STRIP):
        gradient_gO[start : start + _STRIP].addmm_(H_gg[start : start + _STRIP, start:], step_gO[start:], alpha=-1)
    return step_gO


@triton.jit
def _descend(
    H,
    gradient,
    levels,
    steps,
    scales,
    lows,
    highs,
    n_rows,
    n_columns,
    H_stride,
    MANY_BOUNDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    i = tl.arange(0, COLUMNS)[:, None]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :]
    inside = (i < n_columns) & (row < n_rows)
    here = i.to(tl.int64) * n_rows + row
    G, level = tl.load(gradient + here, mask=inside, other=0.0), tl.load(levels + here, mask=inside, other=0.0)
    scale = tl.load(scales + row, mask=row < n_rows, other=1.0)
    if MANY_BOUNDS:
        low, high = tl.load(lows + row, mask=row < n_rows), tl.load(highs + row, mask=row < n_rows)
    else:
        low, high = tl.load(lows + row * 0), tl.load(highs + row * 0)
    step = tl.zeros_like(G)
    for j in range(n_columns):
        # 1. The column's entries, and its best level.
        at_j = i == j
        G_j = tl.sum(tl.where(at_j, G, 0.0), axis=0, keep_dims=True)
        level_j = tl.sum(tl.where(at_j, level, 0.0), axis=0, keep_dims=True)
        v = level_j * scale + tl.div_rn(G_j, tl.load(H + j * H_stride + j))
        best = level_of(v, scale, low, high)
        step_j = (best - level_j) * scale
        # 2. What its step does to the others.
        level = tl.where(at_j, best, level)
        step = tl.where(at_j, step_j, step)
        G -= tl.load(H + i * H_stride + j, mask=i < n_columns, other=0.0) * step_j
    tl.store(levels + here, level, mask=inside)
    tl.store(steps + here, step, mask=inside)
