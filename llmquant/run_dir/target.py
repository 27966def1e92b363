"""Whether a run may write to its target: asked before the work, and again at the commit."""

import errno
import os
import shutil
from pathlib import Path

from llmquant.errors import OutputError, option
from llmquant.run_dir.disk import Disk
from llmquant.run_dir.manifest import is_finished


def check_target(out: Path, *, overwrite: bool) -> None:
    """OutputError unless `out` does not exist, is empty, or, with `overwrite`, is a checkpoint that llmquant wrote."""
    if out.exists() and not out.is_dir():
        raise OutputError(str(out), "is a file", expected="a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        ours = is_finished(out)
        if not ours:
            raise OutputError(
                str(out), "is not empty and not written by llmquant", remedy=f"choose another {option('out')}"
            )
        if not overwrite:
            raise OutputError(
                str(out),
                "already holds a checkpoint",
                remedy=f"choose another {option('out')}, or pass {option('overwrite')}",
            )


def check_space(out: Path, needed: int) -> int:
    """How many bytes are free; OutputError if that is fewer than `needed`."""
    folder = next(parent for parent in out.parents if parent.is_dir())
    if not os.access(folder, os.W_OK):
        raise OutputError(str(folder), "is not writable", remedy=f"choose another {option('out')}")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(str(folder), f"{free} bytes free", expected=f"{needed} for the output and its scratch files")
    return free


def check_exchange(disk: Disk, partial: Path, out: Path) -> None:
    """OutputError unless the file system can replace the old checkpoint by the new one in one step."""
    try:
        disk.exchange(partial, partial)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            raise OutputError(
                str(out), "cannot be replaced in one step on this file system", remedy=f"choose another {option('out')}"
            ) from None
        raise


def allocated(folder: Path, pattern: str = "**/*") -> int:
    """Bytes that the files in `folder` occupy on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob(pattern) if path.is_file())
