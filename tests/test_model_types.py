"""Every model type of transformers passes or is refused in one line; none crashes, and none is quietly wrong.

The quick tests take one type of each mechanism. `pytest -m soak` takes all of them, and compares with the table that
`python eval/model_types.py --write` makes.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import transformers
from contract import table
from contract.build import build, types, variants
from contract.check import _ROUTER, _TOWER, Outcome, check, judged, quantized
from contract.overrides import OVERRIDES
from contract.reference import tensors
from contract.uploads import UPLOADS
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MECHANISMS = {
    "dense": "llama",
    "experts, one tensor each on disk": "qwen3_moe",
    "experts, fused on disk": "llama4_text",
    "hybrid": "qwen3_5_text",
    "multimodal": "llava",
    "multimodal with experts": "deepseek_ocr2",
    "state shared between blocks": "gemma4_text",
    "tensors merged while loading": "bailing_hybrid",
    "Conv1D": "gpt2",
}
VERSION, KNOWN = table.load()
ALL = [*types(), *variants(), *UPLOADS]


def judge(name: str, folder: Path) -> Outcome:
    outcome = check(name, folder)
    assert not outcome.is_bug, outcome
    known = KNOWN.get(name, {}).get("result")
    if known not in (None, "crash", "wrong") and transformers.__version__ == VERSION:
        assert outcome.result == known, outcome
    return outcome


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_one_type_of_each_mechanism(mechanism: str, tmp_path: Path) -> None:
    judge(MECHANISMS[mechanism], tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", ALL)
def test_type(name: str, tmp_path: Path) -> None:
    judge(name, tmp_path)


def test_what_is_wrong_is_noticed(tmp_path: Path) -> None:
    """An output with every fault that a packed checkpoint can have: each is named."""
    source = build("llama", tmp_path / "source")
    report = quantized(source, tmp_path / "out")
    stored = tensors(tmp_path / "out")
    layer = "model.layers.{}.{}"
    stored[layer.format(0, "mlp.up_proj.weight_scale")] *= 3
    stored[layer.format(1, "mlp.down_proj.weight_packed")] ^= 0x1111
    stored[layer.format(1, "input_layernorm.weight")] *= 2
    del stored[layer.format(2, "post_attention_layernorm.weight")]
    save_file(stored, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    outcome = judged("llama", source, tmp_path / "out", report)
    assert outcome.result == "wrong"
    for said in (
        "verify: model.safetensors",
        "the dequantized copy: 1 missing keys (model.layers.2.post_attention_layernorm.weight)",
        "the output: 1 missing keys",
        "3 weights are not the original's (model.layers.0.mlp.up_proj.weight: error 4",  # and two norms
        "KL: 0.0",
    ):
        assert said in outcome.cause


def test_routers_and_towers_are_known_by_name() -> None:
    for name in ("mlp.gate.weight", "mlp.router.linear.weight", "mlp.shared_expert_gate.weight", "router_gate.weight"):
        assert _ROUTER.search(f"model.layers.0.{name}")
    for name in ("mlp.gate_proj.weight", "mlp.experts.gate_up_proj", "self_attn.gate.weight", "mlstm.igate.weight"):
        assert not _ROUTER.search(f"model.layers.0.{name}")
    for name in ("model.visual.blocks.0.attn.qkv.weight", "vision_tower.layers.0.fc1.weight", "mtp.fc.weight"):
        assert _TOWER.search(name)
    assert not _TOWER.search("model.language_model.layers.0.mlp.up_proj.weight")


def test_every_variant_is_of_a_type() -> None:
    assert {name.partition(":")[0] for name in OVERRIDES} <= set(CONFIG_MAPPING)
    assert {upload.base for upload in UPLOADS.values()} <= set(ALL)


@pytest.mark.skipif(not table.DOCS.exists(), reason="no table of all types yet: python eval/model_types.py --write")
def test_docs_show_the_table() -> None:
    assert table.DOCS.read_text("utf-8") == table.docs(VERSION, KNOWN), "run python eval/model_types.py --write"
    if transformers.__version__ == VERSION:
        assert set(KNOWN) == set(ALL)
    assert not [name for name, row in KNOWN.items() if row["result"] in ("crash", "wrong")]


def row(result: str, cause: str = "", kind: str = "dense", share: float = 1.0) -> dict[str, object]:
    return {"kind": kind, "result": result} | ({"cause": cause} if cause else {"share": share})


ROWS = {
    "llama": row("passes"),
    "qwen3": row("passes"),
    "gpt2": row("refused", "FormatError: h.N.attn.c_attn: compressed-tensors cannot hold Conv1D layers"),
    "mixtral": row("passes", kind="MoE"),
    "musicgen": row("not built", "AttributeError: no dropout", kind="encoder"),
    "bert": row("refused", "SourceError: config.json: is no causal LM", kind="encoder"),
    "llama4_text:dense": row("refused", "SourceError: a | b"),
    "llama+shards": row("passes"),
}


def test_docs_count_by_kind_and_give_the_cause() -> None:
    page = table.docs("5.23.0", ROWS)
    assert "| Dense | 3 | 2 | 0 | 1 | 0 |" in page
    assert "| Mixtures of experts | 1 | 1 | 0 | 0 | 0 |" in page
    assert "Pass: `llama`, `qwen3`." in page
    assert "| `llama4_text:dense` | refused | SourceError: a \\| b |" in page
    counted = "3 of 4 types of transformers 5.23.0 that generate text pass; 1 are refused: 1 for Conv1D layers."
    assert f"{counted} Not counted: 2 encoders" in page
    buggy = table.docs("5.23.0", ROWS | {"qwen3": row("wrong", "the output: 3 missing keys")})
    assert "| `qwen3` | wrong | the output: 3 missing keys |" in buggy
    assert "; 1 are bugs" in buggy


def test_the_script_goes_on_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"name": "phi", "seconds": 1.0} | row("passes")) + "\n", "utf-8")
    monkeypatch.setattr(table, "FILE", tmp_path / "outcomes.json")
    monkeypatch.setattr(table, "DOCS", tmp_path / "models.md")
    script = Path(__file__).parents[1] / "eval" / "model_types.py"
    command = ["--results", str(results), "--only", "phi", "roberta-prelayer*", "--write"]
    monkeypatch.setattr(sys, "argv", [str(script), *command])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    said = capfd.readouterr().out
    assert "1 of 2 are known" in said
    assert "models.md is not" in said
    assert [json.loads(line)["name"] for line in results.read_text().splitlines()] == ["phi", "roberta-prelayernorm"]
    version, rows = table.load()
    assert version == transformers.__version__
    assert rows["phi"] == row("passes")
    assert rows["roberta-prelayernorm"]["kind"] == "encoder"
