"""Better codes and scales from those that a solver found, on the same loss tr((T - Q) H_l (T - Q)^T).

Two steps in turn: scales at fixed codes (least squares), and codes at fixed scales (coordinate descent). Neither can
raise the loss of any row, H_l = H + lambda I, but for rounding.

Shapes: O out_features, I in_features, G groups, B columns of a block.
"""

import torch
from torch import Tensor

from llmquant.grid import QuantizedWeight, round_scales
from llmquant.solvers.base import SolveOptions

_NUMBERS = 2**23  # in one temporary of the refit: 32 MB


def default_sweeps(bits: int) -> int:
    """Below 4 bits a second sweep still lowers the divergence; from 4 bits on it is lost in the noise."""
    return 2 if bits < 4 else 1


def refine(
    weight: QuantizedWeight, target_OI: Tensor, H_II: Tensor, lam: float, order: Tensor, options: SolveOptions
) -> QuantizedWeight:
    """`options.sweeps` times: refit the scales, descend on the codes; and a last refit."""
    for _ in range(options.sweeps):
        weight = refit_scales(weight, target_OI, H_II, lam) if options.refit else weight
        weight = descend(weight, target_OI, H_II, lam, order, options.block_size)
    return refit_scales(weight, target_OI, H_II, lam) if options.refit else weight


def levels(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """codes - zeros, [O, I]."""
    codes = weight.codes_OI.to(dtype)
    if weight.zeros_OG is not None:
        codes.view(*weight.zeros_OG.shape, -1).sub_(weight.zeros_OG[..., None])
    return codes


def refit_scales(weight: QuantizedWeight, target_OI: Tensor, H_II: Tensor, lam: float) -> QuantizedWeight:
    """The scales that minimise the loss at fixed codes: least squares in the G scales of each row.

    With c_g the row's codes, less their zero, within group g and 0 elsewhere: A s = b, A_gg' = c_g^T H_l c_g',
    b_g = c_g^T H_l t. Rows whose loss (with scales rounded to bf16) does not fall keep theirs. Costs about one
    product [O, I] x [I, I].
    """
    scales_OG = weight.scales_OG.clone()
    n_groups = scales_OG.shape[1]
    codes_OI = levels(weight, target_OI.dtype)
    rows = max(1, _NUMBERS // max(n_groups**2, target_OI.shape[1]))
    for start in range(0, len(scales_OG), rows):
        at = slice(start, start + rows)
        scales_OG[at] = _refit_rows(target_OI[at], codes_OI[at], scales_OG[at], H_II, lam)
    return QuantizedWeight(weight.codes_OI, scales_OG, weight.scheme, weight.zeros_OG)


def _refit_rows(target_OI: Tensor, codes_OI: Tensor, scales_OG: Tensor, H_II: Tensor, lam: float) -> Tensor:
    n_rows, n_groups = scales_OG.shape

    def by_group(x_OI: Tensor) -> Tensor:
        return x_OI.mul_(codes_OI).view(n_rows, n_groups, -1).sum(-1)

    A = codes_OI.new_empty(n_rows, n_groups, n_groups, dtype=torch.float64)
    for g, part in enumerate(torch.split(codes_OI, codes_OI.shape[1] // n_groups, 1)):
        columns = slice(g * part.shape[1], (g + 1) * part.shape[1])
        A[:, g] = by_group(part @ H_II[columns])
        A[:, g, g] += lam * part.square().sum(1)
    b = by_group(torch.addmm(target_OI, target_OI, H_II, beta=lam)).double()
    old = scales_OG.double()
    diagonal = A.diagonal(dim1=1, dim2=2)
    empty = diagonal == 0  # groups whose codes are all zero keep their scale; their row and column of A are zero
    diagonal[empty], b[empty] = 1, old[empty]
    lower, info = torch.linalg.cholesky_ex(A)
    new = torch.cholesky_solve(b[..., None], lower)[..., 0]
    new = round_scales(torch.where(torch.isfinite(new), new, old))

    def change(scales: Tensor) -> Tensor:
        """The loss but for a constant."""
        return ((A @ scales[..., None])[..., 0] * scales).sum(1) - 2 * (b * scales).sum(1)

    better = (info == 0) & (change(new) < change(old))
    return torch.where(better[:, None], new, old).to(scales_OG.dtype)


def descend(
    weight: QuantizedWeight, target_OI: Tensor, H_II: Tensor, lam: float, order: Tensor, block_size: int
) -> QuantizedWeight:
    """One sweep of coordinate descent: every code in turn becomes the best one while all others stay.

    With E = T - Q and the gradient G = E H_l, weight j of a row is best at w^_j + G_j / H_l,jj, rounded to its grid.
    Columns go by blocks in `order`: one product gives a block its gradient, inside it is corrected column by column.
    Everything lies transposed, [I, O], so that a column is contiguous in memory.
    """
    scheme, dtype = weight.scheme, target_OI.dtype
    level_IO = levels(weight, dtype).T.contiguous()
    error_IO = (target_OI - weight.dequantize(dtype)).T.contiguous()
    scales_GO = weight.scales_OG.T.to(dtype).contiguous()
    zeros_GO = None if weight.zeros_OG is None else weight.zeros_OG.T.to(dtype).contiguous()
    groups = torch.div(order, scheme.group(len(order)), rounding_mode="floor").tolist()
    for start in range(0, len(order), block_size):
        at = order[start : start + block_size]
        H_BI, error_BO, level_BO = H_II[at], error_IO[at], level_IO[at]
        gradient_BO = torch.addmm(error_BO, H_BI, error_IO, beta=lam)
        inside = H_BI[:, at]
        inside.diagonal().add_(lam)
        moved_BO = torch.zeros_like(error_BO)
        for j, curvature in enumerate(inside.diagonal().tolist()):
            group = groups[start + j]
            scale, level = scales_GO[group], level_BO[j]
            gradient = torch.addmv(gradient_BO[j], moved_BO[:j].T, inside[j, :j], alpha=-1) if j else gradient_BO[0]
            best = torch.addcdiv(level, gradient, scale, value=1 / curvature).round_()
            if zeros_GO is None:
                best.clamp_(scheme.code_min, scheme.code_max)
            else:
                best.clamp_(scheme.code_min - zeros_GO[group], scheme.code_max - zeros_GO[group])
            torch.mul(best - level, scale, out=moved_BO[j])
            level_BO[j] = best
        error_IO[at], level_IO[at] = error_BO.sub_(moved_BO), level_BO
    if zeros_GO is not None:
        level_IO.view(len(zeros_GO), -1, level_IO.shape[1]).add_(zeros_GO[:, None])
    return QuantizedWeight(level_IO.T.to(torch.int8).contiguous(), weight.scales_OG, scheme, weight.zeros_OG)
