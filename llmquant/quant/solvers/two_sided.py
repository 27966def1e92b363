"""Two-sided rounding: errors in one output make up for errors in others, as the model's own predictions weigh them.

What. GPTQ's loss e H e^T counts all outputs of a layer alike, but the model does not: it reads some directions of them
closely and others hardly at all. To second order the divergence of its predictions that E = T - Q in one linear causes
is

    KL ~ 1/2 tr(H_O E H_I E^T),   H_I = E[x x^T],   H_O = E[g g^T]

with g the gradient of the log-likelihood at the layer's output (`quant/curvature.py` says how it is taken). With
H_O = I it is GPTQ's loss.

Why it works. With H_O = A^T A, A lower triangular, and H_I = U U^T, U upper triangular, the loss is a sum of squares,
one for each weight:

    ||A E U||^2 = sum_ij A_ii^2 U_jj^2 (v_ij - w_ij)^2
    T'_ij = t_ij  + sum_{k<i} E_kj A_ik / A_ii              what the rows before leave to be made up for
    v_ij  = T'_ij + sum_{l<j} (T'_il - w_il) U_lj / U_jj    and the columns before, as in GPTQ

so each w_ij is the level nearest to v_ij, row by row, column by column.

How. v_ij needs what lies above it in its column and left of it in its row. So the matrix is cut into tiles, and all
tiles on an anti-diagonal are worked on at once; inside of a tile the same holds for its entries. What a finished tile
adds to those below and to its right are two products. On a GPU a kernel does the same (`kernels/tiles.py`).

Cost. O I (O + I) operations in products. H_O of a wide layer is cut into blocks of rows, which know nothing of each
other: then that is O I (b + I), b rows to a block.

Source: Tseng et al., Model-Preserving Adaptive Rounding (arXiv 2505.22988), Algorithm 1: the same feedback, there in
blocks of rows whose entries do not see each other.

Shapes: O out_features, I in_features, G groups in a row, b rows of a block of H_O; n tiles, R = C their sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.quant import kernels
from llmquant.quant.grid import QuantScheme
from llmquant.quant.hessian import factor
from llmquant.quant.solvers.base import rows_at_once

_SIDE = 32  # of a tile


@dataclass(frozen=True)
class RowFeedback:
    """Of one block of rows: A_ik / A_ii below the diagonal, 0 elsewhere, and the rows in which order it holds.

    A_bb   None: the rows know nothing of each other
    """

    A_bb: Tensor | None
    rows: Tensor


def row_feedback(H_OO: Sequence[tuple[Tensor, Tensor]], damp: float) -> list[RowFeedback]:
    """What errors in one row of a block do to those after it, by the block's damped H_O = A^T A.

    H_OO   (rows, H_O of these) of every block

    Rows with large H_ii go first, as columns do: a late one has few others left to make up for its error. Empty where
    there is no block, or one that no damping makes positive definite.

    >>> (feedback,) = row_feedback([(torch.tensor([4, 5]), torch.tensor([[1.0, 0.5], [0.5, 1.25]]))], damp=0.0)
    >>> feedback.A_bb.tolist(), feedback.rows.tolist()
    ([[0.0, 0.0], [0.5, 0.0]], [5, 4])
    """
    found = []
    for rows, H_bb in H_OO:
        order_b = torch.argsort(H_bb.diagonal(), descending=True, stable=True)
        if (factored := factor(H_bb, damp, order_b)) is None:
            return []
        U_bb = factored[0]  # H_O = U U^T: A is its transpose
        found.append(RowFeedback((U_bb / U_bb.diagonal()).T.tril(-1), rows[order_b]))
    return found


def two_sided_ldlq(
    target_OI: Tensor,
    U_II: Tensor,
    feedback: Sequence[RowFeedback],
    scales_OG: Tensor,
    zeros_OG: Tensor | None,
    scheme: QuantScheme,
    order: Tensor,
) -> Tensor:
    """codes_OI, int8, in the original order of rows and columns.

    U_II       the factor of the permuted H_I, `order` that permutation
    feedback   of every block of rows; every row is in one. None at all: this is `gptq.ldlq`

    Two rows whose outputs the model adds up: where one is rounded up, the other is rounded down.

    >>> feedback = row_feedback([(torch.arange(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))], damp=0.0)
    >>> target_OI, ones, scheme = torch.full((2, 1), 0.4), torch.ones(2, 1), QuantScheme(4, -1)
    >>> two_sided_ldlq(target_OI, ones[:1], feedback, ones, None, scheme, torch.arange(1)).tolist()
    [[0], [1]]
    """
    codes_OI = torch.empty(target_OI.shape, dtype=torch.int8, device=target_OI.device)
    columns = _Columns(U_II, order, scheme)
    feedback = feedback or [RowFeedback(None, torch.arange(len(target_OI), device=target_OI.device))]
    for blocks in _together(feedback, rows_at_once(target_OI)):
        placed = _Placed(target_OI, blocks, columns, scales_OG, zeros_OG)
        found = _by_kernel(placed) if kernels.used_for(target_OI) else _by_steps(placed)
        codes_OI[placed.rows] = placed.back(found)
    # Groups of zeros stay zeros, whatever their rows could make up for with the smallest of all scales.
    empty_OG = (target_OI.view(*scales_OG.shape, -1) == 0).all(-1)
    codes_OGg = codes_OI.view(*scales_OG.shape, -1)
    codes_OGg[empty_OG] = 0 if zeros_OG is None else zeros_OG[empty_OG][:, None]
    return codes_OI


def _together(feedback: Sequence[RowFeedback], n_rows: int) -> list[list[RowFeedback]]:
    """Blocks that are worked on at once: of at most `n_rows` rows together, unless one has more."""
    groups, held = [list[RowFeedback]()], 0
    for block in feedback:
        if groups[-1] and held + len(block.rows) > n_rows:
            groups.append([])
            held = 0
        groups[-1].append(block)
        held += len(block.rows)
    return groups


class _Columns:
    """The columns in the order of the loop, in tiles; padded ones take part in nothing.

    feedback   U_lj / U_jj above the diagonal, 0 elsewhere
    inside     the same inside of each tile, with l reversed: along an anti-diagonal one index falls as the other grows
    groups     of every column
    """

    def __init__(self, U_II: Tensor, order: Tensor, scheme: QuantScheme) -> None:
        self.order, self.scheme = order, scheme
        n = len(order)
        self.n_tiles = -(-n // _SIDE)
        self.width = self.n_tiles * _SIDE
        self.feedback = _padded((U_II / U_II.diagonal()).triu(1), self.width)
        self.inside = _diagonal_tiles(self.feedback).flip(1)
        self.groups = torch.zeros(self.width, dtype=torch.long, device=order.device)
        self.groups[:n] = torch.div(order, scheme.group(n), rounding_mode="floor")


@dataclass(frozen=True)
class _TileRow:
    """A row of tiles: number `lag` of block `block` of rows, whose first row is `start`, with the block's feedback."""

    block: int
    start: int
    lag: int
    A_bb: Tensor | None


class _Placed:
    """Blocks of rows in tiles, with rows and columns in the order of the loop, padded by zeros to whole tiles."""

    def __init__(
        self,
        target_OI: Tensor,
        feedback: Sequence[RowFeedback],
        columns: _Columns,
        scales_OG: Tensor,
        zeros_OG: Tensor | None,
    ) -> None:
        self.columns, self.tile_rows, device = columns, list[_TileRow](), target_OI.device
        # 1. Where the rows of each block go: a block begins with a tile of its own.
        places = []
        for number, block in enumerate(feedback):
            start, n_tiles = len(self.tile_rows) * _SIDE, -(-len(block.rows) // _SIDE)
            A_bb = None if block.A_bb is None else _padded(block.A_bb, n_tiles * _SIDE)
            places.append(torch.arange(start, start + len(block.rows), device=device))
            self.tile_rows += [_TileRow(number, start, 0 if A_bb is None else tile, A_bb) for tile in range(n_tiles)]
        self._places, self.rows = torch.cat(places), torch.cat([block.rows for block in feedback])
        self.n_steps = columns.n_tiles + max(row.lag for row in self.tile_rows)
        # 2. The matrices in that order.
        self.target = self._placed(target_OI[self.rows][:, columns.order], columns.width, 0)
        self.scales = self._placed(scales_OG[self.rows].to(target_OI.dtype), scales_OG.shape[1], 1)
        self.zeros = None
        if zeros_OG is not None:
            self.zeros = self._placed(zeros_OG[self.rows].to(target_OI.dtype), zeros_OG.shape[1], 0)

    def _placed(self, rows: Tensor, width: int, pad: int) -> Tensor:
        """`rows` in their places, and `pad` in all others."""
        out = rows.new_full((len(self.tile_rows) * _SIDE, width), pad)
        out[self._places, : rows.shape[1]] = rows
        return out

    def back(self, found: Tensor) -> Tensor:
        """Codes of the blocks' rows, in the original order of columns."""
        of_rows = found[self._places, : len(self.columns.order)]
        ordered = torch.empty_like(of_rows)
        ordered[:, self.columns.order] = of_rows
        return ordered


def _by_kernel(placed: _Placed) -> Tensor:
    """The codes of all tiles."""
    from llmquant.quant.kernels.tiles import round_tiles

    columns, device = placed.columns, placed.target.device
    blocks = {row.block: row.A_bb for row in placed.tile_rows if row.A_bb is not None}
    side = max((len(A_bb) for A_bb in blocks.values()), default=0)
    return round_tiles(
        placed.target,
        columns.feedback,
        torch.stack([_padded(A_bb, side) for A_bb in blocks.values()]) if blocks else None,
        torch.tensor([row.block for row in placed.tile_rows], dtype=torch.int32, device=device),
        torch.tensor([row.lag for row in placed.tile_rows], dtype=torch.int32, device=device),
        placed.n_steps,
        placed.scales,
        placed.zeros,
        columns.groups.int(),
        (columns.scheme.code_min, columns.scheme.code_max),
        _SIDE,
    )


def _by_steps(placed: _Placed) -> Tensor:
    """The same by operators."""
    work = _Steps(placed)
    for step in range(placed.n_steps):
        work.step(step)
    return work.found


class _Steps:
    """The tiles of one anti-diagonal after those of the other.

    moved      T', as far as finished tiles reach
    fed        v - T', likewise
    found      codes
    A_inside   of the tile on the diagonal in each row of tiles
    """

    def __init__(self, placed: _Placed) -> None:
        self._placed = placed
        self.moved, self.fed = placed.target.clone(), torch.zeros_like(placed.target)
        self.found = torch.zeros(placed.target.shape, dtype=torch.int8, device=placed.target.device)
        self.A_inside = placed.target.new_zeros(len(placed.tile_rows), _SIDE, _SIDE)
        for number, row in enumerate(placed.tile_rows):
            if row.A_bb is not None:
                own = slice(row.lag * _SIDE, (row.lag + 1) * _SIDE)
                self.A_inside[number] = row.A_bb[own, own].flip(1)

    def step(self, step: int) -> None:
        """All tiles of one anti-diagonal: those whose neighbours above and on the left are done."""
        placed, columns = self._placed, self._placed.columns
        n_rows, n_columns = len(placed.tile_rows), columns.n_tiles
        active = [(a, step - row.lag) for a, row in enumerate(placed.tile_rows) if 0 <= step - row.lag < n_columns]
        at_row, at_column = torch.tensor(active, device=placed.target.device).T
        grid = (n_rows, _SIDE, n_columns, _SIDE)
        groups = columns.groups.view(n_columns, 1, _SIDE)[at_column].expand(-1, _SIDE, -1)

        def entries(matrix: Tensor) -> Tensor:
            return matrix.view(grid)[at_row, :, at_column]

        def of_groups(values: Tensor) -> Tensor:
            return values.view(n_rows, _SIDE, -1)[at_row].gather(2, groups)

        # 1. The tiles themselves.
        scale, zero = of_groups(placed.scales), None if placed.zeros is None else of_groups(placed.zeros)
        target, moved, fed = entries(placed.target), entries(self.moved), entries(self.fed)
        tile = _Tile(target, moved, fed, scale, zero, columns.scheme)
        tile.round(self.A_inside[at_row], columns.inside[at_column])
        self.found.view(grid)[at_row, :, at_column] = tile.codes.to(torch.int8)
        # 2. What their errors do to the tiles on the right, and to those below.
        for number, (a, c) in enumerate(active):
            row, at = placed.tile_rows[a], slice(c * _SIDE, (c + 1) * _SIDE)
            right = self.fed[a * _SIDE : (a + 1) * _SIDE, at.stop :]
            if right.numel():
                right.addmm_(tile.left[number], columns.feedback[at, at.stop :])
            if row.A_bb is None:
                continue
            own = slice(row.lag * _SIDE, (row.lag + 1) * _SIDE)
            below = self.moved[row.start + own.stop : row.start + len(row.A_bb), at]
            if below.numel():
                below.addmm_(row.A_bb[own.stop :, own], tile.error[number])


def _padded(matrix: Tensor, side: int) -> Tensor:
    """A square matrix with zeros up to this side."""
    if len(matrix) == side:
        return matrix
    out = matrix.new_zeros(side, side)
    out[: len(matrix), : len(matrix)] = matrix
    return out


def _diagonal_tiles(matrix: Tensor) -> Tensor:
    """The tiles on the diagonal, [n, R, C]."""
    return torch.stack([matrix[at : at + _SIDE, at : at + _SIDE] for at in range(0, len(matrix), _SIDE)])


class _Tile:
    """Tiles that are rounded at once, each [n, R, C]. After `round`:

    codes   q
    error   E = T - w, for the rows below
    left    T' - w, for the columns on the right
    """

    def __init__(
        self, target: Tensor, moved: Tensor, fed: Tensor, scale: Tensor, zero: Tensor | None, scheme: QuantScheme
    ) -> None:
        self.target, self.moved, self.fed, self.scale, self.zero = target, moved, fed, scale, zero
        self.scheme = scheme
        self.codes, self.error, self.left = (torch.empty_like(target) for _ in range(3))

    def round(self, A_inside: Tensor, U_inside: Tensor) -> None:
        """Entry by entry, all of an anti-diagonal i + j = s at once.

        A_inside, U_inside   A_ik / A_ii and U_lj / U_jj within the tiles, with k and l reversed
        """
        low, high = self.scheme.code_min, self.scheme.code_max
        # Each tile in one row, made once: a view costs as much as an operation on so few numbers.
        targets, moveds, feds, scales = (x.view(len(x), -1) for x in (self.target, self.moved, self.fed, self.scale))
        zeros = None if self.zero is None else self.zero.view(len(self.zero), -1)
        all_codes, errors, lefts = (x.view(len(x), -1) for x in (self.codes, self.error, self.left))
        for s in range(2 * _SIDE - 1):
            # 1. The entries (i, s - i): in memory they lie _SIDE - 1 apart.
            first, end = max(0, s - _SIDE + 1), min(_SIDE - 1, s) + 1
            at = slice(first * _SIDE + s - first, (end - 1) * _SIDE + s - end + 2, _SIDE - 1)
            moved, scale = moveds[:, at], scales[:, at]
            # 2. The nearest code to v = T' + (v - T'); `level` is q - z.
            level = (moved + feds[:, at]).div_(scale).round_()
            if zeros is None:
                all_codes[:, at] = level.clamp_(low, high)
            else:
                zero = zeros[:, at]
                level.clamp_(low - zero, high - zero)
                all_codes[:, at] = level + zero
            quantized = level.mul_(scale)
            error, left = targets[:, at] - quantized, moved - quantized
            errors[:, at], lefts[:, at] = error, left
            # 3. Down their columns, j from s - end + 1 to s - first: T' of the rows below.
            columns = slice(s - end + 1, s - first + 1)
            senders = slice(_SIDE - end, _SIDE - first)
            below = self.moved[:, first + 1 :, columns]
            below.addcmul_(A_inside[:, first + 1 :, senders], error.flip(1)[:, None])
            # 4. Along their rows: v of the columns on the right.
            senders = slice(_SIDE - 1 - s + first, _SIDE - 1 - s + end)
            right = self.fed[:, first:end, s - end + 2 :]
            right.addcmul_(U_inside[:, senders, s - end + 2 :], left[:, :, None])
