"""Runs blocking code for the event loop: in a bounded number of threads, with a deadline.

A thread that hangs cannot be stopped. It occupies its slot, so that at most `limit` threads hang. As a daemon thread it
does not prevent the exit of the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TaskFailed(Exception):
    """The function raised an exception, which is the cause of this one."""


class BoundedThreadPool:
    """A bounded number of threads for one event loop.

    Args:
        limit: most functions that run at the same time.
    """

    def __init__(self, limit: int) -> None:
        self._slots = asyncio.Semaphore(limit)

    async def run(self, function: Callable[[], T], deadline: float) -> T:
        """Run a function in its own thread; return its value.

        Args:
            function: the function.
            deadline: seconds for it, including the wait for a slot.

        Raises:
            TimeoutError: it took longer. The thread continues.
            TaskFailed: it raised any exception, including SystemExit; or no thread can be started.
        """
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()

        def finish(value: T | None, error: BaseException | None) -> None:
            self._slots.release()
            if not outcome.done():
                outcome.set_result((value, error))

        def work() -> None:
            value, failure = None, None
            try:
                value = function()
            except BaseException as error:  # noqa: BLE001 - passed to the waiting task
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: the program exits
                loop.call_soon_threadsafe(finish, value, failure)

        async with asyncio.timeout(deadline):
            await self._slots.acquire()
            try:
                threading.Thread(target=work, daemon=True).start()
            except RuntimeError as error:
                finish(None, error)
            value, failure = await outcome
        if failure is not None:
            raise TaskFailed(type(failure).__name__) from failure
        return value  # type: ignore[return-value]  # without an error it is the value
