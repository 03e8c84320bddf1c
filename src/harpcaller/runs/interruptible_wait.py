"""Waits that end at a deadline or when another task interrupts them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Interrupted(Exception):
    """A wait that ended at its deadline or by an interrupt."""


class InterruptibleWait:
    """The waits of one task, one at a time. An interrupt between two waits ends the next one at once."""

    def __init__(self) -> None:
        self._timeout: asyncio.Timeout | None = None
        self._interrupted = False

    def interrupt(self) -> None:
        """Interrupt the current wait, or the next one."""
        self._interrupted = True
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def clear(self) -> None:
        """Clear the interrupt flag."""
        self._interrupted = False

    async def wait(self, awaitable: Awaitable[T], deadline: float | None = None) -> T:
        """Return the result of an awaitable.

        Args:
            awaitable: cancelled if the wait is interrupted.
            deadline: monotonic time at which the wait is interrupted; None for no deadline.

        Raises:
            Interrupted: the wait was interrupted, or its deadline has passed.
        """
        loop = asyncio.get_running_loop()
        when = None if deadline is None else loop.time() + deadline - time.monotonic()
        try:
            async with asyncio.timeout_at(loop.time() if self._interrupted else when) as self._timeout:
                return await awaitable
        except TimeoutError:
            if self._timeout is not None and self._timeout.expired():
                raise Interrupted from None
            raise  # an ETIMEDOUT of the system: the connection is dead
        finally:
            self._timeout = None
