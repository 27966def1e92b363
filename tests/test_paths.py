"""A ~ in a path: the home folder everywhere, and one line where there is none."""

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import llmquant
from llmquant.cli.app import main
from llmquant.demo import DEMO
from llmquant.text.corpus import load_text
from llmquant.text.mixture import parse_mixture

GONE = "~nosuchuser/x"
SMALL = [
    *("--samples", "4", "--seq-len", "32", "--eval-tokens", "64", "--eval-seq-len", "32", "--group-size", "32"),
    *("--eval-data", "builtin"),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, beside an empty working directory."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["run", "--model", GONE], 4),
        (["plan", "--model", GONE], 4),
        (["inspect", GONE], 4),
        (["eval", "--model", GONE], 4),
        (["eval", "--model", "demo", "--reference", GONE], 4),
        (["compare", "demo", GONE], 4),
        (["export", GONE, "--format", "gptq", "--out", "x"], 4),
        (["push", GONE, "--repo", "me/m"], 8),
        (["verify", GONE], 8),
        (["run", "--model", "demo", "--recipe", f"{GONE}.toml"], 2),
        (["run", "--model", "demo", "--recipe", GONE], 2),
        (["run", "--model", "demo", "--method", "rtn", "--eval-data", "none", "--out", GONE], 7),
        (["run", "--model", "demo", "--calibration", f"{GONE}.txt"], 5),
        (["run", "--model", "demo", "--calibration", f"{GONE}.txt:0.5,builtin:0.5"], 5),
        (["run", "--model", "demo", "--calibration", f"{GONE}:train"], 5),
        (["run", "--model", "demo", "--method", "rtn", "--eval-data", f"{GONE}.jsonl"], 5),
        (["eval", "--model", "demo", "--data", f"{GONE}.txt"], 5),
        (["eval", "--model", "demo", "--json", GONE], 7),
    ],
)
def test_a_user_who_is_not_there_is_one_line(
    words: list[str], code: int, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    said, errors = capfd.readouterr()
    line = errors.splitlines()[-1]
    assert not said
    assert "no home folder for ~nosuchuser; a folder of this name is ./~nosuchuser" in line
    assert "Traceback" not in errors
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ["--out", GONE],
        ["--calibration", f"{GONE}.txt"],
        ["--calibration", f"{GONE}.txt:0.5,b:0.5"],
        ["--eval-data", f"{GONE}.txt"],
    ],
)
def test_a_plan_lists_it_as_a_problem(options: list[str], home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "demo", *options]) in (5, 7)
    assert f"no home folder for {GONE.partition('/')[0]}" in capfd.readouterr().out


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(
    home: Path, tiny_model: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    os.symlink(tiny_model("llama"), home / "model")
    (home / "notes.txt").write_bytes((DEMO / "calibration.txt").read_bytes()[:20000])
    (home / "fast.toml").write_text('method = "rtn"\n')
    words = ["run", "--model", "~/model", "--out", "~/out", "--recipe", "~/fast.toml", *SMALL]
    assert main([*words, "--method", "gptq", "--calibration", "~/notes.txt:0.5,builtin:0.5", "--bits", "8"]) == 0
    assert (home / "out" / "report.json").is_file()
    assert main(["verify", "~/out", "--source", "~/model"]) == 0
    assert main(["export", "~/out", "--format", "gptq", "--out", "~/export"]) == 0
    scored = ["--data", "~/notes.txt", "--tokens", "64", "--seq-len", "32", "--json", "~/figures.json"]
    assert main(["eval", "--model", "~/export", "--reference", "~/model", *scored]) == 0
    assert (home / "figures.json").is_file()
    assert not list(Path().iterdir())
    (home / "later.partial").mkdir()
    capfd.readouterr()
    assert main(["plan", "--model", "~/model", "--out", "~/later", *SMALL]) == 0
    assert "later.partial exists" in capfd.readouterr().out


def test_texts_are_found_in_the_home_folder(home: Path) -> None:
    (home / "a,b.txt").write_text("words")
    assert load_text("~/a,b.txt", "train", 10).documents == ["words"]
    assert parse_mixture("~/a,b.txt") == [("~/a,b.txt", 1.0)]


def test_only_one_place_expands_paths() -> None:
    package = Path(llmquant.__file__).parent
    for file in package.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Attribute)]
        expands = any(node.attr == "expanduser" for node in calls)
        assert expands == (file.name == "paths.py"), file.name
