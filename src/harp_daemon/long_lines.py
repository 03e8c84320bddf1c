"""Decoding of long lines outside of the event loop.

A thread that decodes delays each event of the loop by up to the switch interval of the interpreter, and by the longest
step of the decoder: about 1.2 ms for each MiB. Several threads would multiply that, so one line is decoded at a time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Bytes from which a line is long: it is decoded in a thread, because the loop must not wait for it.
LONG_LINE = 64 * 1024

_one_at_a_time = threading.Lock()


def decode_in_thread(decode: Callable[[bytes], T], line: bytes) -> asyncio.Future[T]:
    """Decode a line in a thread, after the long lines before it; return a future of the result."""

    def work() -> T:
        with _one_at_a_time:
            return decode(line)

    return asyncio.get_running_loop().run_in_executor(None, work)
