"""Memory of this process: its peak, and giving free pages back."""

import ctypes
import resource
import sys


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def trim() -> None:
    """Give freed heap pages back to the system, where the C library can (glibc).

    Its heap keeps what a tokenizer or a block has freed, and the next stage would come on top of it. A lower mmap
    threshold would do the same at every free, but made the demo run 1.6 times slower.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library: nothing to give back by hand
        return
