"""Which numbers exist: the uniform integer grid of a group, and the fit of its scale.

Shapes: O out_features, I in_features, G groups = I / group_size, g group_size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A bf16 number of this range is exact in fp16 too, so one canonical scale serves every format
# (65280 is the largest bf16 number below fp16's 65504).
SCALE_MIN, SCALE_MAX = 2.0**-17, 65280.0


@dataclass(frozen=True)
class QuantScheme:
    """All that a decoder needs: w = (code - zero) * scale, one scale for `group_size` inputs of a row.

    `group_size` -1 means one group for the whole row (per channel).
    """

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def code_min(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def group(self, in_features: int) -> int:
        """Length of a group in a row of `in_features`."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        return in_features // self.group(in_features)

    def divides(self, in_features: int) -> bool:
        return in_features % self.group(in_features) == 0


@dataclass(frozen=True)
class QuantizedWeight:
    """The canonical form, all that a format needs: weight_OI = codes_OI * scales of the group.

    codes_OI   int8, within [code_min, code_max]
    scales_OG  float32, bf16-representable, 2^-17 <= |s| <= 65280 (a scale may be negative:
               the range of codes has one number more below zero than above)
    """

    codes_OI: Tensor
    scales_OG: Tensor
    scheme: QuantScheme

    def __post_init__(self) -> None:
        out_features, in_features = self.codes_OI.shape
        if not self.scheme.divides(in_features):
            raise ValueError(f"group size {self.scheme.group_size} does not divide {in_features}")
        want = (out_features, self.scheme.groups(in_features))
        if tuple(self.scales_OG.shape) != want:
            raise ValueError(f"scales {tuple(self.scales_OG.shape)} do not fit codes: expected {want}")
        if self.codes_OI.dtype != torch.int8 or self.scales_OG.dtype != torch.float32:
            raise ValueError(f"codes {self.codes_OI.dtype}, scales {self.scales_OG.dtype}: expected int8, float32")
        magnitude = self.scales_OG.abs()
        if not bool(((magnitude >= SCALE_MIN) & (magnitude <= SCALE_MAX)).all()):
            raise ValueError(f"a scale is not finite or lies outside [{SCALE_MIN}, {SCALE_MAX}]")
        if not torch.equal(self.scales_OG, self.scales_OG.bfloat16().float()):
            raise ValueError("a scale is not representable in bfloat16")
        low, high = (int(x) for x in self.codes_OI.aminmax())
        if low < self.scheme.code_min or high > self.scheme.code_max:
            raise ValueError(f"codes {low}..{high} outside {self.scheme.code_min}..{self.scheme.code_max}")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """weight_OI in `dtype`; the product itself is taken in float32.

        >>> q = QuantizedWeight(torch.tensor([[-8, 7]], dtype=torch.int8), torch.tensor([[0.5]]), QuantScheme(4, -1))
        >>> q.dequantize().tolist()
        [[-4.0, 3.5]]
        """
        out_features, in_features = self.codes_OI.shape
        groups = self.codes_OI.view(out_features, self.scales_OG.shape[1], -1).float()
        return groups.mul_(self.scales_OG[..., None]).view(out_features, in_features).to(dtype)


def round_scales(scales: Tensor) -> Tensor:
    """`scales` rounded to bf16 and held in [2^-17, 65280] by magnitude, sign kept. Same shape, float dtype kept.

    >>> round_scales(torch.tensor([0.1, -1e-9, 1e9])).tolist()
    [0.10009765625, -7.62939453125e-06, 65280.0]
    """
    magnitude = scales.abs().clamp(SCALE_MIN, SCALE_MAX).bfloat16().to(scales.dtype)
    return torch.where(scales < 0, -magnitude, magnitude)


def quantize_to_grid(weight_OI: Tensor, scales_OG: Tensor, scheme: QuantScheme) -> Tensor:
    """Nearest codes_OI (int8) of `weight_OI` on the grid of `scales_OG`; halves go to the even code."""
    out_features, in_features = weight_OI.shape
    groups = weight_OI.view(out_features, scales_OG.shape[1], -1)
    codes = (groups / scales_OG[..., None]).round_().clamp_(scheme.code_min, scheme.code_max)
    return codes.to(torch.int8).view(out_features, in_features)


def absmax_scales(weight_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """scales_OG = max |w| of the group / (2^(bits-1) - 1/2), rounded to bf16: plain round-to-nearest.

    The half lets the largest weight use either end of the code range with an error of half a step.
    """
    out_features, in_features = weight_OI.shape
    groups = weight_OI.view(out_features, scheme.groups(in_features), -1)
    return round_scales(groups.abs().amax(-1) / (2 ** (scheme.bits - 1) - 0.5))


# Ratios to absmax / 2^(bits-1). Above 1 the grid covers more than the largest weight.
_COARSE = tuple(0.40 + 0.05 * i for i in range(15))
_FINE = (-0.0375, -0.025, -0.0125, 0.0125, 0.025, 0.0375)


def search_scales(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme, exponent: float = 2.4) -> Tensor:
    """scales_OG minimising sum_j h_j |s q_j - w_j|^exponent over each group, q_j the nearest code.

    importance_I is h, the diagonal of the damped Hessian. Both signs of s are tried over
    s = r * absmax / 2^(bits-1), r from 0.40 to 1.10 and the absmax grid's, coarse and then fine; candidates are
    rounded to bf16 before they are judged. The exponent above 2 and the weighting by h follow the range searches of
    GPTQ's and llama.cpp's reference implementations; the two signs are ours.
    """
    chunk = max(1, 2**21 // weight_OI.shape[1])
    parts = [_search_rows(rows, importance_I, scheme, exponent) for rows in torch.split(weight_OI, chunk)]
    return torch.cat(parts)


def _search_rows(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme, exponent: float) -> Tensor:
    out_features, in_features = weight_OI.shape
    n_groups = scheme.groups(in_features)
    weight = weight_OI.view(out_features, n_groups, -1)
    importance = importance_I.to(weight.dtype).view(n_groups, -1, 1)
    full = weight.abs().amax(-1) / 2 ** (scheme.bits - 1)
    best_scale = round_scales(full)
    best_error = torch.full_like(best_scale, torch.inf)
    best_ratio = torch.ones_like(best_scale)

    def try_ratio(ratio: Tensor) -> None:
        scale = round_scales(full * ratio)
        error = (weight / scale[..., None]).round_().clamp_(scheme.code_min, scheme.code_max)
        error = error.mul_(scale[..., None]).sub_(weight).abs_().pow_(exponent)
        # [G, O, g] @ [G, g, 1]: the weighted sum without another full-size temporary
        error_OG = torch.bmm(error.transpose(0, 1), importance).squeeze(-1).T
        better = error_OG < best_error
        best_error[better] = error_OG[better]
        best_scale[better] = scale[better]
        best_ratio.copy_(torch.where(better, ratio, best_ratio))

    plain = 2 ** (scheme.bits - 1) / (2 ** (scheme.bits - 1) - 0.5)  # the absmax grid: never do worse than it
    for ratio in (*_COARSE, plain):
        for sign in (1.0, -1.0):
            try_ratio(torch.full_like(full, sign * ratio))
    centre = best_ratio.clone()
    for step in _FINE:
        try_ratio(centre * (1 + step / centre.abs()))
    return best_scale
