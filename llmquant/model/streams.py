"""Hidden states of the token batches between two blocks, in memory within a budget, else in files.

Those in memory lie where the model computes, if that has room for them (`lies_on`), else in the machine's memory. Files
are read and written plainly, one batch ahead and one behind; mapped pages would count as memory. A stream of parked
forwards holds more than hidden states, and is always in memory.
"""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmquant.model.devices import device_memory
from llmquant.model.parked import Parked

_CPU = torch.device("cpu")


def spilled(sizes: Mapping[str, int], max_ram: int) -> dict[str, int]:
    """Those streams of `sizes` (bytes) that go to files: the first ones that fit `max_ram` together stay in memory.

    >>> spilled({"a": 4, "b": 5, "c": 2}, 7)
    {'b': 5}
    """
    in_memory, files = 0, {}
    for name, nbytes in sizes.items():
        if in_memory + nbytes <= max_ram:
            in_memory += nbytes
        else:
            files[name] = nbytes
    return files


def lies_on(device: torch.device, nbytes: int) -> torch.device:
    """Where streams of these bytes lie: on an accelerator where they take at most a quarter of its memory."""
    total = device_memory(device)
    return device if total is not None and 4 * nbytes <= total else torch.device("cpu")


def unnamed_file(name: str) -> BinaryIO:
    """A file for a stream of a command that leaves nothing behind, whatever ends it."""
    file: BinaryIO = TemporaryFile()  # noqa: SIM115 (its stream closes it)
    return file


class Streams:
    """Makes the streams of a run, in memory within `max_ram` bytes, the others in files made by `scratch`.

    Those named in `parked` are of parked forwards, and in memory whatever they take.
    device   where the model computes
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        max_ram: int,
        scratch: Callable[[str], BinaryIO],
        parked: Collection[str] = (),
        device: torch.device = _CPU,
    ) -> None:
        self.spilled = spilled({name: size for name, size in sizes.items() if name not in parked}, max_ram)
        self.in_memory = sum(nbytes for name, nbytes in sizes.items() if name not in self.spilled)
        self.spare_bytes = max_ram - self.in_memory
        self._device = lies_on(device, self.in_memory)
        self._scratch, self._parked = scratch, parked
        self._made: list[Stream] = []

    def new(self, name: str) -> "Stream":
        in_file = name in self.spilled
        parked = name in self._parked
        stream = FileStream(self._scratch(name)) if in_file else new_stream(parked=parked, device=self._device)
        self._made.append(stream)
        return stream

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._made:
            stream.close()


def _sum(hidden: Tensor) -> Tensor:
    """The bits of `hidden` added up as integers, int64: the same in any order of adding."""
    return hidden.contiguous().view(torch.int32 if hidden.dtype.itemsize == 4 else torch.int16).sum()


def _replacement(index: int, result: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`result` of an update of batch `index`, refused unless it has the batch's shape and dtype."""
    if (tuple(result.shape), result.dtype) != (shape, dtype):
        got = f"{result.dtype} {tuple(result.shape)}"
        raise ValueError(f"batch {index} of a stream: {got}; expected {dtype} {shape}")
    return result.detach()


class Stream:
    """Batches of hidden states [B, T, D] in the memory of `device`. `update` replaces each by a function of it.

    The function must keep shape and dtype: nothing is cast or broadcast silently.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device = device
        self._batches: list[Tensor] = []
        self._sums: list[Tensor] = []  # of every batch's bits; read late, as a device may still be at work on them

    @property
    def n_batches(self) -> int:
        return len(self._sums)

    def sizes(self) -> list[int]:
        """Bytes of every batch of hidden states."""
        return [hidden.nbytes for hidden in self.hidden()]

    def sums(self) -> list[int]:
        """The bits of every batch, added up: they tell whether two runs computed the same, not whether someone changed
        it."""
        return [int(total) for total in self._sums]

    @property
    def n_tokens(self) -> int:
        return sum(hidden.shape[0] * hidden.shape[1] for hidden in self._batches)

    def append(self, hidden: Any) -> None:
        """Add a batch: what `Skeleton.record` hands out."""
        # A copy: the model may hand out a view of a buffer that it writes again.
        self._batches.append(hidden.detach().to(self._device, copy=True))
        self._sums.append(_sum(self._batches[-1]))

    def __iter__(self) -> Iterator[Any]:
        """The batches, each as `Block.forward` takes it."""
        return iter(self._batches)

    def hidden(self) -> Iterator[Tensor]:
        """The hidden states of the batches."""
        return iter(self)

    def update(self, function: Callable[[Any], Any]) -> None:
        for index, hidden in enumerate(self._batches):
            result = _replacement(index, function(hidden), tuple(hidden.shape), hidden.dtype)
            hidden.copy_(result)  # in place: no fragmentation
            self._sums[index] = _sum(hidden)

    def close(self) -> None:
        self._batches.clear()


def new_stream(*, parked: bool, device: torch.device = _CPU) -> "Stream":
    """An empty stream in memory, that of `device` unless its forwards are parked."""
    return ParkedStream() if parked else Stream(device)


class ParkedStream(Stream):
    """The same for parked forwards: `update` hands each what a function of it answers, and it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self._forwards: list[Parked] = []

    @property
    def n_tokens(self) -> int:
        return sum(forward.n_tokens for forward in self._forwards)

    def append(self, start: Any) -> None:
        self._forwards.append(start())
        self._sums.append(_sum(self._forwards[-1].hidden))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._forwards)

    def hidden(self) -> Iterator[Tensor]:
        return (forward.hidden for forward in self._forwards)

    def update(self, function: Callable[[Any], Any]) -> None:
        for index, forward in enumerate(self._forwards):
            forward.go_on(function(forward))
            self._sums[index] = _sum(forward.hidden)

    def close(self) -> None:
        for forward in self._forwards:
            forward.close()
        self._forwards.clear()


class FileStream(Stream):
    """The same in an (anonymous or scratch) file, double-buffered by one thread."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._index: list[tuple[int, tuple[int, ...], torch.dtype]] = []  # offset, shape, dtype
        self._end = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llmquant-stream")

    @property
    def n_tokens(self) -> int:
        return sum(shape[0] * shape[1] for _, shape, _ in self._index)

    def append(self, hidden: Any) -> None:
        hidden = hidden.detach().cpu().contiguous()
        self._index.append((self._end, tuple(hidden.shape), hidden.dtype))
        self._sums.append(_sum(hidden))
        self._write(len(self._index) - 1, hidden)
        self._end += hidden.numel() * hidden.element_size()

    def sizes(self) -> list[int]:  # nothing is read for it
        return [math.prod(shape) * dtype.itemsize for _, shape, dtype in self._index]

    def __iter__(self) -> Iterator[Tensor]:
        ahead = self._read_ahead(0)
        for index in range(len(self._index)):
            hidden = ahead.result()
            ahead = self._read_ahead(index + 1)
            yield hidden

    def _read_ahead(self, index: int) -> Future[Tensor]:
        if index >= len(self._index):
            return Future()
        # Allocated here: memory that a second thread allocates comes from an arena that is never given back.
        return self._pool.submit(self._read, index, torch.empty(self._index[index][1], dtype=self._index[index][2]))

    def update(self, function: Callable[[Any], Any]) -> None:
        behind: Future[None] | None = None
        for index, hidden in enumerate(self):
            _, shape, dtype = self._index[index]
            result = _replacement(index, function(hidden), shape, dtype).cpu().contiguous()
            if behind is not None:
                behind.result()
            self._sums[index] = _sum(result)
            behind = self._pool.submit(self._write, index, result)
        if behind is not None:
            behind.result()

    def close(self) -> None:
        self._pool.shutdown()
        self._file.close()

    def _write(self, index: int, hidden: Tensor) -> None:
        data, at = hidden.view(torch.uint8).numpy().data.cast("B"), self._index[index][0]
        while data:
            count = os.pwrite(self._file.fileno(), data, at)
            data, at = data[count:], at + count

    def _read(self, index: int, hidden: Tensor) -> Tensor:
        at = self._index[index][0]
        data = hidden.view(torch.uint8).numpy().data.cast("B")
        while data:
            count = os.preadv(self._file.fileno(), [data], at)
            if count == 0:
                raise OSError(f"scratch file ended early at byte {at}")
            data, at = data[count:], at + count
        return hidden
