"""The predicted divergence of a scheme: by its definition, token by token, and against the divergence itself."""

import pytest
import torch

from llmquant.quant.grid import QuantScheme
from llmquant.quant.sensitivity import Sensitivity, rounded

SCHEMES = [QuantScheme(2, 32), QuantScheme(4, 64, symmetric=False), QuantScheme(8, -1)]


def test_it_is_half_the_mean_square_of_what_the_error_does_to_the_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x, g = (torch.randn(size, generator=generator) for size in ((6, 64), (20, 64), (20, 6)))
    felt = Sensitivity(weight, SCHEMES)
    felt.add(x.view(2, 10, 64), g.view(2, 10, 6))
    importance = x.square().mean(0) + 0.01 * x.square().mean()
    torch.testing.assert_close(felt.importance_I, importance)
    for scheme, loss in zip(SCHEMES, felt.losses(), strict=True):
        error = (weight - rounded(weight, importance, scheme).dequantize()).double()
        wanted = sum(float(g[t].double() @ error @ x[t].double()) ** 2 for t in range(20)) / 40
        assert loss == pytest.approx(wanted, rel=1e-4)


def test_batches_add_up_and_tokens_that_are_not_finite_are_left_out() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x, g = (torch.randn(size, generator=generator) for size in ((4, 32), (12, 32), (12, 4)))
    once, twice = Sensitivity(weight, SCHEMES[:1]), Sensitivity(weight, SCHEMES[:1])
    once.add(torch.cat([x, x]), torch.cat([g, g]))
    broken = x.clone()
    broken[3, 3] = torch.nan
    twice.add(x, g)
    twice.add(torch.cat([x, broken[3:4]]), torch.cat([g, g[3:4]]))
    assert (once.n_tokens, twice.n_tokens) == (24, 24)
    assert once.losses() == pytest.approx(twice.losses())


def test_it_predicts_the_divergence_of_a_linear_softmax_model() -> None:
    """y = W x, p = softmax(y): with labels drawn from p, g = onehot - p."""
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(16, 64, generator=generator) / 8, torch.randn(20_000, 64, generator=generator)
    log_p = (x @ weight.T).log_softmax(1)
    labels = torch.multinomial(log_p.exp(), 1, generator=generator)
    g = -log_p.exp().scatter_add(1, labels, -torch.ones(len(x), 1))
    felt = Sensitivity(weight, [QuantScheme(4, 32)])
    felt.add(x, g)
    changed = rounded(weight, felt.importance_I, QuantScheme(4, 32)).dequantize()
    log_q = (x @ changed.T).log_softmax(1)
    measured = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    assert felt.losses()[0] == pytest.approx(measured, rel=0.1)
