"""Infinite limits in a config, as transformers 5 and 4 write them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

import llmquant
from llmquant.errors import SourceError

SMALL = {"method": "rtn", "eval_data": "builtin", "eval_tokens": 128, "eval_seq_len": 32, "format": "fake"}


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("mamba2") / "m"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2}
    Mamba2ForCausalLM(Mamba2Config(vocab_size=4096, chunk_size=16, **shape)).save_pretrained(folder)
    for file in tiny_model("llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("form", ["as transformers 5", "as transformers 4"])
def test_an_infinite_limit_is_read_and_written_as_json(form: str, mamba2: Path, tmp_path: Path) -> None:
    config = json.loads((mamba2 / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    if form == "as transformers 4":
        (mamba2 / "config.json").write_text(json.dumps(config | {"time_step_limit": [0.0, float("inf")]}))
        assert "Infinity]" in (mamba2 / "config.json").read_text()
    report = llmquant.quantize(mamba2, llmquant.make_recipe("x", flags=SMALL), tmp_path / "out")
    assert 0 < report.lanes["llmquant"]["kl_mean"] < 1
    written = json.loads((tmp_path / "out" / "config.json").read_text(), parse_constant=pytest.fail)
    assert written["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tuple(stock.config.time_step_limit) == (0.0, float("inf"))
    (mamba2 / "config.json").write_text(json.dumps(config))


def test_other_infinities_are_refused(mamba2: Path, tmp_path: Path) -> None:
    config = json.loads((mamba2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": float("inf")}))
    (tmp_path / "model.safetensors").write_bytes((mamba2 / "model.safetensors").read_bytes())
    recipe = llmquant.make_recipe("x", flags=SMALL | {"eval_data": "none"})
    with pytest.raises(SourceError, match="layer_norm_epsilon inf; expected a finite number"):
        llmquant.quantize(tmp_path, recipe, tmp_path / "out")
