"""Rounding with feedback, tile by tile: `solvers/two_sided.py` in one launch for each anti-diagonal of tiles.

A program has one tile. It first gathers what all finished tiles above and on the left have left to be made up for, two
products; then it rounds the entries of its own, all of an anti-diagonal at once. Without row feedback every row of
tiles is on its own, and this is `solvers/gptq.ldlq`.

Shapes: R rows and C columns, padded to whole tiles; G groups in a row, T rows of tiles, S the side of A.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmquant.quant.kernels.numbers import level_of


def round_tiles(
    target_RC: Tensor,
    U_CC: Tensor,
    A_nSS: Tensor | None,
    blocks_T: Tensor,
    lags_T: Tensor,
    n_steps: int,
    scales_RG: Tensor,
    zeros_RG: Tensor | None,
    groups_C: Tensor,
    code_range: tuple[int, int],
    side: int,
) -> Tensor:
    """codes_RC, int8.

    U_CC      U_lj / U_jj above the diagonal, 0 elsewhere
    A_nSS     of every block of rows: A_ik / A_ii below the diagonal, 0 elsewhere; None without row feedback
    blocks_T, lags_T   of every row of tiles: its block, and how many rows of tiles of this block lie above it, int32
    n_steps   anti-diagonals: the column tiles and the largest lag
    groups_C  the group of every column, int32
    side      rows and columns of a tile, a power of two from 16 on
    """
    codes_RC = torch.empty(target_RC.shape, dtype=torch.int8, device=target_RC.device)
    error_RC, left_RC = torch.empty_like(target_RC), torch.empty_like(target_RC)
    for step in range(n_steps):
        _step[(len(lags_T),)](
            target_RC,
            error_RC,
            left_RC,
            codes_RC,
            U_CC,
            U_CC if A_nSS is None else A_nSS,
            blocks_T,
            lags_T,
            step,
            scales_RG,
            scales_RG if zeros_RG is None else zeros_RG,
            groups_C,
            target_RC.shape[1],
            scales_RG.shape[1],
            0 if A_nSS is None else A_nSS.shape[1],
            *code_range,
            HAS_A=A_nSS is not None,
            HAS_ZEROS=zeros_RG is not None,
            SIDE=side,
        )
    return codes_RC


@triton.jit(do_not_specialize=["step"])
def _step(
    target,
    error,
    left,
    codes,
    U,
    A,
    blocks,
    lags,
    step,
    scales,
    zeros,
    groups,
    n_columns,
    n_groups,
    A_side,
    code_min,
    code_max,
    HAS_A: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SIDE: tl.constexpr,
):
    a = tl.program_id(0).to(tl.int64)
    lag = tl.load(lags + a)
    c = step - lag
    if (c < 0) | (c * SIDE >= n_columns):
        return
    i, j = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    here = (a * SIDE + i) * n_columns + c * SIDE + j
    t = tl.load(target + here)
    # 1. What finished tiles leave: T' = T + A E of those above, v - T' = (T' - w) U of those on the left.
    moved = t
    if HAS_A:
        A += tl.load(blocks + a).to(tl.int64) * A_side * A_side + (lag * SIDE + i) * A_side
        above = error + ((a - lag) * SIDE + i) * n_columns + c * SIDE + j
        for k in range(lag):
            part = tl.load(A + k * SIDE + j)
            moved += tl.dot(part, tl.load(above + k * SIDE * n_columns), input_precision="ieee")
    fed = tl.zeros((SIDE, SIDE), tl.float32)
    row = left + (a * SIDE + i) * n_columns
    column = U + i.to(tl.int64) * n_columns + c * SIDE + j
    for k in range(c):
        part = tl.load(row + k * SIDE + j)
        fed += tl.dot(part, tl.load(column + k * SIDE * n_columns.to(tl.int64)), input_precision="ieee")
    # 2. The grid.
    of_group = (a * SIDE + i) * n_groups + tl.load(groups + c * SIDE + j)
    scale, zero = tl.load(scales + of_group), tl.zeros((SIDE, SIDE), tl.float32)
    if HAS_ZEROS:
        zero = tl.load(zeros + of_group)
    low, high = code_min - zero, code_max - zero
    # 3. The tile itself: the entries with i + j = s, then what they do to those below and on the right.
    code, e, rest = tl.zeros_like(t), tl.zeros_like(t), tl.zeros_like(t)
    U += (c * SIDE).to(tl.int64) * n_columns + c * SIDE
    for s in range(2 * SIDE - 1):
        at_s = i + j == s
        level = level_of(moved + fed, scale, low, high)
        code = tl.where(at_s, level + zero, code)
        e_s = tl.where(at_s, t - level * scale, 0.0)
        rest_s = tl.where(at_s, moved - level * scale, 0.0)
        e, rest = e + e_s, rest + rest_s
        if HAS_A:
            sender_j = s - j  # the row of column j's entry
            A_s = tl.load(A + lag * SIDE + sender_j, mask=(sender_j >= 0) & (sender_j < SIDE), other=0.0)
            moved += A_s * tl.sum(e_s, axis=0, keep_dims=True)
        sender_i = s - i  # the column of row i's entry
        U_s = tl.load(U + sender_i * n_columns + j, mask=(sender_i >= 0) & (sender_i < SIDE), other=0.0)
        fed += U_s * tl.sum(rest_s, axis=1, keep_dims=True)
    tl.store(codes + here, code.to(tl.int8))
    tl.store(error + here, e)
    tl.store(left + here, rest)
