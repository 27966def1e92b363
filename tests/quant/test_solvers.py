"""What every solver promises, and GPTQ against its definition, the textbook and exhaustive search."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmquant.errors import SolveError
from llmquant.quant.grid import QuantizedWeight, QuantScheme, absmax_scales, quantize_to_grid, round_scales, search_grid
from llmquant.quant.hessian import Hessian
from llmquant.quant.kernels.cpu import tiles
from llmquant.quant.solvers import DATA_FREE, SOLVERS, LayerTask, Solution, SolveOptions
from llmquant.quant.solvers import base as base_module
from llmquant.quant.solvers import refine as refine_module
from llmquant.quant.solvers.gptq import solve_gptq
from llmquant.quant.solvers.refine import refine
from llmquant.quant.solvers.rtn import solve_rtn

every_solver = pytest.mark.parametrize("solver", SOLVERS)
bit_widths = pytest.mark.parametrize("bits", [2, 3, 4, 8])
both_orders = pytest.mark.parametrize("order", ["descending", "natural"])


def correlated(inputs: int, seed: int = 0) -> Tensor:
    """E[x x^T] of strongly correlated inputs of very different size, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) @ mix
    x += 3 * torch.randn(4 * inputs, 1, generator=generator, dtype=torch.float64) * inputs**0.5
    x *= torch.rand(inputs, generator=generator, dtype=torch.float64) * 2 + 0.1
    return x.T @ x / len(x)


def problem(rows: int = 6, inputs: int = 64, *, bits: int = 4, group: int = 32, seed: int = 0) -> LayerTask:
    generator = torch.Generator().manual_seed(1000 + seed)
    weight = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    return LayerTask("layer", weight, correlated(inputs, seed), 4 * inputs, QuantScheme(bits, group))


def hessian(task: LayerTask) -> Tensor:
    assert task.H_II is not None
    return task.H_II


def quadratic(task: LayerTask, weight: QuantizedWeight, H_II: Tensor | None = None) -> Tensor:
    """tr(E H E^T) of each row."""
    error = task.weight_OI - weight.dequantize(task.weight_OI.dtype)
    return ((error @ (hessian(task) if H_II is None else H_II)) * error).sum(1)


def damped(task: LayerTask, damp: float) -> Tensor:
    H = hessian(task)
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def steps(solution: Solution) -> Tensor:
    """The scale of every weight, [O, I], float64."""
    inputs = solution.weight.codes_OI.shape[1]
    return solution.weight.scales_OG.double().repeat_interleave(solution.weight.scheme.group(inputs), dim=1)


# -- contract ------------------------------------------------------------------------------------------
@every_solver
@bit_widths
@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solver_gives_a_valid_weight_of_the_tasks_shape_and_scheme(
    solver: str, bits: int, group: int, dtype: torch.dtype
) -> None:
    task = problem(5, 128, bits=bits, group=group)
    task = replace(task, weight_OI=task.weight_OI.to(dtype), H_II=hessian(task).to(dtype))
    solution = SOLVERS[solver](task, SolveOptions())
    weight = solution.weight
    assert weight.scheme == task.scheme
    assert weight.codes_OI.shape == (5, 128)
    assert weight.codes_OI.dtype == torch.int8
    assert weight.scales_OG.shape == (5, task.scheme.groups(128))
    assert weight.scales_OG.dtype == torch.float32
    assert task.scheme.code_min <= int(weight.codes_OI.min()) <= int(weight.codes_OI.max()) <= task.scheme.code_max
    assert solution.loss_O.shape == (5,)
    assert bool((solution.loss_O >= 0).all())
    assert float((weight.dequantize() - task.weight_OI).abs().mean()) < float(task.weight_OI.abs().mean())


@every_solver
def test_a_solver_is_deterministic_and_leaves_its_task_alone(solver: str) -> None:
    task, untouched = problem(), problem()
    first, second = SOLVERS[solver](task, SolveOptions()), SOLVERS[solver](task, SolveOptions())
    assert torch.equal(first.weight.codes_OI, second.weight.codes_OI)
    assert torch.equal(first.weight.scales_OG, second.weight.scales_OG)
    assert torch.equal(first.loss_O, second.loss_O)
    assert first.notes == second.notes
    assert torch.equal(task.weight_OI, untouched.weight_OI)
    assert torch.equal(hessian(task), hessian(untouched))


@every_solver
def test_the_reported_loss_is_that_of_the_weight(solver: str) -> None:
    task = problem()
    solution = SOLVERS[solver](task, SolveOptions())
    torch.testing.assert_close(solution.loss_O, quadratic(task, solution.weight), rtol=1e-9, atol=0)


@every_solver
def test_a_solver_without_a_hessian_works_or_says_that_it_needs_one(solver: str) -> None:
    task = replace(problem(), H_II=None)
    if solver in DATA_FREE:
        assert not SOLVERS[solver](task, SolveOptions()).loss_O.any()
    else:
        with pytest.raises(ValueError, match="needs a Hessian"):
            SOLVERS[solver](task, SolveOptions())


@every_solver
def test_stacked_rows_of_two_linears_are_solved_as_apart(solver: str) -> None:
    one, two = problem(5), problem(3, seed=7)
    stacked = SOLVERS[solver](replace(one, weight_OI=torch.cat([one.weight_OI, two.weight_OI])), SolveOptions())
    apart = [SOLVERS[solver](replace(one, weight_OI=task.weight_OI), SolveOptions()) for task in (one, two)]
    assert torch.equal(stacked.weight.codes_OI, torch.cat([solution.weight.codes_OI for solution in apart]))
    assert torch.equal(stacked.weight.scales_OG, torch.cat([solution.weight.scales_OG for solution in apart]))


@every_solver
def test_zero_weights_stay_zero(solver: str) -> None:
    task = problem()
    solution = SOLVERS[solver](replace(task, weight_OI=torch.zeros_like(task.weight_OI)), SolveOptions())
    assert not solution.weight.dequantize().any()
    assert not solution.loss_O.any()


def test_a_task_refuses_a_hessian_of_another_size_and_a_group_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"layer: H \(63, 63\)"):
        replace(problem(), H_II=hessian(problem())[1:, 1:])
    with pytest.raises(ValueError, match="layer: group size 24"):
        replace(problem(), scheme=QuantScheme(4, 24))


def test_rtn_is_the_nearest_code_on_the_absmax_grid() -> None:
    task = problem()
    weight = solve_rtn(task).weight
    scales = absmax_scales(task.weight_OI, task.scheme)
    assert torch.equal(weight.scales_OG.double(), scales)
    assert torch.equal(weight.codes_OI, quantize_to_grid(task.weight_OI, scales, task.scheme))


# -- GPTQ: definition ----------------------------------------------------------------------------------
def test_gptq_of_a_diagonal_hessian_is_rtn() -> None:
    task = problem()
    task = replace(task, H_II=hessian(task).diagonal().diag())
    solution, plain = solve_gptq(task, SolveOptions(grid="absmax")), solve_rtn(task)
    assert torch.equal(solution.weight.codes_OI, plain.weight.codes_OI)
    assert torch.equal(solution.weight.scales_OG, plain.weight.scales_OG)


def dense_recursion(task: LayerTask, steps_OI: Tensor, order: Tensor, damp: float) -> Tensor:
    """The formula of solve_gptq's docstring, one column after the other. Returns codes_OI."""
    H = damped(task, damp)[order][:, order]
    U = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    w, s = task.weight_OI[:, order], steps_OI[:, order]
    e, q = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(len(order)):
        v = w[:, j].clone()
        for i in range(j):
            v += e[:, i] * U[i, j] / U[j, j]
        q[:, j] = (v / s[:, j]).round().clamp(task.scheme.code_min, task.scheme.code_max)
        e[:, j] = w[:, j] - s[:, j] * q[:, j]
    codes = torch.empty_like(q)
    codes[:, order] = q
    return codes.to(torch.int8)


def textbook_gptq(task: LayerTask, steps_OI: Tensor, order: Tensor, damp: float) -> Tensor:
    """Frantar et al., Algorithm 1: the inverse Cholesky factor, errors pushed onto the columns still open."""
    H = damped(task, damp)[order][:, order]
    Hinv = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    w, s = task.weight_OI[:, order].clone(), steps_OI[:, order]
    q = torch.zeros_like(w)
    for j in range(len(order)):
        q[:, j] = (w[:, j] / s[:, j]).round().clamp(task.scheme.code_min, task.scheme.code_max)
        error = (w[:, j] - s[:, j] * q[:, j]) / Hinv[j, j]
        w[:, j:] -= error[:, None] * Hinv[j, j:]
    codes = torch.empty_like(q)
    codes[:, order] = q
    return codes.to(torch.int8)


def column_order(task: LayerTask, order: str) -> Tensor:
    diagonal = hessian(task).diagonal()
    return torch.argsort(diagonal, descending=True) if order == "descending" else torch.arange(len(diagonal))


@both_orders
@pytest.mark.parametrize(("side", "wide"), [(1, 1), (3, 6), (5, 20), (16, 48), (64, 512)])
def test_gptq_in_tiles_equals_the_dense_recursion(
    order: str, side: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_SIDE", side)
    monkeypatch.setattr(tiles, "_WIDE", wide)
    task = problem(8, 48, bits=3, group=16)
    solution = solve_gptq(task, SolveOptions(order=order, damp=0.01))
    expected = dense_recursion(task, steps(solution), column_order(task, order), 0.01)
    assert torch.equal(solution.weight.codes_OI, expected)


@both_orders
@bit_widths
@pytest.mark.parametrize("group", [16, -1])
def test_gptq_chooses_the_codes_of_the_textbook_algorithm(order: str, bits: int, group: int) -> None:
    task = problem(8, 48, bits=bits, group=group, seed=bits)
    solution = solve_gptq(task, SolveOptions(order=order, damp=0.01))
    assert torch.equal(solution.weight.codes_OI, textbook_gptq(task, steps(solution), column_order(task, order), 0.01))
    if order == "descending":  # the order does matter here, so the test above can fail
        natural = textbook_gptq(task, steps(solution), column_order(task, "natural"), 0.01)
        assert not torch.equal(solution.weight.codes_OI, natural)


def test_float32_agrees_with_float64_on_nearly_all_codes() -> None:
    task = problem(16, 128)
    single = replace(task, weight_OI=task.weight_OI.float(), H_II=hessian(task).float())
    codes = [solve_gptq(one, SolveOptions(damp=0.01, grid="absmax")).weight.codes_OI for one in (task, single)]
    assert float((codes[0] == codes[1]).double().mean()) > 0.98


def test_scales_come_from_the_weights_before_any_compensation() -> None:
    task = problem()
    lam = 0.02 * float(hessian(task).diagonal().mean())
    searched = solve_gptq(task, SolveOptions(damp=0.02)).weight.scales_OG
    expected = search_grid(task.weight_OI, hessian(task).diagonal() + lam, task.scheme)[0]
    assert torch.equal(searched.double(), expected)
    plain = solve_gptq(task, SolveOptions(grid="absmax")).weight.scales_OG
    assert torch.equal(plain.double(), absmax_scales(task.weight_OI, task.scheme))


def test_descending_order_equals_a_problem_permuted_by_hand() -> None:
    task = problem(group=-1)
    order = column_order(task, "descending")
    sorted_task = replace(task, weight_OI=task.weight_OI[:, order], H_II=hessian(task)[order][:, order])
    by_option = solve_gptq(task, SolveOptions(order="descending", grid="absmax"))
    by_hand = solve_gptq(sorted_task, SolveOptions(order="natural", grid="absmax"))
    assert not torch.equal(order, torch.arange(64))
    assert torch.equal(by_option.weight.codes_OI[:, order], by_hand.weight.codes_OI)


@pytest.mark.parametrize(("n_tokens", "damp"), [(8 * 64, 0.003), (8 * 64 - 1, 0.01)])
def test_damping_follows_the_number_of_tokens(n_tokens: int, damp: float) -> None:
    task = replace(problem(bits=2), n_tokens=n_tokens)
    chosen, asked = solve_gptq(task, SolveOptions()), solve_gptq(task, SolveOptions(damp=damp))
    other = solve_gptq(task, SolveOptions(damp=0.013 - damp))
    assert torch.equal(chosen.weight.codes_OI, asked.weight.codes_OI)
    assert not torch.equal(chosen.weight.codes_OI, other.weight.codes_OI)


# -- error propagation and the last fit of the scales --------------------------------------------------
def streams_of_inputs(inputs: int = 64, tokens: int = 400, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs [N, I] of the original model, and what they became behind quantized layers; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    noise = 0.1 * torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    return x, 0.97 * x + noise


def propagation_task(**options: int) -> tuple[LayerTask, Tensor, Tensor]:
    x, seen = streams_of_inputs()
    hessians = Hessian(64, torch.device("cpu"), torch.float64, drift=True)
    for start in range(0, 400, 100):
        hessians.add(seen[start : start + 100], x[start : start + 100])
    task, drift = problem(**options), hessians.take_drift()
    assert drift is not None
    return replace(task, H_II=hessians.mean(), n_tokens=400, drift_II=drift), x, seen


def test_full_propagation_aims_at_the_closed_form() -> None:
    task, x, seen = propagation_task()
    H, C = seen.T @ seen / 400, x.T @ seen / 400
    H_l = H + 0.01 * H.diagonal().mean() * torch.eye(64, dtype=H.dtype)
    target = solve_gptq(task, SolveOptions(propagation=1.0, damp=0.01)).target_OI
    expected = task.weight_OI + task.weight_OI @ (C - H) @ torch.linalg.inv(H_l)
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-12)


def test_the_target_is_the_least_squares_layer_on_the_quantized_inputs() -> None:
    task, x, seen = propagation_task()
    target = solve_gptq(task, SolveOptions(propagation=1.0, damp=1e-12)).target_OI
    wanted = torch.linalg.lstsq(seen, x @ task.weight_OI.T).solution.T
    torch.testing.assert_close(target, wanted, rtol=1e-6, atol=1e-8)
    # and tr((Q - W*) H (Q - W*)^T) is the output error on xhat but for a constant, whatever Q is
    first, second = torch.randn(2, 6, 64, dtype=torch.float64)
    error = [((x @ task.weight_OI.T - seen @ q.T) ** 2).sum() / 400 for q in (first, second)]
    loss = [(((q - target) @ hessian(task)) * (q - target)).sum() for q in (first, second)]
    torch.testing.assert_close(error[0] - error[1], loss[0] - loss[1], rtol=1e-6, atol=1e-8)


@both_orders
def test_propagation_lowers_the_output_error_and_its_strength_is_linear(order: str) -> None:
    task, x, seen = propagation_task(bits=8)
    solutions = [solve_gptq(task, SolveOptions(order=order, propagation=a)) for a in (0.0, 0.5, 1.0)]
    errors = [((x @ task.weight_OI.T - seen @ s.weight.dequantize(x.dtype).T) ** 2).sum() for s in solutions]
    assert errors[0] > errors[1] > errors[2]
    torch.testing.assert_close(solutions[0].target_OI, task.weight_OI)
    torch.testing.assert_close(solutions[1].target_OI, (task.weight_OI + solutions[2].target_OI) / 2)


def test_many_rows_have_the_target_of_few() -> None:
    """The product with W is taken before the division by H for few rows, and behind it for more rows than inputs."""
    task = propagation_task()[0]
    times = -(-(task.weight_OI.shape[1] + 1) // len(task.weight_OI))
    many = replace(task, weight_OI=task.weight_OI.repeat(times, 1))
    few, first = (solve_gptq(one, SolveOptions(propagation=0.5)).target_OI for one in (task, many))
    torch.testing.assert_close(first[: len(few)], few, rtol=1e-9, atol=1e-12)


def test_the_target_makes_up_for_the_residual() -> None:
    task = propagation_task()[0]
    R_OI = torch.randn(task.weight_OI.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = SolveOptions(propagation=0.5, residual=0.25, damp=0.01)
    plain, other = (solve_gptq(replace(task, residual_OI=R), options).target_OI for R in (None, R_OI))
    H = hessian(task)
    H_l = H + 0.01 * H.diagonal().mean() * torch.eye(64, dtype=H.dtype)
    torch.testing.assert_close(other - plain, 0.5 * 0.25 * R_OI @ torch.linalg.inv(H_l), rtol=1e-9, atol=1e-12)


def test_without_drift_nothing_is_propagated() -> None:
    task = propagation_task()[0]
    plain = solve_gptq(replace(task, drift_II=None), SolveOptions(propagation=1.0))
    unmoved = solve_gptq(replace(task, drift_II=torch.zeros_like(hessian(task))), SolveOptions(propagation=1.0))
    assert torch.equal(plain.weight.codes_OI, unmoved.weight.codes_OI)


# -- refinement: coordinate descent on codes and scales -------------------------------------------------
def one_sweep(weight: QuantizedWeight, target: Tensor, H: Tensor, *, refit: bool) -> QuantizedWeight:
    """Group by group: every candidate of every code tried by its loss, then the best scale for these codes."""
    codes, scales, scheme = weight.codes_OI.clone(), weight.scales_OG.clone(), weight.scheme
    group = codes.shape[1] // scales.shape[1]

    def gap(row: int) -> Tensor:
        zeros = None if weight.zeros_OG is None else weight.zeros_OG[row : row + 1]
        dense = QuantizedWeight(codes[row : row + 1], scales[row : row + 1], scheme, zeros)
        return target[row] - dense.dequantize(torch.float64)[0]

    def loss(row: int) -> float:
        return float(gap(row) @ H @ gap(row))

    for row, first in itertools.product(range(len(codes)), range(scales.shape[1])):
        for j in range(first * group, (first + 1) * group):
            losses = []
            for code in range(scheme.code_min, scheme.code_max + 1):
                codes[row, j] = code
                losses.append(loss(row))
            codes[row, j] = scheme.code_min + losses.index(min(losses))
        level = torch.zeros_like(target[row])
        here = slice(first * group, (first + 1) * group)
        level[here] = codes[row, here].double() - (0 if weight.zeros_OG is None else weight.zeros_OG[row, first])
        if refit and bool(level.any()):
            old, before = scales[row, first].clone(), loss(row)
            others = gap(row) + float(old) * level
            scales[row, first] = round_scales(level @ H @ others / (level @ H @ level))
            if loss(row) >= before:
                scales[row, first] = old
    return QuantizedWeight(codes, scales, scheme, weight.zeros_OG)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("group", [8, -1])
@pytest.mark.parametrize("block", [1, 16, 512])
def test_a_sweep_makes_every_code_and_scale_the_best_while_the_others_stay(
    symmetric: bool, refit: bool, group: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine_module, "_BLOCK", block)
    task = problem(3, 24, bits=3, group=group)
    task = replace(task, scheme=QuantScheme(3, group, symmetric))
    start = solve_rtn(task).weight  # far from the best, so that many codes move
    lam = 0.01 * float(hessian(task).diagonal().mean())
    expected = start
    for sweeps in (1, 2):
        options = SolveOptions(refit=refit, sweeps=sweeps)
        swept = refine(start, task.weight_OI, hessian(task), lam, options)
        expected = one_sweep(expected, task.weight_OI, damped(task, 0.01), refit=refit)
        assert torch.equal(swept.codes_OI, expected.codes_OI)
        assert torch.equal(swept.scales_OG, expected.scales_OG)
    assert not torch.equal(swept.codes_OI, start.codes_OI)
    assert torch.equal(swept.scales_OG, start.scales_OG) is not refit


def test_groups_without_a_code_keep_their_scale() -> None:
    task = propagation_task(group=16)[0]
    weight = task.weight_OI.clone()
    weight[:, 16:32] = 0
    task = replace(task, weight_OI=weight, H_II=hessian(task).diagonal().diag(), drift_II=None)
    plain, swept = (solve_gptq(task, SolveOptions(refit=True, sweeps=n)).weight for n in (0, 1))
    assert torch.equal(plain.scales_OG[:, 1], swept.scales_OG[:, 1])
    assert not torch.equal(plain.scales_OG, swept.scales_OG)


@bit_widths
@pytest.mark.parametrize("symmetric", [True, False])
def test_refinement_never_raises_the_loss_of_a_row(bits: int, symmetric: bool) -> None:
    task = replace(propagation_task(bits=bits)[0], scheme=QuantScheme(bits, 32, symmetric))
    solutions = [
        solve_gptq(task, SolveOptions(damp=0.01, propagation=0.5, refit=True, sweeps=sweeps)) for sweeps in (0, 1, 2, 4)
    ]

    def loss(solution: Solution) -> Tensor:
        return quadratic(replace(task, weight_OI=solution.target_OI), solution.weight, damped(task, 0.01))

    for before, after in itertools.pairwise(solutions):
        assert bool((loss(after) <= loss(before) * (1 + 1e-12)).all())
    assert float(loss(solutions[1]).sum()) < float(loss(solutions[0]).sum())
    for solution in solutions:
        aimed = replace(task, weight_OI=solution.target_OI)
        torch.testing.assert_close(solution.loss_O, quadratic(aimed, solution.weight), rtol=1e-9, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_solved_in_pieces_are_solved_as_all_at_once(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(propagation_task(bits=3)[0], scheme=QuantScheme(3, 32, symmetric))
    options = SolveOptions(propagation=0.5, refit=True, sweeps=2)
    whole = solve_gptq(task, options)
    monkeypatch.setattr(base_module, "_AT_ONCE", 5 * 64)
    assert len(base_module.pieces(task.weight_OI)) == -(-task.weight_OI.shape[0] // 5) > 1
    pieces = solve_gptq(task, options)
    assert torch.equal(pieces.weight.dequantize(), whole.weight.dequantize())
    assert torch.equal(pieces.weight.codes_OI, whole.weight.codes_OI)
    torch.testing.assert_close(pieces.target_OI, whole.target_OI, rtol=1e-12, atol=0)
    torch.testing.assert_close(pieces.loss_O, whole.loss_O, rtol=1e-9, atol=0)


def test_descent_of_a_diagonal_hessian_changes_nothing() -> None:
    task = problem()
    task = replace(task, H_II=hessian(task).diagonal().diag())
    plain, swept = (solve_gptq(task, SolveOptions(sweeps=n)).weight for n in (0, 3))
    assert torch.equal(plain.codes_OI, swept.codes_OI)


# -- asymmetric grids ----------------------------------------------------------------------------------
@both_orders
@bit_widths
@pytest.mark.parametrize("refit", [False, True])
def test_asymmetric_codes_are_those_of_the_dense_recursion_with_zeros(order: str, bits: int, refit: bool) -> None:
    task = problem(8, 48, bits=bits, group=16)
    shifted = task.weight_OI + 0.4 * torch.arange(8)[:, None]
    task = replace(task, weight_OI=shifted, scheme=QuantScheme(bits, 16, symmetric=False))
    plain = solve_gptq(task, SolveOptions(order=order, damp=0.01))
    zeros = plain.weight.zeros_OG
    assert zeros is not None
    assert bool(zeros.any())
    # moving all codes by the zero makes it the symmetric problem with other ends of the range
    column, step = column_order(task, order), steps(plain)
    H = damped(task, 0.01)[column][:, column]
    U = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    zero = zeros.double().repeat_interleave(16, 1)[:, column]
    w, s = shifted[:, column], step[:, column]
    error, codes = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(48):
        v = w[:, j] + error[:, :j] @ (U[:j, j] / U[j, j])
        codes[:, j] = ((v / s[:, j]).round() + zero[:, j]).clamp(task.scheme.code_min, task.scheme.code_max)
        error[:, j] = w[:, j] - s[:, j] * (codes[:, j] - zero[:, j])
    assert torch.equal(plain.weight.codes_OI[:, column], codes.to(torch.int8))
    solution = solve_gptq(task, SolveOptions(order=order, damp=0.01, refit=refit, sweeps=1))
    torch.testing.assert_close(solution.loss_O, quadratic(task, solution.weight), rtol=1e-9, atol=0)


# -- GPTQ: loss ----------------------------------------------------------------------------------------
@both_orders
@bit_widths
@pytest.mark.parametrize("grid", ["hessian", "absmax"])
def test_gptqs_reported_loss_is_that_of_its_codes(order: str, bits: int, grid: str) -> None:
    task = problem(bits=bits, seed=bits)
    solution = solve_gptq(task, SolveOptions(grid=grid, order=order))
    torch.testing.assert_close(solution.loss_O, quadratic(task, solution.weight), rtol=1e-9, atol=0)


@bit_widths
@pytest.mark.parametrize("grid", ["hessian", "absmax"])
def test_gptq_beats_rtn_on_correlated_inputs(bits: int, grid: str) -> None:
    task = problem(16, 128, bits=bits)
    assert solve_gptq(task, SolveOptions(grid=grid)).loss_O.sum() < 0.5 * solve_rtn(task).loss_O.sum()


def test_exhaustive_search_bounds_gptq_which_beats_rtn_on_average() -> None:
    losses = []
    for seed in range(20):
        task = problem(1, 4, bits=2, group=-1, seed=seed)
        solution = solve_gptq(task, SolveOptions(grid="absmax", damp=0.01))
        all_codes = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float64)
        error = task.weight_OI - all_codes * steps(solution)
        H = damped(task, 0.01)  # what gptq minimises
        best = float(((error @ H) * error).sum(1).min())
        found, plain = (float(quadratic(task, w, H)) for w in (solution.weight, solve_rtn(task).weight))
        assert best <= found * (1 + 1e-12)
        losses.append([best, found, plain])
    best, found, plain = torch.tensor(losses).mean(0).tolist()
    assert best <= found < 0.9 * plain


# -- GPTQ: bad inputs ----------------------------------------------------------------------------------
@both_orders
def test_dead_inputs_are_rounded_to_nearest_and_noted(order: str) -> None:
    task = problem()
    H, dead = hessian(task).clone(), [3, 40]
    H[dead] = H[:, dead] = 0
    task = replace(task, H_II=H)
    solution = solve_gptq(task, SolveOptions(order=order))
    nearest = quantize_to_grid(task.weight_OI, solution.weight.scales_OG.double(), task.scheme)
    assert torch.equal(solution.weight.codes_OI[:, dead], nearest[:, dead])
    assert not torch.equal(solution.weight.codes_OI, nearest)
    assert [note for note in solution.notes if note.startswith("2 of 64 inputs are zero")]
    torch.testing.assert_close(solution.loss_O, quadratic(task, solution.weight), rtol=1e-9, atol=0)


def test_a_dead_input_changes_no_other_code() -> None:
    task = problem(group=-1)
    H = hessian(task).clone()
    H[5] = H[:, 5] = 0
    task = replace(task, H_II=H)
    other = replace(task, weight_OI=task.weight_OI.clone())
    other.weight_OI[:, 5] *= 0.5
    codes = [solve_gptq(one, SolveOptions(grid="absmax")).weight for one in (task, other)]
    same_scale = codes[0].scales_OG[:, 0] == codes[1].scales_OG[:, 0]
    assert bool(same_scale.any())
    alive = torch.arange(64) != 5
    assert torch.equal(codes[0].codes_OI[same_scale][:, alive], codes[1].codes_OI[same_scale][:, alive])


def test_a_layer_whose_inputs_are_all_zero_is_rounded_to_nearest_at_no_loss() -> None:
    task = replace(problem(), H_II=torch.zeros(64, 64, dtype=torch.float64))
    solution = solve_gptq(task, SolveOptions())
    scales = search_grid(task.weight_OI, torch.ones(64), task.scheme)[0]
    assert torch.equal(solution.weight.scales_OG.double(), scales)
    assert torch.equal(solution.weight.codes_OI, quantize_to_grid(task.weight_OI, scales, task.scheme))
    assert float(solution.loss_O.max()) < 1e-12
    assert [note for note in solution.notes if note.startswith("64 of 64 inputs are zero")]


def test_raised_damping_is_noted_and_the_loss_still_is_that_of_the_weight() -> None:
    task = problem()
    values, vectors = torch.linalg.eigh(hessian(task))
    values[0] = -0.05 * values.sum() / len(values)
    task = replace(task, H_II=vectors @ values.diag() @ vectors.T)
    solution = solve_gptq(task, SolveOptions(damp=0.01))
    assert solution.notes == ("damping raised to 0.09 after 2 failed factorizations",)
    expected = quadratic(task, solution.weight).clamp(min=0)
    torch.testing.assert_close(solution.loss_O, expected, rtol=1e-9, atol=1e-12)


def bad_task(name: str) -> LayerTask:
    H = hessian(problem()).clone()
    if name == "NaN":
        H[3, 3] = torch.nan
    elif name == "infinite":
        H[3, 4] = H[4, 3] = torch.inf
    else:
        H[3, 3] = -10 * H.diagonal().sum()
    return replace(problem(), H_II=H)


@pytest.mark.parametrize("name", ["NaN", "infinite", "indefinite"])
def test_a_bad_layer_raises_an_error_that_names_it(name: str) -> None:
    with pytest.raises(SolveError, match=r"^layer: .*not positive definite.*; expected .*; .*--on-bad-layer rtn$"):
        solve_gptq(bad_task(name), SolveOptions())


@pytest.mark.parametrize("name", ["NaN", "infinite", "indefinite"])
def test_a_bad_layer_is_rounded_to_nearest_with_a_note_on_request(name: str) -> None:
    solution = solve_gptq(bad_task(name), SolveOptions(on_bad_layer="rtn"))
    plain = solve_rtn(replace(problem(), H_II=None))
    assert torch.equal(solution.weight.codes_OI, plain.weight.codes_OI)
    assert torch.equal(solution.weight.scales_OG, plain.weight.scales_OG)
    assert len(solution.notes) == 1
    assert "rounded to nearest (--on-bad-layer rtn)" in solution.notes[0]
    assert bool(torch.isfinite(solution.loss_O).all())
