"""The plan's figures: headers only, the pipeline's own numbers, and problems in place of a run."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmquant
from llmquant import draft
from llmquant.cli.app import main
from llmquant.demo import DEMO
from llmquant.model import skeleton, streams
from llmquant.model.block import Block
from llmquant.model.sharing import Sharing
from llmquant.preflight import estimate as estimate_module
from llmquant.preflight import trial
from llmquant.preflight.estimate import estimate
from llmquant.preflight.flops import Rate, Tokens, matmul_rate
from llmquant.preflight.trial import Trial
from llmquant.quant.curvature import row_blocks
from llmquant.recipe import RunOptions
from llmquant.source.files import INDEX
from llmquant.source.header import build_header

FLAGS = {"group_size": 32, "samples": 4, "seq_len": 32, "eval_tokens": 128, "eval_seq_len": 64, "eval_data": "builtin"}
SEVENTY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def sparse_70b(folder: Path) -> Path:
    """The headers of a Llama 70B in sparse files: 141 GB by their length, a few hundred KB on the disk."""
    folder.mkdir()
    wide, narrow, inner = (8192, 8192), (1024, 8192), (28672, 8192)
    shards = [{"model.embed_tokens.weight": (128256, 8192), "lm_head.weight": (128256, 8192)}]
    shards[0]["model.norm.weight"] = (8192,)  # type: ignore[assignment]
    for layer in range(80):
        p = f"model.layers.{layer}"
        shapes = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow, "o_proj": wide}
        shard: dict[str, tuple[int, ...]] = {f"{p}.self_attn.{name}.weight": shape for name, shape in shapes.items()}
        shard |= {f"{p}.mlp.gate_proj.weight": inner, f"{p}.mlp.up_proj.weight": inner}
        shard[f"{p}.mlp.down_proj.weight"] = (8192, 28672)
        shard |= dict.fromkeys((f"{p}.input_layernorm.weight", f"{p}.post_attention_layernorm.weight"), (8192,))
        shards.append(shard)  # type: ignore[arg-type]
    weight_map = {}
    for number, shard in enumerate(shards):  # type: ignore[assignment]
        name = f"model-{number:05d}.safetensors"
        head, places = build_header({key: (torch.bfloat16, shape) for key, shape in shard.items()})
        with (folder / name).open("wb") as file:
            file.write(head)
            os.truncate(file.fileno(), max(place.end for place in places.values()))
        weight_map |= dict.fromkeys(shard, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(SEVENTY))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder


def test_70b_is_planned_from_its_headers_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_70b(tmp_path / "big")
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    begin = time.process_time()  # the machine may be busy
    found = estimate(model, llmquant.make_recipe("x", flags={"eval_data": "builtin", "device": "cpu"}))
    assert time.process_time() - begin < 10
    assert found.source_bytes == 141_107_412_992
    kinds = {kind.name: kind for kind in found.kinds}
    down = kinds["model.layers.*.mlp.down_proj.weight"]
    assert (down.count, down.shape, down.action, down.bits, down.group_size) == (80, (8192, 28672), "quantized", 4, 128)
    assert kinds["lm_head.weight"].action == "copied"
    assert found.bits_per_weight == 4.125
    block = 855_654_400  # parameters
    stacks = [8192, 1024, 1024], [8192], [28672, 28672], [8192]  # q, k, v; o; gate, up; down
    assert found.memory == {
        "base": 600_000_000,
        "two copies of the largest block": 2 * 4 * block,
        "Hessian and drifts of the widest input": 8 * 28672**2 + 4 * 28672 * 8192,
        "largest embedding or head": 4 * 128256 * 8192,
        "activations of a batch": 2048 * 4 * (8 * 8192 + 4 * 28672),
        "curvature of the largest block": 8 * sum(len(rows) ** 2 for stack in stacks for rows in row_blocks(stack)),
        "a batch's activations for gradients": 2 * 2048 * 4 * (8 * 8192 + 4 * 28672),
        "streams in memory": 65536 * 8192 * 4,  # one lane; two are over 4 GB, and each calibration stream alone
        "paused forwards": 4_000_000_000 - 65536 * 8192 * 4,
    }
    assert found.disk["output"] > found.output_bytes
    assert found.seconds["Hessians and solving"] > 3600
    assert any("days on this CPU" in problem.message and not problem.blocking for problem in found.problems)
    assert found.exit_code == 0
    assert not (tmp_path / "big-W4A16-G128.partial").exists()


FLOOR = "noise floor's pass in float32, beyond the run's own"


def test_the_noise_floors_pass_is_in_the_bound(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """It holds a block, and the heads of two models, where the run's own pass holds Hessians and paused forwards."""
    folder, options = tiny_model("llama"), RunOptions(tmp_path / "out", max_ram="1KB")

    def bound(**flags: Any) -> dict[str, int]:
        recipe = llmquant.make_recipe("x", flags=FLAGS | {"curvature": "off"} | flags)
        return estimate(folder, recipe, options).memory

    exact, half = bound(), bound(dtype="bfloat16")
    assert FLOOR not in exact
    assert FLOOR not in bound(dtype="bfloat16", eval_data="none")
    block, outer, hessian = (
        exact["two copies of the largest block"],
        exact["largest embedding or head"],
        8 * 96**2 + 4 * 96 * 64,
    )
    activations = exact["activations of a batch"]
    assert half["two copies of the largest block"] == block // 2
    # in float32: a block, a head and that of the compute dtype, activations; less what the run has given back
    pass_ = block // 2 + outer + outer // 2 + activations
    own = block // 2 + hessian + outer // 2 + activations // 2 + half["paused forwards"]
    assert half[FLOOR] == pass_ - own > 0


def test_an_accelerators_memory_is_counted_apart(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, options = llmquant.make_recipe("x", flags=FLAGS), RunOptions(tmp_path / "out")
    here = estimate(tiny_model("llama"), recipe, options)
    assert here.device_memory == {}
    monkeypatch.setattr(draft, "pick_device", lambda device: torch.device("meta"))
    monkeypatch.setattr(skeleton, "find_sharing", lambda *inputs: Sharing(None, ()))  # nothing runs on it
    monkeypatch.setattr(estimate_module, "_time", lambda *arguments: None)
    monkeypatch.setattr(estimate_module, "physical_memory", lambda: 3)
    monkeypatch.setattr(estimate_module, "device_memory", lambda device: 4)
    there = estimate(tiny_model("llama"), llmquant.make_recipe("x", flags=FLAGS | {"dtype": "float32"}), options)
    on_the_way = {"largest tensors while they are read", "the next block as it is stored", "batches on their way"}
    assert there.memory.keys() == {"base", "streams in memory"} | on_the_way
    assert {name: size for name, size in there.memory.items() if name not in on_the_way} | there.device_memory == (
        here.memory
    )
    assert there.memory["largest tensors while they are read"] == 4 * 4096 * 64
    both = there.as_dict()
    assert both["device_memory_bytes"] == sum(there.device_memory.values()) > 0
    assert both["memory_bytes"] == sum(there.memory.values())
    said = [problem.message for problem in there.problems]
    assert any(message.startswith("memory: up to 0.6 GB; expected at most the machine's") for message in said)
    assert any(message.startswith("memory of meta: up to 0.0 GB; expected at most its 0.0 GB") for message in said)
    monkeypatch.setattr(streams, "device_memory", lambda device: 2**40)  # room for the streams, too
    roomy = estimate(tiny_model("llama"), llmquant.make_recipe("x", flags=FLAGS | {"dtype": "float32"}), options)
    assert roomy.memory.keys() == {"base"} | on_the_way
    assert roomy.memory | roomy.device_memory == there.memory | there.device_memory


def test_kinds_that_a_rule_sets_apart_stand_together(tiny_model: Callable[[str], Path]) -> None:
    flags = {"group_size": 32, "method": "rtn", "eval_data": "none", "rules": ["glob:*.1.mlp.*: keep"]}
    kinds = estimate(tiny_model("llama"), llmquant.make_recipe("x", flags=flags)).kinds
    names = [kind.name for kind in kinds]
    assert names.count("model.layers.*.mlp.up_proj.weight") == 2
    runs = [name for name, before in zip(names, ["", *names], strict=False) if name != before]
    assert len(runs) == len(set(runs))


def test_sizes_are_those_of_the_run(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = llmquant.make_recipe("x", flags=FLAGS | {"ignore": ["layers.0"]})
    found = estimate(tiny_model("llama"), recipe, RunOptions(tmp_path / "out"))
    assert found.problems == []
    report = llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "out")
    assert report.lanes["llmquant"]["bytes"] == found.output_bytes
    assert report.data["bits_per_weight"] == found.bits_per_weight
    assert report.lanes["original"]["bytes"] == found.source_bytes
    assert sum(kind.count for kind in found.kinds) == len(report.data["tensors"])
    files = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert files <= found.disk["output"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--group-size", "128"], 2, "not divisible by group size 128; use --group-size 32"),
        (["--ignore", "nowhere"], 2, "'nowhere' matches no tensor"),
        (["--calibration", "gone.txt"], 5, "--calibration gone.txt: no such file"),
        (["--calibration", "builtin:0.5,gone.txt:0.5"], 5, "--calibration gone.txt: no such file"),
        (["--calibration", "builtin:0.5,c4:0.6"], 5, "shares add up to 1.1"),
        (["--device", "cuda:99"], 2, "--device"),
        (["--seq-len", "4096"], 0, "--seq-len: 4096 is shortened to the model's context of 128"),
        (["--samples", "1", "--seq-len", "32"], 0, "fewer calibration tokens than the 96 inputs"),
        (["--out", "."], 7, "not empty and not written by llmquant"),
    ],
)
def test_what_would_end_a_run_is_listed(
    options: list[str],
    code: int,
    said: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").write_text("here")
    words = ["plan", "--model", str(tiny_model("llama")), "--group-size", "32", "--eval-data", "builtin", *options]
    assert main([*words, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert any(said in problem["message"] for problem in found["problems"]), found["problems"]
    assert [problem["blocking"] for problem in found["problems"]].count(True) == (code != 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["something"]


def test_a_quantized_checkpoint_is_one_problem(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    rtn = llmquant.make_recipe("x", flags={"group_size": 32, "method": "rtn", "eval_data": "none"})
    llmquant.quantize(tiny_model("llama"), rtn, tmp_path / "out")
    (problem,) = estimate(tmp_path / "out", rtn).problems
    assert "quantized already" in problem.message
    assert problem.exit_code == 4


def test_dry_run_prints_what_plan_prints(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate_module, "matmul_rate", lambda device, dtype: Rate(1e11, 1e11))  # however busy it is
    words = ["--model", str(tiny_model("llama")), "--group-size", "32", "--eval-data", "builtin"]
    shown = []
    for command in (["plan"], ["run", "--dry-run"]):
        assert main([*command, *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        shown.append([line for line in lines if not line.startswith(("time", "(time"))])
    assert shown[0] == shown[1]
    assert "model.layers.*.mlp.up_proj.weight" in "\n".join(shown[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_plan_time_measures_a_block_of_the_model(
    method: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts the tokens that go through the block: the machine may be busy."""
    tokens, forward = 1, Block.forward

    def counting(self: Block, hidden: torch.Tensor, *products: Any) -> torch.Tensor:
        nonlocal tokens
        tokens += hidden.shape[0] * hidden.shape[1]
        return forward(self, hidden, *products)

    def seconds(work: Callable[[], object], device: torch.device) -> float:
        begin = tokens
        work()
        return 1.0 + tokens - begin

    monkeypatch.setattr(Block, "forward", counting)
    monkeypatch.setattr(trial, "seconds", seconds)
    folder = tiny_model("llama")
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    recipe = llmquant.make_recipe(str(folder), flags=FLAGS | {"method": method})
    counted, measured = (estimate(folder, recipe, RunOptions(tmp_path / "out"), timed=timed) for timed in (False, True))
    assert not measured.problems
    assert measured.memory == counted.memory
    assert measured.seconds["solving"] > 0
    assert measured.seconds["evaluation"] > 0
    assert (measured.seconds["calibration"] > 0) == (method == "gptq")
    assert any("the first block measured" in line for line in measured.assumptions)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert not (tmp_path / "out").exists()


def test_a_trial_counts_blocks_tokens_and_lanes() -> None:
    measured = Trial(
        solving=2.0, calibration_token=0.01, evaluation_token=0.001, curvature_token=0.1, training_token=0.5
    )
    found = measured.seconds(3, Tokens(100, 1000, 10, 10), 4, 20, 10)
    assert found == {
        "curvature": 6.0,
        "allocation": 0.0,
        "recovery": 15.0,
        "solving": 6.0,
        "calibration": 3.0,
        "evaluation": 12.0,
    }


def test_time_needs_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", "demo", "--time"]) == 2
    assert "llmquant plan --time" in capsys.readouterr().err


def test_a_busy_machine_is_said_to_be(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds are those of an idle one; beside them stands what it takes while others are at work."""
    arguments = ["plan", "--model", str(model), "--group-size", "32", "--eval-data", "builtin"]
    shown = []
    for now in (100e9, 25e9):
        monkeypatch.setattr(estimate_module, "matmul_rate", lambda device, dtype, now=now: Rate(100e9, now))
        assert main([*arguments, "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
        assert main(arguments) == 0
        assert ("while this machine is as busy as it is now" in capsys.readouterr().out) == (now < 100e9)
    assert [one["busy"] for one in shown] == [1.0, 4.0]
    assert shown[0]["seconds"] == shown[1]["seconds"]


def test_a_product_takes_its_own_time_and_that_of_others() -> None:
    rate = matmul_rate(torch.device("cpu"), torch.float32, 256)
    assert rate.alone >= rate.now > 0
