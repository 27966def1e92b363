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
from llmquant.quant.scales import SCALE_MAX, SCALE_MIN, round_scales


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

    def rows(self, rows: slice | Tensor) -> "QuantizedWeight":
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
    code_range = (scheme.code_min, scheme.code_max)
    if not scheme.symmetric:
        full, zeros = minmax_grid(weight_OI, scheme)
        # Ratio 1 is the min-max grid to the bit: the search shall never do worse than that.
        return kernels.search(weight_OI, importance_I, full, zeros, code_range, (*_COARSE, 1.0), _FINE)
    groups, most = weight_OI.view(len(weight_OI), scheme.groups(weight_OI.shape[1]), -1), 1 << (scheme.bits - 1)
    plain = most / (most - 0.5)  # the absmax grid, likewise
    return kernels.search(
        weight_OI, importance_I, groups.abs().amax(-1) / most, None, code_range, (*_COARSE, plain), _FINE
    )
