"""Waits for a condition, with a deadline; its error names the condition."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds between two checks of a condition.
_PAUSE = 0.01


def wait_until(predicate: Callable[[], T], deadline: float = 30.0, what: str = "the condition") -> T:
    """Return the predicate's first true value; fail if all are false for `deadline` seconds."""
    last = time.monotonic() + deadline
    while True:
        value = predicate()
        if value:
            return value
        assert time.monotonic() < last, f"{what} did not come true within {deadline} s"
        time.sleep(_PAUSE)


async def eventually(
    predicate: Callable[[], T | Awaitable[T]], deadline: float = 30.0, what: str = "the condition"
) -> T:
    """`wait_until` for coroutines; the predicate may be a coroutine function."""
    last = time.monotonic() + deadline
    while True:
        found = predicate()
        value = await found if isinstance(found, Awaitable) else found
        if value:
            return value
        assert time.monotonic() < last, f"{what} did not come true within {deadline} s"
        await asyncio.sleep(_PAUSE)
