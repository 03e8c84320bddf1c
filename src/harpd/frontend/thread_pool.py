"""Runs blocking code for the event loop: in a bounded number of threads, with a deadline.

A thread that hangs cannot be stopped. It occupies its slot, so that at most `limit` threads hang. As a daemon thread it
does not prevent the exit of the program.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TaskFailed(Exception):
    """The function raised an exception, which is the cause of this one."""


class BoundedThreadPool:
    """A bounded number of threads for one event loop: `limit` functions run at the same time."""

    def __init__(self, limit: int) -> None:
        self._slots = asyncio.Semaphore(limit)

    async def run(self, function: Callable[[], T], deadline: float) -> T:
        """Run a function in its own thread; return its value.

        Raises:
            TimeoutError: it took longer than `deadline` seconds, with the wait for a slot. The thread continues.
            TaskFailed: it raised any exception, including SystemExit; or no thread can be started.
        """
        loop = asyncio.get_running_loop()
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        outcome.set_running_or_notify_cancel()  # from now on, only the thread sets it

        def work() -> None:
            try:
                outcome.set_result(function())
            except BaseException as error:  # noqa: BLE001 - passed to the waiting task
                failure = TaskFailed(type(error).__name__)
                failure.__cause__ = error
                outcome.set_exception(failure)
            with contextlib.suppress(RuntimeError):  # the loop is closed: the program exits
                loop.call_soon_threadsafe(self._slots.release)

        async with asyncio.timeout(deadline):
            await self._slots.acquire()
            try:
                threading.Thread(target=work, daemon=True).start()
            except RuntimeError as error:
                self._slots.release()
                raise TaskFailed("RuntimeError") from error
            return await asyncio.wrap_future(outcome)
