"""A finished checkpoint in every other format: the same codes and scales, without the original model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import llmquant
from llmquant.checkpoint import PackedSource, open_checkpoint
from llmquant.cli.app import main
from llmquant.errors import FormatError, OutputError, RecipeError, SourceError
from llmquant.export import export
from llmquant.formats import FORMATS
from llmquant.output.verify_gguf import read_gguf
from llmquant.recipe import FORMAT_NAMES
from llmquant.run_dir.manifest import sha256
from llmquant.source.resolve import open_source

FLAGS: dict[str, Any] = {"group_size": 32, "method": "rtn", "baselines": "none", "eval_tokens": 128, "eval_seq_len": 64}


ASYMMETRIC_MLX: dict[str, Any] = {"format": "mlx", "symmetric": False}


def quantized(model: Path | str, out: Path, **flags: Any) -> Path:
    llmquant.quantize(model, llmquant.make_recipe("x", flags=FLAGS | {"eval_data": "builtin"} | flags), out)
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized("demo", tmp_path_factory.mktemp("finished") / "q")


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "mlx", "fake"])
def test_an_export_is_byte_for_byte_what_a_run_writes(name: str, finished: Path, tmp_path: Path) -> None:
    direct, out = quantized("demo", tmp_path / "direct", format=name), export(finished, name, tmp_path / "out")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert sha256(out / file) == sha256(direct / file), file
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (out, direct))
    assert ours.pop("exported_from") == "compressed-tensors"
    assert ours["bits_per_weight"] == theirs["bits_per_weight"]
    assert ours["recipe"] == theirs["recipe"]
    if name != "fake":  # a run judges what it writes: weights that were rounded to the model's dtype once more
        assert ours["evaluation"] == theirs["evaluation"]


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_there_and_back_again_is_byte_identical(name: str, finished: Path, tmp_path: Path) -> None:
    back = export(export(finished, name, tmp_path / name), "compressed-tensors", tmp_path / "back")
    for file in ("model.safetensors", "config.json"):
        assert sha256(back / file) == sha256(finished / file)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_reports_of_exports_follow_the_schema(name: str, finished: Path, tmp_path: Path) -> None:
    report = json.loads((export(finished, name, tmp_path / "out") / "report.json").read_text())
    schema = json.loads((Path(__file__).parents[1] / "eval" / "report.schema.json").read_text())
    jsonschema.validate(report, schema)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- {name}" in card
    assert "Measured on the compressed-tensors checkpoint whose codes and scales these are." in card


def test_every_format_can_be_named() -> None:
    assert set(FORMAT_NAMES) == set(FORMATS)


def test_a_model_with_biases_untied_head_and_ignored_linears(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = quantized(tiny_model("qwen2"), tmp_path / "q", ignore=["down_proj", r"layers\.0\.self_attn\.q_proj"])
    direct = quantized(tiny_model("qwen2"), tmp_path / "d", ignore=["down_proj", r"layers\.0\.self_attn\.q_proj"])
    found = export(out, "compressed-tensors", tmp_path / "again")
    assert sha256(found / "model.safetensors") == sha256(direct / "model.safetensors")
    assert sha256(found / "config.json") == sha256(direct / "config.json")
    with pytest.raises(FormatError, match=r"^self_attn\.q_proj: is quantized in some blocks and dense in others"):
        export(out, "gptq", tmp_path / "gptq")
    assert len(open_checkpoint(export(out, "awq", tmp_path / "awq")).packed) == 3 * 6 - 1  # type: ignore[attr-defined]


def test_asymmetric_awq_becomes_gguf_and_fake_but_not_gptq(tmp_path: Path) -> None:
    out = quantized("demo", tmp_path / "q", symmetric=False, format="awq", eval_data="none")
    assert list(export(out, "gguf", tmp_path / "gguf").glob("*.gguf")) == [tmp_path / "gguf" / "model-Q4_1.gguf"]
    dense, packed = open_source(export(out, "fake", tmp_path / "fake")), open_checkpoint(out)
    assert isinstance(packed, PackedSource)
    for name in packed.packed:
        assert torch.equal(dense.read(name), packed.read(name).bfloat16())
    with pytest.raises(FormatError, match="asymmetric grid in gptq"):
        export(out, "gptq", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


def test_what_cannot_be_exported_is_refused(finished: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not quantized"):
        export(tiny_model("llama"), "gptq", tmp_path / "out")
    with pytest.raises(FormatError, match="'exl2'; expected one of compressed-tensors"):
        export(finished, "exl2", tmp_path / "out")
    with pytest.raises(OutputError, match="already holds a checkpoint"):
        export(finished, "gptq", finished)
    foreign = tmp_path / "foreign"
    shutil.copytree(finished, foreign)
    (foreign / "report.json").unlink()
    with pytest.raises(SourceError, match=r"no report\.json"):
        export(foreign, "gptq", tmp_path / "out")
    mlx = export(finished, "mlx", tmp_path / "mlx")
    with pytest.raises(SourceError, match="no integer grid"):
        export(mlx, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(finished), "--format", "gguf", "--out", str(out), "--quiet"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "manifest.json",
        "model-Q4_0.gguf",
        "report.json",
    ]
    assert main(["export", str(finished), "--format", "gguf", "--out", str(out)]) == 7


def test_several_formats_from_one_run(finished: Path, tmp_path: Path) -> None:
    out = quantized("demo", tmp_path / "out", format="compressed-tensors, gguf,gptq,mlx")
    assert sha256(out / "model.safetensors") == sha256(finished / "model.safetensors")
    for name in ("gptq", "mlx"):
        alone = export(finished, name, tmp_path / name)
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            assert sha256(out / name / file) == sha256(alone / file), file
    assert [path.name for path in (out / "gguf").iterdir()] == ["model-Q4_0.gguf"]
    manifest, report = (json.loads((out / f"{name}.json").read_text()) for name in ("manifest", "report"))
    assert "gguf/model-Q4_0.gguf" in manifest["files"]
    assert report["recipe"]["exports"] == ["gguf", "gptq", "mlx"]
    assert "`gguf/`, `gptq/`, `mlx/`" in (out / "README.md").read_text()


@pytest.mark.parametrize(("bits", "symmetric", "kind"), [(4, True, "Q4_0"), (8, True, "Q8_0"), (4, False, "Q4_1")])
def test_gguf_alone_is_byte_for_byte_the_export(bits: int, symmetric: bool, kind: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"bits": bits, "symmetric": symmetric}
    first = "compressed-tensors" if symmetric else "awq"
    both = quantized("demo", tmp_path / "out" / "demo", format=f"{first},gguf", **flags)
    alone = quantized("demo", tmp_path / "demo", format="gguf", **flags)
    name = f"model-{kind}.gguf"
    ours, theirs = read_gguf(alone / name), read_gguf(both / "gguf" / name)
    assert {**ours[0], "general.name": ""} == {**theirs[0], "general.name": ""}
    for tensor, place in theirs[1].items():
        assert np.array_equal(ours[1][tensor].raw(), place.raw()), tensor
    files = {path.name for path in alone.iterdir()}
    assert files == {name, "report.json", "cost.json", "manifest.json", "README.md", "report.html"}
    report = json.loads((alone / "report.json").read_text())
    assert report["recipe"]["format"] == "gguf"
    assert report["bits_per_weight"] == bits + (16 if symmetric else 32) / 32


def test_a_tied_head_is_left_out_of_gguf_and_the_ledger_says_so(tmp_path: Path) -> None:
    model = tiny.build(tmp_path / "model", tiny.ARCHITECTURES["llama"], tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors")
    out = quantized(model, tmp_path / "out", format="gguf")
    rows = {row["name"]: row for row in json.loads((out / "report.json").read_text())["tensors"]}
    assert rows.keys() == tensors.keys()
    assert (rows["lm_head.weight"]["action"], rows["lm_head.weight"]["reason"]) == ("left out", "tied to the embedding")
    assert "lm_head.weight" not in json.loads((out / "manifest.json").read_text())["tensors"]
    assert "output.weight" not in read_gguf(out / "model-Q4_0.gguf")[1]


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("llama", {"format": "gguf"}),
        ("llama", {"format": "gguf", "symmetric": False}),
        ("llama", ASYMMETRIC_MLX),
        ("gpt2", {"format": "gguf"}),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    model: str, flags: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """With the permuted rows of GGUF, its Conv1D layers, and the biases that MLX rounds, read back from the disk."""
    flags = flags | {"method": "gptq", "samples": 4, "seq_len": 32, "eval_data": "builtin", "eval_tokens": 128}
    flags |= {"eval_seq_len": 64, "baselines": "none", "group_size": 32}
    recipe = llmquant.make_recipe("x", flags=flags)
    llmquant.quantize(tiny_model(model), recipe, tmp_path / "whole")

    def stop(line: str) -> None:
        if line.startswith("block 2/3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmquant.quantize(tiny_model(model), recipe, tmp_path / "out", log=stop)
    lines: list[str] = []
    llmquant.quantize(tiny_model(model), recipe, tmp_path / "out", log=lines.append)
    assert "going on after block 2 of 3" in lines
    for file in (path.name for path in (tmp_path / "whole").iterdir()):
        if file not in ("cost.json", "manifest.json", "README.md", "report.html"):
            assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_asymmetric_mlx_is_judged_as_it_is_loaded(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    flags = ASYMMETRIC_MLX | {"method": "rtn", "baselines": "none", "group_size": 32}
    flags |= {"eval_data": "builtin", "eval_tokens": 128, "eval_seq_len": 64}
    recipe = llmquant.make_recipe("x", flags=flags)
    run = llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "out")
    found = llmquant.evaluate(tmp_path / "out", reference=tiny_model("llama"), recipe=recipe)
    assert found.lanes["out"]["kl_mean"] == pytest.approx(run.lanes["llmquant"]["kl_mean"], rel=1e-6)
    assert main(["verify", str(tmp_path / "out"), "--source", str(tiny_model("llama"))]) == 0


@pytest.mark.parametrize(
    ("name", "flags", "error", "message"),
    [
        ("gguf,gptq", {}, RecipeError, "'gguf' first"),
        ("gguf", {"bits": 3}, FormatError, "3 bits in gguf"),
        ("fake,gguf", {}, RecipeError, "'fake' first"),
        ("gptq,exl2", {}, RecipeError, "'exl2'"),
        ("gptq,gptq", {}, RecipeError, "'gptq'; expected other ones"),
        ("compressed-tensors,gguf", {"bits": 3}, FormatError, "3 bits in gguf"),
        ("compressed-tensors,mlx", {"group_size": -1}, FormatError, "group size -1 in mlx"),
    ],
)
def test_formats_that_do_not_go_together_are_refused_before_the_work(
    name: str, flags: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        quantized("demo", tmp_path / "out", format=name, **flags)
    assert not list(tmp_path.iterdir())


def test_a_model_that_gguf_does_not_know_is_refused_before_the_work(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match="model type 'olmo2'"):
        quantized(tiny_model("olmo2"), tmp_path / "out", format="compressed-tensors,gguf")
    assert not list(tmp_path.iterdir())
