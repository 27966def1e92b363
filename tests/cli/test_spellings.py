"""Spellings from other tools, typos, examples and completion of the command line."""

import os
import re
import shlex
import subprocess
import sys
import time
from typing import Any

import pytest
import typer

from llmquant.cli import app as cli
from llmquant.cli import look as commands
from llmquant.cli import options
from llmquant.cli.spellings import ALIASES, COMMANDS, normalise

OPTIONS = commands.options_of(cli.app)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The (model, recipe, options) of the next --dry-run."""
    seen: list[Any] = []

    def show_plan(model: str, recipe: Any, options: Any, **rest: Any) -> None:
        seen.append((model, recipe, options))
        raise typer.Exit(0)

    monkeypatch.setattr(commands, "show_plan", show_plan)
    return seen


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--nsamples 8 --seqlen 64 --wbits 8", "--samples 8 --seq-len 64 --bits 8"),
        ("--n_samples 8 --seq_len=64 --group_size=-1", "--samples 8 --seq-len 64 --group-size -1"),
        ("--dataset c4 --output_dir x --asym --format fake", "--calibration c4 --out x --asymmetric --format fake"),
        ("--percdamp 0.02 --eval_tokens full", "--damp 0.02 --eval-tokens full"),
        ("--num-calibration-samples 3 --no_refit", "--samples 3 --no-refit"),
    ],
)
def test_other_spellings_give_the_same_recipe(theirs: str, ours: str, planned: list[Any]) -> None:
    for words in (theirs, ours):
        for command in ("plan", "quantize --dry_run"):
            assert cli.main([*command.split(), "--model_id", "x", *words.split()]) == 0
    assert len(planned) == 4
    assert all(one == planned[0] for one in planned)


def test_every_option_may_be_spelled_with_underscores() -> None:
    for command, names in OPTIONS.items():
        for name in names:
            if name.startswith("--"):
                assert normalise([command, "--" + name[2:].replace("-", "_")], OPTIONS) == [command, name]


def test_aliases_name_options_that_exist_and_hide_none() -> None:
    every = {name for names in OPTIONS.values() for name in names}
    assert {ours for names in ALIASES.values() for ours in names} <= every
    assert set(COMMANDS.values()) <= set(OPTIONS)
    for names in OPTIONS.values():
        assert [normalise(["run", name], {"run": names})[1] for name in names] == list(names)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--model", "x", "--bit", "4"], "--bit: no such option; did you mean --bits?"),
        (["plan", "--sampels", "4"], "--sampels: no such option; did you mean --samples?"),
        (["rum"], "Did you mean 'run'?"),
    ],
)
def test_typos_are_answered_with_what_was_meant(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


def test_examples_name_commands_and_options_that_exist() -> None:
    lines = re.findall(r"^  llmquant (.+)$", options.EXAMPLES + options.RUN_EXAMPLES, re.MULTILINE)
    assert len(lines) > 8
    for words in map(shlex.split, lines):
        assert {word for word in words if word.startswith("--")} <= set(OPTIONS[words[0]])


def child(**environment: str) -> str:
    command = [sys.executable, "-X", "importtime", "-m", "llmquant"]
    return subprocess.run(command, env=os.environ | environment, text=True, capture_output=True, check=False).stdout


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("llmquant run --eval-t", {"--eval-tokens"}),
        ("llmquant run --format ", {"compressed-tensors", "fake"}),
        ("llmquant run --recipe w", {"w4g128", "w8g128"}),
        ("llmquant ins", {"inspect"}),
    ],
)
def test_the_shell_completes(typed: str, wanted: set[str]) -> None:
    begin = time.monotonic()
    count = len(typed.split()) - (not typed.endswith(" "))
    shown = child(_LLMQUANT_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(count))
    assert wanted <= set(shown.split())
    assert time.monotonic() - begin < 5


def test_help_loads_no_large_library() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "llmquant", "run", "--help"]
    loaded = subprocess.run(command, text=True, capture_output=True, check=True).stderr
    assert not re.search(r"\| +(torch|transformers|datasets|matplotlib|numpy|huggingface_hub)$", loaded, re.MULTILINE)
