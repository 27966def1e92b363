"""A strip of columns of `solvers/refine.py`: each level chosen again while all others stay, in one launch.

Shapes: B columns of a strip, O out_features; tensors lie transposed, [B, O].
"""

import triton
import triton.language as tl
from torch import Tensor

from llmquant.quant.kernels.numbers import level_of

_ROWS = 64  # of the weight, in a program


def descend_strip(
    H_BB: Tensor, gradient_BO: Tensor, level_BO: Tensor, step_BO: Tensor, scale_O: Tensor, low_O: Tensor, high_O: Tensor
) -> None:
    """c_j = clip(round(c_j + G_j / (s H_jj)), low, high), column by column; level_BO and step_BO change in place.

    gradient_BO   G with the steps of all columns before the strip in it
    step_BO       becomes s times the step of c
    low_O, high_O   one bound for each row, or one for all

    All of the strip's tensors are rows of larger ones: contiguous along O, and of one stride.
    """
    n_columns, n_rows = gradient_BO.shape
    _descend[(triton.cdiv(n_rows, _ROWS),)](
        H_BB,
        gradient_BO,
        level_BO,
        step_BO,
        scale_O,
        low_O,
        high_O,
        n_rows,
        n_columns,
        H_BB.stride(0),
        MANY_BOUNDS=len(low_O) > 1,
        COLUMNS=triton.next_power_of_2(n_columns),
        ROWS=_ROWS,
    )


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
