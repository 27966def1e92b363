"""Snapshots of all streams on the disk: `streams-N` after block N, valid if the journal names it with its SHA-256."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llmquant.run_dir.disk import FULL, Disk, fsync_path, write_all
from llmquant.run_dir.journal import Record
from llmquant.run_dir.state_files import damage

PREFIX = "streams-"


class StreamFiles:
    """The snapshots in `folder`. `kept` holds the records of those that should be there, the newest last."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk, self._folder = disk, folder
        self.kept: list[Record] = []

    def find(self, records: Sequence[Record]) -> None:
        """Set `kept` from the journal's `records` of snapshots."""
        # Older ones were removed once the newest was in the journal, unless a kill came in between.
        self.kept = [r for r in records if r is records[-1] or self.path(r["blocks"]).exists()]

    def path(self, blocks: int) -> Path:
        return self._folder / f"{PREFIX}{blocks}"

    def keep(self, blocks: int, chunks: Iterable[memoryview], append: Callable[[Record], None]) -> str:
        """Write `chunks` as the streams after `blocks` blocks, `append` a record of it, and remove older snapshots.

        The file does not count until the journal names it. Returns why there was no room for it, or "".
        """
        self._drop()  # snapshots that the journal does not name
        path, digest, end = self.path(blocks), hashlib.sha256(), 0
        try:
            fd = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                for chunk in chunks:
                    write_all(self._disk, fd, chunk, end)
                    digest.update(chunk)
                    end += len(chunk)
                self._disk.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._drop()  # commits of blocks need the room
            return error.strerror or str(error)
        fsync_path(self._disk, self._folder)
        record = {"kind": "streams", "blocks": blocks, "bytes": end, "sha256": digest.hexdigest()}
        append(record)
        self.kept = [record]
        self._drop()
        return ""

    def _drop(self) -> None:
        """Remove all but `kept`."""
        kept = {self.path(record["blocks"]) for record in self.kept}
        for path in sorted(self._folder.glob(f"{PREFIX}*")):
            if path not in kept:
                self._disk.unlink(path)

    def problem(self, record: Record) -> str:
        """What is wrong with the snapshot that `record` of the journal names, or ""."""
        path = self.path(record["blocks"])
        try:
            if (size := path.stat().st_size) != record["bytes"]:
                return f"{size} bytes, expected {record['bytes']}"
        except OSError as error:
            return error.strerror or str(error)
        return damage(path, record["sha256"])
