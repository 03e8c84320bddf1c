"""Waits that can be broken off: by a time, or by somebody who has something to be looked at."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

__all__ = ["Interrupted", "InterruptibleWait"]

T = TypeVar("T")


class Interrupted(Exception):
    """A wait was broken off: its time is over, or there is something to look at."""


class InterruptibleWait:
    """The waits of one task, one at a time. What interrupts between two waits breaks off the next one."""

    def __init__(self) -> None:
        self._timeout: asyncio.Timeout | None = None
        self._interrupted = False

    def interrupt(self) -> None:
        """There is something to look at."""
        self._interrupted = True
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def clear(self) -> None:
        """What there was to look at is being looked at."""
        self._interrupted = False

    async def wait(self, awaitable: Awaitable[T], deadline: float | None = None) -> T:
        """Wait for something.

        Args:
            awaitable: cancelled if the wait is interrupted.
            deadline: monotonic time at which the wait is interrupted; None for no deadline.

        Raises:
            Interrupted: it was broken off.
        """
        loop = asyncio.get_running_loop()
        when = None if deadline is None else loop.time() + deadline - time.monotonic()
        try:
            async with asyncio.timeout_at(loop.time() if self._interrupted else when) as self._timeout:
                return await awaitable
        except TimeoutError:
            if self._timeout is not None and self._timeout.expired():
                raise Interrupted from None
            raise  # the system's: a connection is dead
        finally:
            self._timeout = None
