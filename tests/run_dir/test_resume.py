"""Killed anywhere, resumed to the same bytes: exceptions, real SIGKILLs and a disk that fails under run_dir/."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import Counting, Killed, files, go_on, kill, on_disk, run
from torch import Tensor

from llmquant import loop, run_dir
from llmquant.cli import app as cli
from llmquant.errors import LLMQuantError, OutputError, ResumeError, VerifyError
from llmquant.model.block import Block
from llmquant.output.check import verify_folder
from llmquant.run_dir.disk import Disk

pytestmark = pytest.mark.usefixtures("short_runs")


def run_killed_at(at: float, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> Counting:
    broken = Counting(at, kill)
    with monkeypatch.context() as patch:
        on_disk(patch, broken)
        # After a SIGKILL no `finally` runs: what the code wants to do on the disk is refused by the dead disk, and
        # the lock goes with the process.
        with contextlib.suppress(Killed):
            run(model, out, **flags)
    return broken


def changes(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> list[str]:
    with monkeypatch.context() as patch:
        counting = Counting()
        on_disk(patch, counting)
        run(model, out, **flags)
    return counting.names


# -- kills ---------------------------------------------------------------------------------------------
def test_a_run_killed_before_or_after_any_change_is_resumed_to_the_same_bytes(
    model: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = len(changes(model, tmp_path / "count", monkeypatch))
    assert total > 80
    # The quick part: a spread of instants, and the first and last ones, where folders come and go.
    instants = sorted({*range(0, 8, 2), *range(total - 12, total), *range(8, total - 12, 50)})
    for position, number in enumerate(instants):
        for at in (number + position % 2 / 2,):
            out = tmp_path / str(at) / "out"
            broken = run_killed_at(at, model, out, monkeypatch)
            assert broken.dead or at == total - 0.5, at
            go_on(model, out, wanted)


@pytest.mark.soak
def test_a_run_killed_at_every_change_is_resumed_to_the_same_bytes(
    model: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = len(changes(model, tmp_path / "count", monkeypatch))
    for number in range(total):
        for at in (number, number + 0.5):
            out = tmp_path / str(at) / "out"
            run_killed_at(at, model, out, monkeypatch)
            go_on(model, out, wanted)
    print(f"{2 * total} kills")


def test_a_replacement_killed_at_its_end_leaves_the_old_or_the_new_checkpoint(
    model: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old" / "out"
    run(model, old, bits=8)
    before, manifest = files(old), (old / "manifest.json").read_bytes()
    new = shutil.copytree(old, tmp_path / "new" / "out")
    total = len(changes(model, new, monkeypatch, overwrite=True))
    assert (new / "manifest.json").read_bytes() != manifest
    for number in range(total - 10, total):
        for at in (number + number % 2 / 2,):
            out = tmp_path / str(at) / "out"
            shutil.copytree(old, out)
            run_killed_at(at, model, out, monkeypatch, overwrite=True)
            assert files(out) in (before, wanted), at  # never neither
            if (out.parent / "out.partial").exists() or files(out) == before:
                run(model, out, overwrite=True)
            assert files(out) == wanted, at
            assert [path.name for path in out.parent.iterdir()] == ["out"], at


def test_two_kills_in_a_row(
    model: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = len(changes(model, tmp_path / "count", monkeypatch))
    for first, second in ((total // 3, 5), (total - 12, 0.5), (total // 2, total // 4)):
        out = tmp_path / f"{first}-{second}" / "out"
        run_killed_at(first, model, out, monkeypatch)
        run_killed_at(second, model, out, monkeypatch)
        run(model, out)
        assert files(out) == wanted, (first, second)


@pytest.mark.parametrize("after", [1, 3])
def test_a_real_sigkill_is_resumed_to_the_same_bytes(
    after: int, model: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    child = os.fork()  # warm: nothing is imported again
    if child == 0:

        def log(line: str) -> None:
            if line.startswith(f"block {after}/"):
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            run(model, out, log=log)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    lines: list[str] = []
    run(model, out, log=lines.append)
    assert [line for line in lines if line.endswith("finished before")] == [
        f"block {number}: finished before" for number in range(1, after + 1)
    ]
    assert files(out) == wanted


@pytest.mark.parametrize(
    "flags",
    [
        {"method": "rtn", "eval_data": "none"},
        {"format": "fake"},
        {"format": "fake", "symmetric": False},
        {"passes": "block"},
        {"propagation": 0, "eval_data": "none"},
        {"max_ram": "1KB"},
    ],
    ids=str,
)
def test_every_kind_of_run_goes_on_to_the_same_bytes(
    flags: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole" / "out", tmp_path / "cut" / "out"  # the card names the folder
    run(model, whole, **flags)
    cut(model, out, **flags)
    assert (tmp_path / "cut" / "out.partial" / "journal").is_file()
    # Another way to hold the streams changes nothing that is computed.
    run(model, out, resume="required", **{name: value for name, value in flags.items() if name != "max_ram"})
    assert files(out) == files(whole)


# -- faults --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_is_loud_and_the_work_is_gone_on_with(
    code: int, model: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = changes(model, tmp_path / "count", monkeypatch)

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    for number in range(3, len(names), len(names) // 5):
        out = tmp_path / str(number) / "out"
        with monkeypatch.context() as patch:
            on_disk(patch, Counting(number, fail))
            lines: list[str] = []
            try:
                run(model, out, log=lines.append)
            except (OSError, LLMQuantError) as error:
                lines.append(str(error))
            # Room for a snapshot of streams is the only thing that a run does without.
            loud = [line for line in lines if os.strerror(code) in line]
            assert loud, number
            assert loud[0] == lines[-1] or (code == errno.ENOSPC and loud[0].startswith("no snapshot of streams"))
        if out.exists():  # only the cleaning up failed
            assert files(out) == wanted, number
        go_on(model, out, wanted)


def test_a_write_that_comes_short_is_continued(
    model: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short(Disk):
        def pwrite(self, fd: int, data: memoryview, at: int) -> int:
            return os.pwrite(fd, data[: max(1, len(data) // 2)], at)

    on_disk(monkeypatch, Short())
    run(model, tmp_path / "out")
    assert files(tmp_path / "out") == wanted


Change = tuple[str, str, str]  # what, on which name, in which folder


def recorded(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> list[Change]:
    """Every change to the disk that a run makes, in order."""
    log: list[Change] = []

    def note(what: str, path: Path | str) -> None:
        log.append((what, os.path.basename(path), os.path.basename(os.path.dirname(path))))

    class Logging(Disk):
        def open(self, path: Path, flags: int) -> int:
            if not path.exists():
                note("create", path)
            return super().open(path, flags)

        def mkdir(self, path: Path) -> None:
            note("create", path)
            super().mkdir(path)

        def pwrite(self, fd: int, data: memoryview, at: int) -> int:
            note("write", os.readlink(f"/proc/self/fd/{fd}"))
            return super().pwrite(fd, data, at)

        def fsync(self, fd: int) -> None:
            note("fsync", os.readlink(f"/proc/self/fd/{fd}"))
            super().fsync(fd)

        def rename(self, source: Path, target: Path) -> None:
            note("rename", target)
            super().rename(source, target)

        def exchange(self, one: Path, other: Path) -> None:
            if one != other:
                note("rename", other)
            super().exchange(one, other)

        def unlink(self, path: Path) -> None:
            note("unlink", path)
            super().unlink(path)

        def remove_tree(self, path: Path) -> None:
            note("remove", path)
            super().remove_tree(path)

    with monkeypatch.context() as patch:
        on_disk(patch, Logging())
        run(model, out, **flags)
    return log


def unsafe(log: list[Change], parent: str) -> str | None:
    """What a power loss could tear apart: the first change that is made before what it relies on is durable."""
    unsynced_bytes: set[str] = set()
    unsynced_names: set[str] = set()  # folders with new names in them
    visible = False
    newest, named = "", "no"  # snapshot of streams, and whether the journal durably says that it is there
    for what, name, folder in log:
        if name.startswith("streams-") and what == "create":
            newest, named = name, "no"
        if name == "journal" and what in ("write", "fsync") and named != "yes":
            named = "yes" if what == "fsync" and named == "written" else "written" if what == "write" else named
        if what == "unlink" and name.startswith("streams-") and not visible and (name == newest or named != "yes"):
            return f"unlink {name}: the newer snapshot may be lost"
        if what == "fsync":
            unsynced_bytes.discard(name)
            unsynced_names.discard(name)
            continue
        if "journal" in unsynced_bytes and name != "journal":
            return f"{what} {name}: the last line of the journal is not durable"
        if (
            what == "write"
            and name == "journal"
            and unsynced_bytes | (unsynced_names & {"output", "out.partial", parent})
        ):
            return f"a line of the journal before {unsynced_bytes | unsynced_names}"
        if what == "write" and name.startswith("model-") and unsynced_names & {"out.partial"}:
            return f"write {name}: job.json may be lost"
        if what == "write":
            unsynced_bytes.add(name)
        if what == "create":
            unsynced_names.add(folder)
            if name == "journal":
                unsynced_bytes.add(name)
        if what == "rename":
            if f"{name}.tmp" in unsynced_bytes:
                return f"rename {name}: its bytes are not durable"
            if name == "out":
                if unsynced_bytes or "output" in unsynced_names:
                    return f"rename out: {unsynced_bytes or unsynced_names} are not durable"
                visible = True
                unsynced_names |= {parent, "out.partial"}
            else:
                unsynced_names.add(folder)
        if what == "remove" and visible and unsynced_names & {parent, "out.partial"}:
            return "remove: the new name may be lost"
    return None


def test_every_fsync_and_rename_has_its_place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is safe as it is, and taking any one fsync or rename out of it is not: none is there for nothing."""
    assert unsafe(recorded(model, tmp_path / "curved" / "out", monkeypatch), "curved") is None
    # The rest without the curvature, whose own fsync of the folder stands for that of job.json.
    off = {"curvature": "off"}
    log = recorded(model, tmp_path / "new" / "out", monkeypatch, **off)
    assert unsafe(log, "new") is None
    fsyncs = [number for number, (what, _, _) in enumerate(log) if what == "fsync"]
    assert len(fsyncs) > 20
    assert [what for what, name, _ in log if name.startswith("streams-") and what != "write"].count("fsync") >= 3
    for number in fsyncs:
        assert unsafe(log[:number] + log[number + 1 :], "new"), f"fsync of {log[number][1:]} ({number}) is not needed"
    renames = [number for number, (what, _, _) in enumerate(log) if what == "rename"]
    assert {log[number][1] for number in renames} >= {"job.json", "manifest.json", "out"}
    for at in range(len(renames)):  # a file without its name, or a folder: the run cannot end well
        without = Counting()
        rename = without.rename
        seen = iter(range(10**6))
        monkeypatch.setattr(
            without,
            "rename",
            lambda *args, rename=rename, seen=seen, at=at: None if next(seen) == at else rename(*args),
        )
        with monkeypatch.context() as patch:
            on_disk(patch, without)
            out = tmp_path / f"without-{at}" / "out"
            with contextlib.suppress(OSError, LLMQuantError):
                if log[renames[at]][1] == "job.json":  # asked for by the run after a kill only
                    cut(model, out, **off)
                    run(model, out, resume="required", **off)
                else:
                    run(model, out, **off)
                verify_folder(out)
                pytest.fail(f"rename to {log[renames[at]][1]} is not needed")


# -- the same job only ---------------------------------------------------------------------------------
def cut(model: Path, out: Path, **flags: Any) -> None:
    """A run that ends after its second block."""

    def stop(line: str) -> None:
        if line.startswith("block 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, out, log=stop, **flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"bits": 8}, "plan, products, recipe.bits"),
        ({"damp": 0.02}, "recipe.damp"),
        ({"seed": 1}, "calibration text, recipe.seed"),
        ({"samples": 3}, "calibration text, recipe.samples"),
        ({"eval_tokens": 64}, "evaluation text, recipe.eval_tokens"),
        ({"baselines": "none"}, "lanes, recipe.baselines"),
        ({"sweeps": 0}, "recipe.sweeps"),
        ({"ignore": ["o_proj"]}, "plan, recipe.ignore"),
        ({"dtype": "bfloat16"}, "dtype, recipe.dtype"),
    ],
    ids=str,
)
def test_another_job_is_refused_by_name(flags: dict[str, Any], named: str, model: Path, tmp_path: Path) -> None:
    cut(model, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ResumeError, match=rf"another job \({named} differs?\).*--resume never"):
        run(model, tmp_path / "out", **flags)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run(model, tmp_path / "out", resume="never", **flags)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_changed_weights_and_versions_are_another_job(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    shutil.copytree(model, source)
    cut(source, tmp_path / "out")
    file = next(source.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ResumeError, match=r"another job \(weights differs\)"):
        run(source, tmp_path / "out")
    data[-1] ^= 1
    file.write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr("llmquant.job.versions", lambda: {"torch": "9"})
        with pytest.raises(ResumeError, match=r"another job \(versions differs\)"):
            run(source, tmp_path / "out")
    run(source, tmp_path / "out", resume="required")


def test_the_policy_for_bad_layers_may_change_on_the_way(model: Path, tmp_path: Path) -> None:
    cut(model, tmp_path / "out")
    report = run(model, tmp_path / "out", on_bad_layer="rtn")
    assert report.data["recipe"]["on_bad_layer"] == "rtn"


def test_a_resume_that_is_required_needs_something_to_resume(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no interrupted run"):
        run(model, tmp_path / "out", resume="required")
    with pytest.raises(LLMQuantError, match="--resume: 'perhaps'"):
        run(model, tmp_path / "out", resume="perhaps")
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_takes_over_the_number_of_threads(model: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    cut(model, tmp_path / "out")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(model, tmp_path / "out")
        assert torch.get_num_threads() == threads == 1
    finally:
        torch.set_num_threads(threads)
    assert files(tmp_path / "out") == wanted


# -- damage --------------------------------------------------------------------------------------------
def test_streams_that_come_out_otherwise_are_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(model, tmp_path / "out")
    (tmp_path / "out.partial" / "streams-1").unlink()
    real = Block.forward

    def other(self: Block, hidden: Tensor, products: torch.dtype | None = None) -> Tensor:
        return real(self, hidden, products) + torch.finfo(hidden.dtype).eps

    monkeypatch.setattr(Block, "forward", other)
    with pytest.raises(ResumeError, match=r"block 1, stream original: differs"):
        run(model, tmp_path / "out")
    assert (tmp_path / "out.partial" / "journal").is_file()


def test_a_torn_last_line_is_dropped_and_a_damaged_middle_one_is_fatal(
    model: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    for name, damage in {
        "torn": lambda data: data[:-7],
        "zeros": lambda data: data + b"\0" * 40,
        "half a line": lambda data: data + data[:50],
    }.items():
        out = tmp_path / name / "out"
        cut(model, out)
        file = out.parent / "out.partial" / "journal"
        file.write_bytes(damage(file.read_bytes()))
        run(model, out)
        assert files(out) == wanted, name
    out = tmp_path / "middle" / "out"
    cut(model, out)
    file = out.parent / "out.partial" / "journal"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ResumeError, match="record 0 is damaged"):
        run(model, out)


def test_bytes_that_changed_under_a_finished_block_do_not_come_out(model: Path, tmp_path: Path) -> None:
    cut(model, tmp_path / "out", eval_data="none", method="rtn")
    shard = sorted((tmp_path / "out.partial" / "output").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4
    shard.write_bytes(data)
    with pytest.raises(VerifyError):
        run(model, tmp_path / "out", eval_data="none", method="rtn")
    assert not (tmp_path / "out").exists()


# -- one writer ----------------------------------------------------------------------------------------
def test_of_eight_racers_one_wins(model: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    out, children = tmp_path / "out", []
    for _ in range(8):
        if (child := os.fork()) == 0:
            try:
                run(model, out)
                os._exit(0)
            except OutputError:
                os._exit(7)
            finally:
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0] + [7] * 7
    assert files(out) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- signals -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_with_75_and_the_same_command_goes_on(
    number: signal.Signals,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["run", "--model", str(model), "--out", str(tmp_path / "out"), "--eval-data", "none"]
    command += ["--samples", "4", "--seq-len", "32", "--group-size", "32"]
    real = loop.Loop._say

    def say(self: Any, block: Any, *rest: Any) -> None:
        real(self, block, *rest)
        if block.index == 1:
            os.kill(os.getpid(), number)
            time.sleep(1)

    # Commands in the background of a script begin with Ctrl-C ignored, and a run leaves what is ignored alone.
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "_say", say)
            assert cli.main(command) == 75
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)
    said = capsys.readouterr().err
    assert "2 of 4 blocks are kept" in said or "2 of 3 blocks are kept" in said
    assert said.splitlines()[-1] == "llmquant: interrupted"
    assert cli.main(command) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["layers"]


CHANGE = re.compile(  # what changes a file, unless a Disk or a RunDir is asked to
    r"""(?<!disk)(?<!run)(?<!self)\.(mkdir|write_text|write_bytes|unlink|touch|rename|rmdir|symlink_to|truncate)\(
    | \bos\.(open|pwritev?|writev?|f?truncate|posix_fallocate|fsync|link|symlink|makedirs|mkdir|rmdir|unlink)\b
    | \bos\.(rename|remove|replace)\w*
    | \bshutil\.(rmtree|copy\w*|move)\b
    | open\([^)]*["'][rb]*[wax+]
    | \b(\w*TemporaryFile|TemporaryDirectory|mk\w*temp)\(""",
    re.VERBOSE,
)


def test_the_disk_has_no_other_door() -> None:
    """Only run_dir/ changes files, and in it all goes through Disk. The exceptions have no name that a kill leaves."""
    package = Path(run_dir.__file__).parents[1]
    found: dict[str, list[str]] = {}
    for file in sorted(package.rglob("*.py")):
        source = file.read_text("utf-8")
        if file.name == "disk.py":
            before, rest = source.split("class Disk:")
            the_disk, after = rest.split("\n\n\n", 1)
            assert len(CHANGE.findall(the_disk)) >= 9
            source = before + after
        if changes := [line.strip() for line in source.splitlines() if CHANGE.search(line)]:
            found[str(file.relative_to(package))] = changes
    assert found == {
        "cli/console.py": ['with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:'],
        "run_dir/disk.py": ["fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)"] * 2,  # for the lock, and for fsync
        "run_dir/folder.py": ['file = path.open("w+b", buffering=0)'],  # a scratch file; its name is removed at once
        "model/streams.py": [
            "file: BinaryIO = TemporaryFile()  # noqa: SIM115 (its stream closes it)",
            "count = os.pwrite(self._file.fileno(), data, at)",  # into a scratch file
        ],
    }
