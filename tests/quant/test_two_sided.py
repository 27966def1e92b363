"""Two-sided rounding against its definition, one entry after the other, and against the solver that sees one side."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmquant.quant.curvature import OutputHessian, row_blocks
from llmquant.quant.grid import QuantizedWeight, QuantScheme, plain_grid
from llmquant.quant.hessian import factor
from llmquant.quant.solvers import LayerTask, SolveOptions, base, two_sided
from llmquant.quant.solvers.gptq import ldlq, solve_gptq
from llmquant.quant.solvers.two_sided import RowFeedback, column_feedback, row_feedback, two_sided_ldlq


def correlated(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * width, width, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x)


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def one_by_one(
    T: Tensor, U: Tensor, blocks: list[RowFeedback], scales: Tensor, zeros: Tensor, low: int, high: int
) -> Tensor:
    """codes_OI, with a scale and a zero point of every entry and the columns in the order of the loop."""
    codes, error, left = torch.zeros_like(T), torch.zeros_like(T), torch.zeros_like(T)
    for block in blocks:
        for i, row in enumerate(block.rows):
            moved = T[row] + block.A_bb[i, :i] @ error[block.rows[:i]]
            for j in range(T.shape[1]):
                v = moved[j] + left[row, :j] @ U[:j, j] / U[j, j]
                codes[row, j] = ((v / scales[row, j]).round() + zeros[row, j]).clamp(low, high)
                level = (codes[row, j] - zeros[row, j]) * scales[row, j]
                error[row, j], left[row, j] = T[row, j] - level, moved[j] - level
    return codes


@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (96, 96), (33, 32), (7, 160)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("most", [64, 24], ids=["one block", "blocks of rows"])
def test_codes_are_those_of_the_definition(
    rows: int, columns: int, symmetric: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmquant.quant.curvature._MOST", most)
    monkeypatch.setattr(base, "_AT_ONCE", 30 * columns)  # blocks one after the other, or two at once
    scheme, target = QuantScheme(3, 32, symmetric), normal(rows, columns)
    scales, zeros = plain_grid(target, scheme)
    H_I, H_O = correlated(columns, 1), correlated(rows, 2)
    order = torch.argsort(H_I.diagonal(), descending=True)
    factored = factor(H_I, 0.01, order)
    assert factored is not None
    blocks = row_feedback([(at, H_O[at][:, at]) for at in row_blocks([rows])], 0.1)
    assert sorted(torch.cat([block.rows for block in blocks]).tolist()) == list(range(rows))
    codes = two_sided_ldlq(target, column_feedback(factored[0].clone()), blocks, scales, zeros, scheme, order)
    zeros = torch.zeros_like(scales) if zeros is None else zeros.double()
    of_entries = [part.double().repeat_interleave(32, 1)[:, order] for part in (scales, zeros)]
    low, high = scheme.code_min, scheme.code_max
    expected = one_by_one(target[:, order], factored[0], blocks, *of_entries, low, high)
    assert torch.equal(codes[:, order].double(), expected)


def test_where_outputs_count_alike_it_is_the_one_sided_loop() -> None:
    scheme, target, H_I = QuantScheme(4, 32), normal(50, 64), correlated(64, 1)
    scales, _ = plain_grid(target, scheme)
    order = torch.arange(64)
    factored = factor(H_I, 0.01, order)
    assert factored is not None
    blocks = row_feedback([(torch.arange(50), torch.eye(50, dtype=torch.float64))], 0.2)
    both = [
        two_sided_ldlq(target, column_feedback(factored[0].clone()), blocks, scales, None, scheme, order),
        ldlq(target, factored[0], scales, None, scheme, order),
    ]
    assert torch.equal(*both)


def test_the_solver_lowers_the_loss_that_it_is_made_for() -> None:
    H_I, H_O, target = correlated(64, 1), correlated(48, 2), normal(48, 64)
    task = LayerTask("layer", target, H_I, 512, QuantScheme(4, 32))
    curved = replace(task, H_OO=tuple((at, H_O[at][:, at]) for at in row_blocks([48])))
    options = SolveOptions(sweeps=1, refit=True)

    def loss(weight: QuantizedWeight) -> float:
        error = target - weight.dequantize(torch.float64)
        return float((H_O @ error @ H_I).mul(error).sum())

    assert loss(solve_gptq(curved, options).weight) < 0.7 * loss(solve_gptq(task, options).weight)


def test_a_curvature_that_cannot_be_factored_is_done_without() -> None:
    task = LayerTask("layer", torch.randn(4, 32), torch.eye(32), 512, QuantScheme(4, 32))
    bad = replace(task, H_OO=((torch.arange(4), torch.full((4, 4), torch.nan)),))
    found = [solve_gptq(each, SolveOptions(sweeps=1)) for each in (task, bad)]
    assert torch.equal(*(each.weight.codes_OI for each in found))
    said = "the curvature at its output is not positive definite: solved without it"
    assert [each.notes for each in found] == [(), (said,)]


def test_groups_of_zeros_stay_zeros() -> None:
    target = normal(48, 64).float()
    target[7], target[9, 32:] = 0, 0
    H_OO = tuple((at, correlated(48, 2).float()[at][:, at]) for at in row_blocks([48]))
    for symmetric in (True, False):
        task = LayerTask("x", target, correlated(64, 1).float(), 512, QuantScheme(4, 32, symmetric), H_OO=H_OO)
        found = solve_gptq(task, SolveOptions()).weight.dequantize()
        assert not found[7].any()
        assert not found[9, 32:].any()
        assert found[9, :32].any()


def test_rows_must_be_those_of_the_weight() -> None:
    with pytest.raises(ValueError, match="H_O of 3 rows, expected 4"):
        LayerTask("x", torch.ones(4, 32), None, 0, QuantScheme(4, 32), H_OO=((torch.arange(3), torch.eye(3)),))


# -- H_O -----------------------------------------------------------------------------------------------
def test_every_token_counts_with_the_direction_of_its_gradient() -> None:
    g = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))
    hessian = OutputHessian([4, 2], torch.device("cpu"))
    for part in (g[0] * 1000, g[1], g[2] / 1000):
        hessian.add(part)
    hessian.add(torch.tensor([[torch.nan] * 6, [torch.inf] * 6, [0.0] * 6]))
    unit = (g / g.norm(dim=-1, keepdim=True)).view(-1, 6)
    assert hessian.n_tokens == 150
    torch.testing.assert_close(hessian.means()[0], unit.T @ unit / 150)


def test_blocks_hold_their_share_of_every_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant.quant.curvature._MOST", 4)
    blocks = row_blocks([6, 2])
    assert [block.tolist() for block in blocks] == [[0, 1, 2, 6], [3, 4, 5, 7]]
    g = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    hessian, unit = OutputHessian([6, 2], torch.device("cpu")), g / g.norm(dim=1, keepdim=True)
    hessian.add(g)
    for rows, part in zip(blocks, hessian.means(), strict=True):
        torch.testing.assert_close(part, (unit.T @ unit / 40)[rows][:, rows])


@pytest.mark.parametrize("columns", [5, 7])
def test_the_feedback_of_columns_takes_the_memory_of_the_factor(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its numbers lie row by row or column by column, and whether tiles divide it or not."""
    monkeypatch.setattr(two_sided, "_TILE", 3)
    factor_II = torch.rand(columns, columns).triu() + torch.eye(columns)
    wanted = (factor_II / factor_II.diagonal()).triu(1)
    for given in (factor_II.clone(), factor_II.T.contiguous().T):
        place = given.data_ptr()
        found = column_feedback(given)
        assert torch.equal(found, wanted)
        assert found.is_contiguous()
        assert found.data_ptr() == place
