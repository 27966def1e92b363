"""Memory of this process: what it holds, its peak, and giving free pages back."""

import ctypes
import os
import resource
import sys
from pathlib import Path

# Resident bytes that freed pages may add between two steps of a block; giving them back takes up to 70 ms.
SLACK = 64 * 2**20
_left = 0  # resident bytes behind the last trim


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def physical_memory() -> int | None:
    """Bytes of the machine's memory, where it tells them."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system says
        return None


def trim(slack: int = 0) -> None:
    """Give freed heap pages back to the system, where the C library can (glibc).

    Its heap keeps what a tokenizer, a block or a step has freed, and the next one would come on top of it. A lower
    mmap threshold would do the same at every free, but made the demo run 1.6 times slower. With `slack` only where
    resident memory has grown by more than that since the last time.
    """
    global _left
    if slack and _resident() <= _left + slack:
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library: nothing to give back by hand
        return
    _left = _resident()


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux, and no glibc
        return 0
