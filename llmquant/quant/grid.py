"""Which numbers exist: the uniform integer grid of a group, and the fit of its scale.

Shapes: O out_features, I in_features, G groups = I / group_size, g group_size.
"""

from collections.abc import Sequence
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
    """The canonical form, all that a format needs: weight_OI = (codes_OI - zero of the group) * scale of the group.

    codes_OI   int8, within [code_min, code_max]
    scales_OG  float32, bf16-representable, 2^-17 <= |s| <= 65280 (a symmetric grid's scale may be negative:
               the range of codes has one number more below zero than above)
    zeros_OG   int8, the code that stands for 0, within the same range; None for a symmetric grid: 0
    """

    codes_OI: Tensor
    scales_OG: Tensor
    scheme: QuantScheme
    zeros_OG: Tensor | None = None

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
        self._check_range("codes", self.codes_OI)
        if (self.zeros_OG is None) != self.scheme.symmetric:
            raise ValueError("an asymmetric grid has zeros, a symmetric one has none")
        if self.zeros_OG is not None:
            if tuple(self.zeros_OG.shape) != want or self.zeros_OG.dtype != torch.int8:
                raise ValueError(
                    f"zeros {self.zeros_OG.dtype} {tuple(self.zeros_OG.shape)} do not fit codes: expected int8 {want}"
                )
            self._check_range("zeros", self.zeros_OG)

    def _check_range(self, what: str, codes: Tensor) -> None:
        low, high = (int(x) for x in codes.aminmax())
        if low < self.scheme.code_min or high > self.scheme.code_max:
            raise ValueError(f"{what} {low}..{high} outside {self.scheme.code_min}..{self.scheme.code_max}")

    def rows(self, rows: slice) -> "QuantizedWeight":
        """Some of the rows, in memory of their own."""
        zeros_OG = None if self.zeros_OG is None else self.zeros_OG[rows].contiguous()
        return QuantizedWeight(
            self.codes_OI[rows].contiguous(), self.scales_OG[rows].contiguous(), self.scheme, zeros_OG
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """weight_OI in `dtype`; the product itself is taken in float32.

        >>> q = QuantizedWeight(torch.tensor([[-8, 7]], dtype=torch.int8), torch.tensor([[0.5]]), QuantScheme(4, -1))
        >>> q.dequantize().tolist()
        [[-4.0, 3.5]]
        """
        out_features, in_features = self.codes_OI.shape
        groups = self.codes_OI.view(out_features, self.scales_OG.shape[1], -1).float()
        if self.zeros_OG is not None:
            groups.sub_(self.zeros_OG[..., None])
        return groups.mul_(self.scales_OG[..., None]).view(out_features, in_features).to(dtype)


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of all of them, which have the same scheme."""
    if len(weights) == 1:
        return weights[0]
    zeros = [weight.zeros_OG for weight in weights if weight.zeros_OG is not None]
    codes_OI, scales_OG = torch.cat([w.codes_OI for w in weights]), torch.cat([w.scales_OG for w in weights])
    return QuantizedWeight(codes_OI, scales_OG, weights[0].scheme, torch.cat(zeros) if zeros else None)


def round_scales(scales: Tensor) -> Tensor:
    """`scales` rounded to bf16 and held in [2^-17, 65280] by magnitude, sign kept. Same shape, float dtype kept.

    >>> round_scales(torch.tensor([0.1, -1e-9, 1e9])).tolist()
    [0.10009765625, -7.62939453125e-06, 65280.0]
    """
    magnitude = scales.abs().clamp(SCALE_MIN, SCALE_MAX).bfloat16().to(scales.dtype)
    return torch.where(scales < 0, -magnitude, magnitude)


def quantize_to_grid(
    weight_OI: Tensor, scales_OG: Tensor, scheme: QuantScheme, zeros_OG: Tensor | None = None
) -> Tensor:
    """Nearest codes_OI (int8) of `weight_OI` on the grid; halves go to the even code."""
    out_features, in_features = weight_OI.shape
    groups = weight_OI.view(out_features, scales_OG.shape[1], -1)
    codes = (groups / scales_OG[..., None]).round_()
    if zeros_OG is not None:
        codes.add_(zeros_OG[..., None])
    return codes.clamp_(scheme.code_min, scheme.code_max).to(torch.int8).view(out_features, in_features)


def plain_grid(weight_OI: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """The grid of plain round-to-nearest: `absmax_scales`, or `minmax_grid` for an asymmetric scheme."""
    return (absmax_scales(weight_OI, scheme), None) if scheme.symmetric else minmax_grid(weight_OI, scheme)


def minmax_grid(weight_OI: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """scales_OG = (max - min) / (2^bits - 1) of the group with 0 in it, and zeros_OG = round(code_min - min / s)."""
    out_features, in_features = weight_OI.shape
    groups = weight_OI.view(out_features, scheme.groups(in_features), -1)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales_OG = round_scales((high - low) / (scheme.code_max - scheme.code_min))
    zeros_OG = (scheme.code_min - low / scales_OG).round_().clamp_(scheme.code_min, scheme.code_max)
    return scales_OG, zeros_OG.to(torch.int8)


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
_CHUNK = 2**19  # weights tried at a time: two temporaries of 2 MB stay in a core's cache


def search_grid(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """scales_OG and zeros_OG minimising sum_j h_j |s (q_j - z) - w_j|^2.5 over each group, q_j the nearest code.

    importance_I is h, the diagonal of the damped Hessian. Symmetric (z = 0, zeros_OG None): s = +-r absmax /
    2^(bits-1), r from 0.40 to 1.10, and the absmax grid's. Asymmetric: s = r (max - min) / (2^bits - 1), z the
    min-max grid's and its neighbours. First coarse and then fine; candidates are rounded to bf16 before they are
    judged. The exponent above 2 and the weighting by h follow the range searches of GPTQ's and llama.cpp's reference
    implementations; the two signs are ours.
    """
    chunk = max(1, _CHUNK // weight_OI.shape[1])
    rows = _symmetric_rows if scheme.symmetric else _asymmetric_rows
    found = [rows(part, importance_I, scheme) for part in torch.split(weight_OI, chunk)]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros).to(torch.int8) if zeros else None


class _Best:
    """The best candidate of every group so far; scales are ratios to `full_OG`."""

    def __init__(self, weight_OI: Tensor, importance_I: Tensor, full_OG: Tensor, scheme: QuantScheme) -> None:
        n_groups = scheme.groups(weight_OI.shape[1])
        self.weight = weight_OI.view(weight_OI.shape[0], n_groups, -1)
        self.importance = importance_I.to(weight_OI.dtype).view(n_groups, -1)
        self.full, self.scheme = full_OG, scheme
        self._error, self._square = torch.empty_like(self.weight), torch.empty_like(self.weight)
        self.error, self.ratio, self.zero = (torch.full_like(full_OG, x) for x in (torch.inf, 1.0, 0.0))
        self.scale = round_scales(full_OG)

    def consider(self, ratio: Tensor, zero: Tensor | None = None) -> None:
        """Keep, group by group, the grid of scales ratio * full, [O, G], where it is better than the best so far."""
        scale = round_scales(self.full * ratio)
        code_min, code_max = self.scheme.code_min, self.scheme.code_max
        error = torch.div(self.weight, scale[..., None], out=self._error).round_()
        if zero is None:
            error.clamp_(code_min, code_max)
        else:
            error.clamp_((code_min - zero)[..., None], (code_max - zero)[..., None])
        torch.addcmul(self.weight, error, scale[..., None], value=-1, out=error)
        square = torch.mul(error, error, out=self._square)
        # |e|^2.5, ten times faster than by a power
        error_OG = error.abs_().sqrt_().mul_(square).mul_(self.importance).sum(-1)
        better = error_OG < self.error
        self.error = torch.where(better, error_OG, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.ratio = torch.where(better, ratio, self.ratio)
        if zero is not None:
            self.zero = torch.where(better, zero, self.zero)


def _symmetric_rows(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, None]:
    full = weight_OI.view(len(weight_OI), scheme.groups(weight_OI.shape[1]), -1).abs().amax(-1)
    full = full / 2 ** (scheme.bits - 1)
    best = _Best(weight_OI, importance_I, full, scheme)
    plain = 2 ** (scheme.bits - 1) / (2 ** (scheme.bits - 1) - 0.5)  # the absmax grid: never do worse than it
    for ratio in (*_COARSE, plain):
        for sign in (1.0, -1.0):
            best.consider(torch.full_like(full, sign * ratio))
    centre = best.ratio.clone()
    for step in _FINE:
        best.consider(centre * (1 + step / centre.abs()))
    return best.scale, None


def _asymmetric_rows(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    full, zeros = minmax_grid(weight_OI, scheme)
    best = _Best(weight_OI, importance_I, full, scheme)

    def around(zero: Tensor, ratio: Tensor) -> None:
        for step in (0, 1, -1):
            best.consider(ratio, (zero + step).clamp_(scheme.code_min, scheme.code_max))

    for value in _COARSE:
        around(zeros.to(full.dtype), torch.full_like(full, value))
    around(zeros.to(full.dtype), torch.ones_like(full))  # the min-max grid to the bit: never do worse than it
    centre, zero = best.ratio.clone(), best.zero.clone()
    for step in _FINE:
        around(zero, centre + step)
    return best.scale, best.zero
