"""The record of finished work: one JSON line each, chained by hashes. `run_dir.py` writes what this file encodes."""

import hashlib
import json
from typing import Any

from llmquant.errors import ResumeError

FIRST = "0" * 64  # what the first record follows

Record = dict[str, Any]


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
