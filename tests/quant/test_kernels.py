"""The kernels of GPUs, interpreted where there is none, against those of CPUs; other tests hold these to formulas."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from llmquant.quant import kernels
from llmquant.quant.curvature import row_blocks
from llmquant.quant.grid import (
    SCALE_MAX,
    SCALE_MIN,
    QuantizedWeight,
    QuantScheme,
    plain_grid,
    quantize_to_grid,
    round_scales,
    search_grid,
)
from llmquant.quant.hessian import factor
from llmquant.quant.solvers import LayerTask, SolveOptions
from llmquant.quant.solvers.gptq import ldlq, solve_gptq
from llmquant.quant.solvers.insurance import refuse_wrong_kernels
from llmquant.quant.solvers.refine import refine
from llmquant.quant.solvers.two_sided import column_feedback, row_feedback, two_sided_ldlq

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")

SCHEMES = [QuantScheme(4, 32), QuantScheme(3, 32, symmetric=False), QuantScheme(8, -1)]
both_grids = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
T = TypeVar("T")


def correlated(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return (x.T @ x / len(x)).to(DEVICE)


def weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def by_gpu_and_cpu(call: Callable[[], T]) -> tuple[T, T]:
    """What `call` gives with the GPU's kernels, and with those of the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "used_for", lambda x: True)
        ours = call()
        patch.setattr(kernels, "used_for", lambda x: False)
        return ours, call()


def assert_alike(codes: Tensor, others: Tensor) -> None:
    """Equal, but for weights that lie between two levels, and those that make up for their other choice."""
    share = (codes != others).float().mean()
    assert share < 0.01, f"{100 * share:.1f}% of codes differ"
    assert (codes.int() - others.int()).abs().max() <= 1


def test_levels_and_scales_are_rounded_as_torch_does_it() -> None:
    from rounding_kernel import rounded

    numbers = [0.25, 0.75, 1.25, -0.25, 100.0, -100.0, 0.0, 1e-9, -1e-9, 1e9, 1 + 2**-8, 1 + 3 * 2**-8]
    x = torch.tensor(numbers + (torch.randn(52) * 3).tolist(), device=DEVICE)
    levels, scales = torch.empty_like(x), torch.empty_like(x)
    rounded[(1,)](x, levels, scales, N=64)
    assert torch.equal(levels, (x / 0.5).round().clamp(-8, 7))
    assert torch.equal(scales, round_scales(x))
    assert scales.abs().min() == SCALE_MIN
    assert scales.abs().max() == SCALE_MAX


@both_grids
@pytest.mark.parametrize("columns", [64, 192])
def test_grid(scheme: QuantScheme, columns: int) -> None:
    W, importance = weight(24, columns), weight(1, columns)[0] ** 4
    W[3, :64] = 0

    def found() -> tuple[Tensor, Tensor]:
        scales, zeros = search_grid(W, importance, scheme)
        dense = QuantizedWeight(quantize_to_grid(W, scales, scheme, zeros), scales, scheme, zeros).dequantize()
        return scales, ((dense - W).abs() ** 2.5 * importance).view(*scales.shape, -1).sum(-1)

    (ours, our_loss), (scales, loss) = by_gpu_and_cpu(found)
    assert (ours == scales).float().mean() > 0.9  # two candidates may be alike but for the order of the sum
    torch.testing.assert_close(our_loss, loss)


@both_grids
@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (7, 128)])
@pytest.mark.parametrize("most", [64, 24], ids=["one block", "blocks of rows"])
def test_two_sided(scheme: QuantScheme, rows: int, columns: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant.quant.curvature._MOST", most)
    W, H_I, H_O = weight(rows, columns), correlated(columns, 1), correlated(rows, 2)
    scales, zeros = plain_grid(W, scheme)
    order = torch.argsort(H_I.diagonal(), descending=True)
    factored = factor(H_I, 0.1, order)
    assert factored is not None
    blocks = row_feedback([(at.to(DEVICE), H_O[at][:, at]) for at in row_blocks([rows])], 0.1)
    assert_alike(
        *by_gpu_and_cpu(
            lambda: two_sided_ldlq(W, column_feedback(factored[0].clone()), blocks, scales, zeros, scheme, order)
        )
    )


@both_grids
@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (7, 192)])
def test_ldlq(scheme: QuantScheme, rows: int, columns: int) -> None:
    W, H_I = weight(rows, columns), correlated(columns, 1)
    scales, zeros = plain_grid(W, scheme)
    order = torch.argsort(H_I.diagonal(), descending=True)
    factored = factor(H_I, 0.1, order)
    assert factored is not None
    assert_alike(*by_gpu_and_cpu(lambda: ldlq(W, factored[0], scales, zeros, scheme, order)))


@both_grids
@pytest.mark.parametrize(("rows", "columns"), [(70, 64), (7, 192)])
def test_refinement(scheme: QuantScheme, rows: int, columns: int) -> None:
    W, H_I = weight(rows, columns), correlated(columns, 1)
    scales, zeros = plain_grid(W, scheme)
    start = QuantizedWeight(quantize_to_grid(W, scales, scheme, zeros), scales, scheme, zeros)
    ours, theirs = by_gpu_and_cpu(lambda: refine(start, W, H_I, 0.1, SolveOptions(sweeps=2, refit=True)))
    assert_alike(ours.codes_OI, theirs.codes_OI)
    assert not torch.equal(ours.codes_OI, start.codes_OI)


@pytest.mark.parametrize("curved", [True, False])
def test_a_layer(curved: bool) -> None:
    """All of them together."""
    W, H_I, H_O = weight(64, 128), correlated(128, 1), correlated(64, 2)
    H_OO = ((torch.arange(64, device=DEVICE), H_O),) if curved else ()
    task = LayerTask("layer", W, H_I, 1024, QuantScheme(4, 64), H_OO=H_OO)
    ours, theirs = by_gpu_and_cpu(lambda: solve_gptq(task, SolveOptions(sweeps=1, refit=True)))
    torch.testing.assert_close(ours.loss_O.sum(), theirs.loss_O.sum(), rtol=0.02, atol=0)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernels ran on this device whatever it is, while nobody refuses them."""
    monkeypatch.setattr(kernels, "_refused", set())
    monkeypatch.setattr(kernels, "runs_on", lambda device: device.type not in kernels._refused)


@pytest.mark.usefixtures("here")
def test_the_insurance_finds_them_right() -> None:
    assert refuse_wrong_kernels(DEVICE) == ""
    assert kernels.used_for(weight(1, 1))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        ("tiles.round_blocks", lambda target, *others: torch.zeros_like(target, dtype=torch.int8)),
        ("grids.search", lambda weight, importance, full, zeros, *others: (full.bfloat16().float(), zeros)),
        ("descent.descend", lambda H, gradient, level, *others: level.neg_()),
        ("tiles.round_blocks", lambda *given: 1 / 0),
    ],
    ids=["tiles", "grids", "descent", "an error"],
)
def test_wrong_kernels_are_refused(kernel: str, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"llmquant.quant.kernels.gpu.{kernel}", wrong)
    problem = refuse_wrong_kernels(DEVICE)
    assert "losses of a small layer are" in problem or "Error: " in problem
    assert not kernels.used_for(weight(1, 1))


def test_they_are_for_float32_on_a_gpu() -> None:
    assert not kernels.runs_on(torch.device("cpu"))
    assert kernels.runs_on(torch.device("cuda"))
    assert not kernels.used_for(torch.zeros(1))
    assert kernels.used_for(torch.zeros(1, device=DEVICE)) == (DEVICE.type == "cuda")
