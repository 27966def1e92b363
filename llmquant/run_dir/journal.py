"""The journal of finished work: one line for each record, its SHA-256 and then JSON that names the hash before it.

The chain shows whether a line is missing or damaged anywhere. Only the last line may be torn: a kill, or a loss of
power, can cut it short, and then it does not count.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from llmquant.errors import ResumeError, option
from llmquant.run_dir.disk import Disk, write_all

FIRST = "0" * 64  # what the first record names as the hash before it

Record = dict[str, Any]


class Journal:
    """The journal's file, open. A record counts for the next run once `append` has returned."""

    def __init__(self, disk: Disk, path: Path, *, new: bool) -> None:
        self._disk, self._path = disk, path
        self._fd = disk.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if new else 0))
        self._end, self._previous = 0, FIRST

    def read(self) -> list[Record]:
        """All records, without a torn last line (see `decode`). `append` continues after the last of them."""
        records, self._end, self._previous = decode(self._path.read_bytes(), str(self._path))
        return records

    def append(self, record: Record) -> None:
        line, digest = encode(record, self._previous)
        try:
            write_all(self._disk, self._fd, line, self._end)
            self._disk.fsync(self._fd)
        except OSError:  # the line may be readable and yet not on the disk: it must not count for the next run
            with contextlib.suppress(OSError):
                self._disk.truncate(self._fd, self._end)
            raise
        self._end, self._previous = self._end + len(line), digest

    def sync(self) -> None:
        self._disk.fsync(self._fd)

    def cut_torn_line(self) -> None:
        """Drop the torn last line that `read` left out."""
        self._disk.truncate(self._fd, self._end)
        self._disk.fsync(self._fd)

    def empty(self) -> None:
        self._end, self._previous = 0, FIRST
        self.cut_torn_line()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


def encode(record: Record, previous: str) -> tuple[bytes, str]:
    """The line of `record`, and its hash, which the next line must name."""
    body = json.dumps({"previous": previous, **record}, ensure_ascii=False, allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"{digest} {body}\n".encode(), digest


def decode(data: bytes, where: str) -> tuple[list[Record], int, str]:
    """The records in `data`, the length of its sound part, and the last hash.

    A torn last line is left out. ResumeError for anything else that is not a chain.
    """
    records, at, previous = [], 0, FIRST
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1]):
        record = _parse(line, previous)
        if record is None:
            if number == len(lines) - 2 and not _whole(line):  # torn, though its newline was written
                break
            raise ResumeError(
                where,
                f"record {number} is damaged",
                remedy=f"start again with {option('resume')} never, or delete the folder",
            )
        records.append(record)
        at += len(line) + 1
        previous = line[:64].decode()
    return records, at, previous


def _whole(line: bytes) -> bool:
    """Whether the line's own hash is right, whatever line it names as the one before."""
    return hashlib.sha256(line[65:]).hexdigest().encode() == line[:64]


def _parse(line: bytes, previous: str) -> Record | None:
    if not _whole(line):
        return None
    record: Record = json.loads(line[65:])
    return record if record.pop("previous", None) == previous else None
