"""Outcomes: like futures, but their callbacks are called immediately."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from harp_daemon.outcome import Outcome, when_done


def outcome() -> Outcome[Any]:
    return Outcome(asyncio.get_running_loop())


async def test_outcome_calls_its_callbacks_in_order_at_once() -> None:
    called: list[tuple[int, Any]] = []
    waiting = outcome()
    waiting.add_done_callback(lambda done: called.append((0, done.result())))
    waiting.add_done_callback(lambda done: called.append((1, done.result())))
    assert not waiting.done()
    waiting.set_result("x")
    assert called == [(0, "x"), (1, "x")]
    assert waiting.done()
    waiting.add_done_callback(lambda done: called.append((2, done.result())))
    assert len(called) == 2, "later, as a future"
    await asyncio.sleep(0)
    assert called[2:] == [(2, "x")]
    with pytest.raises(asyncio.InvalidStateError):
        waiting.set_result("y")


async def test_outcome_calls_others_after_a_callback_failed() -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    waiting, called = outcome(), list[Any]()
    waiting.add_done_callback(lambda _: 1 / 0)
    waiting.add_done_callback(called.append)
    waiting.set_result(None)
    assert called == [waiting]
    assert isinstance(reported[0], ZeroDivisionError)


async def test_outcome_is_awaited_as_a_future() -> None:
    done: Any = outcome()
    failed: Any = outcome()
    both = asyncio.gather(done, failed, return_exceptions=True)
    await asyncio.sleep(0)
    done.set_result(1)
    failed.set_exception(ValueError("x"))
    assert str(await both) == "[1, ValueError('x')]"
    assert await done == 1
    with pytest.raises(ValueError, match="x"):
        await failed


async def test_outcome_of_a_cancelled_awaiter_is_cancelled() -> None:
    waiting = outcome()
    task = asyncio.ensure_future(waiting)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert waiting.cancelled()
    assert not waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        waiting.result()


async def test_when_done_calls_with_any_awaitable() -> None:
    async def work() -> int:
        return 1

    called: list[int] = []
    waiting, future = outcome(), asyncio.get_running_loop().create_future()
    for awaitable in (waiting, future, work()):
        when_done(awaitable, lambda done: called.append(done.result()))
    waiting.set_result(3)
    assert called == [3]
    future.set_result(2)
    await asyncio.sleep(0.01)
    assert sorted(called) == [1, 2, 3]
