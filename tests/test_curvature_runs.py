"""The curvature pass of a run: in bounded memory, resumed, planned, or refused by name."""

import contextlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from broken import TINY, Killed, kill, killed_after, run, weights
from safetensors.torch import load_file

import llmquant
from llmquant.blocks import snapshots
from llmquant.cli.app import main
from llmquant.errors import RecipeError, ResumeError, SourceError
from llmquant.preflight.estimate import estimate
from llmquant.recipe import RunOptions, make_recipe

pytestmark = pytest.mark.usefixtures("short_runs")
FLAGS: dict[str, Any] = {"samples": 8, "sweeps": 1, "baselines": "none"}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def out(model: Path, lines: list[str], short_runs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("curvature") / "out"
    run(model, folder, log=lines.append, **FLAGS)
    return folder


def test_it_runs_by_default_and_changes_codes(out: Path, lines: list[str], model: Path, tmp_path: Path) -> None:
    assert any(re.match(r"curvature: \d+ tokens forwards and backwards through \d blocks", line) for line in lines)
    run(model, tmp_path / "off", **FLAGS, curvature="off")
    assert weights(tmp_path / "off") != weights(out)
    run(model, tmp_path / "full", **FLAGS, curvature="full")
    assert weights(tmp_path / "full") == weights(out)


def test_hidden_states_and_gradients_go_to_files_where_memory_has_no_room(
    out: Path, model: Path, tmp_path: Path
) -> None:
    run(model, tmp_path / "out", **FLAGS, max_ram="1KB")
    assert weights(tmp_path / "out") == weights(out)


# -- resumed -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", [None, "a byte", "gone"])
def test_a_killed_run_goes_on_with_what_was_measured(
    damage: str | None, out: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MIN_SECONDS", math.inf)
    killed_after(1, model, tmp_path / "out", **FLAGS)
    stored, lines = tmp_path / "out.partial" / "curvature-1", list[str]()
    if damage == "gone":
        stored.unlink()
    elif damage:
        stored.write_bytes(stored.read_bytes()[:-1] + b"\1")
    run(model, tmp_path / "out", log=lines.append, **FLAGS, resume="required")
    assert weights(tmp_path / "out") == weights(out)
    again = [line for line in lines if line.startswith("curvature: ")]
    assert bool(again) == bool(damage)
    if damage:
        why = {"gone": "curvature-1: No such file or directory", "a byte": "the SHA-256 of curvature-1 differs"}[damage]
        assert again[0] == f"curvature: {why}; it is measured again"


def test_what_was_measured_is_kept_before_any_block_is(
    out: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("llmquant.loop.quantize_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", log=lines.append, **FLAGS)
    assert lines[-1].startswith("the curvature and 0 of ")
    assert lines[-1].endswith("the same command goes on")
    run(model, tmp_path / "out", log=lines.append, **FLAGS)
    assert sum(line.startswith("curvature: ") for line in lines) == 1
    assert weights(tmp_path / "out") == weights(out)


def test_a_pass_that_was_not_finished_is_made_anew(
    out: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("llmquant.curvature._backwards", lambda *args: kill())
        with contextlib.suppress(Killed):
            run(model, tmp_path / "out", **FLAGS)
    run(model, tmp_path / "out", **FLAGS)
    assert weights(tmp_path / "out") == weights(out)


def test_a_file_that_goes_away_during_the_run_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(line: str) -> None:
        if line.startswith("block 1/"):
            (tmp_path / "out.partial" / "curvature-1").unlink()

    with pytest.raises(ResumeError, match=r"curvature-1: cannot be read \(.*\); start again with --resume never"):
        run(model, tmp_path / "out", log=lost, **FLAGS)


# -- planned, and refused ------------------------------------------------------------------------------
def test_plan_counts_it(model: Path, tmp_path: Path) -> None:
    plans = {}
    for name in ("off", "auto"):
        recipe = make_recipe(str(model), flags=TINY | FLAGS | {"curvature": name})
        plans[name] = estimate(model, recipe, RunOptions(tmp_path / "out", max_ram="1KB"), timed=True)
        assert not plans[name].problems
    assert plans["off"].disk["curvature"] == plans["off"].seconds["curvature"] == 0
    assert plans["auto"].seconds["curvature"] > 0
    assert plans["auto"].memory["curvature of the largest block"] > 0
    run(model, tmp_path / "out", log=(lines := list[str]()).append, **FLAGS, max_ram="1KB")
    n_tokens, n_blocks = map(int, re.findall(r"\d+", next(line for line in lines if line.startswith("curvature"))))
    heights = (64 + 32 + 32, 64, 96 + 96, 64)  # of llama's stacks: q, k, v; o; gate, up; down
    stored = n_blocks * sum(2 * height**2 for height in heights)
    assert plans["auto"].disk["curvature"] == stored + (n_blocks + 1) * n_tokens * 64 * 4


def test_one_window_goes_through_however_long(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant.curvature._MOST_TOKENS", 8)
    run(model, tmp_path / "out", log=(lines := list[str]()).append, **FLAGS)
    assert "curvature: 32 tokens forwards and backwards through 3 blocks" in lines


def test_a_block_that_autograd_refuses_is_one_line_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: torch.ones(1, requires_grad=True).numpy())
    with monkeypatch.context() as patch:
        patch.setattr("llmquant.curvature.head_gradient", lambda hidden, *rest: hidden)
        with pytest.raises(
            SourceError, match=r"block 2: no gradients go through it \(.*\); use --curvature off and --recover off"
        ):
            run(model, tmp_path / "out", **FLAGS)
    assert list(tmp_path.iterdir()) == []
    run(model, tmp_path / "out", **FLAGS, curvature="off")


def test_linears_that_no_prediction_depends_on_are_named_and_solved_without(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmquant.curvature.head_gradient", lambda hidden, *rest: torch.zeros_like(hidden))
    run(model, tmp_path / "out", log=(lines := list[str]()).append, **FLAGS)
    (said,) = [line for line in lines if line.startswith("curvature: no prediction")]
    assert "3 x model.layers.*.mlp.down_proj" in said
    assert said.endswith("; solved without it")
    run(model, tmp_path / "off", **FLAGS, curvature="off")
    assert weights(tmp_path / "out") == weights(tmp_path / "off")


def test_parked_forwards_have_none(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma, lines = tiny_model("gemma4"), list[str]()
    run(gemma, tmp_path / "out", log=lines.append, **FLAGS, eval_data="none", seq_len=32)
    assert "no curvature: no gradients go through parked forwards" in lines
    rounded = {"method": "rtn", "eval_data": "builtin", "seq_len": 32, "curvature": "full"}  # which has no use for one
    run(gemma, tmp_path / "rtn", log=(said := list[str]()).append, **FLAGS | rounded)
    assert not [line for line in said if "curvature" in line]
    recipe = make_recipe(str(gemma), flags=TINY | FLAGS | {"curvature": "full"})
    with pytest.raises(RecipeError, match="curvature full: no gradients go through parked forwards; use"):
        llmquant.quantize(gemma, recipe, tmp_path / "full")
    assert main(["plan", "--model", str(gemma), "--curvature", "full", "--eval-data", "none"]) == 2
    assert "--curvature full" in capsys.readouterr().out


def test_experts_are_solved_without_and_the_rest_with_it(tmp_path: Path) -> None:
    """Four linears of a block have a curvature: those of attention, in two stacks."""
    flags = tiny.LLAMA | tiny.EXPERTS | {"head_dim": 16, "num_hidden_layers": 1}
    moe, kept = tiny.build(tmp_path / "moe", ("Qwen3MoeConfig", flags)), list[str]()

    def look(line: str) -> None:
        if line.startswith("block 1/"):
            kept.extend(load_file(tmp_path / "out.partial" / "curvature-0"))

    run(moe, tmp_path / "out", log=look, **FLAGS)
    attention = "model.layers.0.self_attn"
    assert sorted(kept) == [f"{attention}.o_proj.0", f"{attention}.q_proj.0"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(layer["loss"] is not None for layer in report["layers"])
