"""The only module that writes. Everything goes to `<out>.partial` and becomes `<out>` by one rename at the end."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmquant.errors import OutputError, VerifyError
from llmquant.formats.base import Layout
from llmquant.safetensors_header import TensorInfo, build_header

MANIFEST, COST = "manifest.json", "cost.json"


class RunDir:
    """The output folder of one run, used as a context: what is not committed is removed again.

    `out` must not exist or be empty, or, with `overwrite`, be a folder that llmquant wrote.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> None:
        # Links are followed: a rename would replace the link, not the folder on the disk it points to.
        self.out = out.expanduser().resolve()
        self.path, self._old = Path(f"{self.out}.partial"), Path(f"{self.out}.old")
        self._overwrite = overwrite
        self._places: dict[str, TensorInfo] = {}
        self._files: dict[str, BinaryIO] = {}
        self._unwritten: set[str] = set()
        self._check_target()
        if self.path.exists():
            raise OutputError(
                str(self.path), "exists", remedy="another run is writing it, or one was killed: then delete it"
            )
        self._check_space(needed_bytes)

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
            if self._old.exists():
                raise OutputError(str(self._old), "exists", remedy="a run was killed while it replaced it: delete it")

    def _check_space(self, needed: int) -> None:
        folder = next(parent for parent in self.out.parents if parent.is_dir())
        if not os.access(folder, os.W_OK):
            raise OutputError(str(folder), "is not writable", remedy="choose another --out")
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OutputError(
                str(folder), f"{free} bytes free", expected=f"{needed} for the output and its scratch files"
            )

    def __enter__(self) -> "RunDir":
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise _disk_error(self.path, error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self.path.exists():
            shutil.rmtree(self.path)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise _disk_error(self.path, error) from error

    # -- weights ---------------------------------------------------------------------------------------
    def open_shards(self, layout: Layout, max_shard_bytes: int, folder: str = "") -> None:
        """Create the safetensors files for `layout` in `folder`, in its order, with headers and index."""
        shards = split_shards(layout, max_shard_bytes)
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = ["model.safetensors"]
        weight_map: dict[str, str] = {}
        total = 0
        for file_name, shard in zip(names, shards, strict=True):
            head, places = build_header({name: layout[name] for name in shard})
            self.open_file(folder + file_name, head, places)
            total += sum(place.nbytes for place in places.values())
            weight_map |= dict.fromkeys(places, file_name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.write_json(f"{folder}model.safetensors.index.json", index)

    def open_file(self, file_name: str, head: bytes, places: Mapping[str, TensorInfo]) -> None:
        """Create a file that begins with `head` and whose tensors will be written to `places`; gaps are zeros."""
        target = self.path / file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        file = self._files[file_name] = target.open("w+b", buffering=0)
        _write_all(file, head, 0)
        size = max(place.end for place in places.values())
        os.posix_fallocate(file.fileno(), 0, size)  # the space is ours before hours are spent
        for name, place in places.items():
            self._places[name] = TensorInfo(name, file_name, place.dtype, place.shape, place.start, place.end)
        self._unwritten |= places.keys()

    def write_tensor(self, name: str, tensor: Tensor) -> None:
        """Write one planned tensor to its place; dtype and shape must be the planned ones."""
        place = self._places[name]
        if tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape or name not in self._unwritten:
            raise VerifyError(
                name, f"{tensor.dtype} {tuple(tensor.shape)}", expected=f"{place.dtype} {place.shape}, once"
            )
        if place.nbytes:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            _write_all(self._files[place.file], data.data, place.start)
        self._unwritten.discard(name)

    def close_shards(self) -> None:
        """Flush all shards to disk; every planned tensor must have been written."""
        if self._unwritten:
            raise VerifyError(sorted(self._unwritten)[0], "was planned but never written")
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        self._files, self._places = {}, {}

    # -- other files -----------------------------------------------------------------------------------
    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, _json_bytes(value))

    def write_bytes(self, name: str, data: bytes) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def scratch(self, name: str) -> BinaryIO:
        """A file for this run only; it has no name in the folder once it is open."""
        path = self.path / f"scratch-{name}"
        file = path.open("w+b", buffering=0)
        path.unlink()
        return file

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file())

    def commit(self) -> None:
        """Write the manifest, then make the folder visible under its own name."""
        self._check_target()
        table = {
            name: {"bytes": (self.path / name).stat().st_size, "sha256": sha256(self.path / name)}
            if name != COST
            else {"sha256": None}
            for name in self.files()
        }
        self.write_json(MANIFEST, {"schema_version": 1, "files": table})
        _fsync_folder(self.path)
        if self.out.is_dir() and any(self.out.iterdir()):
            os.rename(self.out, self._old)
            os.rename(self.path, self.out)
            shutil.rmtree(self._old)
        else:
            os.rename(self.path, self.out)
        _fsync_folder(self.out.parent)


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
        temporary.write_bytes(_json_bytes(value))
        os.replace(temporary, path)
    except OSError as error:
        raise _disk_error(path, error) from None


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_all(file: BinaryIO, data: bytes | memoryview, at: int) -> None:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file.fileno(), rest, at)
        rest, at = rest[count:], at + count


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _disk_error(path: Path, error: OSError) -> OutputError:
    return OutputError(
        str(path), error.strerror or str(error), remedy="nothing was kept; free space or choose another --out"
    )
