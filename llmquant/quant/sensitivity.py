"""How much the model's predictions would change if linears that share an input were quantized by one scheme or another.

Let e = E x be what the error E of the weights does to the output of a linear for one token, and g the gradient of
log p(label) there, for a label that is drawn from the model's own prediction. To second order the divergence of the
predictions that E causes is

    KL ~ 1/2 E[(g^T E x)^2]    nats for each token

the Fisher information in the one direction E. That is a product of the tokens' gradients with E, and neither H_I nor
H_O; nothing is taken to be independent. E is rendered: scales are searched as the solver does it, and codes rounded to
nearest. The solver's own error is smaller, by about as much in every layer.

Shapes: N tokens, O out_features of all linears that share the input, I in_features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmquant.quant.grid import QuantizedWeight, QuantScheme, quantize_to_grid, search_grid
from llmquant.quant.matmul import matmul


class Sensitivity:
    """Running sums over the tokens of linears that share an input, for several schemes.

    weight_OI   the original weights, stacked
    The first tokens that are added say which inputs matter to the search of scales.
    """

    def __init__(self, weight_OI: Tensor, schemes: Sequence[QuantScheme]) -> None:
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
        self.n_tokens += len(x_NI)

    def losses(self) -> list[float]:
        """1/2 mean (g^T E x)^2 for each scheme, nats for each token."""
        return [total / (2 * max(1, self.n_tokens)) for total in self._sums]


def rounded(weight_OI: Tensor, importance_I: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Rounded to nearest on the grid that the solver would take."""
    scales_OG, zeros_OG = search_grid(weight_OI, importance_I, scheme)
    return QuantizedWeight(quantize_to_grid(weight_OI, scales_OG, scheme, zeros_OG), scales_OG, scheme, zeros_OG)
