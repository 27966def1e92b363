"""Snapshots of streams: what a resumed run goes through again, and what happens where one is missing or damaged."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broken import Counting, Killed, files, go_on, kill, on_disk, run
from torch import Tensor

from llmquant import loop
from llmquant.blocks import snapshots
from llmquant.blocks.snapshots import Snapshots
from llmquant.errors import ResumeError
from llmquant.log import Lines
from llmquant.model.streams import Stream
from llmquant.run_dir import RunDir, folder
from llmquant.run_dir.disk import Disk

pytestmark = pytest.mark.usefixtures("short_runs")


def cut(model: Path, out: Path, **flags: Any) -> None:
    """A run that ends after its second block, before the snapshot of it; that after the first is there."""

    def stop(line: str) -> None:
        if line.startswith("block 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, out, log=stop, **flags)
    assert kept(out) == ["streams-1"]


def kept(out: Path) -> list[str]:
    return sorted(path.name for path in Path(f"{out}.partial").glob("streams-*"))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the blocks that a resumed run went through again."""
    seen: list[int] = []
    real = loop.Loop._replay

    def replay(self: Any, block: Any) -> None:
        seen.append(block.index + 1)
        real(self, block)

    monkeypatch.setattr(loop.Loop, "_replay", replay)
    return seen


@pytest.fixture
def again(model: Path, wanted: dict[str, bytes], replayed: list[int]) -> Callable[..., tuple[list[int], str]]:
    """Goes on to the same bytes; blocks gone through again, and what was logged."""

    def go(out: Path, **flags: Any) -> tuple[list[int], str]:
        replayed.clear()
        lines: list[str] = []
        go_on(model, out, wanted, log=lines.append, **flags)
        return list(replayed), "\n".join(lines)

    return go


Again = Callable[..., tuple[list[int], str]]


@pytest.mark.parametrize("flags", [{}, {"max_ram": "1KB"}], ids=["memory", "files"])
def test_a_resumed_run_begins_at_the_snapshot(flags: dict[str, Any], model: Path, tmp_path: Path, again: Again) -> None:
    cut(model, tmp_path / "out", **flags)
    blocks, said = again(tmp_path / "out", **flags)
    assert blocks == [2]
    assert "streams after block 1: from the snapshot" in said
    assert "block 1: finished before\nblock 2: finished before" in said


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
            "its SHA-256 differs",
        ),
        (lambda path: os.truncate(path, 1000), "1000 bytes, expected"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["flipped bit", "truncated", "missing"],
)
def test_a_damaged_snapshot_is_named_and_not_used(
    damage: Callable[[Path], object], named: str, model: Path, tmp_path: Path, again: Again
) -> None:
    cut(model, tmp_path / "out")
    damage(tmp_path / "out.partial" / "streams-1")
    blocks, said = again(tmp_path / "out")
    assert blocks == [1, 2]
    assert f"snapshot of streams after block 1: {named}" in said
    assert "no snapshot is sound: finished blocks are gone through again from the embeddings" in said


def test_the_older_generation_stands_in_for_a_damaged_one(
    model: Path, tmp_path: Path, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    class Dying(Disk):
        def unlink(self, path: Path) -> None:
            raise Killed

        remove_tree = unlink

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        on_disk(patch, Dying())
        run(model, out)
    assert kept(out) == ["streams-1", "streams-2"]
    os.truncate(tmp_path / "out.partial" / "streams-2", 10)
    blocks, said = again(out)
    assert blocks == [2]
    assert "after block 2: 10 bytes, expected" in said
    assert "streams after block 1: from the snapshot" in said


def test_streams_that_are_not_those_of_the_block_are_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(model, tmp_path / "out")
    real = snapshots._read_like

    def wrong(hidden: Tensor, file: Any, place: int) -> Tensor:
        return real(hidden, file, place) + torch.finfo(hidden.dtype).eps

    monkeypatch.setattr(snapshots, "_read_like", wrong)
    with pytest.raises(ResumeError, match=r"block 1, stream original: differs"):
        run(model, tmp_path / "out")


def test_a_kill_anywhere_in_a_snapshot_is_resumed_to_the_same_bytes(
    model: Path, tmp_path: Path, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting, spans = Counting(), []
    real = RunDir.keep_streams

    def keep(self: RunDir, chunks: Any) -> str:
        begin = counting.count
        problem = real(self, chunks)
        spans.append(range(begin, counting.count))
        return problem

    with monkeypatch.context() as patch:
        on_disk(patch, counting)
        patch.setattr(RunDir, "keep_streams", keep)
        run(model, tmp_path / "count" / "out")
    names = [counting.names[number] for number in spans[1]]
    assert [name for name in names if name != "pwrite"] == ["open", "fsync", "fsync", "fsync", "unlink"]
    first_write = names.index("pwrite")
    last_write = len(names) - 1 - names[::-1].index("pwrite")  # the journal's line
    seen = []
    for at, name in enumerate(names):
        if name == "pwrite" and at not in (first_write, last_write):
            continue
        number = spans[1][at] + (at % 2) / 2  # before or after it
        out = tmp_path / str(number) / "out"
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            on_disk(patch, Counting(number, kill))
            run(model, out)
        assert "streams-1" in kept(out) or kept(out) == ["streams-2"], (at, name)  # never none
        blocks, said = again(out)
        assert "not used" not in said
        seen.append(blocks)
    assert seen[0] == [2]  # the snapshot before it
    assert seen[-1] == []
    assert sorted(seen, reverse=True) == seen


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_room_for_a_snapshot_is_named_and_the_run_goes_on(
    code: int, model: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    on_disk(monkeypatch, failing(code))
    run(model, tmp_path / "out", log=lines.append)
    assert files(tmp_path / "out") == wanted
    said = [line for line in lines if "snapshot" in line]
    assert said == [f"no snapshot of streams after block 1, nor later: {os.strerror(code)}"]


def test_a_snapshot_that_fails_otherwise_ends_the_run(
    model: Path, tmp_path: Path, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        on_disk(patch, failing(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            run(model, tmp_path / "out")
    blocks, said = again(tmp_path / "out")
    assert blocks == [1]
    assert "snapshot" not in said  # what was begun has no line in the journal


def failing(code: int) -> Disk:
    """A disk on which half of a snapshot can be written."""
    count = iter(range(10**6))

    class Failing(Disk):
        def pwrite(self, fd: int, data: memoryview, at: int) -> int:
            if "/streams-" in os.readlink(f"/proc/self/fd/{fd}") and next(count) > 1:
                raise OSError(code, os.strerror(code))
            return super().pwrite(fd, data, at)

    return Failing()


def test_a_disk_that_has_room_for_the_output_only_is_enough(
    model: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RunDir(tmp_path / "a" / "out", streams_bytes=1000).room_for_streams
    assert not RunDir(tmp_path / "a" / "out", streams_bytes=2**62).room_for_streams
    monkeypatch.setattr(snapshots, "GENERATIONS", 2**50)
    lines: list[str] = []
    run(model, tmp_path / "b" / "out", log=lines.append)
    assert files(tmp_path / "b" / "out") == wanted
    assert [line for line in lines if "snapshot" in line] == [
        "no snapshots of streams: the disk has no room for them; a resumed run goes through all blocks again"
    ]


def test_two_generations_are_all_that_is_on_the_disk(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the preflight counts: twice the streams, and never more."""
    asked: list[int] = []
    largest = 0
    begin = RunDir.__init__

    def init(self: RunDir, *args: Any, streams_bytes: int = 0, **rest: Any) -> None:
        asked.append(streams_bytes)
        begin(self, *args, streams_bytes=streams_bytes, **rest)

    class Watching(Disk):
        def fsync(self, fd: int) -> None:
            nonlocal largest
            super().fsync(fd)
            found = (tmp_path / "out.partial").glob("streams-*")
            largest = max(largest, sum(path.stat().st_size for path in found))

    monkeypatch.setattr(RunDir, "__init__", init)
    monkeypatch.setattr(folder, "Disk", Watching)
    run(model, tmp_path / "out")
    assert [largest] == asked


def test_snapshots_take_at_most_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, saved = 0.0, []

    def keep(chunks: Iterator[memoryview]) -> str:
        nonlocal now
        saved.append((now, b"".join(bytes(chunk) for chunk in chunks)))
        now += 10 if len(saved) == 1 else 1
        return ""

    monkeypatch.setattr(snapshots, "MIN_SECONDS", 60.0)
    monkeypatch.setattr(snapshots, "PAUSE", 20.0)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = Stream()
    stream.append(torch.ones(1, 2, 3))
    fake: Any = SimpleNamespace(keep_streams=keep, room_for_streams=True, records=[])
    kept_by = Snapshots(fake, {"one": stream}, Lines(print))
    for second in range(400):
        now = max(now, float(second))
        if kept_by.due():
            kept_by.save()
    assert [when for when, _ in saved] == [60, 270, 331, 392]  # 60 + 10 + 20 * 10; then a minute after each
    assert saved[0][1] == torch.ones(6).numpy().tobytes()
