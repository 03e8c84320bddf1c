"""The memory of a daemon: how it is allocated and collected, so that no turn of its event loop takes long."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

#: Thresholds of the garbage collector. With Python's, a stream of records causes a full collection, which visits all
#: records that wait for the store, several times per second.
_GC_THRESHOLDS = 5000, 5, 20


def tune(kept_bytes: int, mapped_bytes: int) -> None:
    """Set up the memory of this process, which has loaded its modules and has no thread.

    Args:
        kept_bytes: freed memory that glibc reuses. Page faults make the copy of 1 MiB take 2 ms instead of 0.1 ms.
        mapped_bytes: longer blocks are returned to the system when they are freed.
    """
    gc.set_threshold(*_GC_THRESHOLDS)
    gc.freeze()  # a full collection does not visit the objects of the program itself, which takes 20 ms
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, kept_bytes)
        libc.mallopt(_M_MMAP_THRESHOLD, mapped_bytes)
