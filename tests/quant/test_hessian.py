"""H = E[x x^T] and its upper factor."""

import pytest
import torch
from torch import Tensor

from llmquant.quant import hessian as hessian_module
from llmquant.quant.hessian import Hessian, default_damp, factor

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_eigenvalues(values: Tensor) -> Tensor:
    """A dense symmetric matrix with these eigenvalues, float64."""
    basis = torch.linalg.qr(randn(len(values), len(values), dtype=torch.float64)).Q
    matrix: Tensor = basis @ torch.diag(values.double()) @ basis.T
    return (matrix + matrix.T) / 2


def spd(size: int, seed: int = 0) -> Tensor:
    x = randn(4 * size, size, seed=seed, dtype=torch.float64) * torch.linspace(0.1, 3, size)
    return x.T @ x / len(x)


# -- sum -----------------------------------------------------------------------------------------------
BATCHES = [(2, 5, 12), (1, 1, 12), (7, 12), (3, 2, 2, 12), (0, 12)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_mean_is_the_average_outer_product_over_batches_of_any_shape(dtype: torch.dtype, tolerance: float) -> None:
    hessian, batches = Hessian(12, CPU, dtype), [randn(*shape, seed=i) for i, shape in enumerate(BATCHES)]
    for batch in batches:
        hessian.add(batch)
    x = torch.cat([batch.reshape(-1, 12) for batch in batches]).double()
    expected = x.T @ x / len(x)
    assert (hessian.n_tokens, hessian.n_excluded) == (len(x), 0)
    assert float((hessian.mean().double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_half_precision_inputs_are_summed_in_the_sums_dtype() -> None:
    x, hessian = randn(300, 6).bfloat16(), Hessian(6, CPU)
    hessian.add(x)
    expected = x.double().T @ x.double() / 300
    assert torch.allclose(hessian.mean().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf], [torch.nan] * 4])
def test_tokens_with_a_non_finite_entry_are_left_out_and_counted(bad: list[float]) -> None:
    x = randn(2, 5, 4)
    x[1, 2, : len(bad)] = torch.tensor(bad)
    hessian, clean = Hessian(4, CPU), Hessian(4, CPU)
    hessian.add(x)
    clean.add(x.reshape(10, 4)[torch.arange(10) != 7])
    assert (hessian.n_tokens, hessian.n_excluded) == (9, 1)
    assert torch.equal(hessian.mean(), clean.mean())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_drift_is_what_the_inputs_lost(dtype: torch.dtype, tolerance: float) -> None:
    x = randn(300, 8, dtype=dtype)
    seen = 0.9 * x + 0.1 * randn(300, 8, seed=1, dtype=dtype)
    hessian = Hessian(8, CPU, dtype, drift=True)
    for part in (slice(0, 100), slice(100, 300)):
        hessian.add(seen[part], x[part])
    expected = (x - seen).double().T @ seen.double() / 300
    drift = hessian.take_drift()
    assert drift is not None
    torch.testing.assert_close(drift.double(), expected, rtol=tolerance, atol=tolerance)
    assert hessian.take_drift() is None


def test_a_token_that_is_bad_in_either_model_is_left_out_of_both_sums() -> None:
    x, seen = randn(10, 4), randn(10, 4, seed=1)
    x[2, 1], seen[7, 0] = torch.nan, torch.inf
    hessian, clean = Hessian(4, CPU, drift=True), Hessian(4, CPU, drift=True)
    hessian.add(seen, x)
    kept = [i for i in range(10) if i not in (2, 7)]
    clean.add(seen[kept], x[kept])
    assert (hessian.n_tokens, hessian.n_excluded) == (8, 2)
    drifts = [h.take_drift() for h in (hessian, clean)]
    assert drifts[0] is not None
    assert drifts[1] is not None
    assert torch.equal(drifts[0], drifts[1])
    assert torch.equal(hessian.mean(), clean.mean())


def test_a_drift_without_the_originals_input_is_refused() -> None:
    with pytest.raises(ValueError, match="original"):
        Hessian(4, CPU, drift=True).add(randn(3, 4))


def test_an_input_never_seen_gives_zeros() -> None:
    assert not Hessian(3, CPU).mean().any()


def test_adding_does_not_change_the_batch() -> None:
    x = randn(2, 3, 4)
    before = x.clone()
    Hessian(4, CPU).add(x)
    assert torch.equal(x, before)


def test_few_tokens_per_dimension_are_damped_more() -> None:
    assert [default_damp(n, 16) for n in (0, 127, 128, 10**6)] == [0.01, 0.01, 0.003, 0.003]


# -- factor --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 17, 64])
@pytest.mark.parametrize("damp", [0.003, 0.01, 0.5])
def test_factor_is_upper_and_its_square_is_the_damped_matrix(size: int, damp: float) -> None:
    H = spd(size, seed=size)
    before = H.clone()
    factored = factor(H, damp)
    assert factored is not None
    upper, used, tries = factored
    assert (used, tries) == (damp, 0)
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    damped = H + damp * H.diagonal().mean() * torch.eye(size, dtype=H.dtype)
    assert torch.allclose(upper @ upper.T, damped, rtol=1e-12, atol=1e-12 * float(H.abs().max()))
    assert torch.equal(H, before)


@pytest.mark.parametrize("size", [1, 2, 17, 64])
def test_factor_in_pieces_is_that_of_the_permuted_matrix(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    H, order = spd(size, seed=size), torch.randperm(size, generator=torch.Generator().manual_seed(size))
    monkeypatch.setattr(hessian_module, "_COLUMNS", 5)
    monkeypatch.setattr(hessian_module, "_AT_ONCE", 7)
    factored, plain = factor(H, 0.01, order), factor(H[order][:, order], 0.01)
    assert factored is not None
    assert plain is not None
    assert torch.equal(factored[0], plain[0])
    wanted = torch.linalg.cholesky((H + 0.01 * H.diagonal().mean() * torch.eye(size))[order][:, order].flip(0, 1))
    torch.testing.assert_close(factored[0], wanted.flip(0, 1))


@pytest.mark.parametrize(("lowest", "tries"), [(0.0, 0), (-0.02, 1), (-0.05, 2), (-0.2, 3), (-0.7, 4)])
def test_damping_triples_until_an_indefinite_matrix_is_positive(lowest: float, tries: int) -> None:
    size = 8
    values = torch.full((size,), (size - lowest) / (size - 1), dtype=torch.float64)  # mean diagonal: 1
    values[3] = lowest
    H = with_eigenvalues(values)
    before = H.clone()
    factored = factor(H, 0.01)
    assert factored is not None
    upper, damp, tried = factored
    assert tried == tries
    assert damp == pytest.approx(0.01 * 3**tries)
    assert torch.allclose(upper @ upper.T, H + damp * torch.eye(size), atol=1e-12)
    assert torch.equal(H, before)


def test_a_singular_matrix_of_too_few_tokens_is_factored() -> None:
    x = randn(3, 32)
    hessian = Hessian(32, CPU)
    hessian.add(x)
    H = hessian.mean()
    factored = factor(H, 0.01)
    assert factored is not None
    upper, damp, _ = factored
    assert torch.allclose(upper @ upper.T, H + damp * H.diagonal().mean() * torch.eye(32), atol=1e-4)


def hopeless(name: str) -> Tensor:
    H = spd(6)
    if name == "NaN on the diagonal":
        H[2, 2] = torch.nan
    elif name == "NaN beside it":
        H[1, 4] = H[4, 1] = torch.nan
    elif name == "NaN in the corner":
        H[0, 5] = H[5, 0] = torch.nan
    elif name == "infinity on the diagonal":
        H[0, 0] = torch.inf
    elif name == "infinity beside it":
        H[0, 3] = H[3, 0] = torch.inf
    elif name == "minus infinity":
        H[5, 5] = -torch.inf
    elif name == "strongly indefinite":
        H = with_eigenvalues(torch.tensor([-3.0, 1, 1, 1, 1, 5]))
    elif name == "just beyond five tries":  # the last one adds 0.81 of the mean
        H = with_eigenvalues(torch.tensor([-0.9, 1, 1, 1, 1, 2.9]))
    elif name == "negative":
        H = -H
    return H


@pytest.mark.parametrize(
    "name",
    [
        "NaN on the diagonal",
        "NaN beside it",
        "NaN in the corner",
        "infinity on the diagonal",
        "infinity beside it",
        "minus infinity",
        "strongly indefinite",
        "just beyond five tries",
        "negative",
    ],
)
def test_a_hopeless_matrix_gives_none(name: str) -> None:
    assert factor(spd(6), 0.01) is not None
    assert factor(hopeless(name), 0.01) is None
    assert factor(hopeless(name).float(), 0.01) is None


def test_a_nan_that_the_cholesky_does_not_report_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(matrix: Tensor, *, out: tuple[Tensor, Tensor]) -> None:
        out[0].fill_(torch.nan)
        out[1].zero_()

    monkeypatch.setattr(torch.linalg, "cholesky_ex", silent)
    assert factor(spd(6), 0.01) is None


def test_an_all_zero_matrix_gives_the_identity() -> None:
    factored = factor(torch.zeros(5, 5), 0.01)
    assert factored is not None
    assert torch.equal(factored[0], torch.eye(5))


@pytest.mark.parametrize("dead", [0, 3, 7])
def test_a_dead_input_gets_only_its_diagonal(dead: int) -> None:
    H = spd(8)
    H[dead] = H[:, dead] = 0
    factored = factor(H, 0.01)
    assert factored is not None
    upper = factored[0]
    assert float(upper[dead, dead]) == pytest.approx(float(0.01 * H.diagonal().mean()) ** 0.5)
    others = torch.arange(8) != dead
    assert not upper[dead, others].any()
    assert not upper[others, dead].any()
