"""Which numbers exist: the uniform integer grid of each group of weights, and how its scale is chosen.

What. `group_size` neighbouring weights of a row are a group and share a scale s and a zero point z. A code q of b bits
stands for the weight

    s (q - z),   q in -2^(b-1) .. 2^(b-1) - 1

so a group has 2^b evenly spaced levels. On a symmetric grid z is 0. On an asymmetric grid z is itself a code: the one
that stands for 0. Both grids hold 0 exactly.

Why groups. One large weight widens the steps of its own group only. The price is storage: b + 16 / group_size bits per
weight (4.125 for 4 bits in groups of 128, 4.5 in groups of 32), and b / group_size more with zero points.

How a scale is chosen. `plain_grid` covers the largest weight of the group: all that round-to-nearest needs.
`search_grid` tries smaller and larger scales and keeps the one with the least error. Here lies the trade-off of the
grid: a smaller scale clips the largest weights and resolves all others more finely. Weights of inputs that are often
large count more (importance h, the diagonal of the Hessian).

Scales are rounded to bf16 *before* codes are chosen: rounding them later, when a format stores them, would add an error
that no code makes up for. This file picks the nearest code (`quantize_to_grid`); better codes are the solvers' work.

Shapes: O out_features, I in_features, G groups in a row (I / g), g group_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.quant import kernels

# Every bf16 number in this range is exact in fp16 too, so one canonical scale serves every format: 65280 is the largest
# bf16 number below fp16's 65504, and the last bit of a bf16 number near 2^-17 is 2^-24, fp16's smallest number.
SCALE_MIN, SCALE_MAX = 2.0**-17, 65280.0


@dataclass(frozen=True)
class QuantScheme:
    """All that a decoder needs to know: w = (code - zero) * scale, one scale for `group_size` inputs of a row.

    A `group_size` of -1 makes the whole row one group ("per channel").
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
    scales_OG  float32, each a bf16 number with 2^-17 <= |s| <= 65280. Symmetric grids may have negative scales: there
               is one code more below zero than above, and a negative scale puts it on the other side.
    zeros_OG   int8, the code that stands for 0, within the same range; None for a symmetric grid, whose zero is 0
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
        """The given rows, copied into memory of their own."""
        zeros_OG = None if self.zeros_OG is None else self.zeros_OG[rows].contiguous()
        return QuantizedWeight(
            self.codes_OI[rows].contiguous(), self.scales_OG[rows].contiguous(), self.scheme, zeros_OG
        )

    def to(self, device: torch.device) -> "QuantizedWeight":
        """The same on another device."""
        if self.codes_OI.device == device:
            return self
        zeros_OG = None if self.zeros_OG is None else self.zeros_OG.to(device)
        return QuantizedWeight(self.codes_OI.to(device), self.scales_OG.to(device), self.scheme, zeros_OG)

    def cpu(self) -> "QuantizedWeight":
        """The same on the CPU, where writers take its bytes."""
        return self.to(torch.device("cpu"))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """weight_OI in `dtype`. The product is computed in float32 and rounded once.

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
    """The rows of all `weights` in one; they must have the same scheme."""
    if len(weights) == 1:
        return weights[0]
    zeros = [weight.zeros_OG for weight in weights if weight.zeros_OG is not None]
    codes_OI, scales_OG = torch.cat([w.codes_OI for w in weights]), torch.cat([w.scales_OG for w in weights])
    return QuantizedWeight(codes_OI, scales_OG, weights[0].scheme, torch.cat(zeros) if zeros else None)


def round_scales(scales: Tensor) -> Tensor:
    """`scales` rounded to bf16, with magnitudes clipped to [2^-17, 65280]. Sign, shape and float dtype are kept.

    >>> round_scales(torch.tensor([0.1, -1e-9, 1e9])).tolist()
    [0.10009765625, -7.62939453125e-06, 65280.0]
    """
    magnitude = scales.abs().clamp(SCALE_MIN, SCALE_MAX).bfloat16().to(scales.dtype)
    return torch.where(scales < 0, -magnitude, magnitude)


def quantize_to_grid(
    weight_OI: Tensor, scales_OG: Tensor, scheme: QuantScheme, zeros_OG: Tensor | None = None
) -> Tensor:
    """codes_OI = clip(round(w / s) + z), int8: the nearest codes on the grid. Halves go to the even code.

    >>> quantize_to_grid(torch.tensor([[0.5, 1.5, 2.6, 9.0]]), torch.ones(1, 1), QuantScheme(4, -1)).tolist()
    [[0, 2, 3, 7]]
    """
    out_features, in_features = weight_OI.shape
    groups = weight_OI.view(out_features, scales_OG.shape[1], -1)
    codes = (groups / scales_OG[..., None]).round_()
    if zeros_OG is not None:
        codes.add_(zeros_OG[..., None])
    return codes.clamp_(scheme.code_min, scheme.code_max).to(torch.int8).view(out_features, in_features)


def plain_grid(weight_OI: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """(scales_OG, zeros_OG) of plain round-to-nearest: `absmax_scales` without zeros, or `minmax_grid`."""
    return (absmax_scales(weight_OI, scheme), None) if scheme.symmetric else minmax_grid(weight_OI, scheme)


def minmax_grid(weight_OI: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Asymmetric: scales_OG = (max - min) / (2^bits - 1), zeros_OG = round(code_min - min / s).

    min and max are those of the group's weights and of 0, so that 0 stays on the grid.

    >>> scales_OG, zeros_OG = minmax_grid(torch.tensor([[0.0, 15.0]]), QuantScheme(4, -1, symmetric=False))
    >>> scales_OG.tolist(), zeros_OG.tolist()
    ([[1.0]], [[-8]])
    """
    out_features, in_features = weight_OI.shape
    groups = weight_OI.view(out_features, scheme.groups(in_features), -1)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales_OG = round_scales((high - low) / (scheme.code_max - scheme.code_min))
    zeros_OG = (scheme.code_min - low / scales_OG).round_().clamp_(scheme.code_min, scheme.code_max)
    return scales_OG, zeros_OG.to(torch.int8)


def absmax_scales(weight_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """Symmetric: scales_OG = max |w| of the group / (2^(bits-1) - 1/2), rounded to bf16.

    The half spreads the loss evenly. The largest weight lies half a step beyond the highest code, 2^(bits-1) - 1, or
    half a step inside the lowest, -2^(bits-1). Dividing by 2^(bits-1) - 1 instead would never use the lowest code.

    >>> absmax_scales(torch.tensor([[7.5, -1.0]]), QuantScheme(4, -1)).tolist()
    [[1.0]]
    """
    out_features, in_features = weight_OI.shape
    groups = weight_OI.view(out_features, scheme.groups(in_features), -1)
    return round_scales(groups.abs().amax(-1) / (2 ** (scheme.bits - 1) - 0.5))


# Ratios that the search tries. Below 1 the grid clips the largest weights, above 1 it covers more than them.
_COARSE = tuple(0.40 + 0.05 * i for i in range(15))
_FINE = (-0.0375, -0.025, -0.0125, 0.0125, 0.025, 0.0375)
_CHUNK_OF_DEVICE = 2**26  # where a launch takes longer than its memory traffic
_CHUNK = 2**19  # weights searched at a time: their two temporaries, 2 MB each, stay in a core's cache


def search_grid(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """scales_OG and zeros_OG that minimise sum_j h_j |s (q_j - z) - w_j|^2.5 in each group, q_j the nearest code.

    importance_I is h, the diagonal of the damped Hessian: to first order, what an error in column j costs.

    Candidates, first coarse and then fine around the best:
        symmetric    s = +-r absmax / 2^(bits-1), r from 0.40 to 1.10, and the absmax grid; z = 0 (zeros_OG is None)
        asymmetric   s = r (max - min) / (2^bits - 1), z that of the min-max grid or a neighbour of it
    Each is judged after rounding to bf16. The plain grid is among them, so the search never does worse than it. An
    exponent above 2 counts the large errors of clipped weights more than a square would.

    Sources: the range searches of GPTQ's reference implementation (exponent 2.4, unweighted) and of llama.cpp (weighted
    by importance). Ours differs in the exponent, which needs only a square root, and in trying both signs of s.

    Two bits have the levels -2s, -s, 0 and s, so a negative s reaches furthest above zero:

    >>> scheme, weight_OI = QuantScheme(2, -1), torch.tensor([[1.0, -1.0, 1.0, 4.0]])
    >>> search_grid(weight_OI, torch.tensor([1.0, 1.0, 1.0, 1.0]), scheme)[0].tolist()  # 4 becomes 3.2
    [[-1.6015625]]
    >>> search_grid(weight_OI, torch.tensor([1.0, 1.0, 1.0, 0.0]), scheme)[0].tolist()  # 4 counts for nothing
    [[1.0]]
    """
    if kernels.used_for(weight_OI) and scheme.group(weight_OI.shape[1]) <= kernels.MOST_IN_GROUP:
        return _searched_by_kernel(weight_OI, importance_I, scheme)
    chunk = max(1, (_CHUNK if weight_OI.device.type == "cpu" else _CHUNK_OF_DEVICE) // weight_OI.shape[1])
    rows = _symmetric_rows if scheme.symmetric else _asymmetric_rows
    found = [rows(part, importance_I, scheme) for part in torch.split(weight_OI, chunk)]
    return joined(found)


def _searched_by_kernel(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    from llmquant.quant.kernels import grids

    group, code_range = scheme.group(weight_OI.shape[1]), (scheme.code_min, scheme.code_max)
    if scheme.symmetric:
        full, coarse = _full_range(weight_OI, scheme), (*_COARSE, _plain_ratio(scheme))
        return grids.search(weight_OI, importance_I, full, None, group, code_range, coarse, _FINE)
    full, zeros = minmax_grid(weight_OI, scheme)
    return grids.search(weight_OI, importance_I, full, zeros, group, code_range, (*_COARSE, 1.0), _FINE)


def joined(grids: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """The (scales_OG, zeros_OG) of pieces of rows as those of all."""
    zeros = [zeros_OG for _, zeros_OG in grids if zeros_OG is not None]
    return torch.cat([scales_OG for scales_OG, _ in grids]), torch.cat(zeros) if zeros else None


class _Best:
    """The best candidate of every group so far. Scales are given as ratios to `full_OG`."""

    def __init__(self, weight_OI: Tensor, importance_I: Tensor, full_OG: Tensor, scheme: QuantScheme) -> None:
        n_groups = scheme.groups(weight_OI.shape[1])
        self.weight = weight_OI.view(weight_OI.shape[0], n_groups, -1)
        self.importance = importance_I.to(weight_OI.dtype).view(n_groups, -1)
        self.full, self.scheme = full_OG, scheme
        self._error, self._square = torch.empty_like(self.weight), torch.empty_like(self.weight)
        self.error, self.ratio, self.zero = (torch.full_like(full_OG, x) for x in (torch.inf, 1.0, 0.0))
        self.scale = round_scales(full_OG)

    def consider(self, ratio: Tensor, zero: Tensor | None = None) -> None:
        """Judge the scales ratio * full, [O, G]; keep them in every group where they beat the best so far."""
        scale = round_scales(self.full * ratio)
        code_min, code_max = self.scheme.code_min, self.scheme.code_max
        # 1. The nearest codes, less the zero point: levels q - z.
        error = torch.div(self.weight, scale[..., None], out=self._error).round_()
        if zero is None:
            error.clamp_(code_min, code_max)
        else:
            error.clamp_((code_min - zero)[..., None], (code_max - zero)[..., None])
        # 2. e = w - s (q - z), and |e|^2.5 as sqrt(|e|) e^2, which is ten times as fast as a power.
        torch.addcmul(self.weight, error, scale[..., None], value=-1, out=error)
        square = torch.mul(error, error, out=self._square)
        error_OG = error.abs_().sqrt_().mul_(square).mul_(self.importance).sum(-1)
        # 3. Keep the better grid of each group.
        better = error_OG < self.error
        self.error = torch.where(better, error_OG, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.ratio = torch.where(better, ratio, self.ratio)
        if zero is not None:
            self.zero = torch.where(better, zero, self.zero)


def _symmetric_rows(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, None]:
    full = _full_range(weight_OI, scheme)
    best = _Best(weight_OI, importance_I, full, scheme)
    for ratio in (*_COARSE, _plain_ratio(scheme)):
        for sign in (1.0, -1.0):
            best.consider(torch.full_like(full, sign * ratio))
    centre = best.ratio.clone()
    for step in _FINE:
        best.consider(centre * (1 + step / centre.abs()))
    return best.scale, None


def _full_range(weight_OI: Tensor, scheme: QuantScheme) -> Tensor:
    """absmax / 2^(bits-1), [O, G]."""
    groups = weight_OI.view(len(weight_OI), scheme.groups(weight_OI.shape[1]), -1)
    full: Tensor = groups.abs().amax(-1) / 2 ** (scheme.bits - 1)
    return full


def _plain_ratio(scheme: QuantScheme) -> float:
    """That of the absmax grid: the search shall never do worse than it."""
    most = 1 << (scheme.bits - 1)
    return most / (most - 0.5)


def _asymmetric_rows(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    full, zeros = minmax_grid(weight_OI, scheme)
    best = _Best(weight_OI, importance_I, full, scheme)

    def around(zero: Tensor, ratio: Tensor) -> None:
        for step in (0, 1, -1):
            best.consider(ratio, (zero + step).clamp_(scheme.code_min, scheme.code_max))

    for value in _COARSE:
        around(zeros.to(full.dtype), torch.full_like(full, value))
    around(zeros.to(full.dtype), torch.ones_like(full))  # the min-max grid to the bit: never do worse than that
    centre, zero = best.ratio.clone(), best.zero.clone()
    for step in _FINE:
        around(zero, centre + step)
    return best.scale, best.zero.to(torch.int8)
