"""`--eval-tokens auto`: text is scored until KL is known well enough, as if so many tokens had been asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken import Killed, files, kill, run
from together import on_ranks

import llmquant
from llmquant.cli.app import main
from llmquant.lanes import enough
from llmquant.lanes.enough import windows_to_add
from llmquant.lanes.scores import TokenScores, standard_error
from llmquant.preflight.estimate import estimate
from llmquant.recipe import make_recipe

pytestmark = pytest.mark.usefixtures("short_runs", "short_first_part")
AUTO: dict[str, Any] = {"eval_data": "builtin", "eval_tokens": "auto", "eval_seq_len": 32}


@pytest.fixture
def short_first_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows, of which a tiny model's KL is known to 10% or so; at most 40 windows in all."""
    monkeypatch.setattr(enough, "AIM", 0.01)
    monkeypatch.setattr(enough, "FIRST_TOKENS", 32)
    monkeypatch.setattr(enough, "_FIRST_WINDOWS", 2)
    monkeypatch.setattr("llmquant.job.MOST_TOKENS", 1280)


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def assert_as_with_so_many(model: Path, out: Path, **flags: Any) -> None:
    """The report is that of a run which was asked for as many tokens from the start."""
    found = report(out)
    count = found["evaluation"]["n_tokens"]
    assert count > 64
    run(model, out.parent / "fixed", **(AUTO | flags | {"eval_tokens": count}))
    fixed = report(out.parent / "fixed")
    assert found["recipe"].pop("eval_tokens") == "auto"
    assert fixed["recipe"].pop("eval_tokens") == count
    assert found == fixed


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("llama", {}),
        ("llama", {"max_ram": "1KB"}),
        ("qwen2", {"recover": "all", "samples": 16}),
        ("gemma2", {"format": "mlx", "embed_bits": 8}),
        ("gemma4", {"max_ram": "1GB"}),
    ],
    ids=["plain", "streams in files", "recovered", "embedding", "parked"],
)
def test_it_scores_what_a_run_of_so_many_tokens_scores(
    name: str, flags: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    said: list[str] = []
    run(tiny_model(name), tmp_path / "out", log=said.append, **AUTO, **flags)
    assert any(line.startswith("--eval-tokens auto: ") for line in said)
    assert_as_with_so_many(tiny_model(name), tmp_path / "out", **flags)


def test_it_stops_where_kl_is_known(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enough, "AIM", 0.5)
    run(model, tmp_path / "out", **AUTO)
    assert report(tmp_path / "out")["evaluation"]["n_tokens"] == 64


def test_it_is_that_of_a_finished_folder_too(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", **AUTO)
    recipe = make_recipe(str(model), flags=AUTO)
    compared = llmquant.compare([tmp_path / "out"], reference=model, recipe=recipe)
    facts = report(tmp_path / "out")["evaluation"]
    assert compared.data["evaluation"]["n_tokens"] == facts["n_tokens"]
    assert compared.lanes["out"]["kl_mean"] == pytest.approx(facts["lanes"]["llmquant"]["kl_mean"], rel=1e-4)


def test_a_run_that_is_killed_while_it_scores_more_goes_on(model: Path, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("--eval-tokens auto"):
            kill()

    with pytest.raises(Killed):
        run(model, tmp_path / "out", log=stop, **AUTO)
    run(model, tmp_path / "out", resume="required", **AUTO)
    run(model, tmp_path / "whole" / "out", **AUTO)
    assert files(tmp_path / "out") == files(tmp_path / "whole" / "out")


def test_ranks_share_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant.text.windows.windows_per_batch.__defaults__", (64,))
    flags = {"group_size": 32, "samples": 8, "seq_len": 32, "baselines": "rtn", "max_shard_size": "40KB"}
    options = [part for name, value in (AUTO | flags).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    arguments = ["run", "--model", str(model), "--out", str(tmp_path / "out"), *options]
    assert [one.code for one in on_ranks(2, lambda rank: main(arguments), tmp_path)] == [0, 0]
    run(model, tmp_path / "one" / "out", **(AUTO | {"samples": 8}))
    assert report(tmp_path / "out")["evaluation"] == report(tmp_path / "one" / "out")["evaluation"]


def test_a_plan_counts_its_first_part(model: Path) -> None:
    plan = estimate(model, make_recipe(str(model), flags=AUTO | {"group_size": 32, "samples": 4, "seq_len": 32}))
    fixed = AUTO | {"group_size": 32, "samples": 4, "seq_len": 32, "eval_tokens": 64}
    assert plan.memory == estimate(model, make_recipe(str(model), flags=fixed)).memory
    assert any(line.startswith("--eval-tokens auto") for line in plan.assumptions)


def scores(means: list[float]) -> TokenScores:
    kl = np.repeat(np.array(means)[:, None], 3, 1)
    return TokenScores(kl, kl, kl, kl, kl, np.isfinite(kl))


def test_how_many_windows_the_aim_needs() -> None:
    means = [1.0, 1.2, 0.8, 1.1]
    error = standard_error(np.array(means))
    assert error is not None
    wanted = 4 * (error / (enough.AIM * 1.025)) ** 2
    assert wanted < windows_to_add([scores(means)], 10**6) + 4 < 1.1 * wanted + 1
    assert windows_to_add([scores(means)], 7) == 7
    assert windows_to_add([scores(means), scores([1.0, 3.0])], 10**6) > windows_to_add([scores(means)], 10**6)
    assert windows_to_add([scores([1.0, 1.0])], 9) == 0
    assert windows_to_add([scores([0.0, 0.0])], 9) == 0
    assert windows_to_add([scores([1.0])], 9) == 0
    assert windows_to_add([scores([float("nan"), 1.0, 1.2])], 10**6) > 0
