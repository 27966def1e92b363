"""Weights that the model's class does not know, such as MTP heads: copied, or quantized where a rule names them."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.errors import RecipeError
from llmquant.output.check import verify_folder
from llmquant.recipe import make_recipe

RULE = "glob:mtp.*: bits=8, method=rtn"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.build(tmp_path_factory.mktemp("mtp") / "model", tiny.ARCHITECTURES["qwen3"])
    tensors = load_file(folder / "model.safetensors")
    head = {name.replace("model.", "mtp."): t.clone() for name, t in tensors.items() if ".layers.0." in name}
    head["mtp.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | head, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(source: Path, out: Path, *rules: str) -> llmquant.Report:
    return llmquant.quantize(source, make_recipe(str(source), flags=tiny.SMALL | {"rules": list(rules)}), out=out)


def test_a_head_is_copied_and_ignored(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert any("mtp" in entry for entry in ignore)
    assert "mtp.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_rule_quantizes_it_and_the_model_opens_as_before(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", RULE)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "mtp.layers.0.mlp.up_proj.weight_packed" in stored
    assert "mtp.embed_tokens.weight" in stored
    layers = [layer for layer in report.facts.layers if layer.name.startswith("mtp.")]
    assert len(layers) == 7
    assert all(layer.weight_error < 1e-4 and layer.loss is None for layer in layers)
    assert verify_folder(tmp_path / "out", source).quantized == 4 * 7
    run(source, tmp_path / "plain")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        ours, plain = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
            for name in ("out", "plain")
        )
    assert torch.equal(ours, plain)


def test_a_method_that_wants_text_is_refused_for_it(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"mtp\.layers\.0.*does not run; expected .*; add method=rtn to the rule"):
        run(source, tmp_path / "out", "glob:mtp.*: bits=8")
