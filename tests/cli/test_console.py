"""What cannot be printed does not fail what was done."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from rich.console import Console

import llmquant
from llmquant.cli import app as cli
from llmquant.cli import console
from llmquant.cli.progress import JsonLines, Live, progress
from llmquant.demo import DEMO
from llmquant.errors import CalibrationError, OutputError
from llmquant.output.check import verify_folder
from llmquant.report.data import Report

SMALL = {"samples": 4, "seq_len": 32, "eval_tokens": 64, "eval_seq_len": 32, "group_size": 32, "method": "rtn"}


@pytest.fixture(scope="module")
def report(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("console") / "größe"
    recipe = llmquant.make_recipe("x", flags=SMALL | {"eval_data": "builtin"})
    return llmquant.quantize(tiny_model("llama"), recipe, out)


@pytest.fixture
def broken() -> Iterator[IO[str]]:
    """A pipe whose reader has gone. Closing it would raise, too, if anything were left in its buffer."""
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", encoding="utf-8")
    yield stream
    stream.close()


@pytest.fixture
def ascii_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


def shown(stream: io.TextIOWrapper) -> str:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode("ascii")


def test_the_closing_table_in_ascii(
    report: Report, ascii_stream: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", ascii_stream)
    console.show_report(report)
    assert "+- is one standard error" in shown(ascii_stream)
    assert "gr\\xf6\\xdfe in " in shown(ascii_stream)


def test_the_closing_table_into_a_closed_pipe(report: Report, broken: IO[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", broken)
    console.show_report(report)
    console.print_json({"a": 1})
    console.answer("done")


@pytest.mark.parametrize("stream", [None, "closed"])
def test_the_closing_table_without_a_stdout(
    report: Report, stream: str | None, ascii_stream: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    ascii_stream.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, ascii_stream if stream else None)
    console.show_report(report)
    console.print_json({"a": 1})
    with progress(False) as log:
        log.line("hello")


@pytest.mark.parametrize("as_json", [True, False])
def test_progress_into_a_closed_pipe(as_json: bool, broken: IO[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", broken)
    with progress(False, as_json) as log:
        for _ in range(3):
            log.line("hello")


def test_the_live_display_into_a_closed_pipe(broken: IO[str]) -> None:
    screen: IO[str] = console.Screen(broken)  # type: ignore[assignment]
    live = Live(Console(file=screen, force_terminal=True, width=140))
    with live.display:
        live.line("hello")


def test_progress_in_ascii(ascii_stream: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", ascii_stream)
    with progress(False) as log:
        log.line("größe ± 1 \udcff")
    assert shown(ascii_stream) == "gr\\xf6\\xdfe +- 1 \\udcff\n"


def test_json_says_the_same_in_any_encoding(ascii_stream: io.TextIOWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", ascii_stream)
    JsonLines().line("größe ±")
    assert json.loads(shown(ascii_stream))["message"] == "größe ±"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_fails_what_was_made_to_be_printed_only(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        console.show_report(report)
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match="stdout: No space left on device"):
            console.print_json({"a": 1})


def test_a_run_whose_readers_have_gone_is_finished(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    words = ["--model", str(tiny_model("llama")), "--method", "rtn", "--group-size", "32", "--eval-data", "none"]
    command = [sys.executable, "-m", "llmquant", "run", *words, "--out", str(tmp_path / "out")]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        done = subprocess.run(command, stdout=gone, stderr=gone, check=False)
    assert done.returncode == 0
    assert (tmp_path / "out" / "report.json").is_file()


HOSTILE = "br [/b] [v2] [red]x \\[0m {0} %s"  # a folder and a file in it


def test_markup_in_names_is_printed_as_it_is(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model, text = f"m {HOSTILE}", f"t {HOSTILE}.txt"
    shutil.copytree(tiny_model("llama"), model)
    Path(text).parent.mkdir(exist_ok=True)
    Path(text).write_text((DEMO / "heldout.txt").read_text("utf-8")[:20_000], "utf-8")
    last = HOSTILE.rpartition("/")[2]
    small = [
        "--method",
        "rtn",
        "--group-size",
        "32",
        "--eval-tokens",
        "64",
        "--eval-seq-len",
        "32",
        "--eval-data",
        text,
    ]

    def said(*words: str, code: int = 0) -> str:
        assert cli.main(list(words)) == code
        out, errors = capsys.readouterr()
        return " ".join(f"{out} {errors}".split())

    assert f"model {last}" in said("plan", "--model", model, *small)
    assert f"wrote {tmp_path / 'out'} {HOSTILE} in " in said("run", "--model", model, *small, "--out", f"out {HOSTILE}")
    scored = ["--tokens", "64", "--seq-len", "32", "--data", text, "--reference", model]
    assert " b] [v2] " in said("eval", "--model", f"out {HOSTILE}", *scored)
    assert " b] [v2] " in said("compare", f"out {HOSTILE}", model, *scored)
    assert f"verified: 30 tensors re-read from disk, equal to those of {last}" in said(
        *("export", f"out {HOSTILE}", "--format", "gguf", "--out", f"gguf {HOSTILE}")
    )
    assert f"out {HOSTILE}: 9 files" in said("verify", f"out {HOSTILE}", "--source", model)
    assert f"{last}: llama, " in said("inspect", f"out {HOSTILE}")
    assert f"--layer {HOSTILE}: not in {last}" in said("inspect", f"out {HOSTILE}", "--layer", HOSTILE, code=4)
    assert f"{HOSTILE!r}: no name of a repository" in said("push", f"out {HOSTILE}", "--repo", HOSTILE, code=2)
    assert f"no {HOSTILE}" not in said("run", "--model", HOSTILE, code=4)


def test_names_that_are_no_utf8_are_escaped(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    def named(name: bytes) -> str:
        return os.fsdecode(os.fsencode(tmp_path) + b"/" + name)

    text, out = named(b"t\xff.txt"), named(b"out\xff")
    Path(text).write_text((DEMO / "heldout.txt").read_text("utf-8")[:20_000], "utf-8")
    recipe = llmquant.make_recipe("x", flags=SMALL | {"eval_data": text})
    report = llmquant.quantize(tiny_model("llama"), recipe, out)
    assert json.loads((Path(out) / "report.json").read_bytes())["recipe"]["eval_data"] == text
    assert report.data["evaluation"]["dataset"] == "t\\udcff.txt"
    assert "<title>out\\udcff" in (Path(out) / "report.html").read_text("utf-8")
    verify_folder(Path(out))
    model = Path(named(b"model\xff"))
    shutil.copytree(tiny_model("llama"), model)
    with pytest.raises(CalibrationError, match=r"^model\\udcff: its path is not UTF-8"):
        llmquant.quantize(model, recipe, tmp_path / "other")
    report = llmquant.quantize(
        model, llmquant.make_recipe("x", flags=SMALL | {"eval_data": "none"}), tmp_path / "other"
    )
    assert report.data["model"]["id"] == "model\\udcff"


@pytest.mark.parametrize("name", ["random", "secrets", "types", "torch", "typer"])
def test_modules_in_the_working_folder_are_not_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    done = subprocess.run([sys.executable, "-m", "llmquant", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_everything_is_printed_by_the_console() -> None:
    for file in Path(console.__file__).parent.glob("*.py"):
        names = {
            n.func.id
            for n in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert "print" not in names, file.name
