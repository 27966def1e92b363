"""GPTQ in its LDLQ form: round column by column, and let later columns make up for the errors of earlier ones.

What. A row t of the target should become codes q, with levels w_j = s (q_j - z), so that the error e = t - w costs
little: e H e^T. Rounding each weight to nearest minimises e e^T, as if inputs were uncorrelated. Real inputs are
strongly correlated: an error in one column can be cancelled by a contrary error in another.

Why it works. With H = U U^T, U upper triangular, the loss is a sum over columns:

    e H e^T = ||e U||^2 = sum_j U_jj^2 (v_j - w_j)^2,   v_j = t_j + sum_{i<j} e_i U_ij / U_jj

v_j depends on earlier columns only. So take the columns in order and round v_j, the weight with the feedback of all
errors so far: no other code for column j makes its term smaller. That is greedy, not optimal (the best codes are a
lattice problem), but far better than rounding to nearest.

Order. A late column has few others left to make up for its error, so columns with large H_jj go first. Groups keep
their columns: a decoder sees nothing of the order.

Cost. One Cholesky, I^3 / 3, and O I^2 for the feedback, most of it in matrix products.

Sources: Frantar et al., GPTQ (arXiv 2210.17323), Algorithm 1; Chee et al., QuIP (arXiv 2307.13304), Theorem 6, shows
that this feedback form chooses the same codes. It differs from GPTQ's Algorithm 1 in that
- one factor of H is enough; GPTQ factors H, inverts it and factors the inverse;
- each column gathers the errors before it (left-looking); GPTQ changes all later weights after each column;
- scales are fitted to the target before the loop; GPTQ fits them to weights that carry the errors of earlier columns,
  which widens the grid;
- the target may be more than W (error propagation, `_target`), and codes and scales are refined after the loop;
- weights of dead inputs (H_jj = 0) are rounded to nearest; GPTQ sets them to 0.

Shapes: O out_features, I in_features, G groups in a row, X rows of the drift: I or O.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llmquant.errors import SolveError, option
from llmquant.quant.grid import QuantizedWeight, QuantScheme, plain_grid, search_grid, stacked
from llmquant.quant.hessian import default_damp, factor, quadratic, ridge
from llmquant.quant.matmul import matmul
from llmquant.quant.solvers.base import LayerTask, Solution, SolveOptions, pieces
from llmquant.quant.solvers.refine import refine
from llmquant.quant.solvers.rtn import solve_rtn
from llmquant.quant.solvers.two_sided import column_feedback, row_feedback, two_sided_ldlq

_Grid = Callable[[Tensor, Tensor, QuantScheme], tuple[Tensor, Tensor | None]]
_GRIDS: dict[str, _Grid] = {
    "hessian": search_grid,
    "absmax": lambda weight, diagonal, scheme: plain_grid(weight, scheme),
}


def solve_gptq(task: LayerTask, options: SolveOptions) -> Solution:
    """Minimise tr((T - Q) H_l (T - Q)^T) greedily over codes, H_l = H + lambda I; then refine codes and scales.

    Where the task says how the model adds up errors of its rows, tr(H_O (T - Q) H_l (T - Q)^T) is minimised instead, in
    one go (`two_sided.py`): a refinement by row would undo what rows make up for.

    The target T is W, or W + a W (C - H) H_l^-1 with error propagation of strength a. The loss that is returned is
    taken with H itself, not damped.

    SolveError where no damping makes H_l positive definite or the loss is not finite; with `options.on_bad_layer` "rtn"
    such a layer is rounded to nearest, with a note in the report. ValueError without a Hessian.
    """
    if task.H_II is None:
        raise ValueError(f"{task.name}: gptq needs a Hessian")
    weight_OI, H_II, scheme = task.weight_OI, task.H_II, task.scheme
    in_features = weight_OI.shape[1]
    # 1. The order of the columns.
    diagonal = H_II.diagonal()
    order = torch.arange(in_features, device=H_II.device)
    if options.order == "descending":
        order = torch.argsort(diagonal, descending=True, stable=True)
    # 2. The factor U of the damped and permuted H.
    damp = options.damp if options.damp is not None else default_damp(task.n_tokens, in_features)
    factored = factor(H_II, damp, order)
    if factored is None:
        return _bad_layer(
            task, options, "the Hessian of its input is not positive definite after 5 tries of raised damping"
        )
    U_II, damp, tries = factored
    lam = ridge(float(diagonal.mean()), damp)
    # 3. The target: what the codes should come close to.
    target_OI = _target(task, options, U_II, order)
    # 4. Scales from the target.
    scales_OG, zeros_OG = _GRIDS[options.grid](target_OI, diagonal + lam, scheme)
    # 5. Codes by the loop; by a loop over rows, too, where it is known how the model adds their errors up.
    feedback = row_feedback(task.H_OO, options.curvature_damp)
    feedback_II = column_feedback(U_II)
    del U_II, factored  # nothing reads it any more
    codes_OI = two_sided_ldlq(target_OI, feedback_II, feedback, scales_OG, zeros_OG, scheme, order)
    del feedback_II  # the refinement needs H
    # 6. Codes and scales once more, each the best while the others stay: by a loss that sees one row. Then the loss.
    weight, ranges = QuantizedWeight(codes_OI, scales_OG.float(), scheme, zeros_OG), pieces(weight_OI)
    if not feedback:
        weight = stacked([refine(weight.rows(rows), target_OI[rows], H_II, lam, options) for rows in ranges])
    errors = (target_OI[rows] - weight.rows(rows).dequantize(weight_OI.dtype) for rows in ranges)
    loss_O = torch.cat([quadratic(error_OI, H_II) for error_OI in errors])
    # 7. What the report should know.
    if not bool(torch.isfinite(loss_O).all()):  # then grid and codes were chosen by losses that were not finite either
        return _bad_layer(task, options, "its loss overflows float32")
    notes = [f"damping raised to {damp:g} after {tries} failed factorizations"] if tries else []
    if task.H_OO and not feedback:
        notes.append("the curvature at its output is not positive definite: solved without it")
    if n_dead := int((diagonal == 0).sum()):
        notes.append(f"{n_dead} of {in_features} inputs are zero on all calibration tokens: rounded to nearest")
    return Solution(weight, loss_O, target_OI, tuple(notes))


def _target(task: LayerTask, options: SolveOptions, U_II: Tensor, order: Tensor) -> Tensor:
    """T = W + a W (C - H) H_l^-1, a the strength of propagation; W itself without drift.

    Why. The layer should give on its inputs xhat, which carry the errors of all layers before it, what the original
    layer gives on x. That is a loss with the same H and another target:

        E ||W x - Q xhat||^2 = tr((Q - W*) H (Q - W*)^T) + const,   W* = W C H^-1 = W + W (C - H) H^-1

    so any solver can aim at it. H^-1 comes from the factor that the codes need anyway: two triangular solves.
    Where the output is added to a residual that carries errors, too, b R joins W (C - H).
    Trade-off: with few tokens W* fits their noise, hence a below 1 (`hessian.default_propagation`).

    Source: Arai and Ichikawa, Quantization Error Propagation (arXiv 2504.09629). Ours divides by the damped H_l.
    """
    weight_OI, drift_XI = task.weight_OI, task.drift_II
    if not options.propagation or drift_XI is None:
        return weight_OI
    # The product with W first or last, whichever leaves fewer rows to divide.
    first = task.residual_OI is not None or len(weight_OI) <= len(drift_XI)
    if first:
        drift_XI = matmul(weight_OI, drift_XI)
    if task.residual_OI is not None:
        drift_XI.add_(task.residual_OI, alpha=options.residual)
    moved_XI = torch.empty_like(drift_XI)
    for rows in pieces(drift_XI):
        moved_XI[rows] = divided(drift_XI[rows], U_II, order)
    if not first:
        moved_XI = matmul(weight_OI, moved_XI)
    return moved_XI.mul_(options.propagation).add_(weight_OI)


def divided(drift_XI: Tensor, U_II: Tensor, order: Tensor) -> Tensor:
    """drift_XI H_l^-1, by two triangular solves with U_II, the factor of the permuted H_l = U U^T.

    >>> U_II = torch.tensor([[1.0, 0.5], [0.0, 1.0]])  # of H_l = [[1.25, 0.5], [0.5, 1]]
    >>> divided(torch.tensor([[1.25, 0.5]]), U_II, torch.arange(2)).tolist()
    [[1.0, 0.0]]
    """
    half = torch.linalg.solve_triangular(U_II.T, drift_XI[:, order], upper=False, left=False)
    quotient_XI = torch.empty_like(drift_XI)
    quotient_XI[:, order] = torch.linalg.solve_triangular(U_II, half, upper=True, left=False)
    return quotient_XI


def ldlq(
    weight_OI: Tensor,
    U_II: Tensor,
    scales_OG: Tensor,
    zeros_OG: Tensor | None,
    scheme: QuantScheme,
    order: Tensor,
) -> Tensor:
    """codes_OI, int8, in the original order: the loop over columns, without feedback between rows.

    U_II is the factor of the permuted H.

        v_j = t_j + sum_{i<j} e_i U_ij / U_jj;   q_j = clip(round(v_j / s_j) + z_j);   e_j = t_j - s_j (q_j - z_j)

    Two equal weights of 0.4, correlated by one half. Nearest codes are 0 and 0, at a loss of 0.48. Here the error 0.4
    of the first adds 0.4 * 0.5 to the second: v_2 = 0.6 becomes 1, and the loss 0.28.

    >>> H_II = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> U_II, _, _ = factor(H_II, damp=0.0)
    >>> target_OI, scheme, order = torch.tensor([[0.4, 0.4]]), QuantScheme(4, -1), torch.arange(2)
    >>> codes_OI = ldlq(target_OI, U_II, torch.ones(1, 1), None, scheme, order)
    >>> codes_OI.tolist(), round(float(quadratic(target_OI - codes_OI, H_II)), 6)
    ([[0, 1]], 0.28)
    """
    return two_sided_ldlq(weight_OI, column_feedback(U_II.clone()), [], scales_OG, zeros_OG, scheme, order)


def _bad_layer(task: LayerTask, options: SolveOptions, got: str) -> Solution:
    """Do what `options.on_bad_layer` says with a layer that cannot be solved; `got` is why."""
    if options.on_bad_layer == "fail":
        raise SolveError(
            task.name,
            got,
            expected="finite calibration activations",
            remedy=f"more {option('samples')}, another {option('calibration')} text, {option('ignore')} it, or accept "
            f"{option('on_bad_layer')} rtn",
        )
    H_II = task.H_II
    finite = H_II is not None and bool(torch.isfinite(H_II).all())
    plain = solve_rtn(LayerTask(task.name, task.weight_OI, H_II if finite else None, task.n_tokens, task.scheme))
    return replace(plain, notes=(f"{got}: rounded to nearest (--on-bad-layer rtn)",))
