"""Our own GGUF files read back, against the checkpoints they were made from; and the tokenizers in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import (
    ARCHITECTURES,
    LLAMA3,
    TEXTS,
    built,
    few,
    foreign,
    gguf_of,
    quantized,
    splitter,
    stored,
    with_tokenizer,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llmquant
from llmquant.checkpoint import PackedSource, bits_per_weight, open_checkpoint
from llmquant.cli.app import main
from llmquant.demo import DEMO
from llmquant.errors import CalibrationError
from llmquant.gguf.model import GGUFModel
from llmquant.text.tokenizer import load_tokenizer

LINEAR_BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


# -- our own files -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "extra", "flags"),
    [
        *((name, {}, {}) for name in ARCHITECTURES),
        ("llama", {"rope_parameters": LLAMA3}, {"bits": 8}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, {}),
        ("gemma3", {"rope_parameters": LINEAR_BY_KIND}, {}),
        ("qwen3", {"attention_bias": True}, {"symmetric": False, "format": "awq"}),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "rope_type": "default"}}, {}),
    ],
)
def test_a_file_is_the_checkpoint_it_was_made_from(
    name: str, extra: dict[str, Any], flags: dict[str, Any], tmp_path: Path
) -> None:
    """Every tensor, everything that llama.cpp is told, and the figures of an evaluation."""
    original = built(tmp_path / "m", name, **extra)
    out = quantized(original, tmp_path / "q", **flags)
    file = gguf_of(out)
    ours, read = open_checkpoint(out), open_checkpoint(file.parent)
    assert isinstance(read, PackedSource)
    exact = flags.get("symmetric", True)
    for key in read.tensors:
        mine, theirs = ours.read(key).float(), read.read(key)
        if name.startswith("gemma") and "norm" in key:  # what is multiplied with: 1 + w in float32
            mine, theirs = 1 + mine, 1 + theirs
        if exact or key not in read.packed:
            assert torch.equal(mine, theirs.float()), key
        else:  # minima are rounded to fp16
            torch.testing.assert_close(mine, theirs.float(), rtol=0, atol=2e-3 * float(mine.abs().max()))
    left_out = {"lm_head.weight"} if read.config["tie_word_embeddings"] else set()
    assert ours.tensors.keys() - left_out == read.tensors.keys()

    metadata = stored(file).header.metadata
    config = AutoConfig.for_model(**{"model_type": read.config["model_type"], **read.config}).to_dict()
    again = GGUFModel(config).metadata("", 0, 4096)
    assert {k: v for k, v in again.items() if not k.startswith("general.")}.items() <= metadata.items()

    report = llmquant.compare([out, file.parent], reference=original, recipe=few())
    of_ours, of_file = (report.lanes[lane] for lane in ("q", "q-gguf"))
    rel = 1e-12 if exact else 2e-2
    assert of_file["kl_mean"] == pytest.approx(of_ours["kl_mean"], rel=rel) != 0
    assert of_file["bits_per_weight"] == {True: 4.5, False: 5.0}[exact] if not flags.get("bits") else 8.5
    assert of_file["bytes"] == pytest.approx(file.stat().st_size, rel=0.2)


def test_the_command_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`llmquant eval --model demo-GGUF --reference demo`, for a tiny demo, and what inspect says of it."""
    demo = built(tmp_path / "demo", "llama")
    out = quantized(demo, tmp_path / "demo-GGUF", format="gguf")
    options = ["--data", "builtin", "--tokens", "128", "--seq-len", "64", "--quiet"]
    report = tmp_path / "report.json"
    assert main(["eval", "--model", str(out), "--reference", str(demo), *options, "--json", str(report)]) == 0
    assert "demo-GGUF" in capsys.readouterr().out
    lane = json.loads(report.read_text())["evaluation"]["lanes"]["demo-GGUF"]
    assert 0 < lane["kl_mean"] < 1
    assert lane["bits_per_weight"] == 4.5
    assert main(["inspect", str(out)]) == 0
    assert main(["inspect", str(out), "--layer", "model.layers.0.mlp.up_proj"]) == 0
    said = capsys.readouterr().out
    assert "demo-GGUF: llama" in said
    assert "4.500 bits per weight in the quantized linears" in said
    assert "codes: entropy" in said


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3"])
def test_transformers_unpacks_the_same_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the gguf package")
    file = gguf_of(quantized(built(tmp_path / "m", name), tmp_path / "q"))
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    source = open_checkpoint(file)
    for key in source.tensors:
        assert torch.equal(source.read(key).float(), theirs[key]), key


def test_a_file_of_16_bit_weights_can_be_a_reference(tmp_path: Path) -> None:
    """As llama.cpp's converter writes it, with its tokenizer."""
    table = json.loads((DEMO / "tokenizer.json").read_text("utf-8"))
    special = {item["id"] for item in table["added_tokens"]}

    def vocabulary(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(table["model"]["vocab"], key=table["model"]["vocab"].get))
        writer.add_token_types([3 if index in special else 1 for index in range(4096)])
        writer.add_token_merges([" ".join(merge) for merge in table["model"]["merges"]])
        writer.add_bos_token_id(0)
        writer.add_add_bos_token(False)

    original = built(tmp_path / "m", "llama", dtype=torch.float16)
    file = foreign(tmp_path / "f16", original, {}, vocabulary)
    out = quantized(original, tmp_path / "q")
    source = open_checkpoint(file)
    assert not isinstance(source, PackedSource)
    assert bits_per_weight(source) == pytest.approx(16, rel=0.01)
    lanes = [
        llmquant.evaluate(out, reference=reference, recipe=few()).lanes["q"]["kl_mean"]
        for reference in (original, file)
    ]
    assert lanes[0] == pytest.approx(lanes[1], rel=1e-12)


# -- tokenizers ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change",
    [splitter(r"\p{N}", ignore_merges=False), splitter(r"\p{N}{1,3}", ignore_merges=True), lambda table: None],
    ids=["qwen2", "llama-bpe", "gpt-2"],
)
def test_the_tokenizer_in_a_file_gives_the_ids_of_the_original(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    source = with_tokenizer(tmp_path / "m", change)
    file = gguf_of(quantized(source, tmp_path / "q"))
    found, wanted = load_tokenizer(open_checkpoint(file)), AutoTokenizer.from_pretrained(source)
    for text in [*TEXTS, "", "<s>x</s> <unk>", (DEMO / "heldout.txt").read_text("utf-8")[:20_000]]:
        assert found(text)["input_ids"] == wanted(text)["input_ids"], text
        plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (found, wanted)]
        assert plain[0] == plain[1], text
        assert found.decode(plain[0]) == wanted.decode(plain[1])


def test_an_unknown_splitter_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "m", splitter(r"\p{N}{1,2}", ignore_merges=False))
    file = gguf_of(quantized(source, tmp_path / "q"), gguf_pre="tekken")
    with pytest.raises(
        CalibrationError, match=r"the splitter 'tekken'; expected .*; name the original with --reference"
    ):
        llmquant.evaluate(file, recipe=few())
    assert llmquant.evaluate(file, reference=source, recipe=few()).lanes
