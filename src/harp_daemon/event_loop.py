"""The event loop of the daemons: asyncio's own, or uvloop (the extra ``speed``) if that is asked for.

`HARP_EVENT_LOOP=uvloop` in the environment asks for it. It saves a tenth; its TLS reports a connection that is aborted
while it reads as a fatal error, which is why it is not taken by itself.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import contextlib
import ctypes
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["run"]

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM, _MMAP = 64 * 1024 * 1024, 16 * 1024 * 1024

#: Bytes that asyncio takes for what it receives over each TLS connection, however little comes: by itself 256 KiB.
_RECEIVED = 32 * 1024


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a program's coroutine to its end, and return what it returns."""
    _keep_memory()
    asyncio.sslproto.SSLProtocol.max_size = _RECEIVED
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if os.environ.get("HARP_EVENT_LOOP") != "uvloop":
        return None
    import uvloop

    return uvloop.new_event_loop


def _keep_memory() -> None:
    """Have glibc keep the memory of receive buffers: to map and unmap them again and again doubles the cost."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM)
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP)
