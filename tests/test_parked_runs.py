"""Runs of models whose blocks share more than hidden states: every command goes through parked forwards."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from broken import TINY, Killed, files, kill, run, weights
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.blocks import snapshots
from llmquant.errors import RecipeError
from llmquant.model.parked import Parked
from llmquant.model.sharing import Sharing, find_sharing
from llmquant.preflight import estimate, flops
from llmquant.recipe import RunOptions, make_recipe
from llmquant.report.data import RunReport, load_report
from llmquant.report.html import make_html
from llmquant.source.resolve import open_source
from llmquant.text.tokenizer import load_tokenizer
from llmquant.text.windows import evaluation_windows

pytestmark = pytest.mark.usefixtures("short_runs")
# Calibration and evaluation in batches of one shape.
FLAGS: dict[str, Any] = {"eval_data": "builtin", "seq_len": 32, "samples": 4, "eval_seq_len": 32, "sweeps": 1}
REASON = "blocks write into an argument that they share"


@pytest.fixture(scope="module")
def gemma(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("gemma4")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def out(gemma: Path, lines: list[str], short_runs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("parked") / "out"
    run(gemma, folder, log=lines.append, **FLAGS)
    return folder


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@torch.no_grad()
def stock_divergence(model: Path, out: Path) -> float:
    """KL of `out` from `model` on the evaluation windows, by the library's own classes."""
    ids = evaluation_windows(load_tokenizer(open_source(model)), "builtin", TINY["eval_tokens"], 32).ids
    p, q = (
        torch.cat([loaded(row[None], use_cache=False).logits for row in ids])[:, :-1].log_softmax(-1)
        for loaded in (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval() for each in (model, out))
    )
    return float((p.exp() * (p - q)).sum(-1).double().mean())


# -- what a run finds ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", tiny.some_of(tiny.PARKED, quick="gemma4"))
def test_the_reported_divergence_is_that_of_the_reloaded_output(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model(name)
    found = run(model, tmp_path / "out", format="fake", ignore=tiny.NOT_LAYERS.get(name, []), **FLAGS)
    assert found.lanes["llmquant"]["kl_mean"] > 1e-5
    assert stock_divergence(model, tmp_path / "out") == pytest.approx(found.lanes["llmquant"]["kl_mean"], rel=1e-4)


def test_both_mechanisms_give_the_same_where_both_can_be_had(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Llama, whose blocks share hidden states only, with parked forwards."""
    run(model, tmp_path / "tape" / "out", curvature="off")
    wanted = files(tmp_path / "tape" / "out")

    def asked_for(*inputs: Any) -> Sharing:
        return replace(find_sharing(*inputs), reason="the test wants it")

    monkeypatch.setattr("llmquant.model.skeleton.find_sharing", asked_for)
    run(model, tmp_path / "out", curvature="off")
    found = files(tmp_path / "out")
    differing = {name for name in wanted if found[name] != wanted[name]}
    assert differing == {"report.json", "manifest.json"}
    compute = json.loads(wanted["report.json"])["compute"] | {"parked": "the test wants it"}
    assert report(tmp_path / "out") == json.loads(wanted["report.json"]) | {"compute": compute}


def test_the_log_and_the_report_say_why(out: Path, lines: list[str]) -> None:
    assert f"parked forwards: {REASON}; they stay in memory, without snapshots" in lines
    assert report(out)["compute"]["parked"] == REASON
    facts = load_report(out).facts
    assert isinstance(facts, RunReport)
    assert f"with parked forwards: {REASON}" in make_html("out", facts)


def test_calibration_does_not_see_the_tokens_of_the_evaluation(gemma: Path, out: Path, tmp_path: Path) -> None:
    """Its batches have the shape of the evaluation's; without an evaluation the weights are the same."""
    run(gemma, tmp_path / "out", **FLAGS | {"eval_data": "none"})
    assert weights(tmp_path / "out") == weights(out)


def test_forwards_that_are_run_anew_give_the_same(
    gemma: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for what is parked and nothing else, each step of a block runs the block again."""
    needed = estimate.estimate(gemma, make_recipe("x", flags=TINY | FLAGS)).memory["parked forwards"]
    runs: list[int] = []
    real = Parked.run
    monkeypatch.setattr(Parked, "run", lambda self, *args: (runs.append(0), real(self, *args))[1])
    run(gemma, tmp_path / "out", max_ram=f"{needed}B", **FLAGS)
    assert files(tmp_path / "out") == files(out)
    tight = len(runs)
    run(gemma, tmp_path / "roomy" / "out", **FLAGS)
    assert tight > 2 * (len(runs) - tight)
    with pytest.raises(RecipeError, match="--max-ram"):
        run(gemma, tmp_path / "short" / "out", max_ram=f"{needed - 1}B", **FLAGS)


def test_a_killed_run_goes_through_finished_blocks_again(gemma: Path, out: Path, tmp_path: Path) -> None:
    def log(line: str) -> None:
        if line.startswith("block 3/"):
            kill()

    with contextlib.suppress(Killed):
        run(gemma, tmp_path / "out", log=log, **FLAGS)
    assert not list((tmp_path / "out.partial").glob("**/*streams*"))
    lines: list[str] = []
    run(gemma, tmp_path / "out", log=lines.append, **FLAGS)
    assert "block 2: finished before" in lines
    assert not any("snapshot of" in line or "from the snapshot" in line for line in lines)
    assert files(tmp_path / "out") == files(out)


def test_eval_and_compare_give_what_the_run_gave(gemma: Path, out: Path) -> None:
    recipe = make_recipe("x", flags={"eval_data": "builtin", "eval_tokens": TINY["eval_tokens"], "eval_seq_len": 32})
    lines: list[str] = []
    found = llmquant.compare([out, gemma], reference=gemma, recipe=recipe, log=lines.append)
    lanes = report(out)["evaluation"]["lanes"]
    assert found.lanes["out"]["kl_mean"] == pytest.approx(lanes["llmquant"]["kl_mean"], rel=1e-4)
    assert found.lanes[gemma.name]["kl_mean"] == 0
    assert found.lanes["original"]["perplexity"] == lanes["original"]["perplexity"]
    assert [model.get("parked") for model in found.data["models"]] == [REASON] * 3
    assert sum("parked forwards" in line for line in lines) == 3
    with pytest.raises(RecipeError, match=r"^--max-ram: parked forwards.*a smaller --eval-tokens"):
        llmquant.compare([out], reference=gemma, recipe=recipe, max_ram="1KB")


def test_a_noise_floor_is_parked_too(gemma: Path, tmp_path: Path) -> None:
    found = run(gemma, tmp_path / "out", dtype="bfloat16", method="rtn", **FLAGS)
    assert 0 < found.data["evaluation"]["noise_floor"]["kl_mean"] < found.lanes["llmquant"]["kl_mean"]


# -- before the work -----------------------------------------------------------------------------------------
def test_more_than_memory_has_room_for_is_refused_before_the_work(gemma: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        run(gemma, tmp_path / "out", max_ram="100KB", **FLAGS)
    assert str(error.value) == (
        "--max-ram: parked forwards, which cannot go to files, take 0.7 MB; expected at most 0.1 MB; "
        "a smaller --samples or --seq-len or --eval-tokens, or a larger --max-ram"
    )
    assert list(tmp_path.iterdir()) == []
    found = estimate.estimate(gemma, make_recipe("x", flags=TINY | FLAGS), RunOptions(max_ram="100KB"))
    assert str(error.value) in [problem.message for problem in found.problems if problem.blocking]


def test_plan_counts_what_is_parked(gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = flops.matmul_rate
    monkeypatch.setattr(estimate, "matmul_rate", lambda device, dtype: rate(device, dtype, 64))
    found = estimate.estimate(gemma, make_recipe("x", flags=TINY | FLAGS), timed=True)
    said = [problem.message for problem in found.problems]
    assert said == [
        f"parked forwards: {REASON}; they stay in memory, without snapshots",
        "no curvature: no gradients go through parked forwards",
    ]
    assert "streams in memory" not in found.memory
    assert found.memory["parked forwards"] > 0
    assert found.disk["streams in files"] == found.disk["snapshots of streams, where there is room"] == 0


def test_a_run_without_forwards_does_not_ask(gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MIN_SECONDS", math.inf)
    monkeypatch.setattr("llmquant.model.skeleton.find_sharing", lambda *inputs: pytest.fail("nothing is run"))
    found = run(gemma, tmp_path / "out", method="rtn", **FLAGS | {"eval_data": "none"})
    assert "parked" not in found.data["compute"]
