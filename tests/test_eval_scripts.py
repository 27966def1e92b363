"""The scripts in eval/ run as they are."""

import importlib
import runpy
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
import tiny

import llmquant

SCRIPTS = Path(__file__).parents[1] / "eval"
WINDOWS = ["--data", "builtin", "--tokens", "128", "--seq-len", "32"]


@pytest.fixture(scope="module")
def quantized(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "tiny-w4"
    recipe = llmquant.make_recipe("x", flags={"method": "rtn", "group_size": 32, "eval_data": "none"})
    llmquant.quantize(tiny_model("llama"), recipe, out)
    return out


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments, *WINDOWS])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def test_perplexity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quantized: Path) -> None:
    run(monkeypatch, "perplexity.py", str(quantized))
    expected = llmquant.evaluate(
        quantized,
        recipe=llmquant.make_recipe("x", flags={"eval_data": "builtin", "eval_tokens": 128, "eval_seq_len": 32}),
    )
    assert f"{expected.lanes['tiny-w4']['perplexity']:.3f} ±" in capsys.readouterr().out


def test_divergence_covers_every_token_in_both_tables(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quantized: Path,
    tiny_model: Callable[[str], Path],
) -> None:
    run(monkeypatch, "divergence.py", str(quantized), "--reference", str(tiny_model("llama")))
    tables = capsys.readouterr().out.split("\n\n")[1:]
    counts = [[int(line.split()[-3]) for line in table.strip().splitlines()[1:]] for table in tables]
    assert [sum(count) for count in counts] == [4 * 31, 4 * 31]


def test_speed_times_functions_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for names in runpy.run_path(str(SCRIPTS / "speed.py"))["STAGES"].values():
        for module, path in (name.split(":") for name in names):
            assert callable(attrgetter(path)(importlib.import_module(f"llmquant.{module}")))


def test_lent_compares_what_experts_are_lent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tiny.LLAMA | tiny.EXPERTS | {"head_dim": 16, "num_hidden_layers": 1}
    model = tiny.build(tmp_path / "moe", ("Qwen3MoeConfig", config))
    sizes = ["--sizes", "2x32", "--seeds", "1", "--lent", "100", "--bits", "2", "--group-size", "32"]
    arguments = ["--model", str(model), "--texts", "builtin", "--tokens", "128", "--seq-len", "32"]
    monkeypatch.setattr(sys, "argv", ["lent.py", *arguments, *sizes])
    runpy.run_path(str(SCRIPTS / "lent.py"), run_name="__main__")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| 0.25", "| 100"]
    assert len({row[1] for row in rows}) == 2, "the value has no effect"
