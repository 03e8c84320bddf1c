"""Waits that can be broken off: by a time, or by somebody who has something to be looked at."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

__all__ = ["Interrupted", "Waiting"]

T = TypeVar("T")


class Interrupted(Exception):
    """A wait was broken off: its time is over, or there is something to look at."""


class Waiting:
    """The waits of one task, one at a time. What interrupts between two waits breaks off the next one."""

    def __init__(self) -> None:
        self._wake: asyncio.Timeout | None = None
        self._told = False

    def interrupt(self) -> None:
        """There is something to look at."""
        self._told = True
        if self._wake is not None and not self._wake.expired():
            self._wake.reschedule(asyncio.get_running_loop().time())

    def look_up(self) -> None:
        """What there was to look at is being looked at."""
        self._told = False

    async def wait(self, what: Awaitable[T], until: float | None = None) -> T:
        """Wait for something.

        Args:
            what: what is waited for; cancelled when the wait is broken off.
            until: when the wait is over, on the monotonic clock; None: never.

        Raises:
            Interrupted: it was broken off.
        """
        loop = asyncio.get_running_loop()
        when = None if until is None else loop.time() + until - time.monotonic()
        try:
            async with asyncio.timeout_at(loop.time() if self._told else when) as self._wake:
                return await what
        except TimeoutError:
            if self._wake is not None and self._wake.expired():
                raise Interrupted from None
            raise  # the system's: a connection is dead
        finally:
            self._wake = None
