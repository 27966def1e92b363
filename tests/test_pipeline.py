"""The whole way through, on every promised architecture, opened again by stock transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmquant
from llmquant.demo import DEMO
from llmquant.errors import LLMQuantError, SolveError, SourceError
from llmquant.formats import FORMATS, LinearSpec
from llmquant.quant.grid import QuantizedWeight, QuantScheme
from llmquant.run_dir.manifest import sha256
from llmquant.source.names import natural_key
from llmquant.source.resolve import open_source

SMALL: dict[str, Any] = {
    "group_size": 32,
    "samples": 4,
    "seq_len": 32,
    "eval_tokens": 128,
    "eval_seq_len": 64,
    "baselines": "none",
}


def run(model: Path | str, out: Path, **flags: Any) -> llmquant.Report:
    return llmquant.quantize(model, llmquant.make_recipe(str(model), flags=SMALL | flags), out)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def dequantized_model(source: Path, out: Path) -> Any:
    """The original in float32 with our codes and scales put in by hand."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    report, stored = json.loads((out / "report.json").read_text()), tensors(out)
    modules = {layer["name"] for layer in report["layers"]}
    rows = [row for row in report["tensors"] if row["action"] == "quantized"]
    assert len(rows) == len(modules)
    for row, module in zip(rows, sorted(modules, key=natural_key), strict=True):
        scheme = QuantScheme(row["bits"], row["group_size"], row["symmetric"])
        spec = LinearSpec(row["name"], module, "Linear", tuple(row["shape"]), torch.bfloat16, scheme)
        weight = FORMATS["compressed-tensors"].read(spec, stored.__getitem__)
        assert isinstance(weight, QuantizedWeight)
        linear = model.get_submodule(module)
        # Falcon's own subclass of nn.Linear is unpacked by transformers while loading, in the scales' dtype.
        unpacked = torch.float32 if type(linear) is torch.nn.Linear else torch.bfloat16
        linear.weight.data = weight.dequantize(unpacked).float()
    return model


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_stock_transformers_opens_the_output_and_computes_the_same(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = tiny_model(name), tmp_path / "out"
    report = run(source, out)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = loaded.eval()(ids).logits
        assert torch.equal(logits, dequantized_model(source, out)(ids).logits)
    # What the pass over the blocks measured is what the loaded model does.
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = (DEMO / "heldout.txt").read_text("utf-8")[:4000]
    windows = torch.tensor(tokenizer(text)["input_ids"][:128]).view(2, 64)
    with torch.no_grad():
        loss = torch.stack([loaded(w[None], labels=w[None]).loss for w in windows]).mean()
    rounded = 1e-3 if name == "falcon" else 1e-5
    assert report.lanes["llmquant"]["perplexity"] == pytest.approx(loss.exp().item(), rel=rounded)


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 32), (8, 32), (4, -1), (8, -1)])
def test_every_width_and_group_opens(bits: int, group: int, tmp_path: Path) -> None:
    source = tiny.build(tmp_path / "model", tiny.ARCHITECTURES["llama"], intermediate_size=128)
    run(source, tmp_path / "out", bits=bits, group_size=group, method="rtn")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, dequantized_model(source, tmp_path / "out")(ids).logits)


@pytest.mark.usefixtures("drawn")
def test_a_rerun_is_byte_identical_except_for_its_cost(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    outs = [tmp_path / name / "out" for name in ("a", "b")]
    for out in outs:
        out.parent.mkdir()
        run(tiny_model("llama"), out)
    names = [sorted(path.name for path in out.iterdir()) for out in outs]
    assert names[0] == names[1]
    differing = [name for name in names[0] if sha256(outs[0] / name) != sha256(outs[1] / name)]
    assert differing in ([], ["cost.json"])


def test_the_ledger_names_every_tensor_once_and_copies_are_exact(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = tiny_model("qwen2"), tmp_path / "out"
    report = run(source, out, ignore=["down_proj"])
    rows = {row["name"]: row for row in report.data["tensors"]}
    original, stored = tensors(source), tensors(out)
    assert rows.keys() == original.keys()
    assert len(rows) == len(report.data["tensors"])
    for name, row in rows.items():
        assert row["reason"]
        if row["action"] == "copied":
            assert stored[name].dtype == original[name].dtype
            assert torch.equal(stored[name].view(torch.uint8), original[name].view(torch.uint8))
    assert {row["reason"] for name, row in rows.items() if "down_proj" in name} == {"--ignore down_proj"}
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.down_proj" in ignored


def test_shards_and_their_index_load(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = tiny_model("llama"), tmp_path / "out"
    run(source, out, max_shard_size="40KB")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


def test_streams_in_files_change_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = llmquant.make_recipe("x", flags=SMALL)
    lines: list[str] = []
    for name, max_ram in (("memory", "1GB"), ("files", "1KB")):
        llmquant.quantize(tiny_model("mistral"), recipe, tmp_path / name / "out", max_ram=max_ram, log=lines.append)
    assert sum("kept in a file" in line for line in lines) == 4
    for file in ("model.safetensors", "report.json"):
        assert sha256(tmp_path / "memory" / "out" / file) == sha256(tmp_path / "files" / "out" / file)


def test_float32_and_float16_sources_keep_their_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16):
        source = tiny.build(tmp_path / f"{dtype}", tiny.ARCHITECTURES["llama"], dtype=dtype)
        out = tmp_path / f"{dtype}-out"
        run(source, out)
        stored = tensors(out)
        assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype
        assert stored["model.norm.weight"].dtype == dtype
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            ids = torch.arange(30)[None]
            assert torch.equal(loaded(ids).logits, dequantized_model(source, out)(ids).logits)


def test_untied_and_tied_heads_stay_what_they_were(tmp_path: Path) -> None:
    for tied in (True, False):
        source = tiny.build(tmp_path / f"{tied}", tiny.ARCHITECTURES["llama"], tie_word_embeddings=tied)
        run(source, tmp_path / f"{tied}-out")
        assert ("lm_head.weight" in tensors(tmp_path / f"{tied}-out")) is not tied


@pytest.mark.parametrize(("tokens", "window", "count"), [(300, 128, 2), (96, 96, 1), (31, 31, 1)])
def test_fewer_tokens_than_a_window_are_one_window(
    tokens: int, window: int, count: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of 2,048 tokens by default; the context of the model is 128."""
    lines: list[str] = []
    recipe = llmquant.make_recipe("x", flags={"method": "rtn", "eval_data": "builtin", "eval_tokens": tokens})
    for report in (
        llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "out", log=lines.append),
        llmquant.evaluate(tiny_model("llama"), recipe=recipe),
    ):
        evaluation = report.data["evaluation"]
        assert (evaluation["seq_len"], evaluation["n_tokens"]) == (window, count * window)
    said = f"evaluation: one window of the {tokens} tokens that are asked for"
    assert (said in lines) == (tokens < 128)


def test_side_files_are_carried_and_the_manifest_lists_everything(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model("llama"), source)
    (source / "LICENSE").write_text("a licence")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"never opened")
    run(source, out, method="rtn")
    written = {path.name for path in out.iterdir()}
    assert {"LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "README.md"} <= written
    assert "pytorch_model.bin" not in written
    files = json.loads((out / "manifest.json").read_text())["files"]
    assert files.keys() == written - {"manifest.json"}
    for name, entry in files.items():
        assert entry["sha256"] == (None if name == "cost.json" else sha256(out / name))


def test_rtn_reads_no_calibration_text_and_runs_no_forward(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmquant.model.skeleton import Skeleton

    def never(*args: object) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr(Skeleton, "record", never)
    source = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), source)
    for file in source.glob("tokenizer*"):
        file.unlink()
    report = run(source, tmp_path / "out", method="rtn", eval_data="none")
    assert report.lanes == {}
    assert report.data["calibration"] is None


def test_gptq_beats_rounding_on_the_demo_model(tmp_path: Path) -> None:
    flags = {
        "samples": 16,
        "seq_len": 256,
        "eval_tokens": 4096,
        "eval_seq_len": 256,
        "group_size": 128,
        "baselines": "rtn",
    }
    report = run("demo", tmp_path / "out", **flags)
    lanes = report.lanes
    assert 0 < lanes["llmquant"]["kl_mean"] < 0.7 * lanes["rtn"]["kl_mean"]
    assert lanes["original"]["kl_mean"] == 0
    assert report.data["bits_per_weight"] == 4.125


def test_conv1d_models_are_solved_and_evaluated(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    report = run(tiny_model("gpt2"), tmp_path / "out", format="fake", baselines="rtn")
    assert len(report.data["layers"]) == 12
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    text = (DEMO / "heldout.txt").read_text("utf-8")[:4000]
    windows = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"][:128]).view(2, 64)
    with torch.no_grad():
        loss = torch.stack([loaded(w[None], labels=w[None]).loss for w in windows]).mean()
    # bf16 weights on disk, float32 in the lane: the products q * s are rounded once more
    assert report.lanes["llmquant"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-3)


def test_stories260k_names_the_layers_no_group_divides_and_works_by_channel(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "stories260k"
    with pytest.raises(LLMQuantError, match=r"down_proj \(172\).*--group-size -1"):
        run(source, tmp_path / "out")
    report = run(source, tmp_path / "out", group_size=-1, eval_tokens=2048)
    assert report.lanes["llmquant"]["kl_mean"] < 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        ids = torch.arange(60)[None]
        assert torch.equal(loaded(ids).logits, dequantized_model(source, tmp_path / "out")(ids).logits)


def test_a_layer_without_a_definite_hessian_follows_the_policy(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmquant.quant.solvers import gptq

    monkeypatch.setattr(gptq, "factor", lambda *arguments: None)
    with pytest.raises(SolveError, match=r"layers\.0.*on-bad-layer rtn"):
        run(tiny_model("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    report = run(tiny_model("llama"), tmp_path / "out", on_bad_layer="rtn")
    assert all("on-bad-layer rtn" in layer["notes"][0] for layer in report.data["layers"])


def test_weights_that_turn_bad_during_the_run_end_it_with_what_is_finished_kept(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmquant import pipeline

    source = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), source)
    monkeypatch.setattr(pipeline, "refuse_damaged_weights", lambda source: None)
    info = open_source(source).tensors["model.layers.2.mlp.up_proj.weight"]
    with (source / info.file).open("r+b") as file:
        file.seek(info.start)
        sound = file.read(2)
        file.seek(info.start)
        file.write(b"\xff\xff")
    flags = {"curvature": "off"}  # which goes through all blocks before the first one is solved
    with pytest.raises(SourceError, match=r"layers\.2\.mlp\.up_proj"):
        run(source, tmp_path / "out", **flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.partial"]
    with (source / info.file).open("r+b") as file:
        file.seek(info.start)
        file.write(sound)
    run(source, tmp_path / "out", **flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
