"""`kernels.round_blocks` for CPUs.

Rows are taken in panels. What finished rows above leave to be made up for is one product for a panel; what finished
columns on the left leave is one for each `_WIDE` of its columns, and one for each tile inside of these. In a tile a row
follows the other, and in it a column: `_round`.

Shapes: R rows and C columns, G groups in a row, P rows of a panel.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmquant.quant.kernels.cpu import array, compiled

_WIDE = 512  # columns whose feedback from all earlier ones is one product
_SIDE = 64  # of a tile: rows of a panel, where they know of each other, and columns
_TOGETHER = 16  # rows of a tile, where they do not


def round_blocks(
    target_RC: Tensor,
    feedback_CC: Tensor,
    blocks: Sequence[tuple[int, Tensor | None]],
    scales_RG: Tensor,
    zeros_RG: Tensor | None,
    groups_C: Tensor,
    code_range: tuple[int, int],
) -> Tensor:
    device, dtype = target_RC.device, target_RC.dtype
    target_RC, feedback_CC = target_RC.detach().cpu().contiguous(), feedback_CC.cpu().contiguous()
    error_RC, left_RC = torch.empty_like(target_RC), torch.empty_like(target_RC)
    codes_RC = torch.empty(target_RC.shape, dtype=torch.int8)
    zeros_RG = torch.zeros_like(scales_RG) if zeros_RG is None else zeros_RG
    scales, zeros, groups = array(scales_RG.to(dtype)), array(zeros_RG.to(dtype)), array(groups_C.long())
    bounds = array(torch.tensor(code_range, dtype=dtype))
    start, n_columns = 0, target_RC.shape[1]
    for n_rows, A_bb in blocks:
        A_bb = None if A_bb is None else A_bb.cpu()
        height = n_rows if A_bb is None else _SIDE
        for first in range(0, n_rows, height):
            # 1. T' = T + A E of the rows above in their block.
            own = slice(first, min(first + height, n_rows))
            rows = slice(start + own.start, start + own.stop)
            moved_PC, A = target_RC[rows].clone(), np.zeros((0, 0), bounds.dtype)
            if A_bb is not None:
                moved_PC.addmm_(A_bb[own, :first], error_RC[start : rows.start])
                A = array(A_bb[own, own])
            for wide in range(0, n_columns, _WIDE):
                # 2. v - T' = (T' - w) U of the columns before.
                end = min(wide + _WIDE, n_columns)
                fed = left_RC[rows, :wide] @ feedback_CC[:wide, wide:end]
                for at in range(wide, end, _SIDE):
                    columns = slice(at, min(at + _SIDE, end))
                    near = fed[:, at - wide : columns.stop - wide]
                    near = torch.addmm(near, left_RC[rows, wide:at], feedback_CC[wide:at, columns])
                    # 3. The tile.
                    _round(
                        rows.start,
                        at,
                        target_RC.numpy(),
                        moved_PC.numpy(),
                        near.numpy(),
                        A,
                        feedback_CC.numpy(),
                        scales,
                        zeros,
                        groups,
                        bounds,
                        codes_RC.numpy(),
                        error_RC.numpy(),
                        left_RC.numpy(),
                    )
        start += n_rows
    return codes_RC.to(device)


@compiled
def _round(
    top: Any, at: Any, target: Any, moved: Any, fed: Any, A: Any, U: Any, scales: Any, zeros: Any, groups: Any,
    bounds: Any, codes: Any, error: Any, left: Any,
) -> None:  # fmt: skip
    """The tile whose first row and column are `top` and `at`: row by row, column by column.

    moved, fed   T' without what rows inside of the tile leave, and v - T' without its columns; both of the tile's rows,
                 `fed` of its columns only
    A            without rows where they know nothing of each other: then a few of them go along each column together,
                 and none waits for the other's arithmetic
    """
    n_rows, n_columns = fed.shape
    together = 1 if len(A) else _TOGETHER
    for first in range(0, n_rows, together):
        end = min(first + together, n_rows)
        if len(A):
            row = moved[first, at : at + n_columns]
            for k in range(first):
                share, above = A[first, k], error[top + k, at : at + n_columns]
                for j in range(n_columns):
                    row[j] += share * above[j]
        for j in range(n_columns):
            feedback, group = U[at + j, at : at + n_columns], groups[at + j]
            for i in range(first, end):
                scale, zero = scales[top + i, group], zeros[top + i, group]
                level = np.rint((moved[i, at + j] + fed[i, j]) / scale)
                level = min(max(level, bounds[0] - zero), bounds[1] - zero)
                codes[top + i, at + j] = level + zero
                error[top + i, at + j] = target[top + i, at + j] - level * scale
                lacking = moved[i, at + j] - level * scale
                left[top + i, at + j] = lacking
                rest = fed[i]
                for later in range(n_columns):  # those before it have 0 there
                    rest[later] += lacking * feedback[later]
