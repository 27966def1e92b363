"""A target size: what is chosen, that it fits and opens, resumed, planned, or refused by name."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from broken import TINY, Killed, files, kill, run, weights

import llmquant
from llmquant import allocation
from llmquant.cli.app import main
from llmquant.errors import RecipeError
from llmquant.preflight import trial
from llmquant.preflight.estimate import estimate
from llmquant.recipe import RunOptions, make_recipe

pytestmark = pytest.mark.usefixtures("short_runs")
FLAGS: dict[str, Any] = {"samples": 8, "baselines": "none", "target_bpw": 4.2}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def out(model: Path, short_runs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target") / "out"
    run(model, folder, **FLAGS)
    return folder


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def bits_by_module(out: Path) -> dict[str, int]:
    return {row["module"]: row["bits"] for row in report(out)["tensors"] if "bits" in row}


# -- what is chosen ------------------------------------------------------------------------------------
def test_schemes_are_mixed_within_the_target(out: Path) -> None:
    found = report(out)
    chosen = found["allocation"]
    assert chosen["kept"] == "mixed"
    assert chosen["bits_per_weight"] == pytest.approx(found["bits_per_weight"])
    assert 4.0 < found["bits_per_weight"] <= 4.2
    assert sum(chosen["linears"].values()) == 21
    assert len(chosen["linears"]) > 1
    assert chosen["uniform"] == "W3 g32"
    assert chosen["predicted"]["mixed"] < chosen["predicted"]["uniform"]
    assert chosen["measured"]["mixed"] < chosen["measured"]["uniform"]
    bits = bits_by_module(out)
    for block in range(3):  # what servers run as one matrix
        at = f"model.layers.{block}"
        assert len({bits.get(f"{at}.self_attn.{name}_proj") for name in "qkv"}) == 1
        assert len({bits.get(f"{at}.mlp.{name}_proj") for name in ("gate", "up")}) == 1


def test_it_is_better_than_the_uniform_scheme_below_it(out: Path, model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", **FLAGS | {"target_bpw": None, "bits": 3})
    assert (
        report(out)["evaluation"]["lanes"]["llmquant"]["kl_mean"]
        < (report(tmp_path / "out")["evaluation"]["lanes"]["llmquant"]["kl_mean"])
    )


def test_a_size_in_bytes_counts_all_tensors(model: Path, tmp_path: Path) -> None:
    dense = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    size = dense - 120_000
    run(model, tmp_path / "out", **FLAGS | {"target_bpw": None, "target_size": f"{size}B"})
    stored = report(tmp_path / "out")["evaluation"]["lanes"]["llmquant"]["bytes"]
    assert 0.97 * size < stored <= size


def test_the_uniform_scheme_is_kept_unless_the_mixture_surely_wins(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = {"mixed": np.array([0.7, 1.1, 0.9]), "uniform": np.array([0.9, 1.0, 0.9])}  # better, but not surely
    monkeypatch.setattr(allocation, "_measured", lambda *inputs: close)
    run(model, tmp_path / "out", **FLAGS)
    assert report(tmp_path / "out")["allocation"]["kept"] == "uniform"
    run(model, tmp_path / "plain", **FLAGS | {"target_bpw": None, "bits": 3, "group_size": 32})
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


def test_rules_decide_what_they_match(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", **FLAGS | {"rules": ["down_proj: bits=8"], "target_bpw": 5.5})
    bits = bits_by_module(tmp_path / "out")
    assert {bits[f"model.layers.{block}.mlp.down_proj"] for block in range(3)} == {8}
    assert report(tmp_path / "out")["bits_per_weight"] <= 5.5


def test_sixteen_bits_are_a_choice(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", **FLAGS | {"target_bpw": 14})
    found = report(tmp_path / "out")["allocation"]
    assert found["linears"]["16 bit"] > 0


def test_experts_stay_as_the_recipe_says(tmp_path: Path) -> None:
    flags = tiny.LLAMA | tiny.EXPERTS | {"head_dim": 16, "num_hidden_layers": 1}
    moe = tiny.build(tmp_path / "moe", ("Qwen3MoeConfig", flags))
    run(moe, tmp_path / "out", **FLAGS | {"target_bpw": 4.6})
    experts = {bits for module, bits in bits_by_module(tmp_path / "out").items() if "experts" in module}
    assert experts == {4}


@pytest.mark.parametrize("format_name", ["mlx", "gguf"])
def test_other_formats_choose_among_what_they_hold(format_name: str, model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", **FLAGS | {"format": format_name, "target_bpw": 6.0})
    found = report(tmp_path / "out")
    assert found["bits_per_weight"] <= 6.0
    if format_name == "gguf":
        assert set(found["allocation"]["linears"]) <= {"W4 g32", "W8 g32", "16 bit"}


# -- resumed -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("line", ["allocation: mixed, KL", "block 1/"])
def test_an_interrupted_run_goes_on_with_the_same_schemes(line: str, out: Path, model: Path, tmp_path: Path) -> None:
    def log(said: str) -> None:
        if said.startswith(line):
            kill()

    with contextlib.suppress(Killed):
        run(model, tmp_path / "out", log=log, **FLAGS)
    run(model, tmp_path / "out", log=(lines := list[str]()).append, **FLAGS, resume="required")
    assert not [line for line in lines if line.startswith("curvature: ")]
    assert files(tmp_path / "out") == files(out)


def test_another_target_is_another_job(model: Path, tmp_path: Path) -> None:
    def log(said: str) -> None:
        if said.startswith("block 1/"):
            kill()

    with contextlib.suppress(Killed):
        run(model, tmp_path / "out", log=log, **FLAGS)
    with pytest.raises(llmquant.LLMQuantError, match=r"another job \(recipe.target_bpw differs\)"):
        run(model, tmp_path / "out", **FLAGS | {"target_bpw": 5.0})


def test_the_checkpoint_can_be_finetuned(out: Path, model: Path, tmp_path: Path) -> None:
    llmquant.finetune(out, reference=model, out=tmp_path / "out", recover="norms")
    assert bits_by_module(tmp_path / "out") == bits_by_module(out)


# -- planned, and refused ------------------------------------------------------------------------------
def test_plan_says_what_is_known(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "seconds", lambda work, device: [work(), 1.0][1])  # however busy the machine is
    recipe = make_recipe(str(model), flags=TINY | FLAGS)
    found = estimate(model, recipe, RunOptions(tmp_path / "out"), timed=True)
    assert found.seconds["allocation"] > found.seconds["solving"] > 0
    assert found.memory["schemes of the largest block"] > 0
    assert not found.exit_code
    assert found.bits_per_weight == pytest.approx(4.2, abs=1e-4)
    assert any("--target-bpw" in line for line in found.assumptions)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"target_bpw": 1.0}, r"target-bpw: 1\.0; expected at least 2\.\d+, which the smallest schemes"),
        ({"target_bpw": None, "target_size": "1KB"}, r"target-size: 1KB; expected at least \d+ bytes"),
        ({"target_bpw": 17}, "expected bits, above 0 and below 16"),
        ({"target_size": "1MB"}, "target-size: beside --target-bpw"),
        ({"target_bpw": None, "target_size": "much"}, "expected a size such as"),
        ({"format": "awq", "symmetric": False}, "awq knows one scheme for all layers"),
        ({"rules": ["proj: bits=8"]}, "nothing is left to choose: all linears are experts, or decided by rules"),
        ({"curvature": "off"}, "nothing is measured with --curvature off"),
        ({"method": "rtn"}, "nothing is measured with --curvature off or without text"),
    ],
)
def test_what_cannot_be_is_one_line(flags: dict[str, Any], why: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=why):
        run(model, tmp_path / "out", **FLAGS | flags)
    assert not list(tmp_path.iterdir())


def test_parked_forwards_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"target-bpw 4\.2: no gradients go through parked forwards"):
        run(tiny_model("gemma4"), tmp_path / "out", **FLAGS | {"seq_len": 32})


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--model", str(model), "--out", str(tmp_path / "out"), "--samples", "4", "--seq-len", "32"]
    assert main([*command, "--target-bpw", "5", "--eval-data", "none", "--group-size", "32"]) == 0
    assert "allocation: mixed" in capsys.readouterr().err
