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

How. Row by row and column by column, in a kernel that leaves the bulk of the sums to products (`quant/kernels/`).

Cost. O I (O + I) operations in products. H_O of a wide layer is cut into blocks of rows, which know nothing of each
other: then that is O I (b + I), b rows to a block.

Source: Tseng et al., Model-Preserving Adaptive Rounding (arXiv 2505.22988), Algorithm 1: the same feedback, there in
blocks of rows whose entries do not see each other.

Shapes: O out_features, I in_features, G groups in a row, b rows of a block of H_O.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.quant import kernels
from llmquant.quant.grid import QuantScheme
from llmquant.quant.hessian import factor
from llmquant.quant.solvers.base import pieces, rows_at_once

_TILE = 1024  # rows and columns that are transposed at once


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


def column_feedback(U_II: Tensor) -> Tensor:
    """U_ij / U_jj above the diagonal, 0 elsewhere: what an error in a column does to those after it.

    It takes the memory of `U_II`, whose numbers are gone: of a wide layer each such matrix is half a gigabyte. Rows lie
    one behind the other, as the loop reads them; those of a factor are columns.

    >>> column_feedback(torch.tensor([[2.0, 3.0], [0.0, 6.0]])).tolist()
    [[0.0, 0.5], [0.0, 0.0]]
    """
    if not U_II.is_contiguous() and U_II.mT.is_contiguous():
        U_II = _transposed(U_II.mT)
    return U_II.div_(U_II.diagonal().clone()).triu_(1)


def _transposed(square: Tensor) -> Tensor:
    """Its transpose, in its memory, tile by tile."""
    starts = range(0, len(square), _TILE)
    for i in starts:
        for j in starts[i // _TILE :]:
            here, there = square[i : i + _TILE, j : j + _TILE], square[j : j + _TILE, i : i + _TILE]
            kept = here.clone()
            if i != j:
                here.copy_(there.T)
            there.copy_(kept.T)
    return square


def two_sided_ldlq(
    target_OI: Tensor,
    feedback_II: Tensor,
    feedback: Sequence[RowFeedback],
    scales_OG: Tensor,
    zeros_OG: Tensor | None,
    scheme: QuantScheme,
    order: Tensor,
) -> Tensor:
    """codes_OI, int8, in the original order of rows and columns.

    feedback_II  of the permuted H_I, by `column_feedback`; `order` is that permutation
    feedback   of every block of rows; every row is in one. None at all: this is `gptq.ldlq`

    Two rows whose outputs the model adds up: where one is rounded up, the other is rounded down.

    >>> feedback = row_feedback([(torch.arange(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))], damp=0.0)
    >>> target_OI, ones, scheme = torch.full((2, 1), 0.4), torch.ones(2, 1), QuantScheme(4, -1)
    >>> two_sided_ldlq(target_OI, torch.zeros(1, 1), feedback, ones, None, scheme, torch.arange(1)).tolist()
    [[0], [1]]
    """
    codes_OI = torch.empty(target_OI.shape, dtype=torch.int8, device=target_OI.device)
    groups_I = torch.div(order, scheme.group(len(order)), rounding_mode="floor")
    if not feedback:
        all_rows = torch.arange(len(target_OI), device=target_OI.device)
        feedback = [RowFeedback(None, all_rows[rows]) for rows in pieces(target_OI)]
    for blocks in _together(feedback, rows_at_once(target_OI)):
        rows = torch.cat([block.rows for block in blocks])
        found_OI = kernels.round_blocks(
            target_OI[rows][:, order],
            feedback_II,
            [(len(block.rows), block.A_bb) for block in blocks],
            scales_OG[rows],
            None if zeros_OG is None else zeros_OG[rows],
            groups_I,
            (scheme.code_min, scheme.code_max),
        )
        ordered_OI = torch.empty_like(found_OI)
        ordered_OI[:, order] = found_OI
        codes_OI[rows] = ordered_OI
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
