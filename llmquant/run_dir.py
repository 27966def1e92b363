"""The only module that writes. A run fills `<out>.partial` and appears under its own name in one step at the end.

    <out>.partial/job.json        what the run is: its fingerprint
    <out>.partial/journal         finished blocks, one chained line each (`journal.py`)
    <out>.partial/streams-N       all streams after block N (`snapshots.py`), once the journal names it
    <out>.partial/output/         the checkpoint; its shards have their full size from the start

A block is committed once its tensors are on the disk (fsync) and then its journal line is (fsync): a kill at any
instant loses the block at work and nothing else. A folder is locked while its run lives.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmquant import journal
from llmquant.disk import Disk, fsync_path, lock, write_all
from llmquant.errors import OutputError, RecipeError, ResumeError, VerifyError
from llmquant.formats.base import Layout
from llmquant.safetensors_header import TensorInfo, build_header

MANIFEST, COST, _JOB, _JOURNAL = "manifest.json", "cost.json", "job.json", "journal"
_STREAMS = "streams-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunDir:
    """The output folder of one run, used as a context.

    `out` must not exist or be empty, or, with `overwrite`, be a folder that llmquant wrote. `fingerprint` says by
    name all that decides the output. What an earlier run of the same fingerprint left is gone on with: `resume`
    "auto" where there is something, "required" or it is an error, "never": it is thrown away.

    records     bodies of the blocks that are committed already, in order
    snapshots   records of the snapshots of streams that should be there, the newest last
    room_for_streams   whether the disk has `streams_bytes` more than it needs; a run without them is never refused
    finished    the earlier run was killed after its last commit: `out` is complete, and nothing is left to do
    threads     of the run that began: products are summed differently by another number of threads
    """

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        needed_bytes: int = 0,
        streams_bytes: int = 0,
        resume: str = "auto",
        fingerprint: Mapping[str, str] | None = None,
        threads: int = 1,
        disk: Disk | None = None,
    ) -> None:
        # Links are followed: a rename would replace the link, not the folder on the disk it points to.
        self.out = out.expanduser().resolve()
        self.partial = Path(f"{self.out}.partial")
        self.path = self.partial / "output"
        self.records: list[journal.Record] = []
        self.snapshots: list[journal.Record] = []
        self.finished = False
        self.threads = threads
        self._overwrite, self._resume, self._disk = overwrite, resume, disk or Disk()
        if resume not in ("auto", "required", "never"):
            raise RecipeError("--resume", repr(resume), expected="auto, required or never")
        self._fingerprint = dict(fingerprint or {})
        self._places: dict[str, TensorInfo] = {}
        self._fds: dict[str, int] = {}
        self._unwritten: set[str] = set()
        self._given: set[str] = set()  # files beside the weights
        self._weights: dict[str, dict[str, Any]] = {}  # what `weight_files` has found
        self._since: list[str] = []  # tensors written since the last commit
        self._lock: int | None = None
        self._journal: int | None = None
        self._end, self._previous = 0, journal.FIRST
        if not (self.partial / _JOB).is_file():
            self._check_remains()
            self._check_target()
        needed = needed_bytes - _allocated(self.path)
        free = self._check_space(needed)
        self.room_for_streams = free >= needed + streams_bytes - _allocated(self.partial, f"{_STREAMS}*")

    def _check_target(self) -> None:
        """Asked before the work and again at the commit: others may have used the folder in between."""
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(str(self.out), "is a file", expected="a folder that does not exist yet")
        if self.out.is_dir() and any(self.out.iterdir()):
            ours = (self.out / MANIFEST).is_file() and (self.out / "report.json").is_file()
            if not ours:
                raise OutputError(
                    str(self.out), "is not empty and not written by llmquant", remedy="choose another --out"
                )
            if not self._overwrite:
                raise OutputError(
                    str(self.out), "already holds a checkpoint", remedy="choose another --out, or pass --overwrite"
                )

    def _check_remains(self) -> None:
        """A folder under the name of ours, without its job.json: nothing but what a kill at the very start leaves."""
        if not self.partial.exists():
            if self._resume == "required":
                raise ResumeError(str(self.partial), "there is no interrupted run", remedy="leave --resume out")
            return
        # In the order in which they are made, and removed again.
        early = {_JOURNAL, _JOB + ".tmp", "output"}
        strange = not self.partial.is_dir() or {path.name for path in self.partial.iterdir()} - early
        if strange or (self.path.is_dir() and any(self.path.iterdir())):
            raise OutputError(str(self.partial), "exists and is not a run of this version", remedy="move it away")
        # What a kill at the very start or the very end leaves is removed here, unless another run is just there.
        self._lock = lock(self.partial)
        if self._lock is not None and not (self.partial / _JOB).is_file():
            self._remove()
        self._close()

    def _check_space(self, needed: int) -> int:
        """Bytes that are free; OutputError where they are fewer than `needed`."""
        folder = next(parent for parent in self.out.parents if parent.is_dir())
        if not os.access(folder, os.W_OK):
            raise OutputError(str(folder), "is not writable", remedy="choose another --out")
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OutputError(
                str(folder), f"{free} bytes free", expected=f"{needed} for the output and its scratch files"
            )
        return free

    def __enter__(self) -> "RunDir":
        try:
            self._open()
        except OSError as error:
            if self._lock is not None and not self.records:
                with contextlib.suppress(OSError):
                    self._remove()
            self._close()
            raise _disk_error(self.partial, error, kept=len(self.records)) from None
        except BaseException:
            self._close()
            raise
        return self

    def _open(self) -> None:
        """Take the lock, and either begin or read how far the earlier run came."""
        if not self.partial.exists():
            with contextlib.suppress(FileExistsError):  # another run was faster: the lock says which one may go on
                self._disk.mkdir(self.partial)
                fsync_path(self._disk, self.partial.parent)
        self._lock = lock(self.partial)
        if self._lock is None:
            raise OutputError(str(self.partial), "another run is writing it", remedy="wait, or choose another --out")
        if self.out.is_dir() and any(self.out.iterdir()):
            self._check_exchange()
        if (self.partial / _JOB).is_file() and self._read():
            return
        self._begin()

    def _check_exchange(self) -> None:
        """Whether the file system can put the new checkpoint in the old one's place in one step."""
        try:
            self._disk.exchange(self.partial, self.partial)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                raise OutputError(
                    str(self.out), "cannot be replaced in one step on this file system", remedy="choose another --out"
                ) from None
            raise

    def _begin(self) -> None:
        """job.json last and by a rename: where it is, the journal is."""
        if self._journal is None:
            self._journal = self._disk.open(self.partial / _JOURNAL, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            self._disk.fsync(self._journal)
        if not self.path.exists():
            self._disk.mkdir(self.path)
        data = json_bytes({"schema_version": 1, "fingerprint": self._fingerprint, "threads": self.threads})
        self._replace(self.partial / _JOB, data)
        fsync_path(self._disk, self.partial)

    def _read(self) -> bool:
        """Read what an earlier run left: go on with it, finish it or throw it away. False: begin anew."""
        job = json.loads((self.partial / _JOB).read_bytes())
        theirs = job["fingerprint"]
        path = self.partial / _JOURNAL
        records, self._end, self._previous = journal.decode(path.read_bytes(), str(path))
        self._journal = self._disk.open(path, os.O_RDWR)
        if records and records[-1]["kind"] == "commit":
            self._swap_in(records[-1]["manifest"])
            if theirs == self._fingerprint:
                self.finished = True
                return True
            self._close()
            self._check_target()
            self._open()
            return True
        self._check_target()
        if self._resume == "never" or not records:
            self._remove_output()
            return False
        if names := sorted(n for n in {*theirs, *self._fingerprint} if theirs.get(n) != self._fingerprint.get(n)):
            raise ResumeError(
                str(self.partial),
                f"is an interrupted run of another job ({', '.join(names)} differ{'s' * (len(names) == 1)})",
                remedy="choose another --out, or throw it away with --resume never",
            )
        self.records, self.threads = [r["body"] for r in records if r["kind"] == "block"], job["threads"]
        kept = [record for record in records if record["kind"] == "streams"]
        # Older ones were removed when the newest was in the journal, unless a kill came in between.
        self.snapshots = [r for r in kept if r is kept[-1] or self.streams_file(r["blocks"]).exists()]
        self._disk.truncate(self._journal, self._end)  # a torn last line
        self._disk.fsync(self._journal)
        return True

    def _remove_output(self) -> None:
        """Empty the journal first: a kill in between leaves a run that is at its beginning."""
        if self._journal is not None:
            self._disk.truncate(self._journal, 0)
            self._disk.fsync(self._journal)
        for entry in self.partial.iterdir():
            if entry.name not in (_JOB, _JOURNAL):
                self._disk.remove_tree(entry) if entry.is_dir() else self._disk.unlink(entry)
        self._end, self._previous = 0, journal.FIRST

    def _remove(self) -> None:
        """The folder of this run, in an order that a kill at any instant leaves readable."""
        for entry in sorted(self.partial.iterdir(), key=lambda entry: (entry.name == _JOURNAL, entry.name == _JOB)):
            self._disk.remove_tree(entry) if entry.is_dir() else self._disk.unlink(entry)
        self._disk.remove_tree(self.partial)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finished blocks are kept for the next run, unless they were found to be wrong."""
        try:
            if self.partial.exists() and (not self.records or isinstance(error, VerifyError)):
                self._remove_output()
                self._remove()
        finally:
            self._close()
        if isinstance(error, OSError) and error.errno in (*_FULL, errno.EROFS):
            raise _disk_error(self.partial, error, kept=len(self.records)) from error

    def _close(self) -> None:
        for fd in (*self._fds.values(), self._journal, self._lock):
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._fds, self._journal, self._lock = {}, None, None

    # -- weights ---------------------------------------------------------------------------------------
    def open_shards(self, layout: Layout, max_shard_bytes: int, folder: str = "") -> None:
        """Open the safetensors files for `layout` in `folder`, in its order, with headers and index.

        Files of an earlier run are gone on with where blocks of it are committed.
        """
        shards = split_shards(layout, max_shard_bytes)
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        weight_map: dict[str, str] = {}
        total = 0
        for file_name, shard in zip(names, shards, strict=True):
            head, places = build_header({name: layout[name] for name in shard})
            self._open_file(folder + file_name, head, places)
            total += sum(place.nbytes for place in places.values())
            weight_map |= dict.fromkeys(places, file_name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.write_json(f"{folder}model.safetensors.index.json", index)
        fsync_path(self._disk, self.path / folder)

    def open_file(self, file_name: str, head: bytes, places: Mapping[str, TensorInfo]) -> None:
        """A file that begins with `head` and whose tensors will be written to `places`; gaps are zeros.

        That of an earlier run is gone on with where blocks of it are committed.
        """
        self._open_file(file_name, head, places)
        fsync_path(self._disk, (self.path / file_name).parent)

    def _open_file(self, file_name: str, head: bytes, places: Mapping[str, TensorInfo]) -> None:
        path, size = self.path / file_name, max(place.end for place in places.values())
        beside = "/" in file_name  # an export, which is begun when all blocks are committed
        if self.records and not beside:
            if not path.is_file() or path.stat().st_size != size:
                raise ResumeError(str(path), "is not the file that was begun", remedy="start again with --resume never")
            self._fds[file_name] = self._disk.open(path, os.O_RDWR)
        else:
            if not path.parent.exists():
                self._disk.mkdir(path.parent)
            fd = self._fds[file_name] = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            write_all(self._disk, fd, head, 0)
            self._disk.allocate(fd, size)  # the space is ours before hours are spent
        for name, place in places.items():
            self._places[name] = TensorInfo(name, file_name, place.dtype, place.shape, place.start, place.end)
        self._unwritten |= places.keys()
        if not beside:
            self._unwritten -= {name for record in self.records for name in record["tensors"]}

    def read_tensor(self, name: str) -> Tensor:
        """A tensor that was written before."""
        place = self._places[name]
        data = bytearray(place.nbytes)
        if place.nbytes and os.preadv(self._fds[place.file], [data], place.start) != place.nbytes:
            raise VerifyError(name, f"{place.file} ends early")
        return torch.frombuffer(data, dtype=torch.uint8).view(place.dtype).view(place.shape)

    def write_tensor(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor to its place; dtype and shape must be the planned ones."""
        place = self._places[name]
        if tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape or name not in self._unwritten:
            raise VerifyError(
                name, f"{tensor.dtype} {tuple(tensor.shape)}", expected=f"{place.dtype} {place.shape}, once"
            )
        if place.nbytes:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            write_all(self._disk, self._fds[place.file], data.data, place.start)
        self._unwritten.discard(name)
        self._since.append(name)

    def commit_block(self, body: dict[str, Any]) -> None:
        """Make everything written since the last commit durable, then say so in the journal. `body` is plain data."""
        record = {"tensors": self._since, **body}
        self._sync_written()
        self._append({"kind": "block", "body": record})
        self.records.append(record)

    def _sync_written(self) -> None:
        """Make all tensors since the last call durable."""
        for file in sorted({self._places[name].file for name in self._since}):
            self._disk.fsync(self._fds[file])
        self._since = []

    def _append(self, record: journal.Record) -> None:
        if self._journal is None:
            raise RuntimeError("the run is not open")
        line, digest = journal.encode(record, self._previous)
        try:
            write_all(self._disk, self._journal, line, self._end)
            self._disk.fsync(self._journal)
        except OSError:  # the line can be read, and the disk may not have it: it must not count for the next run
            with contextlib.suppress(OSError):
                self._disk.truncate(self._journal, self._end)
            raise
        self._end, self._previous = self._end + len(line), digest

    # -- streams ---------------------------------------------------------------------------------------
    def streams_file(self, blocks: int) -> Path:
        return self.partial / f"{_STREAMS}{blocks}"

    def keep_streams(self, chunks: Iterable[memoryview]) -> str:
        """Keep `chunks` as the streams after the last committed block; then the snapshots before it are removed.

        Its name is new and counts for nothing until the journal names it. Returns why there was no room for it, or "".
        """
        blocks = len(self.records)
        self._drop_streams(but={record["blocks"] for record in self.snapshots})  # those of which no line was written
        path, digest, end = self.streams_file(blocks), hashlib.sha256(), 0
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
            if error.errno not in _FULL:
                raise
            self._drop_streams(but={record["blocks"] for record in self.snapshots})  # commits need the room
            return error.strerror or str(error)
        fsync_path(self._disk, self.partial)
        record = {"kind": "streams", "blocks": blocks, "bytes": end, "sha256": digest.hexdigest()}
        self._append(record)
        self.snapshots = [record]
        self._drop_streams(but={blocks})
        return ""

    def _drop_streams(self, but: set[int]) -> None:
        kept = {self.streams_file(blocks).name for blocks in but}
        for path in sorted(self.partial.glob(f"{_STREAMS}*")):
            if path.name not in kept:
                self._disk.unlink(path)

    def problem_of_streams(self, record: journal.Record) -> str:
        """What is wrong with the snapshot that `record` of the journal names, or ""."""
        path = self.streams_file(record["blocks"])
        try:
            if (size := path.stat().st_size) != record["bytes"]:
                return f"{size} bytes, expected {record['bytes']}"
            return "" if sha256(path) == record["sha256"] else "its SHA-256 differs"
        except OSError as error:
            return error.strerror or str(error)

    # -- the end of the weights ------------------------------------------------------------------------
    def close_shards(self) -> None:
        """Flush all shards to disk; every planned tensor must have been written."""
        if self._unwritten:
            raise VerifyError(sorted(self._unwritten)[0], "was planned but never written")
        self._sync_written()
        for fd in self._fds.values():
            os.close(fd)
        self._fds, self._places = {}, {}

    # -- other files -----------------------------------------------------------------------------------
    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, json_bytes(value))

    def write_bytes(self, name: str, data: bytes) -> None:
        target = self.path / name
        if not target.parent.exists():
            self._disk.mkdir(target.parent)
        self._replace(target, data)
        self._given.add(name)

    def _replace(self, target: Path, data: bytes) -> None:
        """The file whole and durable under its name, or not at all; its folder is synced by the commit."""
        temporary = target.with_name(target.name + ".tmp")
        fd = self._disk.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            write_all(self._disk, fd, data, 0)
            self._disk.fsync(fd)
        finally:
            os.close(fd)
        self._disk.rename(temporary, target)

    def scratch(self, name: str) -> BinaryIO:
        """A file for this run only; it has no name in the folder once it is open."""
        path = self.partial / f"scratch-{name}"
        file = path.open("w+b", buffering=0)
        self._disk.unlink(path)
        return file

    def weight_files(self) -> dict[str, dict[str, Any]]:
        """Bytes and SHA-256 of every file of weights, once all shards are closed."""
        for name in self.files():
            if name.endswith((".safetensors", ".gguf")) and name not in self._weights:
                self._weights[name] = self._facts(name)
        return dict(self._weights)

    def _facts(self, name: str) -> dict[str, Any]:
        return {"bytes": (self.path / name).stat().st_size, "sha256": sha256(self.path / name)}

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file())

    def commit(self, digests: Mapping[str, str] | None = None) -> None:
        """Write the manifest, then make the folder visible under its own name.

        `digests` were taken of the tensors when they were computed; `llmquant verify` asks for them.
        """
        self._check_target()
        for leftover in self.path.rglob("*.tmp"):
            self._disk.unlink(leftover)
        if missing := sorted(name for name in self._given if not (self.path / name).is_file()):
            raise VerifyError(missing[0], "was written and is not there")
        table = {
            name: self._weights.get(name) or self._facts(name) if name != COST else {"sha256": None}
            for name in self.files()
            if name != MANIFEST  # of a commit that was killed
        }
        self.write_json(MANIFEST, {"schema_version": 1, "files": table, "tensors": dict(digests or {})})
        for folder in sorted({path.parent for path in self.path.rglob("*")}):
            fsync_path(self._disk, folder)
        manifest = sha256(self.path / MANIFEST)
        self._append({"kind": "commit", "manifest": manifest})
        self._swap_in(manifest)

    def _swap_in(self, manifest: str) -> None:
        """Put the finished folder under its own name, unless that was done already, and remove what is left."""
        if not ((self.out / MANIFEST).is_file() and sha256(self.out / MANIFEST) == manifest):
            if self.out.is_dir() and any(self.out.iterdir()):
                self._check_target()
                self._disk.exchange(self.path, self.out)  # one step: there is no instant without a checkpoint
            else:
                self._disk.rename(self.path, self.out)
            fsync_path(self._disk, self.out.parent)
            fsync_path(self._disk, self.partial)
        self._remove()


def split_shards(layout: Layout, max_bytes: int) -> list[list[str]]:
    """Tensor names shard by shard, in order; a tensor larger than `max_bytes` gets a shard of its own.

    >>> split_shards({"a": (torch.int8, (6,)), "b": (torch.int8, (6,)), "c": (torch.int8, (4,))}, 10)
    [['a'], ['b', 'c']]
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in layout.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def write_json_file(path: Path, value: Any) -> None:
    """Write a report outside of any run, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(json_bytes(value))
        os.replace(temporary, path)
    except OSError as error:
        raise _disk_error(path, error) from None


def json_bytes(value: Any) -> bytes:
    """As every JSON file of an output is written."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _allocated(folder: Path, pattern: str = "**/*") -> int:
    """Bytes on the disk of the files in `folder`."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob(pattern) if path.is_file())


def _disk_error(path: Path, error: OSError, kept: int = 0) -> OutputError:
    what = f"{kept} blocks are kept: free space and start the same command again" if kept else "nothing was kept"
    return OutputError(
        str(path), error.strerror or str(error), remedy=what if kept else f"{what}; free space or choose another --out"
    )
