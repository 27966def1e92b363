"""How much the model's predictions would change if linears that share an input were quantized by one scheme or another.

Let e = E x be what the error E of the weights does to the output of a linear for one token, and g the gradient of
log p(label) there, for a label that is drawn from the model's own prediction. To second order the divergence of the
predictions that E causes is

    KL ~ 1/2 E[(g^T E x)^2]    nats for each token

the Fisher information in the one direction E. That is a product of the tokens' gradients with E, and neither H_I nor
H_O; nothing is taken to be independent. E is rendered: scales are searched as the solver does it, and codes rounded to
nearest.

The solver's own error is smaller, and not by as much everywhere: much where inputs are correlated, hardly where they
are not. With a factor H = U U^T its loss is a sum of U_jj^2 times squares of roundings, that of nearest codes a sum of
H_jj times the same, on average. So each loss counts by

    (sum U_jj^2 / sum H_jj)^0.6

of H_I, and likewise of H_O. The exponent is fitted: 1 would be right if new tokens were like those that H was taken
from; eval/LOG.md has the measurement.

Shapes: N tokens, O out_features of all linears that share the input, I in_features.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmquant.quant.grid import QuantizedWeight, QuantScheme, quantize_to_grid, search_grid
from llmquant.quant.hessian import Hessian, default_damp, factor
from llmquant.quant.matmul import matmul

_TRUST = 0.6  # in what feedback promises


class Sensitivity:
    """Running sums over the tokens of linears that share an input, for several schemes.

    weight_OI   the original weights, stacked
    The first tokens that are added say which inputs matter to the search of scales.
    """

    def __init__(
        self, weight_OI: Tensor, schemes: Sequence[QuantScheme], products: torch.dtype = torch.float32
    ) -> None:
        self._inputs = Hessian(weight_OI.shape[1], weight_OI.device, products=products)
        self._weight_OI, self._schemes = weight_OI, schemes
        self._rounded: list[QuantizedWeight] = []  # a byte for each weight and scheme
        self._sums = [0.0] * len(schemes)
        self.importance_I = weight_OI.new_zeros(weight_OI.shape[1])
        self.n_tokens = 0

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add tokens: their inputs x [..., I], and gradients g [..., O] at the outputs, side by side."""
        x_NI, g_NO = x.reshape(-1, x.shape[-1]).float(), g.reshape(-1, g.shape[-1]).float()
        finite = torch.isfinite(x_NI.sum(1) + g_NO.sum(1))
        x_NI, g_NO = x_NI[finite], g_NO[finite]
        if not self._rounded:
            square_I = x_NI.square().mean(0)
            self.importance_I = square_I + 0.01 * square_I.mean()
            self._rounded = [rounded(self._weight_OI, self.importance_I, scheme) for scheme in self._schemes]
        for number, weight in enumerate(self._rounded):
            E_OI = self._weight_OI - weight.dequantize()
            self._sums[number] += float((matmul(x_NI, E_OI.T) * g_NO).sum(1).square().sum())
        self._inputs.add(x_NI)
        self.n_tokens += len(x_NI)

    def losses(self) -> list[float]:
        """1/2 mean (g^T E x)^2 of rounding for each scheme, nats for each token."""
        return [total / (2 * max(1, self.n_tokens)) for total in self._sums]

    def left_by_inputs(self) -> float:
        """The share of such a loss that feedback by H_I leaves. Call it once."""
        n_inputs = len(self.importance_I)
        return left(self._inputs.mean(), default_damp(self.n_tokens, n_inputs))


def left(H: Tensor, damp: float) -> float:
    """The share of the loss of nearest codes that feedback by a damped H leaves: (sum U_jj^2 / sum H_jj)^0.6; 1 where
    it cannot be factored.

    >>> left(torch.eye(3), 0.0), round(left(torch.tensor([[1.0, 0.6], [0.6, 1.0]]), 0.0) ** (1 / 0.6), 6)
    (1.0, 0.82)
    """
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    if (factored := factor(H, damp, order)) is None:
        return 1.0
    squares = factored[0].square()
    share = float(squares.diagonal().sum() / squares.sum())  # sum H_jj = sum of all U_ij^2
    return math.pow(share, _TRUST)


def rounded(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Rounded to nearest on the grid that the solver would take."""
    scales_OG, zeros_OG = search_grid(weight_OI, importance_I, scheme)
    return QuantizedWeight(quantize_to_grid(weight_OI, scales_OG, scheme, zeros_OG), scales_OG, scheme, zeros_OG)
