"""GPTQ in its LDLQ form: column by column, each column's error is made up for by the columns after it.

Sources: Frantar et al., GPTQ (arXiv 2210.17323), Algorithm 1; Chee et al., QuIP (arXiv 2307.13304),
Theorem 6, shows that the feedback form below chooses the same codes. It needs one Cholesky factor and no
inverse, and the grid never sees compensated weights.

Shapes: O out_features, I in_features, G groups.
"""

import torch
from torch import Tensor

from llmquant.errors import SolveError
from llmquant.grid import QuantizedWeight, QuantScheme, absmax_scales, search_scales
from llmquant.hessian import default_damp, factor, ridge
from llmquant.solvers.base import LayerTask, Solution, SolveOptions
from llmquant.solvers.rtn import solve_rtn

_SCALES = {
    "hessian": lambda weight, diagonal, scheme: search_scales(weight, diagonal, scheme),
    "absmax": lambda weight, diagonal, scheme: absmax_scales(weight, scheme),
}


def solve_gptq(task: LayerTask, options: SolveOptions) -> Solution:
    """Minimise tr((W - Q) H_l (W - Q)^T) greedily over codes, H_l = H + lambda I, scales fixed beforehand.

    With H_l (columns permuted) = U U^T, U upper triangular, for j = 1..I:
        v_j = w_j + sum_{i<j} e_i U_ij / U_jj;   q_j = clip(round(v_j / s_j));   e_j = w_j - s_j q_j
    and the loss is sum_j U_jj^2 (v_j - s_j q_j)^2. Columns go in descending order of H_jj while groups stay
    where they were, so a decoder sees nothing of the order.

    Where no damping makes H_l positive definite, `options.on_bad_layer` says what happens: SolveError, or
    round-to-nearest with a note in the report.
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
        return _bad_layer(task, options)
    U_II, damp, tries = factored
    lam = ridge(float(diagonal.mean()), damp)
    scales_OG = _SCALES[options.grid](weight_OI, diagonal + lam, scheme)
    codes_OI, damped_loss_O = ldlq(weight_OI, U_II, scales_OG, scheme, order, options.block_size)

    weight = QuantizedWeight(codes_OI, scales_OG.float(), scheme)
    error_OI = weight_OI - weight.dequantize(weight_OI.dtype)
    loss_O = (damped_loss_O - lam * error_OI.square().sum(1)).clamp_(min=0)  # tr(E H E^T) without the damping
    notes = [f"damping raised to {damp:g} after {tries} failed factorizations"] if tries else []
    if n_dead := int((diagonal == 0).sum()):
        notes.append(f"{n_dead} of {in_features} inputs are zero on all calibration tokens: rounded to nearest")
    return Solution(weight, loss_O, tuple(notes))


def ldlq(
    weight_OI: Tensor, U_II: Tensor, scales_OG: Tensor, scheme: QuantScheme, order: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """The loop of `solve_gptq`; U_II is the factor of the permuted H. Returns codes_OI (int8) and loss_O.

    Left-looking: before a block of columns its part of all earlier errors comes in by one product; inside,
    one column at a time. Everything lies transposed, [I, O], so that a column is contiguous in memory.
    """
    in_features, group = weight_OI.shape[1], scheme.group(weight_OI.shape[1])
    weight_IO = weight_OI.T[order].contiguous()
    scales_GO = scales_OG.T.contiguous()
    groups = torch.div(order, group, rounding_mode="floor").tolist()
    diagonal = U_II.diagonal()
    error_IO = torch.zeros_like(weight_IO)
    codes_IO = torch.empty(weight_IO.shape, dtype=torch.int8, device=weight_IO.device)
    loss_O = torch.zeros_like(weight_IO[0])

    for start in range(0, in_features, block_size):
        end = min(start + block_size, in_features)
        feedback = U_II[:end, start:end] / diagonal[start:end]  # U_ij / U_jj of this block's columns
        target = torch.addmm(weight_IO[start:end], feedback[:start].T, error_IO[:start])
        inside = feedback[start:].T.contiguous()
        for j in range(end - start):
            scale = scales_GO[groups[start + j]]
            v = torch.addmv(target[j], error_IO[start : start + j].T, inside[j, :j]) if j else target[0]
            code = (v / scale).round_().clamp_(scheme.code_min, scheme.code_max)
            codes_IO[start + j] = code
            quantized = code.mul_(scale)
            torch.sub(weight_IO[start + j], quantized, out=error_IO[start + j])
            target[j] = v - quantized
        loss_O += target.mul_(diagonal[start:end, None]).square_().sum(0)

    codes_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    codes_OI[:, order] = codes_IO.T
    return codes_OI, loss_O


def _bad_layer(task: LayerTask, options: SolveOptions) -> Solution:
    if options.on_bad_layer == "fail":
        raise SolveError(
            task.name,
            "the Hessian of its input is not positive definite after 5 tries of raised damping",
            expected="finite calibration activations",
            remedy="more --samples, another --calibration text, --ignore it, or accept --on-bad-layer rtn",
        )
    H_II = task.H_II
    finite = H_II is not None and bool(torch.isfinite(H_II).all())
    plain = solve_rtn(LayerTask(task.name, task.weight_OI, H_II if finite else None, task.n_tokens, task.scheme))
    return Solution(plain.weight, plain.loss_O, ("no factorization: rounded to nearest (--on-bad-layer rtn)",))
