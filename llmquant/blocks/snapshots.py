"""Snapshots of all streams after a block: a resumed run goes through the blocks after the newest one only.

One file holds the batches of every stream, one after the other, as raw bytes; the shapes are those of the embeddings,
which every run computes. `run_dir/` writes it and names it in the journal with its SHA-256. A snapshot only saves
time: one that does not fit on the disk, or is found missing or damaged, is named in the log and done without.
"""

import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from io import FileIO

import torch
from torch import Tensor

from llmquant.errors import ResumeError
from llmquant.log import Progress
from llmquant.model.streams import Stream
from llmquant.ranks import ALONE, Ranks
from llmquant.run_dir import RunDir

MIN_SECONDS = 60.0  # between two snapshots,
PAUSE = 20.0  # and this many times what the last one took: at most a twentieth of a run goes into them
GENERATIONS = 2  # on the disk at once: the older one is removed when the newer one is in the journal


def snapshot_bytes(sizes: Mapping[str, int]) -> int:
    """What snapshots of streams of these sizes take on the disk at most."""
    return GENERATIONS * sum(sizes.values())


class Snapshots:
    """Saves and loads `streams`, which stay the same objects for the whole run."""

    def __init__(self, run: RunDir, streams: Mapping[str, Stream], log: Progress, ranks: Ranks = ALONE) -> None:
        self._run, self._streams, self._log, self._ranks = run, streams, log, ranks
        self._on = bool(streams)
        self._next = time.monotonic() + MIN_SECONDS
        if self._on and not run.room_for_streams:
            self._on = False
            log.line(
                "no snapshots of streams: the disk has no room for them; a resumed run goes through all blocks again"
            )

    def due(self) -> bool:
        return self._ranks.of_first(self._on and time.monotonic() >= self._next)

    def save(self) -> None:
        """Keep the streams as they are after the last committed block.

        If there is no room for them on the disk, the log says so and the run continues without. Every other OSError is
        raised, because commits of blocks would meet it too.
        """
        if not self._on:
            return
        begin, _ = time.monotonic(), self._sizes  # which all ranks must ask for at once
        chunks = self._bytes()
        problem = self._run.keep_streams(chunks) if self._ranks.first else ""
        for _ in chunks:  # of other ranks that no disk took; a rank that does not write sends its own
            pass
        if problem := self._ranks.of_first(problem):
            self._on = False
            self._log.line(f"no snapshot of streams after block {len(self._run.records)}, nor later: {problem}")
        now = time.monotonic()
        self._next = now + max(MIN_SECONDS, PAUSE * (now - begin))

    def load(self) -> int:
        """Fill the streams from the newest sound snapshot, and return after how many blocks it was taken.

        0: there is none, and the streams hold the embeddings still. The caller compares checksums.
        """
        blocks = self._ranks.of_first(self._newest_sound() if self._ranks.first else 0)
        if not blocks:
            return 0
        end = 0
        with FileIO(self._run.streams.path(blocks)) as file:
            for number, stream in enumerate(self._streams.values()):
                own = []
                for rank, nbytes in self._in_order(number):
                    own += [end] if rank == self._ranks.rank else []
                    end += nbytes
                places = iter(own)
                stream.update(lambda hidden, file=file, places=places: _read_like(hidden, file, next(places)))  # type: ignore[misc]
        self._log.line(f"streams after block {blocks}: from the snapshot")
        return blocks

    def _newest_sound(self) -> int:
        """After how many blocks the newest snapshot was taken that can be used; 0: there is none."""
        for record in reversed(self._run.streams.kept):
            blocks = int(record["blocks"])
            if not (problem := self._run.streams.problem(record)):
                return blocks
            self._log.line(f"snapshot of streams after block {blocks}: {problem}; it is not used")
        if self._run.streams.kept:
            self._log.line("no snapshot is sound: finished blocks are gone through again from the embeddings")
        return 0

    def _bytes(self) -> Iterator[memoryview]:
        """All batches of the first stream, then of the next; those of other ranks come to the first one in between."""
        ranks = self._ranks
        for number, stream in enumerate(self._streams.values()):
            own = (hidden.cpu().contiguous().view(torch.uint8).flatten() for hidden in stream.hidden())
            for rank, nbytes in self._in_order(number):
                if rank == ranks.rank and ranks.first:
                    yield next(own).numpy().data
                elif rank == ranks.rank:
                    ranks.send(next(own))
                elif ranks.first:
                    yield ranks.receive(torch.empty(nbytes, dtype=torch.uint8), rank).numpy().data

    def _in_order(self, number: int) -> list[tuple[int, int]]:
        """(rank, bytes) of all batches of a stream."""
        shares = [[(rank, nbytes) for nbytes in sizes[number]] for rank, sizes in enumerate(self._sizes)]
        return self._ranks.in_order(shares)

    @cached_property
    def _sizes(self) -> list[list[list[int]]]:
        """Bytes of the batches of every stream of every rank."""
        return self._ranks.gathered([stream.sizes() for stream in self._streams.values()])


def _read_like(hidden: Tensor, file: FileIO, place: int) -> Tensor:
    """The bytes of `file` from a place on as a tensor of the shape and dtype of `hidden`."""
    file.seek(place)
    found = torch.empty(hidden.shape, dtype=hidden.dtype)
    data = found.view(torch.uint8).numpy().data.cast("B")
    while data:
        count = file.readinto(data)
        if not count:
            raise ResumeError(str(file.name), "ends early", remedy="start the same command again")
        data = data[count:]
    return found
