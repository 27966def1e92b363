"""The curvature of every block N on the disk: `curvature-N`, valid if the journal names it with its SHA-256."""

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from llmquant.ahead import ahead
from llmquant.run_dir.disk import Disk, fsync_path, replace_file
from llmquant.run_dir.journal import Record
from llmquant.run_dir.manifest import sha256
from llmquant.run_dir.state_files import read_tensors
from llmquant.run_dir.target import allocated

PREFIX = "curvature-"


class CurvatureFiles:
    """The files in `folder`. They count once all are written and the journal has their hashes."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk, self._folder = disk, folder
        self.complete, self.problem = False, ""

    def find(self, records: list[Record]) -> None:
        """Take up what the journal's `records` of curvature name; `problem` is what is wrong with it."""
        for name, digest in records[-1]["sha256"].items() if records else ():
            try:
                if sha256(self._folder / name) != digest:
                    self.problem = f"the SHA-256 of {name} differs"
            except OSError as error:
                self.problem = f"{name}: {error.strerror}"
        self.complete = bool(records) and not self.problem

    @property
    def allocated(self) -> int:
        """Bytes that they occupy on the disk."""
        return allocated(self._folder, f"{PREFIX}*")

    def put(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the file of a block; it does not count until `finish`."""
        replace_file(self._disk, self._folder / f"{PREFIX}{block}", save(dict(tensors)))

    def finish(self, append: Callable[[Record], None]) -> None:
        """Say in the journal that all blocks are there."""
        fsync_path(self._disk, self._folder)
        paths = sorted(self._folder.glob(f"{PREFIX}*"))
        hashes = zip((path.name for path in paths), ahead(sha256, paths), strict=True)
        append({"kind": "curvature", "sha256": dict(hashes)})
        self.complete = True

    def of(self, block: int) -> dict[str, Tensor]:
        """What `put` was given. ResumeError where the file can no longer be read."""
        return read_tensors(self._folder / f"{PREFIX}{block}")
