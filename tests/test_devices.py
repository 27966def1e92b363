"""Runs on an accelerator, by the pretend one: every feature goes through it, and gives what it gives on the CPU."""

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from broken import TINY, killed_after, run, weights
from pretend_device import on_pretend_device
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmquant
from llmquant import ahead, draft, pipeline, recovery
from llmquant.blocks import snapshots
from llmquant.blocks.measure import _square
from llmquant.cli.app import main
from llmquant.errors import RecipeError, ResumeError
from llmquant.model import streams
from llmquant.model.devices import pick_device, pick_dtype, pick_products
from llmquant.model.weights import Weights
from llmquant.preflight import estimate, flops
from llmquant.preflight.doctor import diagnose
from llmquant.quant import matmul
from llmquant.quant.grid import QuantScheme
from llmquant.quant.solvers import LayerTask
from llmquant.quant.solvers.rtn import solve_rtn
from llmquant.recipe import make_recipe
from llmquant.run_dir.recovery_files import RecoveryFiles
from llmquant.source.resolve import open_source

pytestmark = pytest.mark.usefixtures("on_cpu")  # which imports all that a run needs before a test forks
CPU = torch.device("cpu")
# Products in float32: those of bfloat16 are the CPU's own.
EXACT: dict[str, Any] = {"dtype": "float32", "products": "float32", "sweeps": 1}
ALL_LANES = {"baselines": "rtn,bnb-nf4,bnb-int8"}
NO_SCORES = {"eval_data": "none"}
# Two blocks, as narrow as all formats allow.
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def same_products() -> Iterator[None]:
    """The CPU multiplies as other devices do, and attention takes the kernel that every device has."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(matmul, "_ONEDNN", None)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("small") / "llama", tiny.ARCHITECTURES["llama"], **SMALL)


@pytest.fixture(scope="module")
def on_cpu(model: Path, short_runs: None, same_products: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all baselines on the CPU."""
    out = tmp_path_factory.mktemp("cpu") / "out"
    run(model, out, device="cpu", **ALL_LANES, **EXACT)
    return out


def report(out: Path) -> dict[str, Any]:
    """What was computed: without the name of the device."""
    data: dict[str, Any] = json.loads((out / "report.json").read_text())
    del data["recipe"]["device"], data["compute"]["device"]
    if (allocation := data.get("allocation")) is not None:  # sums over rows, in the order that each device likes
        allocation["predicted"] = {name: f"{loss:.6g}" for name, loss in allocation["predicted"].items()}
    return data


def assert_same(out: Path, wanted: Path) -> None:
    assert weights(out)
    assert weights(out) == weights(wanted)
    assert report(out) == report(wanted)


def on_both(model: Path, folder: Path, **flags: Any) -> Path:
    """A run on the device equals the same run on the CPU; its folder."""
    for device in ("cpu", "pretend"):
        run(model, folder / device / "out", device=device, **EXACT | flags)
    assert_same(folder / "pretend" / "out", folder / "cpu" / "out")
    return folder / "pretend" / "out"


# -- runs ------------------------------------------------------------------------------------------------
@on_pretend_device
def test_a_run_with_all_baselines_is_that_of_the_cpu(model: Path, on_cpu: Path, tmp_path: Path) -> None:
    found = run(model, tmp_path / "out", device="pretend", **ALL_LANES, **EXACT)
    assert found.data["compute"]["device"] == "pretend"
    assert list(found.lanes) == ["original", "llmquant", "rtn", "bnb-nf4", "bnb-int8"]
    assert_same(tmp_path / "out", on_cpu)


@on_pretend_device
@pytest.mark.parametrize(
    "flags",
    [
        {"format": "compressed-tensors,gptq,awq,mlx,gguf,fake"},
        {"format": "fake", "symmetric": False},
        {"format": "awq", "symmetric": False},
        {"format": "mlx", "symmetric": False},
        {"format": "gguf", "symmetric": False},
        {"format": "gptq", "bits": 8},
    ],
    ids=lambda flags: flags["format"],
)
def test_every_format_is_that_of_the_cpu(flags: dict[str, Any], model: Path, tmp_path: Path) -> None:
    on_both(model, tmp_path, method="rtn", **NO_SCORES, **flags)


@on_pretend_device
@pytest.mark.parametrize(
    "flags",
    [
        {"rules": ["down_proj: bits=8", "v_proj: method=rtn", "layers.1.*o_proj: keep"]},
        {"passes": "block", "grid": "absmax", "order": "natural"},
        {"bits": 2, "sweeps": 2, "propagation": 0.5},
        {"propagation": 0, "refit": False, "symmetric": False, "format": "fake"},
        {"calibration": "nan", "on_bad_layer": "rtn"},
    ],
    ids=["rules", "block", "refined", "asymmetric", "bad"],
)
def test_every_way_of_solving_is_that_of_the_cpu(
    flags: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags.pop("calibration", None) is not None:
        monkeypatch.setattr("llmquant.quant.solvers.gptq.factor", lambda *inputs: None)  # no layer can be solved
    on_both(model, tmp_path, **NO_SCORES, **flags)


@on_pretend_device
def test_layers_of_gpt2_lie_transposed_on_it(tmp_path: Path) -> None:
    model = tiny.build(tmp_path / "gpt2", tiny.GPT2_ARCHITECTURE, n_layer=2, n_embd=32, n_inner=64)
    on_both(model, tmp_path, format="fake", baselines="none")


@on_pretend_device
def test_a_target_size_is_reached_on_it(model: Path, tmp_path: Path) -> None:
    on_both(model, tmp_path, target_bpw=4.2, baselines="none")


@on_pretend_device
def test_head_and_embedding_are_quantized_on_it(model: Path, tmp_path: Path) -> None:
    on_both(model, tmp_path, format="mlx", embed_bits=4, lm_head_bits=8, baselines="none")


@on_pretend_device
@pytest.mark.parametrize("memory", [None, 1], ids=["all", "on demand"])
def test_it_is_trained_on_it(memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step is kept, whatever it brought; the scales of experts stay, their weights pass gradients on."""
    monkeypatch.setattr(draft, "device_memory", lambda device: memory)
    monkeypatch.setattr(RecoveryFiles, "best", property(lambda files: files.steps))
    monkeypatch.setattr(recovery, "_STEP_TOKENS", 64)
    moe = "Qwen3MoeConfig", {**tiny.LLAMA, **tiny.EXPERTS, "head_dim": 8}
    for name, kind in {"moe": moe, "dense": tiny.ARCHITECTURES["qwen2"]}.items():
        built = tiny.build(tmp_path / name / "model", kind, **SMALL)
        on_both(built, tmp_path / name, recover="all", samples=8, baselines="none")


@on_pretend_device
def test_windows_and_soft_caps_of_gemma2(tmp_path: Path) -> None:
    model = tiny.build(tmp_path / "gemma2", tiny.ARCHITECTURES["gemma2"], **SMALL | {"head_dim": 8})
    on_both(model, tmp_path, baselines="none")


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with keys and values of their own, and one that has those of the second."""
    layers = {
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention"] + 2 * ["full_attention"],
    }
    return tiny.build(tmp_path_factory.mktemp("small") / "gemma4", tiny.GEMMA4, **layers)


@on_pretend_device
def test_parked_forwards_stay_on_it(gemma4: Path, tmp_path: Path) -> None:
    on_both(gemma4, tmp_path, baselines="none", eval_data="builtin")


@pytest.mark.soak
@on_pretend_device
def test_a_killed_run_with_parked_forwards_goes_on(gemma4: Path, tmp_path: Path) -> None:
    flags = {"device": "pretend", "eval_data": "builtin", **EXACT}
    run(gemma4, tmp_path / "whole", **flags)
    killed_after(2, gemma4, tmp_path / "out", **flags)
    run(gemma4, tmp_path / "out", **flags)
    assert_same(tmp_path / "out", tmp_path / "whole")


@on_pretend_device
def test_a_run_in_the_dtype_of_the_checkpoint_has_a_noise_floor(model: Path, tmp_path: Path) -> None:
    found = run(model, tmp_path / "out", device="pretend", sweeps=1)
    assert (found.data["compute"]["dtype"], found.data["compute"]["products"]) == ("bfloat16", "bfloat16")
    assert 0 < found.data["evaluation"]["noise_floor"]["kl_mean"] < 0.01


# -- interrupted and short of memory -----------------------------------------------------------------------
@on_pretend_device
@pytest.mark.parametrize("name", ["compressed-tensors", "fake"])
def test_a_killed_run_goes_through_finished_blocks_with_what_is_on_the_disk(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MIN_SECONDS", math.inf)
    flags = {"format": name, "baselines": "rtn", **EXACT}
    run(model, tmp_path / "cpu", device="cpu", **flags)
    killed_after(1, model, tmp_path / "out", device="pretend", **flags)
    lines: list[str] = []
    run(model, tmp_path / "out", device="pretend", log=lines.append, **flags)
    assert "block 1: finished before" in lines
    assert_same(tmp_path / "out", tmp_path / "cpu")


@on_pretend_device
def test_a_killed_run_goes_on_from_its_snapshot(model: Path, on_cpu: Path, tmp_path: Path) -> None:
    flags = {"device": "pretend", **ALL_LANES, **EXACT}
    killed_after(2, model, tmp_path / "out", **flags)
    lines: list[str] = []
    run(model, tmp_path / "out", log=lines.append, **flags)
    assert "streams after block 1: from the snapshot" in lines
    assert_same(tmp_path / "out", on_cpu)


@on_pretend_device
def test_a_run_that_was_killed_on_it_does_not_go_on_elsewhere(model: Path, tmp_path: Path) -> None:
    flags = {"method": "rtn", **EXACT, **NO_SCORES}
    killed_after(1, model, tmp_path / "out", device="pretend", **flags)
    with pytest.raises(ResumeError, match="device"):
        run(model, tmp_path / "out", device="cpu", resume="required", **flags)


@on_pretend_device
def test_streams_in_files_and_forwards_that_are_run_anew(model: Path, on_cpu: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    run(model, tmp_path / "out", device="pretend", max_ram="1KB", log=lines.append, **ALL_LANES, **EXACT)
    assert sum("kept in a file" in line for line in lines) == 7
    assert_same(tmp_path / "out", on_cpu)


# -- the other commands --------------------------------------------------------------------------------------
@on_pretend_device
def test_streams_lie_on_it_where_it_has_room(
    model: Path, on_cpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a kill and a snapshot, too, and with tensors that are read several at once."""
    monkeypatch.setattr(streams, "device_memory", lambda device: 2**40 if device.type == "pretend" else None)
    monkeypatch.setattr(ahead, "n_workers", lambda: 3)
    monkeypatch.setattr(snapshots, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(snapshots, "PAUSE", 0.0)
    assert streams.lies_on(torch.device("pretend"), 2**38).type == "pretend"
    assert streams.lies_on(torch.device("pretend"), 2**38 + 1).type == "cpu"
    made = list[torch.device]()
    new = streams.new_stream
    monkeypatch.setattr(streams, "new_stream", lambda **given: [made.append(given["device"]), new(**given)][1])
    flags: dict[str, Any] = {"device": "pretend", **ALL_LANES, **EXACT}
    killed_after(2, model, tmp_path / "out", **flags)
    lines: list[str] = []
    run(model, tmp_path / "out", log=lines.append, **flags)
    assert {device.type for device in made} == {"pretend"}
    assert "streams after block 1: from the snapshot" in lines
    assert_same(tmp_path / "out", on_cpu)


@on_pretend_device
def test_eval_and_compare_give_what_they_give_on_the_cpu(model: Path, on_cpu: Path) -> None:
    found = []
    for device in ("cpu", "pretend"):
        flags = {"eval_data": "builtin", "eval_tokens": 128, "eval_seq_len": 64, "device": device, **EXACT}
        report = llmquant.compare([on_cpu, model], reference=model, recipe=make_recipe("x", flags=flags))
        found.append(report.data)
    assert found[0]["evaluation"]["lanes"].keys() > {"original"}
    assert found[0] == found[1]


@on_pretend_device
def test_plan_times_a_block_on_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = flops.matmul_rate
    monkeypatch.setattr(estimate, "matmul_rate", lambda device, dtype: rate(device, dtype, 64))
    flags = TINY | {"device": "pretend", "eval_data": "builtin", "sweeps": 1}
    for timed in (False, True):
        found = estimate.estimate(model, make_recipe("x", flags=flags), timed=timed)
        assert not found.problems
        assert found.compute == {"device": "pretend", "dtype": "bfloat16"}
        assert all(value >= 0 for value in found.seconds.values())


@on_pretend_device
def test_the_command_line_takes_it(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = (
        "--group-size 32 --sweeps 1 --samples 2 --seq-len 32 --eval-data builtin --eval-tokens 64 --eval-seq-len 64"
    )
    run_it = ["run", "--model", str(model), "--out", str(tmp_path / "out"), "--device", "auto", *options.split()]
    assert main(run_it) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["compute"]["device"] == "pretend"
    judge = ["--data", "builtin", "--tokens", "64", "--seq-len", "64", "--device", "pretend:0"]
    assert main(["eval", "--model", str(tmp_path / "out"), "--reference", str(model), *judge]) == 0
    assert main(["compare", str(tmp_path / "out"), str(model), *judge]) == 0
    assert main(["verify", str(tmp_path / "out"), "--source", str(model)]) == 0
    capfd.readouterr()
    assert main(["compare", str(model), "--device", "pretend:1"]) == 2
    assert "--device: pretend:1, of 1 there are" in capfd.readouterr().err


@on_pretend_device
def test_doctor_names_it() -> None:
    assert diagnose()["devices"][1:] == [{"name": "pretend:0", "what": "pretend", "memory_bytes": None}]


@on_pretend_device
@pytest.mark.parametrize("memory", [None, 1], ids=["all", "on demand"])
def test_experts_lie_on_it(memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "device_memory", lambda device: memory)
    flags = {**SMALL, **tiny.EXPERTS, "head_dim": 8}
    model = tiny.build(tmp_path / "moe", ("Qwen3MoeConfig", tiny.LLAMA | flags))
    on_both(model, tmp_path, format="compressed-tensors,gptq", baselines="rtn")


# -- parts -------------------------------------------------------------------------------------------------
@on_pretend_device
def test_squares_are_added_up_without_float64_of_its_own() -> None:
    for size in (1.0, 1e30):  # the squares of the second are beyond float32
        weight_OI = torch.full((2, 4), size)
        assert _square(weight_OI.to("pretend")) == _square(weight_OI) == pytest.approx(8 * size**2)


@on_pretend_device
def test_losses_of_data_free_solving_lie_where_the_weight_lies() -> None:
    weight_OI = torch.randn(4, 32, device="pretend")
    solution = solve_rtn(LayerTask("x", weight_OI, None, 0, QuantScheme(4, 32)))
    assert solution.loss_O.device == weight_OI.device
    assert solution.weight.cpu().codes_OI.device == CPU


# -- choosing a device -----------------------------------------------------------------------------------
@on_pretend_device
def test_auto_is_the_accelerator_where_there_is_one() -> None:
    assert pick_device("auto") == pick_device("pretend") == torch.device("pretend")
    assert pick_device("pretend:0") == torch.device("pretend", 0)
    assert pick_device("cpu") == CPU
    with pytest.raises(RecipeError, match="--device: pretend:1, of 1 there are; expected an index below 1"):
        pick_device("pretend:1")
    with pytest.raises(RecipeError, match="'tpu'; expected auto, cpu or pretend"):
        pick_device("tpu")


def test_auto_is_the_cpu_where_there_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert pick_device("auto") == pick_device("cpu") == pick_device("cpu:0") == CPU


@pytest.mark.parametrize("name", ["tpu", "meta", "vulkan", "cuda:9999999999", "cpu:1", "pretend", "mtia", "xpu:64"])
def test_a_device_that_this_torch_does_not_compute_on_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"^--device: '?{name}\b.*expected"):
        pick_device(make_recipe("x", flags={"device": name}).device)


@pytest.mark.parametrize("name", ["", "cuda:", "cuda:x", "CPU", "-1", "cuda 0", "cuda:0\n"])
def test_what_cannot_be_a_device_is_refused_by_the_recipe(name: str) -> None:
    with pytest.raises(RecipeError, match=r"^--device: "):
        make_recipe("x", flags={"device": name})


@on_pretend_device
def test_products_on_an_accelerator_are_those_of_its_compute_dtype() -> None:
    device = torch.device("pretend")
    assert pick_products("auto", device, torch.float32, 4) == torch.float32
    assert pick_products("auto", device, torch.bfloat16, 8) == torch.bfloat16
    assert pick_dtype("auto", device, open_source("demo")) == torch.bfloat16
    with pytest.raises(RecipeError, match="--products: bfloat16"):
        pick_products("bfloat16", device, torch.float32, 4)


@pytest.mark.parametrize(("method", "said"), [("gptq", True), ("rtn", False)])
def test_wrong_kernels_are_said_where_codes_are_solved_for(
    method: str, said: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "refuse_wrong_kernels", lambda device: "no compiler")
    lines: list[str] = []
    run(model, tmp_path / "out", device="cpu", method=method, log=lines.append, **NO_SCORES)
    line = "kernels of this GPU: no compiler; the CPU does their part, which takes longer"
    assert (line in lines) == said


@on_pretend_device
def test_the_next_block_is_read_while_this_one_is_worked_on(
    model: Path, on_cpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards, backwards and in the loop; the head that comes between does not drop it."""
    readers = dict[str, set[str]]()
    read = Weights.read

    def noted(self: Weights, name: str) -> torch.Tensor:
        readers.setdefault(name, set()).add(threading.current_thread().name.rpartition("_")[0])
        return read(self, name)

    monkeypatch.setattr(Weights, "read", noted)
    run(model, tmp_path / "out", device="pretend", baselines="none", **EXACT)
    of_blocks = {name.split(".")[2]: names for name, names in readers.items() if name.startswith("model.layers.")}
    assert of_blocks["1"] == {"llmquant-weights"}
    assert "llmquant-weights" in of_blocks["0"]
    assert weights(tmp_path / "out") == weights(on_cpu)
