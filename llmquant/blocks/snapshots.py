"""Snapshots of all streams after a block: a resumed run goes through the blocks after the newest one only.

One file holds the batches of every stream, one after the other, as raw bytes; the shapes are those of the embeddings,
which every run computes. `run_dir/` writes it and names it in the journal with its SHA-256. A snapshot only saves
time: one that does not fit on the disk, or is found missing or damaged, is named in the log and done without.
"""

import time
from collections.abc import Iterator, Mapping
from io import FileIO

import torch
from torch import Tensor

from llmquant.errors import ResumeError
from llmquant.log import Progress
from llmquant.model.streams import Stream
from llmquant.run_dir import RunDir

MIN_SECONDS = 60.0  # between two snapshots,
PAUSE = 20.0  # and this many times what the last one took: at most a twentieth of a run goes into them
GENERATIONS = 2  # on the disk at once: the older one is removed when the newer one is in the journal


def snapshot_bytes(sizes: Mapping[str, int]) -> int:
    """What snapshots of streams of these sizes take on the disk at most."""
    return GENERATIONS * sum(sizes.values())


class Snapshots:
    """Saves and loads `streams`, which stay the same objects for the whole run."""

    def __init__(self, run: RunDir, streams: Mapping[str, Stream], log: Progress) -> None:
        self._run, self._streams, self._log = run, streams, log
        self._on = bool(streams)
        self._next = time.monotonic() + MIN_SECONDS
        if self._on and not run.room_for_streams:
            self._on = False
            log.line(
                "no snapshots of streams: the disk has no room for them; a resumed run goes through all blocks again"
            )

    def due(self) -> bool:
        return self._on and time.monotonic() >= self._next

    def save(self) -> None:
        """Keep the streams as they are after the last committed block.

        If there is no room for them on the disk, the log says so and the run continues without. Every other OSError is
        raised, because commits of blocks would meet it too.
        """
        if not self._on:
            return
        begin = time.monotonic()
        if problem := self._run.keep_streams(self._bytes()):
            self._on = False
            self._log.line(f"no snapshot of streams after block {len(self._run.records)}, nor later: {problem}")
        now = time.monotonic()
        self._next = now + max(MIN_SECONDS, PAUSE * (now - begin))

    def load(self) -> int:
        """Fill the streams from the newest sound snapshot, and return after how many blocks it was taken.

        0: there is none, and the streams hold the embeddings still. The caller compares checksums.
        """
        for record in reversed(self._run.streams.kept):
            blocks = int(record["blocks"])
            if problem := self._run.streams.problem(record):
                self._log.line(f"snapshot of streams after block {blocks}: {problem}; it is not used")
                continue
            with FileIO(self._run.streams.path(blocks)) as file:
                for stream in self._streams.values():
                    stream.update(lambda hidden, file=file: _read_like(hidden, file))  # type: ignore[misc]
            self._log.line(f"streams after block {blocks}: from the snapshot")
            return blocks
        if self._run.streams.kept:
            self._log.line("no snapshot is sound: finished blocks are gone through again from the embeddings")
        return 0

    def _bytes(self) -> Iterator[memoryview]:
        for stream in self._streams.values():
            for hidden in stream.hidden():
                yield hidden.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _read_like(hidden: Tensor, file: FileIO) -> Tensor:
    """The next bytes of `file` as a tensor of the shape and dtype of `hidden`."""
    found = torch.empty(hidden.shape, dtype=hidden.dtype)
    data = found.view(torch.uint8).numpy().data.cast("B")
    while data:
        count = file.readinto(data)
        if not count:
            raise ResumeError(str(file.name), "ends early", remedy="start the same command again")
        data = data[count:]
    return found
