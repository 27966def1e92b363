"""A config that ties the head to the embedding beside a head of its own: the tensors decide, for every reader."""

import json
from pathlib import Path

import pytest
import torch
from gguf_files import gguf_of
from peers import LlamaCpp, dequantized, divergence, log_probs
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, build
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.source.base import Source
from llmquant.source.files import SINGLE
from llmquant.source.resolve import open_source

FLAGS = {"group_size": 32, "method": "rtn", "eval_data": "builtin", "eval_tokens": 256, "eval_seq_len": 64}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(
        tmp_path_factory.mktemp("untied") / "m",
        ARCHITECTURES["llama"],
        tie_word_embeddings=True,
        initializer_range=0.2,
        max_position_embeddings=512,
    )
    tensors = load_file(folder / SINGLE)
    head = 0.1 * torch.randn(4096, 64, generator=torch.Generator().manual_seed(5))
    save_file(tensors | {"lm_head.weight": head.to(torch.bfloat16)}, folder / SINGLE, {"format": "pt"})
    return folder


def test_the_config_follows_the_tensors(untied: Path, tmp_path: Path) -> None:
    source = open_source(untied)
    assert source.untied
    assert source.config["tie_word_embeddings"] is False
    stock = AutoModelForCausalLM.from_pretrained(untied)
    assert torch.equal(stock.get_output_embeddings().weight, source.read("lm_head.weight"))
    tied = build(tmp_path / "tied", ARCHITECTURES["llama"], tie_word_embeddings=True)
    assert not open_source(tied).untied
    assert open_source(tied).config["tie_word_embeddings"] is True
    tensors = load_file(tied / SINGLE)
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(twice, tied / SINGLE, {"format": "pt"})  # as old converters left it
    assert open_source(tied).config["tie_word_embeddings"] is True
    assert Source("owner/name", tied, "a commit").config["tie_word_embeddings"] is False


@pytest.mark.parametrize("format_name", ["compressed-tensors", "mlx", "gptq", "gguf"])
def test_every_format_holds_the_head_that_was_measured(format_name: str, untied: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = llmquant.make_recipe("x", flags=FLAGS | {"format": format_name})
    report = llmquant.quantize(untied, recipe, tmp_path / "out", log=lines.append)
    assert any("a head of its own is stored: that one is used" in line for line in lines)
    measured = report.lanes["llmquant"]["kl_mean"]
    again = llmquant.evaluate(tmp_path / "out", reference=untied, recipe=recipe)
    (lane,) = (figures for name, figures in again.lanes.items() if name not in ("original", untied.name))
    assert lane["kl_mean"] == pytest.approx(measured, rel=1e-3)
    if format_name != "gguf":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["tie_word_embeddings"] is False


def test_llama_cpp_uses_the_same_head(untied: Path, tmp_path: Path) -> None:
    recipe = llmquant.make_recipe("x", flags=FLAGS | {"eval_data": "none"})
    llmquant.quantize(untied, recipe, tmp_path / "out")
    ids = torch.randint(5, 4096, (40,), generator=torch.Generator().manual_seed(1))
    ours = log_probs(dequantized(untied, tmp_path / "out"), ids)
    llama = LlamaCpp(gguf_of(tmp_path / "out"))
    at = [10, 20, 39]
    theirs = torch.stack([llama.log_probs(ids[: t + 1].tolist(), 4096) for t in at])
    assert divergence(ours[at], theirs) < 0.02
