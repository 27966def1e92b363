"""Runs on a disk that a test has broken: shared by the tests of kills, faults and power loss."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmquant
from llmquant.errors import OutputError
from llmquant.run_dir import folder
from llmquant.run_dir.disk import Disk
from llmquant.run_dir.manifest import sha256

TINY: dict[str, Any] = {
    "group_size": 32,
    "samples": 4,
    "seq_len": 32,
    "eval_tokens": 128,
    "eval_seq_len": 64,
    "baselines": "rtn",
    "max_shard_size": "40KB",
}


class Killed(BaseException):
    """What a SIGKILL is for the code: no line of it runs afterwards."""


class Counting(Disk):
    """Counts the changes to the disk, and calls `at` before one of them (its number), or after it (number + 0.5)."""

    CHANGES = (
        "mkdir",
        "open",
        "pwrite",
        "allocate",
        "truncate",
        "fsync",
        "rename",
        "exchange",
        "unlink",
        "remove_tree",
    )

    def __init__(self, at: float = -1, act: Callable[[], None] = lambda: None) -> None:
        self.count, self.at, self.act = 0, at, act
        self.names: list[str] = []
        self.dead = False
        for name in self.CHANGES:
            setattr(self, name, self._counted(name, getattr(self, name)))

    def _counted(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            if self.dead:
                raise Killed
            number, self.count = self.count, self.count + 1
            self.names.append(name)
            if number == self.at:
                self._act()
            result = change(*args)
            if number + 0.5 == self.at:
                self._act()
            return result

        return counted

    def _act(self) -> None:
        try:
            self.act()
        except Killed:
            self.dead = True
            raise


def run(model: Path, out: Path, **flags: Any) -> llmquant.Report:
    options = {name: flags.pop(name) for name in ("overwrite", "resume", "log", "max_ram") if name in flags}
    return llmquant.quantize(model, llmquant.make_recipe(str(model), flags=TINY | flags), out, **options)


def on_disk(monkeypatch: pytest.MonkeyPatch, broken: Disk) -> None:
    monkeypatch.setattr(folder, "Disk", lambda: broken)


def files(out: Path) -> dict[str, bytes]:
    """All but the cost, and what the manifest says of it."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    del found["cost.json"]
    return found


def go_on(model: Path, out: Path, wanted: dict[str, bytes], **flags: Any) -> None:
    """The same command again; where only the cleaning up was missing, it may also say that all is there."""
    try:
        run(model, out, **flags)
    except OutputError as error:
        assert "already holds a checkpoint" in str(error)  # noqa: PT017
    assert files(out) == wanted
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def weights(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(out).items() if name.endswith((".safetensors", ".gguf"))}


def kill() -> None:
    raise Killed


def killed_after(blocks: int, model: Path, out: Path, **flags: Any) -> None:
    """A run that is killed when so many blocks are done."""

    def log(line: str) -> None:
        if line.startswith(f"block {blocks}/"):
            kill()

    with contextlib.suppress(Killed):
        run(model, out, log=log, **flags)


def repaired(folder: Path) -> None:
    """A manifest that fits the changed files: as if the packer itself had been wrong."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        if "bytes" in entry:
            entry |= {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
