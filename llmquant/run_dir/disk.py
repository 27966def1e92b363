"""Every call of the operating system that changes a file. A test that breaks the disk replaces these alone."""

import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

from llmquant.errors import OutputError, option
from llmquant.run_dir.manifest import json_bytes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the errors that mean that there is no room
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Disk:
    """Every change that a run makes goes through one of these methods. Each does one thing, or raises OSError."""

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True)

    def open(self, path: Path, flags: int) -> int:
        """A file descriptor. New files get the mode that the umask allows."""
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def pwrite(self, fd: int, data: memoryview, at: int) -> int:
        """Write `data` at the offset `at`. Returns the number of bytes written, which may be fewer than given."""
        return os.pwrite(fd, data, at)

    def allocate(self, fd: int, size: int) -> None:
        """Reserve `size` bytes, so that a full disk shows now and not hours later."""
        os.posix_fallocate(fd, 0, size)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """`target` may be an empty folder. A folder with files in it is never replaced."""
        os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> None:
        """Swap both paths in one step (Linux). OSError with ENOTSUP where the system cannot do that."""
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(other))
        if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
            code = ctypes.get_errno()
            unable = code in (errno.ENOSYS, errno.EINVAL)
            raise OSError(errno.ENOTSUP if unable else code, os.strerror(code), str(other))

    def unlink(self, path: Path) -> None:
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)


def write_all(disk: Disk, fd: int, data: bytes | memoryview, at: int) -> None:
    """Write all of `data` at the offset `at`, in as many writes as it takes."""
    rest = memoryview(data)
    while rest:
        count = disk.pwrite(fd, rest, at)
        rest, at = rest[count:], at + count


def read_all(fd: int, data: memoryview, at: int) -> int:
    """Fill `data` from the offset `at`, in as many reads as it takes (Linux gives at most 2 GiB in one).

    Returns the number of bytes read, which is less than asked only where the file ends.
    """
    done = 0
    while done < len(data) and (count := os.preadv(fd, [data[done:]], at + done)):
        done += count
    return done


def replace_file(disk: Disk, target: Path, data: bytes) -> None:
    """Write a whole file: it is durable under its name, or not there at all. The caller syncs its folder."""
    temporary = target.with_name(target.name + ".tmp")
    fd = disk.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(disk, fd, data, 0)
        disk.fsync(fd)
    finally:
        os.close(fd)
    disk.rename(temporary, target)


def fsync_path(disk: Disk, path: Path) -> None:
    """Make the bytes of a file, or the entries of a folder, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        disk.fsync(fd)
    finally:
        os.close(fd)


def lock(path: Path) -> int | None:
    """Lock a folder. The lock lasts until the descriptor is closed or the process ends; None if another one has it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    if not path.exists() or os.stat(path).st_ino != os.fstat(fd).st_ino:  # renamed or removed in the meantime
        os.close(fd)
        return None
    return fd


def disk_error(path: Path, error: OSError, kept: int = 0) -> OutputError:
    """An error that says what the system said, and how many finished blocks are kept."""
    what = f"{kept} blocks are kept: free space and start the same command again" if kept else "nothing was kept"
    return OutputError(
        str(path),
        error.strerror or str(error),
        remedy=what if kept else f"{what}; free space or choose another {option('out')}",
    )


def write_json_file(path: Path, value: Any) -> None:
    """Write a JSON file outside of any run, whole or not at all. OutputError where that fails."""
    try:
        replace_file(Disk(), path, json_bytes(value))
    except OSError as error:
        raise OutputError(str(path), error.strerror or str(error), remedy="choose another file") from None
