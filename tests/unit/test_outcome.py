"""Outcomes: like futures, but their callbacks are called immediately."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from harp_daemon.outcome import Outcome


def outcome() -> Outcome[Any]:
    return Outcome(asyncio.get_running_loop())


async def test_outcome_calls_its_callbacks_in_order_at_once() -> None:
    called: list[tuple[int, Any]] = []
    waiting = outcome()
    waiting.add_done_callback(lambda done: called.append((0, done.result())))
    waiting.add_done_callback(lambda done: called.append((1, done.result())))
    removed = called.append
    waiting.add_done_callback(removed)
    assert waiting.remove_done_callback(removed) == 1
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
    assert asyncio.ensure_future(done) is done
    awaiting = asyncio.create_task(asyncio.wait({done, failed}))
    await asyncio.sleep(0)
    done.set_result(1)
    failed.set_exception(ValueError("x"))
    assert await awaiting == ({done, failed}, set())
    assert str(await both) == "[1, ValueError('x')]"
    assert await done == 1
    with pytest.raises(ValueError, match="x"):
        await failed


async def test_outcome_of_a_cancelled_awaiter_is_cancelled() -> None:
    waiting, shielded = outcome(), outcome()

    async def wait(one: Any) -> None:
        await one

    tasks = [asyncio.create_task(wait(waiting)), asyncio.create_task(wait(asyncio.shield(shielded)))]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert waiting.cancelled()
    assert not waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        waiting.result()
    assert not shielded.done()


async def test_gather_of_outcomes_can_be_cancelled() -> None:
    outcomes: list[Outcome[int]] = [Outcome(asyncio.get_running_loop()) for _ in range(3)]
    gathered = asyncio.gather(*outcomes)
    gathered.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(60):
            await gathered
    assert all(outcome.cancelled() for outcome in outcomes)
