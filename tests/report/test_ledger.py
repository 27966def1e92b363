"""What the ledger adds up to: most of a model in 16 bit is never a success without a word."""

import json
from pathlib import Path

import pytest
import tiny

import llmquant
from llmquant.cli.app import main
from llmquant.report.ledger import TensorRow, mostly_dense
from llmquant.report.verdict import health, verdict

# Its experts are rows of two embeddings, which no format holds.
DOGE = tiny.LLAMA | {"is_moe": True, "num_experts": 1024, "num_experts_per_tok": 2, "num_hidden_layers": 2}


def row(name: str, reason: str, shape: tuple[int, ...]) -> TensorRow:
    if reason:
        return TensorRow(name, "copied", reason, "bfloat16", shape)
    return TensorRow(name, "quantized", "linear layer", "bfloat16", shape, bits=4, group_size=32, symmetric=True)


def test_less_than_half_is_said_with_the_largest_kinds_and_why() -> None:
    quantized = [row(f"h.{i}.up.weight", "", (4, 32)) for i in range(3)]
    outside = [
        row("wte.weight", "outside the decoder blocks (Embedding)", (512, 64)),
        row("mtp.fc.weight", "not a parameter of the model class", (64, 64)),
    ]
    half = [row("h.0.experts", "not a linear layer (Experts)", (3, 4, 32))]
    assert mostly_dense([*quantized, *outside, *half]) == []
    more = [row(f"h.{i}.down.weight", "--ignore down", (2, 2)) for i in range(2)]
    assert mostly_dense([*quantized, *outside, *half, *more]) == [
        "only 49% of the parameters in the decoder blocks are quantized",
        "h.*.experts (49%: not a linear layer (Experts)), h.*.down.weight (1%: --ignore down)",
    ]
    many = [
        row(f"h.0.{name}", "not a linear layer (X)", (1, size))
        for name, size in zip("abcde", (99, 98, 97, 96, 95), strict=True)
    ]
    assert mostly_dense([*half, *many])[1].endswith("h.*.c (11%: not a linear layer (X)) and 2 more kinds")


def test_run_plan_report_and_card_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny.build(tmp_path / "doge", ("DogeConfig", DOGE)), tmp_path / "out"
    said = "nly 18% of the parameters in the decoder blocks are quantized"
    why = "model.layers.*.mlp.down_embed.weight (39%: not a linear layer (Embedding))"
    options = ["--model", str(source), "--method", "rtn", "--group-size", "32", "--eval-data", "none"]
    assert main(["plan", *options]) == 0
    shown = capsys.readouterr().out
    assert f"note: o{said}; not quantized: {why}" in shown
    assert main(["run", *options, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert f"o{said}; not quantized: {why}" in shown.err
    assert f"warning: o{said}; not quantized: {why}" in shown.out
    facts = llmquant.report.data.load_report(out).facts
    assert verdict(facts).startswith(f"O{said}. ")
    assert [note for note in health(facts) if note.startswith(f"Not quantized: {why}")]
    card = (out / "README.md").read_text()
    assert f"**O{said}. " in card
    assert why in card
    assert json.loads((out / "report.json").read_text())["tensors"]
