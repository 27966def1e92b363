"""Whether a run may write to its target: asked before the work, and again at the commit."""

import errno
import os
import shutil
from pathlib import Path

from llmquant.errors import OutputError
from llmquant.run_dir.disk import Disk
from llmquant.run_dir.manifest import is_finished


def check_target(out: Path, *, overwrite: bool) -> None:
    """OutputError unless `out` is not there, empty, or, with `overwrite`, a checkpoint that llmquant wrote."""
    if out.exists() and not out.is_dir():
        raise OutputError(str(out), "is a file", expected="a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        ours = is_finished(out)
        if not ours:
            raise OutputError(str(out), "is not empty and not written by llmquant", remedy="choose another --out")
        if not overwrite:
            raise OutputError(
                str(out), "already holds a checkpoint", remedy="choose another --out, or pass --overwrite"
            )


def check_space(out: Path, needed: int) -> int:
    """Bytes that are free; OutputError where they are fewer than `needed`."""
    folder = next(parent for parent in out.parents if parent.is_dir())
    if not os.access(folder, os.W_OK):
        raise OutputError(str(folder), "is not writable", remedy="choose another --out")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(str(folder), f"{free} bytes free", expected=f"{needed} for the output and its scratch files")
    return free


def check_exchange(disk: Disk, partial: Path, out: Path) -> None:
    """OutputError unless the file system can put the new checkpoint in the old one's place in one step."""
    try:
        disk.exchange(partial, partial)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            raise OutputError(
                str(out), "cannot be replaced in one step on this file system", remedy="choose another --out"
            ) from None
        raise


def allocated(folder: Path, pattern: str = "**/*") -> int:
    """Bytes on the disk of the files in `folder`."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob(pattern) if path.is_file())
