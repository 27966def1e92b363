"""GPTQ in its LDLQ form, between error propagation and a last fit of the scales.

Column by column, each column's error is made up for by the columns after it.

Sources: Frantar et al., GPTQ (arXiv 2210.17323), Algorithm 1; Chee et al., QuIP (arXiv 2307.13304),
Theorem 6, shows that the feedback form below chooses the same codes. It needs one Cholesky factor and no
inverse, and the grid never sees compensated weights.

Shapes: O out_features, I in_features, G groups.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llmquant.errors import SolveError
from llmquant.quant.grid import QuantizedWeight, QuantScheme, plain_grid, search_grid, stacked
from llmquant.quant.hessian import default_damp, factor, quadratic, ridge
from llmquant.quant.matmul import matmul
from llmquant.quant.solvers.base import LayerTask, Solution, SolveOptions, pieces
from llmquant.quant.solvers.refine import refine
from llmquant.quant.solvers.rtn import solve_rtn

_INSIDE = 32  # columns corrected one by one; beyond them by products

_Grid = Callable[[Tensor, Tensor, QuantScheme], tuple[Tensor, Tensor | None]]
_GRIDS: dict[str, _Grid] = {
    "hessian": search_grid,
    "absmax": lambda weight, diagonal, scheme: plain_grid(weight, scheme),
}


def solve_gptq(task: LayerTask, options: SolveOptions) -> Solution:
    """Minimise tr((T - Q) H_l (T - Q)^T) greedily over codes, H_l = H + lambda I; then refine codes and scales.

    The target T is W, or W + a W (C - H) H_l^-1 with error propagation (`_target`).

    With H_l (columns permuted) = U U^T, U upper triangular, for j = 1..I:
        v_j = t_j + sum_{i<j} e_i U_ij / U_jj;   q_j = clip(round(v_j / s_j) + z_j);   e_j = t_j - s_j (q_j - z_j)
    Columns go in descending order of H_jj while groups stay where they were, so a decoder sees nothing of the order.

    Where no damping makes H_l positive definite, or the loss is not finite, `options.on_bad_layer` says what happens:
    SolveError, or round-to-nearest with a note in the report.
    """
    if task.H_II is None:
        raise ValueError(f"{task.name}: gptq needs a Hessian")
    weight_OI, H_II, scheme = task.weight_OI, task.H_II, task.scheme
    in_features = weight_OI.shape[1]
    diagonal = H_II.diagonal()
    order = torch.arange(in_features, device=H_II.device)
    if options.order == "descending":
        order = torch.argsort(diagonal, descending=True, stable=True)

    damp = options.damp if options.damp is not None else default_damp(task.n_tokens, in_features)
    factored = factor(H_II, damp, order)
    if factored is None:
        return _bad_layer(
            task, options, "the Hessian of its input is not positive definite after 5 tries of raised damping"
        )
    U_II, damp, tries = factored
    lam = ridge(float(diagonal.mean()), damp)
    target_OI = _target(task, options.propagation, U_II, order)
    ranges, weights, losses = pieces(weight_OI), [], []
    for rows in ranges:
        scales_OG, zeros_OG = _GRIDS[options.grid](target_OI[rows], diagonal + lam, scheme)
        codes_OI = ldlq(target_OI[rows], U_II, scales_OG, zeros_OG, scheme, order, options.block_size)
        weights.append(QuantizedWeight(codes_OI, scales_OG.float(), scheme, zeros_OG))
    del U_II, factored
    for number, rows in enumerate(ranges):
        weights[number] = refine(weights[number], target_OI[rows], H_II, lam, options)
        losses.append(quadratic(target_OI[rows] - weights[number].dequantize(weight_OI.dtype), H_II))
    weight, loss_O = stacked(weights), torch.cat(losses)
    if not bool(torch.isfinite(loss_O).all()):  # so were the losses by which grid and codes were chosen
        return _bad_layer(task, options, "its loss overflows float32")
    notes = [f"damping raised to {damp:g} after {tries} failed factorizations"] if tries else []
    if n_dead := int((diagonal == 0).sum()):
        notes.append(f"{n_dead} of {in_features} inputs are zero on all calibration tokens: rounded to nearest")
    return Solution(weight, loss_O, target_OI, tuple(notes))


def _target(task: LayerTask, strength: float, U_II: Tensor, order: Tensor) -> Tensor:
    """T = W + a W (C - H) H_l^-1; W itself without drift.

    E ||W x - Q x^||^2 = tr((Q - W*) H (Q - W*)^T) + const with W* = W C H^-1 = W + W (C - H) H^-1. Source: Arai and
    Ichikawa, Quantization Error Propagation (arXiv 2504.09629).
    """
    weight_OI, drift_XI = task.weight_OI, task.drift_OI if task.drift_II is None else task.drift_II
    if not strength or drift_XI is None:
        return weight_OI
    moved_XI = torch.empty_like(drift_XI)
    for rows in pieces(drift_XI):
        moved_XI[rows] = divided(drift_XI[rows], U_II, order)
    if task.drift_II is not None:
        moved_XI = matmul(weight_OI, moved_XI)
    return moved_XI.mul_(strength).add_(weight_OI)


def divided(drift_XI: Tensor, U_II: Tensor, order: Tensor) -> Tensor:
    """drift_XI H_l^-1 by two triangular solves with U_II, the factor of the permuted H_l that the codes need anyway."""
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
    block_size: int,
) -> Tensor:
    """The loop of `solve_gptq`; U_II is the factor of the permuted H. Returns codes_OI (int8).

    Left-looking: before a block of columns its part of all earlier errors comes in by one product, inside by narrower
    ones, and by single columns in the end. Everything lies transposed, [I, O], so that a column is contiguous.
    """
    in_features, group = weight_OI.shape[1], scheme.group(weight_OI.shape[1])
    weight_IO = weight_OI.T[order].contiguous()
    scales_GO = scales_OG.T.contiguous()
    zeros_GO = None if zeros_OG is None else zeros_OG.T.to(weight_OI.dtype).contiguous()
    groups = torch.div(order, group, rounding_mode="floor").tolist()
    diagonal = U_II.diagonal()
    error_IO = torch.zeros_like(weight_IO)
    codes_IO = torch.empty(weight_IO.shape, dtype=torch.int8, device=weight_IO.device)

    for start in range(0, in_features, block_size):
        end = min(start + block_size, in_features)
        feedback = U_II[:end, start:end] / diagonal[start:end]  # U_ij / U_jj of this block's columns
        target = matmul(feedback[:start].T, error_IO[:start]).add_(weight_IO[start:end])
        inside = feedback[start:].T.contiguous()
        for j in range(end - start):
            near = j - j % _INSIDE
            if j == near:
                target[j : j + _INSIDE].addmm_(inside[j : j + _INSIDE, :j], error_IO[start : start + j])
            scale = scales_GO[groups[start + j]]
            v = target[j]
            if j > near:
                v = torch.addmv(v, error_IO[start + near : start + j].T, inside[j, near:j])
            level = (v / scale).round_()
            if zeros_GO is None:
                codes_IO[start + j] = level.clamp_(scheme.code_min, scheme.code_max)
            else:
                zero = zeros_GO[groups[start + j]]
                level.clamp_(scheme.code_min - zero, scheme.code_max - zero)
                codes_IO[start + j] = level + zero
            quantized = level.mul_(scale)
            torch.sub(weight_IO[start + j], quantized, out=error_IO[start + j])

    codes_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    codes_OI[:, order] = codes_IO.T
    return codes_OI


def _bad_layer(task: LayerTask, options: SolveOptions, got: str) -> Solution:
    if options.on_bad_layer == "fail":
        raise SolveError(
            task.name,
            got,
            expected="finite calibration activations",
            remedy="more --samples, another --calibration text, --ignore it, or accept --on-bad-layer rtn",
        )
    H_II = task.H_II
    finite = H_II is not None and bool(torch.isfinite(H_II).all())
    plain = solve_rtn(LayerTask(task.name, task.weight_OI, H_II if finite else None, task.n_tokens, task.scheme))
    return replace(plain, notes=(f"{got}: rounded to nearest (--on-bad-layer rtn)",))
