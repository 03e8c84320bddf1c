"""Code that may block, run for the event loop: in few threads, with a deadline.

A thread that hangs can't be stopped. It keeps its place, so that no more than the limit ever hang, and it does
not keep the program from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["BoundedThreadPool", "TaskFailed"]

T = TypeVar("T")


class TaskFailed(Exception):
    """The code raised something; that is the cause."""


class BoundedThreadPool:
    """Places for code that may block. Belongs to one event loop.

    Args:
        limit: how many may run at once.
    """

    def __init__(self, limit: int) -> None:
        self._slots = asyncio.Semaphore(limit)

    async def run(self, function: Callable[[], T], deadline: float) -> T:
        """Run a function in a thread of its own and return what it returns.

        Args:
            function: what to run.
            deadline: seconds for it, waiting for a place included.

        Raises:
            TimeoutError: it took longer. The thread goes on.
            Crashed: it raised something, be it SystemExit; or there is no thread to be had.
        """
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()

        def end(value: T | None, error: BaseException | None) -> None:
            self._slots.release()
            if not outcome.done():
                outcome.set_result((value, error))

        async with asyncio.timeout(deadline):
            await self._slots.acquire()
            try:
                threading.Thread(target=_run_task, args=(loop, function, end), daemon=True).start()
            except RuntimeError as error:
                end(None, error)
            value, error_ = await outcome
        if error_ is not None:
            raise TaskFailed(type(error_).__name__) from error_
        return value  # type: ignore[return-value]  # no error: it is what the function returned


def _run_task(loop: asyncio.AbstractEventLoop, function: Callable[[], Any], end: Callable[..., None]) -> None:
    value, failure = None, None
    try:
        value = function()
    except BaseException as error:  # noqa: BLE001 - handed to the one who waits, whatever it is
        failure = error
    try:
        loop.call_soon_threadsafe(end, value, failure)
    except RuntimeError:
        return  # the loop is closed: the program ends
