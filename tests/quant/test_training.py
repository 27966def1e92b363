"""The steps of a training: its gradients are autograd's, its steps Adam's."""

import math

import pytest
import torch
from torch import Tensor

from llmquant.quant.grid import QuantizedWeight, QuantScheme, round_scales
from llmquant.quant.training import Trained, rate_of, scale_gradient, with_scales

GENERATOR = torch.Generator().manual_seed(0)


def quantized(*, symmetric: bool) -> QuantizedWeight:
    codes = torch.randint(-8, 8, (6, 64), generator=GENERATOR).to(torch.int8)
    scales = round_scales(torch.randn(6, 2, generator=GENERATOR))
    zeros = None if symmetric else torch.randint(-8, 8, (6, 2), generator=GENERATOR).to(torch.int8)
    return QuantizedWeight(codes, scales, QuantScheme(4, 32, symmetric), zeros)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_scales_is_that_of_autograd(*, symmetric: bool) -> None:
    weight, gradient = quantized(symmetric=symmetric), torch.randn(6, 64, generator=GENERATOR)
    scales = weight.scales_OG.clone().requires_grad_()
    zeros = 0 if weight.zeros_OG is None else weight.zeros_OG[..., None].float()
    dense = (weight.codes_OI.view(6, 2, 32).float() - zeros) * scales[..., None]
    assert torch.equal(dense.view(6, 64), weight.dequantize())
    (wanted,) = torch.autograd.grad(dense, scales, gradient.view(6, 2, 32))
    torch.testing.assert_close(scale_gradient(gradient, weight), wanted)


def test_steps_are_those_of_adam_in_units_of_the_value() -> None:
    """Of a vector whose root mean square hardly changes, so that the unit is one number."""
    start = torch.randn(512, generator=GENERATOR)
    unit = start.square().mean().sqrt()
    trained, share = Trained.of(start), (start / unit).clone().requires_grad_()
    adam = torch.optim.Adam([share], lr=1e-5, betas=(0.9, 0.99), eps=1e-12)
    for count in range(1, 6):
        gradient = torch.randn(512, generator=GENERATOR)
        share.grad = gradient * unit
        adam.step()
        trained.step(gradient, 1e-5, count)
    torch.testing.assert_close(trained.value - start, share.detach() * unit - start, rtol=1e-3, atol=1e-6)


def test_the_unit_of_a_scale_is_its_own_size() -> None:
    scales = torch.tensor([[1.0, -100.0], [0.01, 5.0]])
    trained = Trained.of(scales)
    trained.step(torch.tensor([[3.0, 3.0], [-1e-6, 0.0]]), 0.01, 1)
    torch.testing.assert_close(trained.value, torch.tensor([[0.99, -101.0], [0.0101, 5.0]]))


def test_scales_keep_their_signs_and_stay_numbers_that_formats_hold() -> None:
    weight = quantized(symmetric=True)
    wild = torch.full_like(weight.scales_OG, math.pi)
    for scales in (wild, -wild, 0 * wild, 1e9 * wild):
        changed = with_scales(weight, scales)  # a QuantizedWeight checks its numbers
        assert torch.equal(changed.codes_OI, weight.codes_OI)
        assert torch.equal(changed.scales_OG.sign(), weight.scales_OG.sign())
    same = with_scales(weight, weight.scales_OG)
    assert torch.equal(same.scales_OG, weight.scales_OG)


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [rate_of(step, 40, 1.0) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert rate_of(0, 1, 1.0) == 1.0


def test_steps_go_down_a_quadratic() -> None:
    """Three scales and a minimum at other ones: sum (s - a)^2."""
    wanted = torch.tensor([[0.5, 2.0, -3.0]])
    trained = Trained.of(torch.tensor([[0.6, 1.7, -2.5]]))

    def loss(values: Tensor) -> float:
        return float((values - wanted).square().sum())

    before = loss(trained.value)
    for step in range(100):
        trained.step(2 * (trained.value - wanted), rate_of(step, 100, 0.02), step + 1)
    assert loss(trained.value) < before / 1000
