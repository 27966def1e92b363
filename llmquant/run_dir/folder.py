"""The output folder of one run: started or continued, filled, and at the end made visible under its own name."""

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from llmquant.ahead import ahead
from llmquant.errors import LLMQuantError, OutputError, ResumeError, VerifyError, option
from llmquant.formats.base import Layout
from llmquant.paths import expanded
from llmquant.ranks import ALONE, Ranks
from llmquant.run_dir.curvature_files import CurvatureFiles
from llmquant.run_dir.disk import FULL, Disk, disk_error, fsync_path, lock, replace_file
from llmquant.run_dir.journal import Journal, Record
from llmquant.run_dir.manifest import COST, MANIFEST, facts, files_in, json_bytes, sha256
from llmquant.run_dir.recovery_files import RecoveryFiles
from llmquant.run_dir.shards import INDEX, lay_out_shards
from llmquant.run_dir.stream_files import PREFIX, StreamFiles
from llmquant.run_dir.target import allocated, check_exchange, check_space, check_target
from llmquant.run_dir.tensor_files import TensorFiles
from llmquant.source.header import TensorInfo

_JOB, _JOURNAL = "job.json", "journal"


class RunDir:
    """The output folder of one run. Use it as a context.

    out          must not exist, or be empty, or, with `overwrite`, be a folder that llmquant wrote
    fingerprint  everything that decides the output, by name; only a run with the same one is continued
    ranks        that take part in the run; this one is the first of them
    resume       "auto" continues an interrupted run if there is one; "required" is an error if there is none; "never"
                 throws it away

    Attributes:
    records      bodies of the blocks that are committed already, in order
    tensors      the files of weights: read and write tensors by its methods
    streams      the snapshots that earlier blocks left
    curvature    H_O of every block, where it was measured
    allocation   what was measured of the schemes for a target size; None: nothing yet
    recovery     what a training behind the last block has reached
    room_for_streams   whether the disk has room for `streams_bytes` more; a run without that room is never refused
    finished     the earlier run was killed after its last commit: `out` is complete, and nothing is left to do
    threads      how many threads the run was started with: another number adds up products in another order
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
        ranks: Ranks = ALONE,
    ) -> None:
        # Follow links: a rename would replace the link, not the folder that it points to.
        self.out = expanded(out, OutputError).resolve()
        self.partial = Path(f"{self.out}.partial")
        self.path = self.partial / "output"
        self.records: list[Record] = []
        self.allocation: Record | None = None
        self.finished = False
        self.threads = threads
        self._overwrite, self._resume, self._disk, self._ranks = overwrite, resume, disk or Disk(), ranks
        self._fingerprint = dict(fingerprint or {})
        self.tensors, self.streams = TensorFiles(self._disk, self.path), StreamFiles(self._disk, self.partial)
        self.curvature = CurvatureFiles(self._disk, self.partial)
        self.recovery = RecoveryFiles(self._disk, self.partial)
        self._given: set[str] = set()  # files beside the weights
        self._weights: dict[str, dict[str, Any]] = {}  # sizes and hashes that `weight_files` has taken
        self._lock: int | None = None
        self._journal: Journal | None = None
        self.room_for_streams = True
        self._check(needed_bytes, streams_bytes)

    def _check(self, needed_bytes: int, streams_bytes: int) -> None:
        """OutputError where a run cannot start."""
        try:
            if not (self.partial / _JOB).is_file():
                self._check_remains()
                self._check_target()
            needed = needed_bytes - allocated(self.path) - self.curvature.allocated - self.recovery.allocated
            free = check_space(self.out, needed)
            self.room_for_streams = free >= needed + streams_bytes - allocated(self.partial, f"{PREFIX}*")
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise OutputError(
                str(self.out), error.strerror or str(error), remedy=f"choose another {option('out')}"
            ) from None

    def _check_target(self) -> None:
        check_target(self.out, overwrite=self._overwrite)

    def _check_remains(self) -> None:
        """OutputError for a folder with the name of ours and no job.json, unless a kill at the start or end left it."""
        if not self.partial.exists():
            if self._resume == "required":
                raise ResumeError(
                    str(self.partial), "there is no interrupted run", remedy=f"leave {option('resume')} out"
                )
            return
        # These exist before job.json does, or after it is removed.
        early = {_JOURNAL, _JOB + ".tmp", "output"}
        strange = not self.partial.is_dir() or {path.name for path in self.partial.iterdir()} - early
        if strange or (self.path.is_dir() and any(self.path.iterdir())):
            raise OutputError(str(self.partial), "exists and is not a run of this version", remedy="move it away")
        # What a kill at the very start or the very end left is removed here, unless another run works on it right now.
        self._lock = lock(self.partial)
        if self._lock is not None and not (self.partial / _JOB).is_file():
            self._remove()
        self._close()

    def __enter__(self) -> "RunDir":
        try:
            self._open()
        except OSError as error:
            if self._lock is not None and not self.records:
                with contextlib.suppress(OSError):
                    self._remove()
            self._close()
            raise disk_error(self.partial, error, kept=len(self.records)) from None
        except BaseException:
            self._close()
            raise
        self._tell()
        return self

    def _tell(self) -> None:
        """The first rank knows what an earlier run left; now the others do."""
        known = (
            self.finished,
            self.threads,
            self.records,
            self.room_for_streams,
            self.streams.kept,
            self.curvature.complete,
        )
        self.finished, self.threads, self.records, self.room_for_streams, kept, complete = self._ranks.of_first(known)
        self.streams.kept, self.curvature.complete = kept, complete

    def _open(self) -> None:
        """Take the lock; then start anew, or read how far the earlier run came."""
        if not self.partial.exists():
            with contextlib.suppress(FileExistsError):  # another run was faster: the lock decides which one continues
                self._disk.mkdir(self.partial)
                fsync_path(self._disk, self.partial.parent)
        self._lock = lock(self.partial)
        if self._lock is None:
            raise OutputError(
                str(self.partial), "another run is writing it", remedy=f"wait, or choose another {option('out')}"
            )
        if self.out.is_dir() and any(self.out.iterdir()):
            check_exchange(self._disk, self.partial, self.out)
        if (self.partial / _JOB).is_file() and self._read():
            return
        self._begin()

    def _begin(self) -> None:
        """Create the journal, then the output folder, then job.json by a rename: where it is, the others are."""
        if self._journal is None:
            self._journal = Journal(self._disk, self.partial / _JOURNAL, new=True)
            self._journal.sync()
        if not self.path.exists():
            self._disk.mkdir(self.path)
        data = json_bytes({"schema_version": 1, "fingerprint": self._fingerprint, "threads": self.threads})
        replace_file(self._disk, self.partial / _JOB, data)
        fsync_path(self._disk, self.partial)

    def _read(self) -> bool:
        """Read what an earlier run left, and continue it, finish it or throw it away. Returns False to start anew."""
        job = json.loads((self.partial / _JOB).read_bytes())
        theirs = job["fingerprint"]
        self._journal = Journal(self._disk, self.partial / _JOURNAL, new=False)
        records = self._journal.read()
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
                remedy=f"choose another {option('out')}, or throw it away with {option('resume')} never",
            )
        self.records, self.threads = [r["body"] for r in records if r["kind"] == "block"], job["threads"]
        self.streams.find([record for record in records if record["kind"] == "streams"])
        self.curvature.find([record for record in records if record["kind"] == "curvature"])
        self.allocation = next((r["body"] for r in records if r["kind"] == "allocation"), None)
        self.recovery.find([record for record in records if record["kind"] == "recovery"])
        self._journal.cut_torn_line()
        return True

    def _remove_output(self) -> None:
        """Remove everything but job.json and the journal. The journal is emptied first, so that a kill in the middle
        leaves a run that has finished no block."""
        if self._journal is not None:
            self._journal.empty()
        for entry in self.partial.iterdir():
            if entry.name not in (_JOB, _JOURNAL):
                self._disk.remove_tree(entry) if entry.is_dir() else self._disk.unlink(entry)

    def _remove(self) -> None:
        """Remove the folder of this run, in an order that leaves it readable if a kill comes in the middle."""
        for entry in sorted(self.partial.iterdir(), key=lambda entry: (entry.name == _JOURNAL, entry.name == _JOB)):
            self._disk.remove_tree(entry) if entry.is_dir() else self._disk.unlink(entry)
        self._disk.remove_tree(self.partial)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep the finished blocks for the next run, unless verification found them to be wrong."""
        try:
            # An error of ours before the first block ends the job; an interruption does not.
            kept = self.records or (self.curvature.complete and not isinstance(error, LLMQuantError))
            if self.partial.exists() and (not kept or isinstance(error, VerifyError)):
                self._remove_output()
                self._remove()
        finally:
            self._close()
        if isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS):
            raise disk_error(self.partial, error, kept=len(self.records)) from error

    def _close(self) -> None:
        self.tensors.close()
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.close(self._lock)
        self._journal = self._lock = None

    # -- weights ---------------------------------------------------------------------------------------
    def open_shards(self, layout: Layout, max_shard_bytes: int, folder: str = "") -> None:
        """Open the safetensors files for `layout` in `folder`, in its order, with headers and index.

        If blocks of an earlier run are committed, its files are continued.
        """
        shards, index = lay_out_shards(layout, max_shard_bytes)
        for shard in shards:
            self._open_file(folder + shard.file, shard.head, shard.places)
        if index is not None:
            self.write_json(folder + INDEX, index)
        fsync_path(self._disk, self.path / folder)

    def open_file(self, file_name: str, head: bytes, places: Mapping[str, TensorInfo]) -> None:
        """Open a file that begins with `head` and whose tensors will be written to `places`. Gaps are zeros.

        If blocks of an earlier run are committed, its file is continued.
        """
        self._open_file(file_name, head, places)
        fsync_path(self._disk, (self.path / file_name).parent)

    def _open_file(self, file_name: str, head: bytes, places: Mapping[str, TensorInfo]) -> None:
        beside = "/" in file_name  # the file of an export, which starts when all blocks are committed
        if self.records and not beside:
            written = (name for record in self.records for name in record["tensors"])
            self.tensors.go_on(file_name, places, written)
        else:
            self.tensors.begin(file_name, head, places)

    def commit_block(self, body: dict[str, Any]) -> None:
        """Make everything durable that was written since the last commit, then say so in the journal.

        `body` is plain data that goes into the journal.
        """
        record = {"tensors": self.tensors.sync(), **body}
        self._append({"kind": "block", "body": record})
        self.records.append(record)

    def keep_streams(self, chunks: Iterable[memoryview]) -> str:
        """Write `chunks` as a snapshot of the streams after the last committed block.

        Returns why there was no room for it, or "".
        """
        return self.streams.keep(len(self.records), chunks, self._append)

    def finish_curvature(self) -> None:
        """The curvature of all blocks is there (`curvature.put`): from now on an interrupted run keeps it."""
        self.curvature.finish(self._append)

    def keep_allocation(self, body: Record) -> None:
        """Keep what was measured of schemes: plain data."""
        self._append({"kind": "allocation", "body": body})
        self.allocation = body

    def finish_recovery(self, step: int, losses: Sequence[float], *, done: bool) -> None:
        """The states of all blocks after a step are there (`recovery.put`), or the last loss is known."""
        self.recovery.finish(step, losses, self._append, done=done)

    def _append(self, record: Record) -> None:
        if self._journal is None:
            raise RuntimeError("the run is not open")
        self._journal.append(record)

    # -- other files -----------------------------------------------------------------------------------
    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, json_bytes(value))

    def write_bytes(self, name: str, data: bytes) -> None:
        target = self.path / name
        if not target.parent.exists():
            self._disk.mkdir(target.parent)
        replace_file(self._disk, target, data)  # the commit syncs its folder
        self._given.add(name)

    def scratch(self, name: str) -> BinaryIO:
        """An open file for this run only. Its name is removed at once, so that it is gone when the run ends."""
        path = self.partial / f"scratch-{name}"
        file = path.open("w+b", buffering=0)
        self._disk.unlink(path)
        return file

    def weight_files(self) -> dict[str, dict[str, Any]]:
        """Bytes and SHA-256 of every file of weights. Call it when all of them are closed."""
        weights = [name for name in self.files() if name.endswith((".safetensors", ".gguf"))]
        new = [name for name in weights if name not in self._weights]
        self._weights |= zip(new, ahead(lambda name: facts(self.path / name), new), strict=True)
        return dict(self._weights)

    def files(self) -> list[str]:
        return files_in(self.path)

    def commit(self, digests: Mapping[str, str] | None = None) -> None:
        """Write the manifest, then make the folder visible under its own name.

        `digests` of the tensors were taken when they were computed; `llmquant verify` compares with them.
        """
        self._check_target()
        for leftover in self.path.rglob("*.tmp"):
            self._disk.unlink(leftover)
        if missing := sorted(name for name in self._given if not (self.path / name).is_file()):
            raise VerifyError(missing[0], "was written and is not there")
        table = {
            name: self._weights.get(name) or facts(self.path / name) if name != COST else {"sha256": None}
            for name in self.files()
            if name != MANIFEST  # left by a commit that was killed
        }
        self.write_json(MANIFEST, {"schema_version": 1, "files": table, "tensors": dict(digests or {})})
        for folder in sorted({path.parent for path in self.path.rglob("*")}):
            fsync_path(self._disk, folder)
        manifest = sha256(self.path / MANIFEST)
        self._append({"kind": "commit", "manifest": manifest})
        self._swap_in(manifest)

    def _swap_in(self, manifest: str) -> None:
        """Give the finished folder its own name, unless it has it already, and remove what is left."""
        if not ((self.out / MANIFEST).is_file() and sha256(self.out / MANIFEST) == manifest):
            if self.out.is_dir() and any(self.out.iterdir()):
                self._check_target()
                self._disk.exchange(self.path, self.out)  # in one step: at every instant there is a checkpoint
            else:
                self._disk.rename(self.path, self.out)
            fsync_path(self._disk, self.out.parent)
            fsync_path(self._disk, self.partial)
        self._remove()
