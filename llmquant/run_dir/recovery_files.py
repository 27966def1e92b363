"""The state of a training on the disk: `recovery-K-N` of block N after step K, valid if the journal names it.

A step counts once the states of all blocks are written and the journal has their hashes. Three generations are kept:
the first, the best so far and the newest one.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from llmquant.errors import ResumeError, option
from llmquant.run_dir.disk import Disk, fsync_path, replace_file
from llmquant.run_dir.journal import Record
from llmquant.run_dir.manifest import sha256
from llmquant.run_dir.state_files import damage, read_tensors
from llmquant.run_dir.target import allocated

PREFIX = "recovery-"


class RecoveryFiles:
    """The files in `folder`.

    steps   that the journal says were finished; None: not even the state before the first one is there
    losses  held-out loss of the state after each step 0, 1, ..., as far as it was measured
    done    the last one was measured, too
    """

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk, self._folder = disk, folder
        self._hashes: dict[int, dict[str, str]] = {}
        self.steps: int | None = None
        self.losses: list[float] = []
        self.done = False

    def find(self, records: Sequence[Record]) -> None:
        """Take up what the journal's `records` of a training say. ResumeError where a file is not what they name."""
        for record in records:
            self.losses, self.done = record["losses"], record["done"]
            if record["sha256"]:
                self.steps = record["step"]
                self._hashes[record["step"]] = record["sha256"]
        for step in self._kept():
            for name, digest in self._hashes[step].items():
                path = self._folder / name
                if problem := damage(path, digest):
                    raise ResumeError(str(path), problem, remedy=f"start again with {option('resume')} never")

    @property
    def best(self) -> int:
        """The step with the lowest held-out loss, the first of equals."""
        return min(range(len(self.losses)), key=self.losses.__getitem__) if self.losses else 0

    @property
    def allocated(self) -> int:
        """Bytes that they occupy on the disk."""
        return allocated(self._folder, f"{PREFIX}*")

    def put(self, step: int, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the state of a block after a step; it does not count until `finish`."""
        replace_file(self._disk, self._folder / f"{PREFIX}{step}-{block}", save(dict(tensors)))

    def finish(self, step: int, losses: Sequence[float], append: Callable[[Record], None], *, done: bool) -> None:
        """Say in the journal that the states of all blocks after `step` are there, unless it was said before, and which
        losses are known; then remove what is not kept."""
        fsync_path(self._disk, self._folder)
        new = step not in self._hashes
        if new:
            paths = sorted(self._folder.glob(f"{PREFIX}{step}-*"))
            self._hashes[step] = {path.name: sha256(path) for path in paths}
        self.steps, self.losses, self.done = step, list(losses), done
        hashes = self._hashes[step] if new else {}
        append({"kind": "recovery", "step": step, "losses": self.losses, "done": done, "sha256": hashes})
        kept = {name for kept in self._kept() for name in self._hashes[kept]}
        for path in sorted(self._folder.glob(f"{PREFIX}*")):
            if path.name not in kept:
                self._disk.unlink(path)

    def _kept(self) -> set[int]:
        return set() if self.steps is None else {0, self.best, self.steps}

    def of(self, step: int, block: int) -> dict[str, Tensor]:
        """What `put` was given. ResumeError where the file can no longer be read."""
        return read_tensors(self._folder / f"{PREFIX}{step}-{block}")
