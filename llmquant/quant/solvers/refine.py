"""Coordinate descent: better codes and scales from those that a solver found, on the same loss.

What. The loss of a row is e H_l e^T with e = t - s (q - z) and H_l = H + lambda I. GPTQ chooses each code once, before
it knows the later ones. Here each code is chosen again while all others stay, then each scale, group by group. With the
gradient row G = e H_l, the best choices have closed forms (c = q - z, the levels):

    code    c_j <- round(c_j + G_j / (s H_l,jj))     e changes by -s times the step of c_j, G by that times row j of H_l
    scale   s <- s + c^T G / (c^T H_l c)             over the columns of the group

Why it is safe. Each step minimises a parabola, so it never raises the loss of any row, but for rounding; scales, which
are rounded to bf16, are kept only where the loss falls.

Trade-off. A sweep costs one product [O, I] x [I, I], twice the feedback of GPTQ. Every sweep lowers the layer's loss.
After a few of them (`default_sweeps`) the model's divergence falls no longer: codes then fit the calibration text only.

Sources: coordinate descent on codes is a textbook method, and the scale is a least-squares fit; going through both in
one sweep of the groups, so that they need one product, is ours.

Shapes: O out_features, I in_features, G groups in a row, g group size, B columns of a block: one group or several.
Tensors lie transposed, [I, O], so that a column of the weight is contiguous in memory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.quant import kernels
from llmquant.quant.grid import QuantizedWeight
from llmquant.quant.matmul import matmul
from llmquant.quant.scales import round_scales
from llmquant.quant.solvers.base import SolveOptions

_BLOCK = 512  # columns whose gradient is one product; a whole group at least


def default_sweeps(bits: int, group_size: int) -> int:
    """1; 4 below 4 bits and for groups of 32. More sweeps lower the loss still, but no longer the divergence.

    >>> default_sweeps(4, 128), default_sweeps(4, 32), default_sweeps(2, 128)
    (1, 4, 4)
    """
    return 4 if bits < 4 or group_size == 32 else 1


def refine(
    weight: QuantizedWeight, target_OI: Tensor, H_II: Tensor, lam: float, options: SolveOptions
) -> QuantizedWeight:
    """`weight` after `options.sweeps` sweeps over all groups. Without `options.refit` the scales stay.

    target_OI is the T of the loss, H_II not damped, `lam` the lambda that is added to its diagonal.

    Two equal weights of 0.4, correlated by one half. The nearest codes, 0 and 0, cost 0.48; one sweep finds 1 and 0, at
    0.28: the first column's error turns negative and cancels part of the second's.

    >>> target_OI, H_II = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> from llmquant.quant.grid import QuantScheme
    >>> nearest = QuantizedWeight(torch.zeros(1, 2, dtype=torch.int8), torch.ones(1, 1), QuantScheme(4, -1))
    >>> refine(nearest, target_OI, H_II, 0.0, SolveOptions(sweeps=1)).codes_OI.tolist()
    [[1, 0]]
    """
    if not options.sweeps:
        return weight
    scheme, dtype = weight.scheme, target_OI.dtype
    # 1. Levels c = q - z and the error e, both transposed. `level_GgO` is a view of `level_IO`.
    group = scheme.group(target_OI.shape[1])
    width = max(_BLOCK // group, 1) * group
    scales_GO = weight.scales_OG.T.to(dtype).clone(memory_format=torch.contiguous_format)  # changed in place
    zeros_GO = target_OI.new_zeros(len(scales_GO), 1)
    if weight.zeros_OG is not None:
        zeros_GO = weight.zeros_OG.T.to(dtype).contiguous()
    level_IO = weight.codes_OI.T.to(dtype, memory_format=torch.contiguous_format)
    level_GgO = level_IO.view(len(scales_GO), group, -1).sub_(zeros_GO[:, None])
    error_IO = target_OI.T - (level_GgO * scales_GO[:, None]).view_as(level_IO)
    for _ in range(options.sweeps):
        for start in range(0, len(level_IO), width):
            at = slice(start, min(start + width, len(level_IO)))
            # 2. G = E H_l of the block's columns, with E as the blocks before left it.
            gradient_BO = matmul(H_II[at], error_IO).add_(error_IO[at], alpha=lam)
            H_BB = H_II[at, at].clone()
            H_BB.diagonal().add_(lam)
            for first in range(0, len(H_BB), group):
                # 3. One group: its codes, then its scale. `one` changes the tensors that it is given.
                here, rest = slice(first, first + group), slice(first + group, None)
                number = (start + first) // group
                one = _Group(
                    H_BB[here, here], level_IO[at][here], error_IO[at][here], gradient_BO[here], scales_GO[number]
                )
                before = one.error_gO.clone()
                one.descend(scheme.code_min - zeros_GO[number], scheme.code_max - zeros_GO[number])
                if options.refit:
                    one.rescale()
                # 4. What that does to the gradient of the block's later groups.
                gradient_BO[rest].addmm_(H_BB[rest, here], one.error_gO - before)
    # 5. Back to codes.
    level_GgO.add_(zeros_GO[:, None])
    codes_OI = level_IO.T.to(torch.int8, memory_format=torch.contiguous_format)
    return QuantizedWeight(codes_OI, scales_GO.T.float().contiguous(), scheme, weight.zeros_OG)


@dataclass(frozen=True)
class _Group:
    """One group of all rows. Both methods change its tensors in place, so that they stay consistent:

    H_gg         the damped H of the group's columns
    level_gO     c = codes - zeros
    error_gO     E = T - Q
    gradient_gO  G = E H_l in these columns, with the errors of all columns in E
    scale_O      s
    """

    H_gg: Tensor
    level_gO: Tensor
    error_gO: Tensor
    gradient_gO: Tensor
    scale_O: Tensor

    def rescale(self) -> None:
        """s += c^T G / (c^T H_l c), rounded to bf16; kept in the rows whose loss falls."""
        # 1. The parabola: a step d of the scale changes the loss by d^2 curvature - 2 d slope.
        moves_gO = self.H_gg @ self.level_gO
        slope_O, curvature_O = ((self.level_gO * x_gO).sum(0) for x_gO in (self.gradient_gO, moves_gO))
        # 2. Its lowest point, as a bf16 scale. Where all codes stand for zero any scale is as good, and it stays.
        empty_O = curvature_O <= 0
        step_O = round_scales(self.scale_O + (slope_O / curvature_O).masked_fill_(empty_O, 0)) - self.scale_O
        # 3. Keep what lowers the loss even after rounding.
        better_O = step_O * (step_O * curvature_O - 2 * slope_O) < 0
        step_O = torch.where(better_O & torch.isfinite(step_O), step_O, 0)
        self.scale_O.add_(step_O)
        self.error_gO.addcmul_(self.level_gO, step_O, value=-1)
        self.gradient_gO.addcmul_(moves_gO, step_O, value=-1)

    def descend(self, low_O: Tensor, high_O: Tensor) -> None:
        """Choose the levels of each column in turn: c_j = clip(round(c_j + G_j / (s H_l,jj)), low, high)."""
        self.error_gO.sub_(kernels.descend(self.H_gg, self.gradient_gO, self.level_gO, self.scale_O, low_O, high_O))
