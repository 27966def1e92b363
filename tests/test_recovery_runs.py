"""The recovery of a run: what it changes, in bounded memory, resumed, planned, finetuned, or refused by name."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from broken import TINY, Counting, Killed, files, kill, on_disk, run, weights
from safetensors import safe_open

import llmquant
from llmquant import recovery
from llmquant.blocks import snapshots
from llmquant.cli.app import main
from llmquant.errors import RecipeError, ResumeError, SourceError
from llmquant.finished import Finished
from llmquant.output.check import TRAINED, verify_folder
from llmquant.preflight.estimate import estimate
from llmquant.recipe import RunOptions, make_recipe
from llmquant.run_dir.recovery_files import RecoveryFiles

# Scales that leave much to gain, so that a few steps do.
POOR: dict[str, Any] = {
    **{"bits": 2, "grid": "absmax", "order": "natural", "propagation": 0, "curvature": "off", "sweeps": 0}
}
FLAGS: dict[str, Any] = POOR | {"samples": 32, "recover": "all", "baselines": "none"}


@pytest.fixture(scope="module", autouse=True)
def fast(short_runs: None) -> Iterator[None]:
    """Two steps in a pass over the text, and large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "_STEP_TOKENS", 384)
        patch.setattr(recovery, "_SCALES_RATE", 0.005)
        patch.setattr(recovery, "_VECTORS_RATE", 0.02)
        patch.setattr(recovery, "_HELD_OUT", 4)
        yield


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen2")  # its q, k and v have biases


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def out(model: Path, lines: list[str], fast: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("recovery") / "out"
    run(model, folder, log=lines.append, **FLAGS)
    return folder


@pytest.fixture(scope="module")
def before(model: Path, fast: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without recovery."""
    folder = tmp_path_factory.mktemp("before") / "out"
    run(model, folder, **FLAGS | {"recover": "off"})
    return folder


def changed(one: Path, other: Path) -> set[str]:
    """The last parts of the names of tensors that two checkpoints do not have alike."""
    found = set()
    for file in sorted(one.glob("*.safetensors")):
        with safe_open(file, "pt") as a, safe_open(other / file.name, "pt") as b:
            assert a.keys() == b.keys()
            for name in a.keys():  # noqa: SIM118 (no dict)
                if not a.get_tensor(name).equal(b.get_tensor(name)):
                    found.add(".".join(name.split(".")[-2:]))
    return found


SCALES = {f"{name}_proj.weight_scale" for name in ("q", "k", "v", "o", "gate", "up", "down")}
NORMS = {
    *(f"{name}_proj.bias" for name in "qkv"),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
}


# -- what it does --------------------------------------------------------------------------------------
def test_it_brings_the_loss_down_and_leaves_the_codes(out: Path, before: Path, lines: list[str]) -> None:
    found = json.loads((out / "report.json").read_text())
    recovered, lanes = found["recovery"], found["evaluation"]["lanes"]
    assert recovered["n_steps"] == 4
    assert 0 < recovered["step"] <= 4
    assert (recovered["n_tokens"], recovered["held_out_tokens"]) == (24 * 32, 8 * 32)
    assert recovered["kl_after"] < 0.97 * recovered["kl_before"]
    assert changed(out, before) == SCALES | NORMS
    base = json.loads((before / "report.json").read_text())
    ours = base["evaluation"]["lanes"]["llmquant"]
    assert lanes["before recovery"] == ours
    assert lanes["llmquant"]["kl_mean"] < ours["kl_mean"]
    assert found["layers"] == base["layers"]
    assert "recovery: 4 steps of 384 tokens, judged by 256 others" in lines
    assert sum(line.startswith("recovery: step ") for line in lines) == 5


@pytest.mark.parametrize(("what", "wanted"), [("scales", SCALES), ("norms", NORMS)])
def test_one_kind_alone(what: str, wanted: set[str], before: Path, model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", **FLAGS | {"recover": what, "eval_data": "none"})
    assert changed(tmp_path / "out", before) == wanted


def test_what_is_written_is_what_was_measured(out: Path, model: Path) -> None:
    measured = json.loads((out / "report.json").read_text())["evaluation"]["lanes"]["llmquant"]
    recipe = make_recipe(str(model), flags={"eval_tokens": 128, "eval_seq_len": 64, "eval_data": "builtin"})
    found = llmquant.compare([out], reference=model, recipe=recipe)
    assert found.lanes["out"]["kl_mean"] == pytest.approx(measured["kl_mean"], rel=1e-5)


def test_verify_says_what_it_cannot_compare(out: Path, before: Path, model: Path) -> None:
    found, plain = verify_folder(out, model), verify_folder(before, model)
    assert plain.not_compared == {}
    assert set(found.not_compared) == {TRAINED}
    assert 0 < found.not_compared[TRAINED] < plain.quantized + plain.copied


def test_where_no_step_is_better_nothing_is_changed(
    before: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_SCALES_RATE", 0.9)
    monkeypatch.setattr(recovery, "_VECTORS_RATE", 0.9)
    report = run(model, tmp_path / "out", log=(lines := list[str]()).append, **FLAGS)
    assert report.data["recovery"]["step"] == 0
    assert "recovery: no step brought the loss down; nothing is changed" in lines
    assert weights(tmp_path / "out") == weights(before)


@pytest.mark.parametrize("format_name", ["gptq", "awq", "mlx", "gguf"])
def test_every_format_is_read_and_written_over(
    format_name: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run verifies what it wrote; here the last step, whatever it brought."""
    monkeypatch.setattr(RecoveryFiles, "best", property(lambda files: files.steps))
    flags = FLAGS | {"bits": 4, "format": format_name, "symmetric": format_name == "gptq"}
    report = run(tiny_model("llama"), tmp_path / "out", **flags)
    assert report.data["recovery"]["step"] == 4
    assert report.lanes["llmquant"]["kl_mean"] != report.lanes["before recovery"]["kl_mean"]


def test_scales_of_experts_stay(tmp_path: Path) -> None:
    flags = tiny.LLAMA | tiny.EXPERTS | {"head_dim": 16, "num_hidden_layers": 1}
    moe = tiny.build(tmp_path / "moe", ("Qwen3MoeConfig", flags))
    for what in ("off", "scales"):
        run(moe, tmp_path / what, **FLAGS | {"recover": what, "eval_data": "none"})
    names = {f"{name}_proj.weight_scale" for name in "qkvo"}
    assert changed(tmp_path / "scales", tmp_path / "off") <= names


# -- bounded, and resumed ------------------------------------------------------------------------------
def test_hidden_states_go_to_files_where_memory_has_no_room(out: Path, model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", **FLAGS, max_ram="1KB")
    assert weights(tmp_path / "out") == weights(out)


@pytest.mark.parametrize("step", [0, 1, 4])
def test_an_interrupted_training_goes_on_behind_its_last_step(
    step: int, out: Path, model: Path, tmp_path: Path
) -> None:
    def log(line: str) -> None:
        if line.startswith(f"recovery: step {step}/"):
            kill()

    with contextlib.suppress(Killed):
        run(model, tmp_path / "out", log=log, **FLAGS)
    run(model, tmp_path / "out", log=(lines := list[str]()).append, **FLAGS, resume="required")
    steps = [line.split()[2].rstrip(",") for line in lines if line.startswith("recovery: step ")]
    assert steps == [f"{number}/4" for number in range(step, 5)]
    assert files(tmp_path / "out") == files(out)


@pytest.mark.parametrize("count", [8, pytest.param(1000, marks=pytest.mark.soak)])
def test_kills_at_changes_of_the_disk_behind_the_loop(
    count: int, out: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spread over those of one step, of the tensors that are written again, and of the commit; or at all of them."""
    with monkeypatch.context() as patch:
        on_disk(patch, counting := Counting())
        begin: list[int] = []

        def log(line: str) -> None:
            if line.startswith("recovery: step 3"):
                begin.append(counting.count)

        run(model, tmp_path / "count" / "out", log=log, **FLAGS)
    assert begin
    for number in range(begin[0], counting.count, max(1, (counting.count - begin[0]) // count)):
        folder = tmp_path / str(number) / "out"
        with monkeypatch.context() as patch:
            on_disk(patch, Counting(number, kill))
            with contextlib.suppress(Killed):
                run(model, folder, **FLAGS)
        if not folder.exists():  # only the cleaning up was missing
            run(model, folder, **FLAGS)
        assert files(folder) == files(out), number


def test_a_run_without_snapshots_reads_what_the_loop_left(
    out: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while tensors are written again; the resumed run goes through all blocks anew."""
    monkeypatch.setattr(snapshots.Snapshots, "save", lambda self: None)
    with monkeypatch.context() as patch:
        patch.setattr("llmquant.output.containers.Shards.finish", lambda *args, **kwargs: kill())
        with contextlib.suppress(Killed):
            run(model, tmp_path / "out", **FLAGS)
    lines: list[str] = []
    run(model, tmp_path / "out", log=lines.append, **FLAGS, resume="required")
    assert "block 3: finished before" in lines
    assert not [line for line in lines if line.startswith("recovery: step")]
    assert files(tmp_path / "out") == files(out)


@pytest.mark.parametrize("damage", ["a byte", "gone"])
def test_a_damaged_state_is_named(damage: str, model: Path, tmp_path: Path) -> None:
    def log(line: str) -> None:
        if line.startswith("recovery: step 2/"):
            kill()

    with contextlib.suppress(Killed):
        run(model, tmp_path / "out", log=log, **FLAGS)
    stored = tmp_path / "out.partial" / "recovery-2-1"
    if damage == "gone":
        stored.unlink()
    else:
        stored.write_bytes(stored.read_bytes()[:-1] + b"\1")
    why = {"gone": "No such file or directory", "a byte": "its SHA-256 differs"}[damage]
    with pytest.raises(ResumeError, match=rf"recovery-2-1: {why}; start again with --resume never"):
        run(model, tmp_path / "out", **FLAGS)


def test_three_states_are_kept_at_most(model: Path, tmp_path: Path) -> None:
    kept: list[set[str]] = []

    def log(line: str) -> None:
        if line.startswith("recovery: step "):
            kept.append({path.name.split("-")[1] for path in (tmp_path / "out.partial").glob("recovery-*")})

    run(model, tmp_path / "out", log=log, **FLAGS)
    assert all(len(steps) <= 3 for steps in kept)
    assert [str(number) in steps for number, steps in enumerate(kept)] == [True] * 5


# -- planned, and refused ------------------------------------------------------------------------------
def test_plan_counts_it(model: Path, tmp_path: Path) -> None:
    plans = {}
    for what in ("off", "all"):
        recipe = make_recipe(str(model), flags=TINY | FLAGS | {"recover": what})
        for timed in (False, True):
            plans[what, timed] = estimate(model, recipe, RunOptions(tmp_path / "out", max_ram="1KB"), timed=timed)
            assert not plans[what, timed].problems
    assert plans["off", True].disk["recovery"] == plans["off", True].seconds["recovery"] == 0
    assert plans["all", True].seconds["recovery"] > 0
    assert plans["all", False].seconds["forwards"] > plans["off", False].seconds["forwards"]
    assert plans["all", True].memory["gradients of the largest block"] > 0
    states = 3 * 12 * 3 * ((64 + 32 + 32 + 64 + 96 + 96) * 2 + 64 * 3 + 64 + 32 + 32 + 2 * 64)
    window = 32 * 64 * 4
    hidden = 32 * window + 8 * window + 4 * 12 * window  # the original's; what is held out; at four borders
    assert plans["all", True].disk["recovery"] == states + hidden


def test_what_cannot_be_trained_is_refused_before_the_work(
    model: Path, tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, why in (
        ({"method": "rtn"}, "recover all: no calibration text is read by --method rtn"),
        ({"samples": 1}, "samples: 1, with --recover all; expected 2 or more"),
        ({"format": "fake"}, "recover all: the format fake holds no scales"),
    ):
        with pytest.raises(RecipeError, match=why):
            run(model, tmp_path / "out", **FLAGS | flags)
    with pytest.raises(RecipeError, match="recover all: no gradients go through parked forwards; use --recover off"):
        run(tiny_model("gemma4"), tmp_path / "out", **FLAGS | {"seq_len": 32})
    assert main(["plan", "--model", str(model), "--recover", "all", "--method", "rtn", "--eval-data", "none"]) == 2
    assert "--recover all" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# -- finetune ------------------------------------------------------------------------------------------
def test_a_finished_checkpoint_is_trained_as_its_own_run_would_have(
    out: Path, before: Path, model: Path, tmp_path: Path
) -> None:
    found = llmquant.finetune(before, reference=model, out=tmp_path / "out")
    assert weights(tmp_path / "out") == weights(out)
    wanted = json.loads((out / "report.json").read_text())
    assert found.data == wanted
    assert llmquant.finetune(tmp_path / "out", reference=model, out=tmp_path / "again").data["recovery"]


def test_the_command(before: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", str(before), "--reference", str(model), "--out", str(tmp_path / "out")]
    assert main([*command, "--recover", "norms", "--samples", "8", "--eval-tokens", "64"]) == 0
    assert "before recovery" in capsys.readouterr().out
    assert changed(tmp_path / "out", before) == NORMS
    assert main([*command, "--recover", "off"]) == 2
    assert main([*command, "--recover", "codes"]) == 2
    assert "expected" in capsys.readouterr().err


def test_a_finetune_is_planned(before: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", str(before), "--reference", str(model), "--dry-run"]) == 0
    assert "recovery" in capsys.readouterr().out
    recipe = make_recipe(str(model), flags=TINY | FLAGS)
    taken_over = estimate(model, recipe, RunOptions(codes=before))
    assert taken_over.seconds["forwards"] > taken_over.seconds["Hessians and solving"] == 0


def test_an_interrupted_finetune_goes_on(before: Path, model: Path, tmp_path: Path) -> None:
    def log(line: str) -> None:
        if line.startswith("recovery: step 2/"):
            kill()

    with contextlib.suppress(Killed):
        llmquant.finetune(before, reference=model, out=tmp_path / "out", log=log)
    llmquant.finetune(before, reference=model, out=tmp_path / "out", resume="required")
    llmquant.finetune(before, reference=model, out=tmp_path / "whole" / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole" / "out")


def test_the_checkpoint_of_another_model_is_refused(
    before: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"\d of its tensors are not the original's, such as .*; name the original"):
        llmquant.finetune(before, reference=tiny_model("mistral"), out=tmp_path / "out")
    with pytest.raises(RecipeError, match=r"linears are not as the original and its recipe make them, such as"):
        llmquant.finetune(before, reference=tiny_model("phi3"), out=tmp_path / "out")
    with pytest.raises(SourceError, match="is not quantized"):
        llmquant.finetune(tiny_model("qwen2"), reference=tiny_model("qwen2"), out=tmp_path / "out")


def test_the_codes_are_the_stored_ones(before: Path, model: Path) -> None:
    finished = Finished(before)
    assert finished.recipe["bits"] == 2
    assert "recover" in finished.recipe
    assert math.isclose(finished.report.bits_per_weight, 2.5)
