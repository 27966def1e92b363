"""Errors about options name those of the command that was called."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmquant
from llmquant.cli import app as cli
from llmquant.cli import look
from llmquant.cli.spellings import naming
from llmquant.errors import flag

PACKAGE = Path(llmquant.__file__).parent
OPTIONS = look.options_of(cli.app)
NAMES = look.names_of_fields(cli.app)
FIELDS = sorted(
    {field for file in PACKAGE.rglob("*.py") for field in re.findall(r"\boption\(['\"](\w+)", file.read_text("utf-8"))}
)


def flags_are_of(command: str, text: str) -> bool:
    """Whether every --flag in `text` is an option of the command, or stands with a command that has it."""
    for match in re.finditer(r"(?:llmquant (\w+) )?(--[a-z][a-z-]*)", text):
        if match[2] not in OPTIONS[match[1] or command]:
            return False
    return True


@pytest.mark.parametrize("command", OPTIONS)
def test_every_field_in_an_error_has_a_name_for_every_command(command: str) -> None:
    assert len(FIELDS) > 25
    for field in (*FIELDS, *llmquant.Recipe.__dataclass_fields__):
        assert flags_are_of(command, naming(command, NAMES)(field)), field


def test_the_message_of_an_error_is_that_of_a_run() -> None:
    for field in FIELDS:
        if field in NAMES["run"] and field != "repo":
            assert flag(field) == naming("run", NAMES)(field)


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that is refused, in an empty folder; its line on stderr, or the problems of a plan."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        capfd.readouterr()
        assert cli.main(list(words)) not in (0, 1)
        shown, line = capfd.readouterr()
        text = "\n".join(row for row in shown.splitlines() if row.startswith("problem")) if words[0] == "plan" else line
        assert flags_are_of(words[0], text)
        return text

    return run


@pytest.mark.parametrize("command", [["eval", "--model", "demo"], ["compare", "demo"]])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tokens", "1"], "--tokens: 1"),
        (["--tokens", "many"], "--tokens: many"),
        (["--seq-len", "1"], "--seq-len: 1"),
        (["--device", "tpu"], "--device: 'tpu'"),
        (["--dtype", "int8"], "--dtype: 'int8'"),
        (["--max-ram", "much"], "--max-ram: 'much'"),
    ],
)
def test_eval_and_compare(command: list[str], options: list[str], expected: str, said: Callable[..., str]) -> None:
    assert said(*command, *options).startswith(f"llmquant: {expected}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--bits", "5"], "--bits: 5"),
        (["--eval-tokens", "1"], "--eval-tokens: 1"),
        (["--max-ram", "much"], "--max-ram: 'much'"),
        (["--recipe", "gone"], "--recipe: no recipe 'gone'"),
        (["--push-to-hub", "no-owner"], "'no-owner': no name of a repository"),
    ],
)
def test_run(options: list[str], expected: str, said: Callable[..., str]) -> None:
    assert said("run", "--model", "demo", *options).startswith(f"llmquant: {expected}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--for", "vlm"], "--for: 'vlm'"),
        (["--baselines", "gguf"], "--baselines: 'gguf'"),
        (["--ignore", "no_such"], "--ignore: 'no_such'"),
        (["--calibration", "a:0.5,b:0.1"], "--calibration a:0.5,b:0.1"),
        (["--eval-data", "gone.txt"], "--eval-data gone.txt"),
        (["--format", "awq", "--bits", "3"], "model.layers.0"),
    ],
)
def test_plan(options: list[str], expected: str, said: Callable[..., str]) -> None:
    assert said("plan", "--model", "demo", *options).startswith(f"problem: {expected}")


def test_export(said: Callable[..., str], tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    recipe = llmquant.make_recipe("x", flags={"group_size": 32, "method": "rtn", "eval_data": "none", "bits": 8})
    llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "done")
    export = ["export", str(tmp_path / "done")]
    assert said(*export, "--format", "exl2", "--out", "x").startswith("llmquant: --format: 'exl2'")
    size = ["--format", "gptq", "--out", "x", "--max-shard-size", "big"]
    assert said(*export, *size).startswith("llmquant: --max-shard-size: 'big'")
    # The grid is that of the run: its option is shown with the run.
    assert said(*export, "--format", "awq", "--out", "x").endswith("change llmquant run --bits\n")
    assert "another --out" in said(*export, "--format", "gptq", "--out", "done")
    shutil.rmtree(tmp_path / "done")


def test_push(said: Callable[..., str], tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    recipe = llmquant.make_recipe("x", flags={"group_size": 32, "method": "rtn", "eval_data": "none"})
    llmquant.quantize(tiny_model("llama"), recipe, tmp_path / "done")
    words = ["push", str(tmp_path / "done"), "--repo", "me/m"]
    assert said(*words, "--create-pr", "--tag", "v1").startswith("llmquant: --tag: beside --create-pr")
    assert said("push", str(tmp_path / "done"), "--repo", "no-owner").startswith("llmquant: 'no-owner'")


def test_an_option_that_the_command_does_not_have_is_shown_with_one_that_has_it() -> None:
    names: dict[str, Any] = {command: naming(command, NAMES) for command in OPTIONS}
    assert names["eval"]("ignore") == "llmquant run --ignore"
    assert names["run"]("create_pr") == "llmquant push --create-pr"
    assert names["run"]("repo") == "--push-to-hub"
    assert names["push"]("public") == "--public"
    assert names["doctor"]("seq_len") == "llmquant run --seq-len"
    assert names["compare"]("seq_len") == "--seq-len"
