"""Text in files, as people have it: plain text, JSON lines, a JSON array, CSV, Parquet; packed by gzip or not; in
UTF-8 with or without a byte order mark, or in UTF-16 with one.

The ending decides, in any case of letters; what has none, or one that is not known, is plain text.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from llmquant.errors import CalibrationError
from llmquant.paths import expanded

_GZIP = ".gz"
_TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_TEXTS = (".txt", ".md")
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
FILES = "FILE (.txt, .md, .jsonl, .json, .csv, .parquet, also .gz)"


def refuse_folder(spec: str, name: str) -> None:
    """CalibrationError where `name`, of `spec`, is a local folder: `datasets` would read it in place of the Hub's
    dataset of that name."""
    if expanded(name, CalibrationError).is_dir():
        raise CalibrationError(
            spec,
            f"{name} is a local folder",
            expected=f"{FILES} or HUB_ID",
            remedy="name a file in it, or run from a folder without it",
        )


def find_file(spec: str) -> tuple[Path, str | None] | None:
    """The file that `FILE` or `FILE:column` names, here or missing, and the column; None where it names no file.

    CalibrationError for a folder.
    """
    for name, column in ((spec, None), (spec.rpartition(":")[0], spec.rpartition(":")[2])):
        if not name:
            continue
        path = expanded(name, CalibrationError)
        try:
            is_file = path.is_file()
            if column is None:
                refuse_folder(spec, name)
        except OSError as error:  # a name that no file can have
            raise CalibrationError(spec[:200], f"cannot be read ({error.strerror})", expected="a file") from None
        if is_file or (column is None and _suffix(path) in (*_TABLES, *_TEXTS)):
            return path, column
    return None


def read_rows(path: Path) -> Generator[dict[str, Any]]:
    """The rows of a table, each by its columns; of plain text one row with the column `text`.

    CalibrationError for what cannot be read, with the number of its line where there is one.
    """
    try:
        with _opened(path) as stream:
            yield from _rows(path, stream)
    except UnicodeDecodeError as error:
        raise CalibrationError(str(path), f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(str(path), f"cannot be read ({error})") from None


def _rows(path: Path, stream: BinaryIO) -> Iterator[dict[str, Any]]:
    if (suffix := _suffix(path)) == ".parquet":
        yield from _parquet(path, stream)
        return
    with _decoded(stream) as text:
        if suffix in (".jsonl", ".ndjson"):
            yield from _lines(path, text)
        elif suffix == ".json":
            yield from _array(path, text)
        elif suffix in (".csv", ".tsv"):
            yield from _csv(path, text, suffix)
        else:
            yield {"text": text.read()}


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(_GZIP)
    return Path(name).suffix


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise CalibrationError(str(path), "no such file")
    is_packed = path.name.lower().endswith(_GZIP)
    return cast(BinaryIO, gzip.open(path)) if is_packed else path.open("rb")


def _decoded(stream: BinaryIO) -> TextIO:
    """The text of a stream, by its byte order mark."""
    start = stream.read(3)
    stream.seek(0)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(stream, encoding=encoding)


def _lines(path: Path, text: TextIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise CalibrationError(f"{path}: line {number}", "not a JSON object", expected="one with a text per line")
        if row:
            yield row


def _array(path: Path, text: TextIO) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(text.read())
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            text.seek(0)
            yield from _lines(path, text)  # JSON lines by another name
            return
        raise CalibrationError(str(path), f"not valid JSON ({error})"[:200]) from None
    if isinstance(rows, dict):  # columns or rows one level down
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, dict | str):
            raise CalibrationError(str(path), f"an array of {type(row).__name__}", expected="one of objects or texts")
        yield row if isinstance(row, dict) else {"text": row}


def _csv(path: Path, text: TextIO, suffix: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    header = text.readline()
    text.seek(0)
    delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=header.count)
    try:
        yield from csv.DictReader(text, delimiter=delimiter)
    except csv.Error as error:
        raise CalibrationError(str(path), f"not valid CSV ({error})") from None


def _parquet(path: Path, stream: BinaryIO) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except ArrowException as error:
        raise CalibrationError(str(path), f"not valid Parquet ({error})"[:200]) from None
