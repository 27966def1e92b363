"""`kernels.round_blocks` for GPUs, in one launch for each anti-diagonal of tiles.

v_ij needs what lies above it in its column and left of it in its row. So the matrix is cut into tiles, and a program
has one of those whose neighbours above and on the left are done. It first gathers what all finished tiles have left to
be made up for, two products; then it rounds the entries of its own, all of an anti-diagonal at once.

Shapes: R rows and C columns, padded to whole tiles; G groups in a row, T rows of tiles, S the side of A.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmquant.quant.kernels.gpu.numbers import level_of

_SIDE = 32  # of a tile


def round_blocks(
    target_RC: Tensor,
    feedback_CC: Tensor,
    blocks: Sequence[tuple[int, Tensor | None]],
    scales_RG: Tensor,
    zeros_RG: Tensor | None,
    groups_C: Tensor,
    code_range: tuple[int, int],
) -> Tensor:
    device = target_RC.device
    # 1. Where the rows of each block go: a block begins with a tile of its own.
    places, at, in_block, lags = list[Tensor](), 0, list[int](), list[int]()
    for number, (n_rows, A_bb) in enumerate(blocks):
        n_tiles = -(-n_rows // _SIDE)
        places.append(torch.arange(at, at + n_rows, device=device))
        at += n_tiles * _SIDE
        in_block += [number] * n_tiles
        lags += range(n_tiles) if A_bb is not None else [0] * n_tiles
    place = torch.cat(places)
    n_columns = -(-target_RC.shape[1] // _SIDE) * _SIDE

    def placed(x: Tensor, width: int, pad: int) -> Tensor:
        out = target_RC.new_full((at, width), pad)
        out[place, : x.shape[1]] = x.to(out.dtype)
        return out

    # 2. All matrices padded to whole tiles; padded columns feed back nothing.
    side = max((-(-n_rows // _SIDE) * _SIDE for n_rows, A_bb in blocks if A_bb is not None), default=0)
    A_nSS = torch.stack([_padded(A_bb, side) for _, A_bb in blocks if A_bb is not None]) if side else None
    scales = placed(scales_RG, scales_RG.shape[1], 1)
    zeros = scales if zeros_RG is None else placed(zeros_RG, zeros_RG.shape[1], 0)
    groups = torch.zeros(n_columns, dtype=torch.int32, device=device)
    groups[: len(groups_C)] = groups_C
    target, feedback = placed(target_RC, n_columns, 0), _padded(feedback_CC, n_columns)
    codes = torch.empty(target.shape, dtype=torch.int8, device=device)
    error, left = torch.empty_like(target), torch.empty_like(target)
    tile_rows = [torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (in_block, lags)]
    # 3. One anti-diagonal after the other.
    for step in range(n_columns // _SIDE + max(lags)):
        _step[(len(lags),)](
            target,
            error,
            left,
            codes,
            feedback,
            feedback if A_nSS is None else A_nSS,
            *tile_rows,
            step,
            scales,
            zeros,
            groups,
            n_columns,
            scales.shape[1],
            side,
            *code_range,
            HAS_A=A_nSS is not None,
            HAS_ZEROS=zeros_RG is not None,
            SIDE=_SIDE,
        )
    return codes[place, : target_RC.shape[1]]


def _padded(matrix: Tensor, side: int) -> Tensor:
    """A square matrix with zeros up to this side."""
    if len(matrix) == side:
        return matrix.contiguous()
    out = matrix.new_zeros(side, side)
    out[: len(matrix), : len(matrix)] = matrix
    return out


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
