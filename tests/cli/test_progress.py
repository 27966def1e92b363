"""Progress: plain lines as ever, JSON lines, and a live display on a terminal."""

import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.cli.app import main
from llmquant.cli.progress import JsonLines, Live, progress
from llmquant.log import BlockDone, Progress, progress_of
from llmquant.source.resolve import open_source
from llmquant.text.tokenizer import load_tokenizer
from llmquant.text.windows import evaluation_windows

SMALL = [
    *("--samples", "4", "--seq-len", "32", "--eval-tokens", "64", "--eval-seq-len", "32", "--group-size", "32"),
    *("--eval-data", "builtin"),
]


class Heard:
    """A Progress that keeps all that it hears."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: list[str] = []
        self.blocks: list[BlockDone] = []
        self.kl: list[dict[str, float]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def block(self, done: BlockDone) -> None:
        self.blocks.append(done)

    def scored(self, kl: Mapping[str, float]) -> None:
        self.kl.append(dict(kl))


def test_a_plain_log_gets_plain_lines(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = llmquant.make_recipe("x", flags={"group_size": 32, "method": "rtn", "eval_data": "none"})
    llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "out", log=lines.append)
    blocks = [line for line in lines if line.startswith("block ")]
    assert len(blocks) == 3
    assert all(line.startswith(f"block {i}/3: 7 linears, ") for i, line in enumerate(blocks, 1))
    assert all(lines)


def test_json_lines_tell_stages_blocks_and_errors(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--model", str(tiny_model("llama")), "--out", str(tmp_path / "out"), *SMALL, "--json"]
    assert main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {"prepare", "embed", "quantize", "evaluate", "verify"} <= {
        x["stage"] for x in lines if x["event"] == "stage"
    }
    assert [(x["done"], x["total"]) for x in lines if x["event"] == "block"] == [(1, 3), (2, 3), (3, 3)]
    blocks = [x["relative_errors"] for x in lines if x["event"] == "block"]
    assert all(errors.keys() == {"llmquant", "rtn", "bnb-nf4"} and all(errors.values()) for errors in blocks)
    (scored,) = [x for x in lines if x["event"] == "scored"]
    lanes = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]["lanes"]
    assert scored["kl"] == {name: lane["kl_mean"] for name, lane in lanes.items() if name != "original"}
    assert all(x["peak_rss_bytes"] > 0 and x["elapsed_seconds"] >= 0 for x in lines)
    assert main(words) == 7  # the output is there already
    (error,) = [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"error"' in line]
    assert error["exit_code"] == 7
    assert "--overwrite" in error["message"]


def test_the_running_error_is_that_of_the_hidden_states(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Against transformers itself: the hidden states that the second block returns, original and rounded."""
    heard = Heard()
    flags = {"group_size": 32, "method": "rtn", "eval_data": "builtin", "eval_tokens": 64, "eval_seq_len": 32}
    recipe = llmquant.make_recipe("x", flags=flags | {"baselines": "none", "format": "fake"})
    folder = tiny_model("llama")
    report = llmquant.quantize(folder, recipe, tmp_path / "out", log=heard)
    ids = evaluation_windows(load_tokenizer(open_source(folder)), "builtin", 64, 32).ids
    hidden = []
    for path in (folder, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            hidden.append(model(ids, output_hidden_states=True).hidden_states[2])
    expected = float((hidden[1] - hidden[0]).norm() / hidden[0].norm())
    assert [(done.done, done.total) for done in heard.blocks] == [(1, 3), (2, 3), (3, 3)]
    assert heard.blocks[1].errors == {"llmquant": pytest.approx(expected, rel=1e-4)}
    assert {"prepare", "embed", "quantize", "evaluate", "verify"} <= set(heard.stages)
    assert heard.kl == [{"llmquant": report.lanes["llmquant"]["kl_mean"]}]
    assert heard.lines
    assert not [line for line in heard.lines if line.startswith(("block ", "KL: "))]


def test_the_live_display_shows_blocks_stage_time_left_and_memory() -> None:
    screen = io.StringIO()
    live = Live(Console(file=screen, force_terminal=True, width=140))
    with live.display:
        live.stage("quantize")
        live.block(BlockDone("block 2/8", done=2, total=8, seconds=10.0, errors={"rtn": 0.0312}))
        live.scored({"rtn": 0.5})
        live.line("a [note] for people")
        live.display.refresh()
    shown = screen.getvalue()
    assert "a [note] for people" in shown
    assert "KL: rtn 0.50000" in shown
    assert all(
        part in shown for part in ("quantize", "block 2/8", "60 s left for the blocks", "rtn 3.12% off", "peak ")
    )


def test_quiet_says_nothing_and_no_terminal_means_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for quiet, said in ((True, ""), (False, "hello\n")):
        with progress(quiet) as log:
            log.line("hello")
            log.stage("quantize")
        assert capsys.readouterr().err == said
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with progress(False) as log:
        log.line("hello")
    assert capsys.readouterr().err == "hello\n"


def test_a_json_line_is_one_line() -> None:
    lines: list[str] = []
    JsonLines(lines.append).line("two\nlines")
    assert json.loads(lines[0])["message"] == "two\nlines"
    assert "\n" not in lines[0]


def test_what_is_no_progress_is_a_function_of_a_line() -> None:
    lines: list[str] = []
    heard = Heard()
    assert progress_of(heard) is heard
    assert isinstance(JsonLines(), Progress)
    assert isinstance(Live(Console(file=io.StringIO())), Progress)
    plain = progress_of(lines.append)
    plain.line("hello")
    plain.stage("quantize")
    plain.block(BlockDone("block 1/2", 1, 2, 0.5))
    plain.scored({"rtn": 0.5, "llmquant": 0.25})
    assert lines == ["hello", "block 1/2", "KL: rtn 0.50000, llmquant 0.25000"]
