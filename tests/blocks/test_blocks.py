"""What the solver is given for each linear, against two whole models run by hand with hooks."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.blocks import measure
from llmquant.blocks import spread as spread_module
from llmquant.job import prepare
from llmquant.log import SILENT
from llmquant.quant.hessian import Hessian, default_propagation, residual_part
from llmquant.quant.solvers import SOLVERS, LayerTask, Solution, SolveOptions
from llmquant.recipe import RunOptions

TINY: dict[str, Any] = {"group_size": 32, "samples": 6, "seq_len": 32, "eval_data": "none", "method": "gptq"}
Seen = list[tuple[LayerTask, SolveOptions]]
GPTQ = SOLVERS["gptq"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every task that a run gives to the solver."""
    tasks: Seen = []

    def solve(task: LayerTask, options: SolveOptions) -> Solution:
        H = None if task.H_II is None else task.H_II.clone()
        tasks.append((replace(task, H_II=H), options))
        return GPTQ(task, options)

    monkeypatch.setitem(spread_module.SOLVERS, "gptq", solve)
    return tasks


def drift_of(task: LayerTask, options: SolveOptions) -> Tensor | None:
    """W (C - H) + b R."""
    if task.drift_II is None:
        return None
    drift_OI = task.weight_OI @ task.drift_II
    return drift_OI if task.residual_OI is None else drift_OI + options.residual * task.residual_OI


def quantize(model: Path, out: Path, **flags: Any) -> None:
    llmquant.quantize(model, llmquant.make_recipe(str(model), flags=TINY | flags), out)


def inputs_of(model: Any, ids: Tensor, modules: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: found.__setitem__(name, inputs[0].flatten(0, -2))
        )
        for name in modules
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def put(model: Any, name: str, solution: Tensor) -> None:
    """Set stacked rows back into the linears of a task."""
    start = 0
    for module in name.split(" + "):
        linear = model.get_submodule(module)
        linear.weight.data = solution[start : start + linear.weight.shape[0]].clone()
        start += linear.weight.shape[0]


def residual_of(linear: str) -> str:
    """The norm of a Llama's block that reads what the linear's output is added to."""
    block = linear.rpartition(".")[0].rpartition(".")[0]
    return f"{block}.{'input' if linear.endswith('o_proj') else 'post_attention'}_layernorm"


@pytest.mark.parametrize("passes", ["step", "block"])
@pytest.mark.parametrize(("max_ram", "products"), [("4GB", "float32"), ("1KB", "float32"), ("4GB", "bfloat16")])
def test_hessian_and_drift_pair_the_original_with_the_quantized_prefix(
    passes: str, max_ram: str, products: str, seen: Seen, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    flags = TINY | {"passes": passes, "propagation": 0.5, "products": products, "samples": 64}
    recipe = llmquant.make_recipe(str(folder), flags=flags)
    llmquant.quantize(folder, recipe, tmp_path / "out", max_ram=max_ram)
    job = prepare(folder, recipe, RunOptions(), SILENT)
    assert job.calibration is not None
    ids = job.calibration.ids
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    quantized = copy.deepcopy(original)
    first = [task.name.split(" + ")[0] for task, _ in seen]
    assert len(first) == 4 * len(original.model.layers)
    residuals = {name: residual_of(name) for name in first if name.endswith(("o_proj", "down_proj"))}
    wanted = inputs_of(original, ids, [*first, *residuals.values()])
    before_block = None
    for position, (task, options) in enumerate(seen):
        if passes == "step" or position % 4 == 0:
            before_block = inputs_of(quantized, ids, [*first, *residuals.values()])
        assert before_block is not None
        x, x_hat = wanted[first[position]], before_block[first[position]]
        assert options.propagation == 0.5
        assert task.n_tokens == len(x)
        H = x_hat.T @ x_hat / len(x)
        assert task.H_II is not None
        assert torch.equal(task.H_II, task.H_II.T)
        expected = task.weight_OI @ ((x - x_hat).T @ x_hat / len(x))
        if (place := residuals.get(first[position])) is not None:
            part = residual_part(recipe.residual, len(x), x.shape[1])
            assert part > 0.3
            expected += part * (wanted[place] - before_block[place]).T @ x_hat / len(x)
        if products == "float32":
            torch.testing.assert_close(task.H_II, H, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(drift_of(task, options), expected, rtol=1e-2, atol=2e-6)
        else:  # every factor is rounded by up to 2^-9, several times on the way
            drift = drift_of(task, options)
            assert drift is not None
            assert float((task.H_II - H).norm()) < 2**-6 * float(H.norm())
            assert float((drift - expected).norm()) <= 0.1 * float(expected.norm()) + 2**-6 * float(H.norm())
        solution = GPTQ(task, options)
        put(quantized, task.name, solution.weight.dequantize())
    for number, moved in ((1, passes == "step"), (5, True)):  # inside the first block only where steps see each other
        drift = drift_of(*seen[number])
        assert drift is not None
        assert bool(drift.any()) == moved


@pytest.mark.parametrize("rule", ["layers.1.*: keep", "layers.1.*: method=rtn"])
def test_the_text_goes_through_a_block_that_does_not_need_it(
    rule: str, seen: Seen, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = {"format": "fake", "products": "float32", "propagation": 0.5, "rules": [rule]}
    quantize(tiny_model("llama"), tmp_path / "out", **flags)
    job = prepare(tiny_model("llama"), llmquant.make_recipe("x", flags=TINY | flags), RunOptions(), SILENT)
    assert job.calibration is not None
    name = "model.layers.2.self_attn.q_proj"
    task, options = next(pair for pair in seen if pair[0].name.startswith(name))
    x, x_hat = (
        inputs_of(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), job.calibration.ids, [name])[name]
        for model in (tiny_model("llama"), tmp_path / "out")
    )
    assert task.H_II is not None
    torch.testing.assert_close(task.H_II, x_hat.T @ x_hat / len(x_hat), rtol=1e-3, atol=1e-5)
    expected = task.weight_OI @ ((x - x_hat).T @ x_hat / len(x))
    torch.testing.assert_close(drift_of(task, options), expected, rtol=1e-2, atol=2e-6)


def test_the_strength_follows_the_tokens_and_is_switched_off_by_zero(
    seen: Seen, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(tiny_model("llama"), tmp_path / "auto")
    for task, options in seen:
        width = task.weight_OI.shape[1]
        wide = width > 64  # the tiny models' hidden size
        assert options.propagation == default_propagation(task.n_tokens, width, wide=wide)
        assert (drift_of(task, options) is None) == (options.propagation == 0)
    assert {drift_of(*pair) is None for pair in seen} == {True, False}  # 192 tokens are too few for wide inputs
    seen.clear()
    quantize(tiny_model("llama"), tmp_path / "off", propagation=0)
    assert all(drift_of(task, options) is None and options.propagation == 0 for task, options in seen)


@pytest.mark.parametrize("name", ["phi3", "cohere", "gemma2"])
def test_propagation_leaves_less_output_error_than_going_without(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """On the calibration windows themselves, behind all blocks: what propagation is for."""
    folder = tiny_model(name)
    errors = []
    recipe = llmquant.make_recipe(str(folder), flags=TINY | {"format": "fake", "samples": 64})
    windows = prepare(folder, recipe, RunOptions(), SILENT).calibration
    assert windows is not None
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for strength in (0, 1.0):
        out = tmp_path / str(strength)
        quantize(folder, out, format="fake", samples=64, propagation=strength, bits=3)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            gap = model.get_decoder()(windows.ids)[0] - original.get_decoder()(windows.ids)[0]
        errors.append(float(gap.square().sum()))
    assert errors[1] < errors[0]


def test_a_report_made_in_pieces_is_that_of_all_rows(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = llmquant.make_recipe("x", flags=TINY)
    whole = llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "whole").data["layers"]
    monkeypatch.setattr(measure, "pieces", lambda weight: [slice(i, i + 5) for i in range(0, len(weight), 5)])
    parts = llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "parts").data["layers"]
    for one, other in zip(whole, parts, strict=True):
        for key in ("loss", "rtn_loss", "relative_error", "weight_error"):
            assert other[key] == pytest.approx(one[key], rel=1e-5)


def test_only_what_reads_hidden_states_is_lent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inner dimensions are each expert's own: the Hessian of all down projections says nothing of one."""
    lend, widths = Hessian.lend, []

    def spy(self: Hessian, pool: Hessian, n_tokens: float) -> None:
        widths.append(len(self.sum_II))
        lend(self, pool, n_tokens)

    monkeypatch.setattr(Hessian, "lend", spy)
    config = tiny.LLAMA | tiny.EXPERTS | {"head_dim": 16, "num_hidden_layers": 1}  # 4 experts of 32, hidden 64
    model = tiny.build(tmp_path / "moe", ("Qwen3MoeConfig", config))
    flags = {"samples": 2, "seq_len": 32, "group_size": 32, "eval_data": "none", "calibration": "builtin"}
    llmquant.quantize(model, llmquant.make_recipe("x", flags=flags), tmp_path / "out")
    assert widths == [64] * 4
