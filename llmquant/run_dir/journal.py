"""The record of finished work: one JSON line each, chained by hashes."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from llmquant.errors import ResumeError
from llmquant.run_dir.disk import Disk, write_all

FIRST = "0" * 64  # what the first record follows

Record = dict[str, Any]


class Journal:
    """The journal's file, open. What it was given counts for the next run once `append` has returned."""

    def __init__(self, disk: Disk, path: Path, *, new: bool) -> None:
        self._disk, self._path = disk, path
        self._fd = disk.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if new else 0))
        self._end, self._previous = 0, FIRST

    def read(self) -> list[Record]:
        """All records, behind which it goes on; a torn last line is not among them (see `decode`)."""
        records, self._end, self._previous = decode(self._path.read_bytes(), str(self._path))
        return records

    def append(self, record: Record) -> None:
        line, digest = encode(record, self._previous)
        try:
            write_all(self._disk, self._fd, line, self._end)
            self._disk.fsync(self._fd)
        except OSError:  # the line can be read, and the disk may not have it: it must not count for the next run
            with contextlib.suppress(OSError):
                self._disk.truncate(self._fd, self._end)
            raise
        self._end, self._previous = self._end + len(line), digest

    def sync(self) -> None:
        self._disk.fsync(self._fd)

    def cut_torn_line(self) -> None:
        """Drop what `read` did not count."""
        self._disk.truncate(self._fd, self._end)
        self._disk.fsync(self._fd)

    def empty(self) -> None:
        self._end, self._previous = 0, FIRST
        self.cut_torn_line()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


def encode(record: Record, previous: str) -> tuple[bytes, str]:
    """The line of `record`, and the hash that the next one must name."""
    body = json.dumps({"previous": previous, **record}, ensure_ascii=False, allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"{digest} {body}\n".encode(), digest


def decode(data: bytes, where: str) -> tuple[list[Record], int, str]:
    """Records, the length of the sound part of `data`, and the last hash.

    A last line that was cut short is what a kill leaves and is not counted. ResumeError for anything else that is
    not a chain.
    """
    records, at, previous = [], 0, FIRST
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1]):
        record = _parse(line, previous)
        if record is None:
            if number == len(lines) - 2 and not _whole(line):  # torn, with a newline among the bytes that came through
                break
            raise ResumeError(
                where, f"record {number} is damaged", remedy="start again with --resume never, or delete the folder"
            )
        records.append(record)
        at += len(line) + 1
        previous = line[:64].decode()
    return records, at, previous


def _whole(line: bytes) -> bool:
    """Whether the line's own hash fits, whatever it follows."""
    return hashlib.sha256(line[65:]).hexdigest().encode() == line[:64]


def _parse(line: bytes, previous: str) -> Record | None:
    if not _whole(line):
        return None
    record: Record = json.loads(line[65:])
    return record if record.pop("previous", None) == previous else None
