"""Procedures that are coroutines: an event loop runs each call to its end. Only files that need it load it.

A signal of the supervisor would raise an exception somewhere in the loop, which may lose it. So the first one cancels
the procedure's task instead, as `asyncio.timeout` does. A second one is raised where the code is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from harpd.proc import Result

if TYPE_CHECKING:
    from harpd.worker.signals import SignalGuard


def run_to_end(value: Any, guard: SignalGuard, write: Callable[[Any, int], None] | None) -> Any:
    """Run a coroutine in a new event loop, and return its value; then end all other tasks.

    For a streaming procedure, `write` writes a record with its number. Asynchronous records are the value, or
    the return value of the coroutine. They are written; the value is then their `Result`, or an empty tuple.
    """

    async def run() -> Any:
        returned = await value if hasattr(type(value), "__await__") else value
        if write is not None and hasattr(type(returned), "__aiter__"):
            return await _write_records(returned, write)
        return returned

    runner = asyncio.Runner()
    loop = runner.get_loop()
    task = loop.create_task(run())

    def cancel() -> None:
        with suppress(RuntimeError):  # the loop has just been closed
            loop.call_soon_threadsafe(task.cancel)

    guard.redirect(cancel)
    try:
        with runner:
            return loop.run_until_complete(task)
    finally:
        guard.end_redirection()


async def _write_records(records: Any, write: Callable[[Any, int], None]) -> Any:
    iterator = aiter(records)
    number = 0
    try:
        async for record in iterator:
            if isinstance(record, Result):
                return record
            write(record, number)
            try:
                await asyncio.sleep(0)  # other tasks run, and a limit takes effect even if the records need no wait
            except asyncio.CancelledError as cancelled:
                if hasattr(iterator, "athrow"):  # a generator cleans up, as after an exception at its `yield`
                    await iterator.athrow(cancelled)
                raise
            number += 1
        return ()
    finally:
        if hasattr(iterator, "aclose"):
            await iterator.aclose()
