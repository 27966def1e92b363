"""The files of the output that hold tensors. Each has a fixed place from the start, and is written once: by the loop,
and, once the loop is behind, by what changes finished tensors."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmquant.errors import ResumeError, VerifyError, option
from llmquant.run_dir.disk import Disk, read_all, write_all
from llmquant.source.header import TensorInfo


class TensorFiles:
    """Files in `folder` while they are filled. What was written is durable after `sync`."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk, self._folder = disk, folder
        self._places: dict[str, TensorInfo] = {}
        self._fds: dict[str, int] = {}
        self._unwritten: set[str] = set()
        self._changing: set[str] = set()  # written, and may be written once more
        self._since: list[str] = []  # written since the last sync

    def begin(self, file: str, head: bytes, places: Mapping[str, TensorInfo]) -> None:
        """Start a new file of its full size that begins with `head`. Gaps are zeros."""
        path = self._folder / file
        if not path.parent.exists():
            self._disk.mkdir(path.parent)
        fd = self._fds[file] = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        write_all(self._disk, fd, head, 0)
        self._disk.allocate(fd, _size(places))  # reserve the space before hours of work
        self._plan(file, places)

    def go_on(self, file: str, places: Mapping[str, TensorInfo], written: Iterable[str]) -> None:
        """Continue a file that an earlier run started. `written` names the tensors that it holds, and maybe others.

        ResumeError where it is missing or has another size.
        """
        path = self._folder / file
        if not path.is_file() or path.stat().st_size != _size(places):
            raise ResumeError(
                str(path), "is not the file that was begun", remedy=f"start again with {option('resume')} never"
            )
        self._fds[file] = self._disk.open(path, os.O_RDWR)
        self._plan(file, places)
        self._unwritten -= set(written)

    def _plan(self, file: str, places: Mapping[str, TensorInfo]) -> None:
        for name, place in places.items():
            self._places[name] = TensorInfo(name, file, place.dtype, place.shape, place.start, place.end)
        self._unwritten |= places.keys()

    def read(self, name: str) -> Tensor:
        """A tensor that was written before, read back from the file."""
        place = self._places[name]
        data = torch.empty(place.nbytes, dtype=torch.uint8)
        done = read_all(self._fds[place.file], data.numpy().data, place.start)
        if done < place.nbytes:
            raise VerifyError(name, f"{place.file} ends after {done} bytes of it", expected=f"{place.nbytes} bytes")
        return data.view(place.dtype).view(place.shape)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor to its place. VerifyError unless dtype and shape are the planned ones, and once."""
        place = self._places[name]
        if (
            tensor.dtype != place.dtype
            or tuple(tensor.shape) != place.shape
            or name not in self._unwritten | self._changing
        ):
            raise VerifyError(
                name, f"{tensor.dtype} {tuple(tensor.shape)}", expected=f"{place.dtype} {place.shape}, once"
            )
        if place.nbytes:
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            write_all(self._disk, self._fds[place.file], data.data, place.start)
        self._unwritten.discard(name)
        self._changing.discard(name)
        self._since.append(name)

    def change(self) -> None:
        """From now on, every tensor that was written may be written once more."""
        self._changing = self._places.keys() - self._unwritten

    def sync(self) -> list[str]:
        """Make everything durable that was written since the last call. Returns the names of those tensors."""
        for file in sorted({self._places[name].file for name in self._since}):
            self._disk.fsync(self._fds[file])
        names, self._since = self._since, []
        return names

    def finish(self) -> None:
        """Sync and close all files. VerifyError if a planned tensor was never written."""
        if self._unwritten:
            raise VerifyError(sorted(self._unwritten)[0], "was planned but never written")
        self.sync()
        for fd in self._fds.values():
            os.close(fd)
        self._fds, self._places = {}, {}

    def close(self) -> None:
        """Close the files as they are."""
        for fd in self._fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds = {}


def _size(places: Mapping[str, TensorInfo]) -> int:
    return max(place.end for place in places.values())
