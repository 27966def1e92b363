"""Real SIGKILLs of real children at random instants, and a disk that fails at every single operation."""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from broken import Counting, files, go_on, on_disk, run

from llmquant.demo import DEMO
from llmquant.errors import LLMQuantError, OutputError
from llmquant.run_dir.disk import Disk

pytestmark = pytest.mark.usefixtures("short_runs")


def killed_after(delay: float, model: Path, out: Path) -> bool:
    """A run in a forked child (warm: nothing is imported again), killed after `delay` seconds. False: it was done."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            run(model, out)
            os._exit(0)
        os._exit(1)
    end = time.monotonic() + delay
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def random_kills(
    count: int, in_a_row: int, seed: int, model: Path, wanted: dict[str, bytes], folder: Path
) -> tuple[int, int]:
    """How many children were killed, and how many resumes began with finished blocks."""
    dice, killed, resumed = random.Random(seed), 0, 0
    seconds = 1.0  # what a run takes; other work on the machine changes it all the time
    for number in range(count):
        out = folder / str(number) / "out"
        for _ in range(in_a_row):
            begin = time.monotonic()
            if killed_after(dice.uniform(0, seconds), model, out):
                killed, seconds = killed + 1, seconds * 1.1
            else:
                seconds = time.monotonic() - begin
        journal = out.parent / "out.partial" / "journal"
        resumed += journal.is_file() and journal.stat().st_size > 0
        if out.parent.exists():
            go_on(model, out, wanted)
    return killed, resumed


def test_kills_at_random_instants(model: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    killed, _ = random_kills(6, 1, 1, model, wanted, tmp_path)
    assert killed >= 3


@pytest.mark.soak
def test_two_hundred_kills_at_random_instants(model: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    killed, resumed = random_kills(200, 1, 2, model, wanted, tmp_path)
    print(f"{killed} of 200 killed, {resumed} had finished blocks or more")
    assert killed >= 120
    assert resumed >= 20


@pytest.mark.soak
def test_fifty_double_kills_at_random_instants(model: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    killed, resumed = random_kills(50, 2, 3, model, wanted, tmp_path)
    print(f"{killed} of 100 killed, {resumed} of 50 had finished blocks or more")
    assert killed >= 60


@pytest.mark.soak
def test_twenty_cold_commands_killed_at_random_instants(model: Path, tmp_path: Path) -> None:
    text = (DEMO / "heldout.txt").read_text("utf-8")
    (tmp_path / "a.txt").write_text(text[:20_000], "utf-8")
    (tmp_path / "b.txt").write_text(text[20_000:40_000], "utf-8")

    def command(out: Path) -> list[str]:
        options = "--samples 4 --seq-len 32 --group-size 32 --eval-tokens 128 --eval-seq-len 64 --baselines rtn --quiet"
        texts = ["--calibration", str(tmp_path / "a.txt"), "--eval-data", str(tmp_path / "b.txt")]
        return [
            sys.executable,
            "-m",
            "llmquant",
            "run",
            "--model",
            str(model),
            "--out",
            str(out),
            *options.split(),
            *texts,
        ]

    whole = tmp_path / "whole" / "out"
    begin = time.monotonic()
    subprocess.run(command(whole), check=True, capture_output=True, timeout=600)
    taken, dice, killed = time.monotonic() - begin, random.Random(4), 0
    for number in range(20):
        out = tmp_path / str(number) / "out"
        started = time.monotonic()  # the first half is spent with imports
        with subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            try:
                child.wait(dice.uniform(0.4, 1) * taken)
            except subprocess.TimeoutExpired:
                child.kill()
            if child.wait() == -signal.SIGKILL:
                killed, taken = killed + 1, taken * 1.1
            else:  # other work on the machine changes what a run takes
                taken = time.monotonic() - started
        again = subprocess.run(command(out), check=False, capture_output=True, text=True, timeout=600)
        assert again.returncode == 0 or "already holds a checkpoint" in again.stderr, again.stderr
        assert files(out) == files(whole)
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    print(f"{killed} of 20 killed")
    assert killed >= 10


@pytest.mark.soak
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_every_operation_fails_once(
    code: int, model: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        counting = Counting()
        on_disk(patch, counting)
        run(model, tmp_path / "count" / "out")

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    for number in range(counting.count):
        out = tmp_path / str(number) / "out"
        with monkeypatch.context() as patch:
            on_disk(patch, Counting(number, fail))
            # Only what is tried and may fail (the exchange of two folders, room for a snapshot) lets a run end well.
            lines: list[str] = []
            with contextlib.suppress(OSError, LLMQuantError):
                run(model, out, log=lines.append)
                without = any(line.startswith("no snapshot of streams") for line in lines)
                assert counting.names[number] == "exchange" or (without and code != errno.EIO), number
        if out.exists():  # only the cleaning up failed
            assert files(out) == wanted, number
        go_on(model, out, wanted)
    print(f"{counting.count} operations")


# After those for the empty journal, the curvature and block 1: its streams, block 2.
@pytest.mark.parametrize("which", [4, 5])
def test_a_line_of_the_journal_that_may_not_be_durable_does_not_count(
    which: int, model: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed fsync is not tried again: after it, the page cache says what the disk may not hold."""
    out, journals = tmp_path / "out", []

    class Failing(Disk):
        def fsync(self, fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith("/journal"):
                journals.append(fd)
                if len(journals) == which:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            super().fsync(fd)

    with monkeypatch.context() as patch:
        on_disk(patch, Failing())
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            run(model, out)
    assert len(journals) == which
    lines: list[str] = []
    run(model, out, log=lines.append)
    assert [line for line in lines if "finished before" in line] == ["block 1: finished before"]
    assert ("streams after block 1: from the snapshot" in lines) == (which == 5)
    assert files(out) == wanted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of the size that is asked for."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "llmquant-test", str(folder)]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"this machine allows no mount: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_refused_with_the_bytes_that_are_needed(
    model: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("400k")
    with pytest.raises(OutputError, match=r"bytes free; expected \d{6,} for the output"):
        run(model, disk / "out")
    assert not list(disk.iterdir())


def test_a_disk_that_fills_up_on_the_way_keeps_what_is_finished(
    model: Path, wanted: dict[str, bytes], small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("8m")

    def fill(line: str) -> None:
        if line.startswith("block 2/"):
            with contextlib.suppress(OSError), (disk / "others").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(OutputError, match=r"No space left on device; [23] blocks are kept: free space"):
        run(model, disk / "out", log=fill)
    with pytest.raises(OutputError):  # still full
        run(model, disk / "out")
    (disk / "others").unlink()
    go_on(model, disk / "out", wanted)


def test_a_folder_that_may_not_be_written_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(OutputError, match=r"locked: is not writable; choose another --out"):
        run(model, tmp_path / "locked" / "out")


def test_a_limit_on_the_size_of_files_is_one_line(model: Path, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself has it
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            try:
                run(model, tmp_path / "out")
            except OutputError as error:
                code = 7 if os.strerror(errno.EFBIG) in str(error) else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not list(tmp_path.iterdir())
