"""The folder of a run as those ranks see it that do not write: they follow what the first one does in it, and read."""

import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from llmquant.ranks import Ranks
from llmquant.run_dir.disk import Disk
from llmquant.run_dir.folder import RunDir
from llmquant.run_dir.journal import Record


class _Spectator(Disk):
    """Opens files that another rank has made, to read them; everything else is that rank's to do."""

    def mkdir(self, path: Path) -> None:
        pass

    def open(self, path: Path, flags: int) -> int:
        return super().open(path, os.O_RDONLY)

    def pwrite(self, fd: int, data: memoryview, at: int) -> int:
        return len(data)

    def allocate(self, fd: int, size: int) -> None:
        pass

    def fsync(self, fd: int) -> None:
        pass


class FollowedRun(RunDir):
    """As `RunDir`, whose methods write nothing; what an earlier run left is told by the first rank."""

    def __init__(self, out: Path, ranks: Ranks) -> None:
        super().__init__(out, disk=_Spectator(), ranks=ranks)

    def _check(self, needed_bytes: int, streams_bytes: int) -> None:
        pass

    def _open(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _append(self, record: Record) -> None:
        pass

    def finish_curvature(self) -> None:
        self.curvature.complete = True

    def write_bytes(self, name: str, data: bytes) -> None:
        pass

    def scratch(self, name: str) -> BinaryIO:
        return super().scratch(f"{name}-{self._ranks.rank}")
