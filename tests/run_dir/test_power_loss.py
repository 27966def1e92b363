"""Power loss: every change to the disk is recorded, and what was not synced is dropped, torn or kept at random.

The model of the disk: names change in the order in which they were changed, as journaling file systems keep it, and
those before a sync of their folder are durable; bytes of a file are durable before its last sync, and each write after
it is there, not there, or half there.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken import files, go_on, on_disk, run

from llmquant.run_dir.disk import Disk

pytestmark = pytest.mark.usefixtures("short_runs")

Names = dict[str, int | None]  # path -> number of a file, None for a folder
QUICK: dict[str, Any] = {"eval_data": "none", "samples": 2}


class Recorder(Disk):
    """Does everything and notes it: ("names", folders touched, change) or ("bytes", file, change) or ("sync", path)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: Names = {}
        self.log: list[tuple[Any, ...]] = []

    def _at(self, path: Path | str) -> str:
        return os.path.relpath(path, self.root)

    def _of(self, fd: int) -> str:
        return self._at(os.readlink(f"/proc/self/fd/{fd}"))

    def _rename(self, *paths: str, change: Callable[[Names], None]) -> None:
        self.log.append(("names", {os.path.dirname(path) for path in paths}, change))
        change(self.names)

    def _write(self, path: str, change: Callable[[bytearray], None]) -> None:
        self.log.append(("bytes", self.names[path], change))

    def mkdir(self, path: Path) -> None:
        made = [parent for parent in (*reversed(path.parents), path) if not parent.exists()]
        super().mkdir(path)
        for folder in map(self._at, made):
            self._rename(folder, change=lambda names, folder=folder: names.update({folder: None}))

    def open(self, path: Path, flags: int) -> int:
        name, new = self._at(path), not path.exists()
        fd = super().open(path, flags)
        if new:
            number = len(self.log)
            self._rename(name, change=lambda names: names.update({name: number}))
        elif flags & os.O_TRUNC:
            self._write(name, bytearray.clear)
        return fd

    def pwrite(self, fd: int, data: memoryview, at: int) -> int:
        copy = bytes(data)

        def write(content: bytearray, count: int = len(copy)) -> None:
            content.extend(bytes(max(0, at + count - len(content))))
            content[at : at + count] = copy[:count]

        self._write(self._of(fd), write)
        return super().pwrite(fd, data, at)

    def allocate(self, fd: int, size: int) -> None:
        super().allocate(fd, size)
        self._write(self._of(fd), lambda content: content.extend(bytes(max(0, size - len(content)))))

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        self._write(self._of(fd), lambda content: content.__delitem__(slice(size, None)))

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        name = self._of(fd)
        self.log.append(("sync", name, self.names.get(name)))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        one, other = self._at(source), self._at(target)
        self._rename(one, other, change=lambda names: moved(names, {one: other}))

    def exchange(self, one: Path, other: Path) -> None:
        super().exchange(one, other)
        a, b = self._at(one), self._at(other)
        if a != b:
            self._rename(a, b, change=lambda names: moved(names, {a: b, b: a}))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        name = self._at(path)
        if name in self.names:  # scratch files are nobody's
            self._rename(name, change=lambda names: removed(names, name))

    def remove_tree(self, path: Path) -> None:
        super().remove_tree(path)
        name = self._at(path)
        self._rename(name, change=lambda names: removed(names, name))


def below(name: str, folder: str) -> bool:
    return name == folder or name.startswith(folder + "/")


def removed(names: Names, folder: str) -> None:
    for name in [name for name in names if below(name, folder)]:
        del names[name]


def moved(names: Names, moves: dict[str, str]) -> None:
    """All of `moves` at once; what was under a new name and does not move is replaced."""
    taken = {name: names.pop(name) for name in list(names) if any(below(name, old) for old in moves)}
    for new in moves.values():
        removed(names, new)
    for name, number in taken.items():
        old, new = next((old, new) for old, new in moves.items() if below(name, old))
        names[new + name[len(old) :]] = number


def after_power_loss(log: list[tuple[Any, ...]], before: Names, contents: dict[int, bytes], dice: random.Random) -> Any:
    """Names and bytes that may be found when the power goes after `log`."""
    changes = [(at, entry) for at, entry in enumerate(log) if entry[0] == "names"]
    synced = {name: at for at, (kind, name, *_) in enumerate(log) if kind == "sync"}
    durable = max(
        (n for n, (at, (_, folders, _)) in enumerate(changes) if all(synced.get(f or ".", -1) > at for f in folders)),
        default=-1,
    )
    names = dict(before)
    for _, (_, _, change) in changes[: dice.randint(durable + 1, len(changes))]:
        change(names)
    last = {entry[2]: at for at, entry in enumerate(log) if entry[0] == "sync"}  # by number of the file
    found: dict[int, bytearray] = {}
    for number in {n for n in names.values() if n is not None}:
        content = found[number] = bytearray(contents.get(number, b""))
        keep = dice.choice((0.0, 0.5, 0.9))  # a whole writeback that is missing, or pages here and there
        for at, entry in enumerate(log):
            if entry[0] != "bytes" or entry[1] != number:
                continue
            if at < last.get(number, -1) or dice.random() < keep:
                entry[2](content)
            elif entry[2].__defaults__ and dice.random() < 0.3:
                entry[2](content, dice.randint(0, entry[2].__defaults__[0]))
    return names, found


def put(root: Path, names: Names, found: dict[int, bytearray]) -> None:
    root.mkdir(parents=True)
    for name, number in sorted(names.items()):
        if number is None:
            (root / name).mkdir(exist_ok=True)
        else:
            (root / name).write_bytes(found[number])


def states_are_safe(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, seed: int, *, replaced: bool
) -> int:
    """Run, lose the power at `count` instants, run again: the same bytes, or first the checkpoint that was there."""
    out = tmp_path / "recorded" / "out"
    old: dict[str, bytes] = {}
    before: Names = {}
    contents: dict[int, bytes] = {}
    if replaced:
        run(model, out, bits=8, **QUICK)
        old = files(out)
        for number, path in enumerate(sorted(out.rglob("*")), start=10**6):
            before[os.path.relpath(path, out.parent)] = None if path.is_dir() else number
            if path.is_file():
                contents[number] = path.read_bytes()
        before["out"] = None
    disk = Recorder(out.parent)
    disk.names = dict(before)
    with monkeypatch.context() as patch:
        on_disk(patch, disk)
        run(model, out, overwrite=replaced, **QUICK)
    wanted, dice = files(out), random.Random(seed)
    different = set()
    for state in range(count):
        # The end, where files come and go under their own names, as often as all that is before it.
        at = dice.randint(len(disk.log) - 25, len(disk.log)) if state % 2 else dice.randint(1, len(disk.log))
        names, found = after_power_loss(disk.log[:at], before, contents, dice)
        picture = {name: n if n is None else bytes(found[n]) for name, n in names.items()}
        known = len(different)
        different.add(hash(tuple(sorted((name, data or b"") for name, data in picture.items()))))
        if len(different) == known:  # drawn before
            continue
        root = tmp_path / f"state-{state}"
        put(root, names, found)
        where = f"seed {seed}, state {state}, power lost after change {at}"
        if replaced:
            assert files(root / "out") in (old, wanted), where  # never neither
            if files(root / "out") == old or (root / "out.partial").exists():
                run(model, root / "out", overwrite=True, **QUICK)
            assert files(root / "out") == wanted, where
        else:
            go_on(model, root / "out", wanted, **QUICK)
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    return len(different)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_power_loss_costs_nothing_that_was_committed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    assert states_are_safe(model, tmp_path, monkeypatch, 10, 1, replaced=replaced) >= 4


@pytest.mark.soak
@pytest.mark.parametrize("replaced", [False, True])
def test_four_thousand_power_losses(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    different = states_are_safe(model, tmp_path, monkeypatch, 2000, 2, replaced=replaced)
    print(f"{different} different states of 2000")
    assert different > 300
