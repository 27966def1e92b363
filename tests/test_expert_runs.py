"""Runs of mixtures of experts: resume, exports, evaluation of the output, what the report says of few tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from broken import TINY, Killed, files, kill, run

import llmquant
from llmquant import draft, job
from llmquant import recipe as recipes
from llmquant.blocks import forwards
from llmquant.cli.app import main
from llmquant.errors import CalibrationError
from llmquant.log import SILENT
from llmquant.model.experts import Experts
from llmquant.quant.hessian import Hessian, pooled
from llmquant.recipe import make_recipe
from llmquant.report.verdict import health
from llmquant.source.resolve import open_source
from llmquant.text.tokenizer import load_tokenizer
from llmquant.text.windows import Windows, evaluation_windows

pytestmark = pytest.mark.usefixtures("short_runs")
FLAGS: dict[str, Any] = {"eval_data": "builtin", "samples": 4, "seq_len": 32, "sweeps": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = tiny.LLAMA | tiny.EXPERTS | {"head_dim": 16, "num_hidden_layers": 2}
    return tiny.build(tmp_path_factory.mktemp("moe") / "moe", ("Qwen3MoeConfig", flags))


@pytest.fixture(scope="module")
def out(model: Path, short_runs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("moe-out") / "out"
    run(model, folder, **FLAGS)
    return folder


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_a_killed_run_goes_on_to_the_same_bytes(model: Path, out: Path, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("block 1/2"):
            kill()

    with pytest.raises(Killed):
        run(model, tmp_path / "out", log=stop, **FLAGS)
    run(model, tmp_path / "out", **FLAGS)
    assert files(tmp_path / "out") == files(out)


def test_experts_whose_hessians_do_not_fit_at_once_are_solved_in_parts(
    model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwards, "_AT_ONCE", 2 * 64**2)  # two experts of 64 inputs
    run(model, tmp_path / "out", **FLAGS)
    ours, theirs = (report(folder)["evaluation"]["lanes"]["llmquant"]["kl_mean"] for folder in (tmp_path / "out", out))
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.fixture
def on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "physical_memory", lambda: 1)


@pytest.mark.parametrize("flags", [{}, {"method": "rtn"}, {"passes": "block", "baselines": "bnb-nf4"}])
def test_experts_that_are_read_for_every_batch_give_the_same_bytes(
    flags: dict[str, Any], model: Path, tmp_path: Path, on_demand: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    run(model, tmp_path / "few" / "out", log=said.append, **FLAGS | flags)
    assert any(line.startswith("experts are read again for every batch") for line in said)
    monkeypatch.setattr(draft, "physical_memory", lambda: None)
    run(model, tmp_path / "all" / "out", **FLAGS | flags)
    assert files(tmp_path / "few" / "out") == files(tmp_path / "all" / "out")


def test_a_killed_run_whose_experts_are_read_for_every_batch_goes_on(
    model: Path, out: Path, tmp_path: Path, on_demand: None
) -> None:
    def stop(line: str) -> None:
        if line.startswith("block 1/2"):
            kill()

    with pytest.raises(Killed):
        run(model, tmp_path / "out", log=stop, **FLAGS)
    run(model, tmp_path / "out", **FLAGS)
    assert files(tmp_path / "out") == files(out)


def test_no_expert_stays_in_memory(model: Path, on_demand: None, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = draft.draft_model(open_source(model), make_recipe(str(model)), SILENT)
    hidden = skeleton.embed(torch.arange(16)[None])
    block, seen = skeleton.blocks[0], list[int]()
    experts = next(module for module in block.module.modules() if isinstance(module, Experts))

    def count(module: torch.nn.Module, inputs: Any) -> None:
        seen.append(sum(parameter.numel() for parameter in experts.parameters() if not parameter.is_meta))

    for linear in (module for module in experts.modules() if isinstance(module, torch.nn.Linear)):
        linear.register_forward_pre_hook(count)
    with block.loaded():
        block.forward(hidden)
    assert seen
    assert max(seen) <= 64 * 32  # one linear
    assert all(parameter.is_meta for parameter in experts.parameters())


def test_the_output_is_evaluated_and_exported(model: Path, out: Path, tmp_path: Path) -> None:
    recipe = make_recipe(str(out), flags={key: TINY[key] for key in ("eval_tokens", "eval_seq_len")})
    found = llmquant.evaluate(out, reference=model, recipe=recipe).lanes["out"]
    wanted = report(out)["evaluation"]["lanes"]["llmquant"]
    assert found["kl_mean"] == pytest.approx(wanted["kl_mean"], rel=1e-4)
    assert main(["export", str(out), "--format", "gptq", "--out", str(tmp_path / "gptq")]) == 0
    assert main(["verify", str(tmp_path / "gptq")]) == 0
    again = llmquant.evaluate(tmp_path / "gptq", reference=model, recipe=recipe).lanes["gptq"]
    assert again["kl_mean"] == pytest.approx(wanted["kl_mean"], rel=1e-4)


def test_an_expert_that_no_token_reaches_is_solved_by_what_the_others_read(model: Path, tmp_path: Path) -> None:
    found = run(model, tmp_path / "out", **FLAGS | {"samples": 1, "seq_len": 32, "eval_data": "none"})
    layers = [layer for layer in found.facts.layers if ".experts." in layer.name]
    assert min(layer.n_tokens for layer in layers) < 32
    assert all(layer.loss is not None for layer in layers)
    (said,) = [note for note in health(found.facts) if note.startswith("Experts")]
    assert "of 32 calibration tokens a linear of an expert saw" in said
    assert "saw fewer than they have inputs" in said


def test_auto_takes_as_many_windows_as_the_rarest_experts_need(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "_MOST_SAMPLES", 48)
    monkeypatch.setattr(job, "_USUAL_SAMPLES", 4)
    said: list[str] = []
    found = run(model, tmp_path / "out", log=said.append, **FLAGS | {"samples": "auto", "eval_data": "none"})
    (line,) = [line for line in said if line.startswith("--samples auto")]
    assert found.facts.calibration is not None
    count = found.facts.calibration.n_tokens // 32
    assert line == f"--samples auto: {count} windows of 32 tokens"
    assert 4 < count <= 48
    ups = [layer.n_tokens for layer in found.facts.layers if layer.name.endswith(".up_proj")]
    assert sorted(ups)[1] >= 48  # of about 64, as many as each has inputs: the windows were drawn anew
    monkeypatch.setattr(recipes, "_MOST_SAMPLES", 5)
    run(model, tmp_path / "few", log=said.append, **FLAGS | {"samples": "auto", "eval_data": "none"})
    assert any(line.endswith("would need still more") for line in said)


def test_auto_is_the_usual_number_without_experts(tiny_model: Any, tmp_path: Path) -> None:
    found = run(tiny_model("llama"), tmp_path / "out", **FLAGS | {"samples": "auto", "eval_data": "none"})
    assert found.facts.calibration is not None
    assert found.facts.calibration.n_tokens == 128 * 32, "which is all that the text of these tests has"


def test_what_is_lent_counts_as_that_many_tokens() -> None:
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    few, many, none = (Hessian(4, device) for _ in range(3))
    x, y = torch.randn(3, 4, generator=generator), torch.randn(50, 4, generator=generator)
    few.add(x)
    many.add(y)
    pool = pooled([few, many, none])
    everything = torch.cat([x, y])
    few.lend(pool, 2.0)
    wanted = (x.T @ x + 2 * (everything.T @ everything) / 53) / (3 + 2)
    torch.testing.assert_close(few.mean(), wanted)
    none.lend(pool, 2.0)
    torch.testing.assert_close(none.mean(), everything.T @ everything / 53)


def test_plan_knows_what_experts_take(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(model), "--group-size", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["Hessians of experts"] > 0
    assert main(["plan", "--model", str(model), "--group-size", "32", "--samples", "1", "--seq-len", "32"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "experts: about 16 of 32 calibration tokens reach each, which has 64 inputs; more --samples would help" in text
    )


def test_a_fused_checkpoint_is_evaluated_from_its_single_experts(tmp_path: Path) -> None:
    config = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_hidden_layers": 2}
    rope = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    source = tiny.build(tmp_path / "oss", ("GptOssConfig", tiny.LLAMA | config | rope))
    recipe = make_recipe(str(source), flags=TINY | FLAGS)
    wanted = llmquant.quantize(source, recipe, out=tmp_path / "out", runtimes=("vllm",)).lanes["llmquant"]
    recipe = make_recipe(str(source), flags={key: TINY[key] for key in ("eval_tokens", "eval_seq_len")})
    found = llmquant.evaluate(tmp_path / "out", reference=source, recipe=recipe).lanes["out"]
    assert found["kl_mean"] == pytest.approx(wanted["kl_mean"], rel=1e-4)


def test_windows_that_are_drawn_anew_are_checked_anew(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie at other places of the text, where the evaluation text may be."""
    heldout = evaluation_windows(load_tokenizer(open_source("demo")), "builtin", 512, 32).ids

    def on_the_evaluation_text(draft: object, most: Windows, log: object) -> Windows:
        return replace(most, ids=heldout)

    monkeypatch.setattr(job, "as_many_as_needed", on_the_evaluation_text)
    flags = {"samples": "auto", "eval_data": "builtin", "eval_tokens": 512, "eval_seq_len": 32}
    with pytest.raises(CalibrationError, match="evaluation"):
        run(tiny_model("llama"), tmp_path / "out", **FLAGS | flags)
