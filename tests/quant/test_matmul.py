"""Which products are rounded, and that the others are not."""

import pytest
import torch

from llmquant.errors import RecipeError
from llmquant.model.devices import pick_products
from llmquant.quant.hessian import Hessian, quadratic
from llmquant.quant.matmul import fast_linears, forwards_in, linear, matmul, sums_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def with_cpu(monkeypatch: pytest.MonkeyPatch, **features: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", "bf16"])
def test_auto_is_bfloat16_where_the_cpu_is_made_for_it_and_bits_are_few(
    feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cpu(monkeypatch, **{feature: True})
    assert pick_products("auto", CPU, torch.float32, 4) == torch.bfloat16
    assert pick_products("auto", CPU, torch.float32, 8) == torch.float32
    assert pick_products("float32", CPU, torch.float32, 4) == torch.float32
    assert pick_products("bfloat16", CPU, torch.float32, 8) == torch.bfloat16
    assert pick_products("auto", CPU, torch.bfloat16, 8) == torch.bfloat16
    assert pick_products("auto", CUDA, torch.float16, 4) == torch.float16
    with_cpu(monkeypatch, avx512_f=True)
    assert pick_products("auto", CPU, torch.float32, 4) == torch.float32


def test_products_that_the_compute_dtype_does_not_allow_are_refused() -> None:
    with pytest.raises(RecipeError, match="--products: bfloat16"):
        pick_products("bfloat16", CUDA, torch.float16, 4)


def test_forwards_round_their_products_only_while_asked_to() -> None:
    linear, x = torch.nn.Linear(64, 8).requires_grad_(False), torch.randn(4, 64)
    plain = linear(x)
    with forwards_in(torch.bfloat16, torch.float32):
        rounded = linear(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), plain, rtol=0.05, atol=0.05)
    with forwards_in(torch.float32, torch.float32):
        assert torch.equal(linear(x), plain)
    assert torch.equal(linear(x), plain)


def test_the_precision_of_sums_is_put_back_even_after_an_error() -> None:
    def now() -> tuple[str, str]:
        cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
        return cpu.fp32_precision, cuda.fp32_precision

    @sums_of(torch.bfloat16)
    def fail() -> None:
        assert now() == ("bf16", "tf32")
        raise ZeroDivisionError

    before = now()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert now() == before
    with sums_of(torch.float32):
        assert now() == before


@pytest.mark.parametrize("width", [5, 512, 1100])
def test_half_the_products_of_a_symmetric_matrix_are_enough(width: int) -> None:
    x, other = (torch.randn(40, width, dtype=torch.float64) for _ in range(2))
    hessian = Hessian(width, CPU, torch.float64, drift=True)
    for rows in (slice(0, 30), slice(30, 40)):
        hessian.add(x[rows], other[rows])
    E = torch.randn(7, width, dtype=torch.float64)
    torch.testing.assert_close(hessian.take_drift(), (other - x).T @ x / 40)
    H = hessian.mean()
    assert torch.equal(H, H.T)
    torch.testing.assert_close(H, x.T @ x / 40)
    torch.testing.assert_close(quadratic(E, H), ((E @ H) * E).sum(1))


def test_sums_in_bfloat16_are_exact_for_what_bfloat16_holds() -> None:
    x = torch.randn(300, 600).bfloat16().float()
    sums = []
    for products in (torch.float32, torch.bfloat16):
        hessian = Hessian(600, CPU, products=products)
        hessian.add(x)
        sums.append(hessian.mean())
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_equal_torchs_for_any_layout_of_the_factors(dtype: torch.dtype) -> None:
    a, b = torch.randn(24, 40).to(dtype), torch.randn(40, 56).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    for left, right in (
        (a, b),
        (a.T.contiguous().T, b),
        (a, b.T.contiguous().T),
        (a[:, 8:24], b[8:24, 16:48]),  # gaps between rows
        (a[:1], b[:, :1]),
        (a[:0], b),
        (a[:, :0], b[:0]),
    ):
        torch.testing.assert_close(matmul(left, right), left @ right, rtol=tolerance, atol=tolerance)


def test_fast_linears_are_the_models_linears() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.GELU(), torch.nn.Linear(8, 4, bias=False))
    x, expected = torch.randn(2, 3, 16), torch.nn.Linear.forward
    with torch.no_grad():
        plain = model(x)
        fast_linears(model)
        assert type(model[0]) is torch.nn.Linear
        assert torch.nn.Linear.forward is expected
        torch.testing.assert_close(model(x), plain)
        model[0].weight.data = model[0].weight.data * 2  # what a block is given later counts
        assert not torch.allclose(model(x), plain)
        with forwards_in(torch.bfloat16, torch.float32):
            assert model(x).dtype == torch.bfloat16
    assert torch.equal(linear(x.double(), torch.eye(16).double()), x.double())
