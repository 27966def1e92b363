"""Training by gradients of the whole model of what is no code: scales, and the vectors beside them (norms, biases).

All is trained in relative steps, so that one rate serves numbers of any size. The unit u of a scale is its own
magnitude, that of a vector's entries their root mean square. Adam in these units (Kingma & Ba 2015):

    g = u dL/dp,    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
    p -= rate u m^ / (sqrt(v^) + eps),    m^ = m / (1 - b1^t),    v^ = v / (1 - b2^t)

Values are trained in float32 and used as they are stored: what rounding takes away returns in a later step.

Shapes: O out_features, I in_features, G groups in a row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.quant.grid import QuantizedWeight
from llmquant.quant.scales import SCALE_MIN, round_scales

_BETA_1, _BETA_2 = 0.9, 0.99
_EPS = 1e-12  # gradients of a mean loss by one of millions of scales are far below Adam's usual 1e-8


@dataclass
class Trained:
    """A value with its two moments, float32, changed in place by `step`."""

    value: Tensor
    m: Tensor
    v: Tensor

    @staticmethod
    def of(value: Tensor) -> "Trained":
        value = value.float().clone()
        return Trained(value, torch.zeros_like(value), torch.zeros_like(value))

    def step(self, gradient: Tensor, rate: float, count: int) -> None:
        """Step number `count`, from 1 on, against the gradient of the loss."""
        unit = self.value.abs() if self.value.ndim > 1 else self.value.square().mean().sqrt()
        gradient = gradient.float() * unit
        self.m.lerp_(gradient, 1 - _BETA_1)
        self.v.lerp_(gradient.square(), 1 - _BETA_2)
        slope = self.m / (1 - _BETA_1**count)
        slope /= (self.v / (1 - _BETA_2**count)).sqrt_().add_(_EPS)
        self.value.addcmul_(unit.expand_as(slope), slope, value=-rate)


def with_scales(weight: QuantizedWeight, scales_OG: Tensor) -> QuantizedWeight:
    """The same codes with other scales, which are rounded to those that a format can hold. A scale keeps its sign."""
    sign_OG = torch.where(weight.scales_OG < 0, -1.0, 1.0)
    rounded_OG = round_scales((scales_OG * sign_OG).clamp_min(SCALE_MIN)) * sign_OG
    return QuantizedWeight(weight.codes_OI, rounded_OG, weight.scheme, weight.zeros_OG)


def scale_gradient(gradient_OI: Tensor, weight: QuantizedWeight) -> Tensor:
    """dL/ds_og = sum over the group of dL/dw (q - z), from the gradient at the dequantized weight; [O, G], float32."""
    rows, groups = weight.scales_OG.shape
    levels = weight.codes_OI.view(rows, groups, -1).to(gradient_OI.device, torch.float32)
    if weight.zeros_OG is not None:
        levels.sub_(weight.zeros_OG.to(levels)[..., None])
    return levels.mul_(gradient_OI.float().view_as(levels)).sum(-1)


def rate_of(step: int, n_steps: int, peak: float) -> float:
    """The rate of step 0 .. n_steps - 1: up to `peak` over the first tenth, then down to zero along a cosine."""
    rise = max(1, n_steps // 10)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (1 + math.cos(math.pi * (step - rise) / max(1, n_steps - rise))) / 2
