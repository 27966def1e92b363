"""Better codes and scales from those that a solver found, on the same loss tr((T - Q) H_l (T - Q)^T).

Coordinate descent, group by group: first the codes of the group, one column after the other, then its scale, each the
best one while all else stays. No step raises the loss of any row, H_l = H + lambda I, but for
rounding. A sweep over all groups costs one product [O, I] x [I, I], as much as the feedback of GPTQ twice.

Shapes: O out_features, I in_features, G groups, g group size, B columns of a block: one group or several.
Everything lies transposed, [I, O], so that a column of the weight is contiguous in memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.quant.grid import QuantizedWeight, round_scales
from llmquant.quant.matmul import matmul
from llmquant.quant.solvers.base import SolveOptions

_BLOCK = 512  # columns, at least: their gradient is one product
_INSIDE = 32  # columns corrected one by one; beyond them by products


def default_sweeps(bits: int, group_size: int) -> int:
    """One; four below 4 bits and for groups of 32. Beyond that the loss falls still, the divergence no longer."""
    return 4 if bits < 4 or group_size == 32 else 1


def refine(
    weight: QuantizedWeight, target_OI: Tensor, H_II: Tensor, lam: float, options: SolveOptions
) -> QuantizedWeight:
    """`options.sweeps` sweeps over all groups; without `options.refit` the scales stay."""
    if not options.sweeps:
        return weight
    scheme, dtype = weight.scheme, target_OI.dtype
    group = scheme.group(target_OI.shape[1])
    width = max(_BLOCK // group, 1) * group
    scales_GO = weight.scales_OG.T.to(dtype).contiguous()
    zeros_GO = target_OI.new_zeros(len(scales_GO), 1)
    if weight.zeros_OG is not None:
        zeros_GO = weight.zeros_OG.T.to(dtype).contiguous()
    level_IO = weight.codes_OI.T.to(dtype, memory_format=torch.contiguous_format)
    level_GgO = level_IO.view(len(scales_GO), group, -1).sub_(zeros_GO[:, None])
    error_IO = target_OI.T - (level_GgO * scales_GO[:, None]).view_as(level_IO)
    for _ in range(options.sweeps):
        for start in range(0, len(level_IO), width):
            at = slice(start, min(start + width, len(level_IO)))
            # G = E H_l of the block's columns, as the blocks before it left E
            gradient_BO = matmul(H_II[at], error_IO).add_(error_IO[at], alpha=lam)
            H_BB = H_II[at, at].clone()
            H_BB.diagonal().add_(lam)
            for first in range(0, len(H_BB), group):
                here, rest = slice(first, first + group), slice(first + group, None)
                number = (start + first) // group
                one = _Group(
                    H_BB[here, here], level_IO[at][here], error_IO[at][here], gradient_BO[here], scales_GO[number]
                )
                before = one.error_gO.clone()
                one.descend(scheme.code_min - zeros_GO[number], scheme.code_max - zeros_GO[number])
                if options.refit:
                    one.rescale()
                gradient_BO[rest].addmm_(H_BB[rest, here], one.error_gO - before)
    level_GgO.add_(zeros_GO[:, None])
    codes_OI = level_IO.T.to(torch.int8, memory_format=torch.contiguous_format)
    return QuantizedWeight(codes_OI, scales_GO.T.float().contiguous(), scheme, weight.zeros_OG)


@dataclass(frozen=True)
class _Group:
    """One group of all rows; the steps change its tensors in place.

    H_gg damped; level_gO = codes - zeros; error_gO = T - Q; gradient_gO = E H_l of these columns; scale_O.
    """

    H_gg: Tensor
    level_gO: Tensor
    error_gO: Tensor
    gradient_gO: Tensor
    scale_O: Tensor

    def rescale(self) -> None:
        """s += c^T G / c^T H_l c, c the levels, rounded to bf16; kept where the loss of the row falls."""
        moves_gO = self.H_gg @ self.level_gO
        slope_O, curvature_O = ((self.level_gO * x_gO).sum(0) for x_gO in (self.gradient_gO, moves_gO))
        empty_O = curvature_O <= 0  # all codes stand for zero: any scale is as good
        step_O = round_scales(self.scale_O + (slope_O / curvature_O).masked_fill_(empty_O, 0)) - self.scale_O
        better_O = step_O * (step_O * curvature_O - 2 * slope_O) < 0
        step_O = torch.where(better_O & torch.isfinite(step_O), step_O, 0)
        self.scale_O.add_(step_O)
        self.error_gO.addcmul_(self.level_gO, step_O, value=-1)
        self.gradient_gO.addcmul_(moves_gO, step_O, value=-1)

    def descend(self, low: Tensor, high: Tensor) -> None:
        """Every column's levels in turn: round(c + G_j / (s H_l,jj)), held in [low, high]."""
        H_gg, gradient_gO = self.H_gg, self.gradient_gO
        step_gO = torch.zeros_like(self.level_gO)  # of the weights
        inverse_O = 1 / self.scale_O
        curvature = H_gg.diagonal().tolist()
        for start in range(0, len(H_gg), _INSIDE):
            end = min(start + _INSIDE, len(H_gg))
            gradient_gO[start:end].addmm_(H_gg[start:end, :start], step_gO[:start], alpha=-1)
            for j in range(start, end):
                gradient_O = gradient_gO[j]
                if j > start:
                    gradient_O = torch.addmv(gradient_O, step_gO[start:j].T, H_gg[j, start:j], alpha=-1)
                best_O = torch.addcmul(self.level_gO[j], gradient_O, inverse_O, value=1 / curvature[j]).round_()
                best_O.clamp_(low, high)
                torch.sub(best_O, self.level_gO[j], out=step_gO[j])
                step_gO[j].mul_(self.scale_O)
                self.level_gO[j].copy_(best_O)
        for start in range(0, len(H_gg), _INSIDE):  # what the columns from `start` on moved
            end = start + _INSIDE
            gradient_gO[start:end].addmm_(H_gg[start:end, start:], step_gO[start:], alpha=-1)
        self.error_gO.sub_(step_gO)
