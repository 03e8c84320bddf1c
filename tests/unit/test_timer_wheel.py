"""`harp_daemon.timer_wheel`: when timers run."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from harp_daemon.timer_wheel import TICK, Timer, TimerWheel
from support.deadline import eventually


async def test_timers_run_in_order_and_never_early() -> None:
    wheel = TimerWheel()
    began = time.monotonic()
    ran: list[tuple[float, float]] = []

    def start(seconds: float) -> None:
        wheel.call_later(seconds, lambda: ran.append((seconds, time.monotonic() - began)))

    for seconds in (0.3, 0.1, 0.2, -1.0, 0.0):
        start(seconds)
    await eventually(lambda: len(ran) == 5, what="all timers")
    assert [seconds for seconds, _ in ran][2:] == [0.1, 0.2, 0.3]
    assert all(after >= seconds for seconds, after in ran)


async def test_timer_cancelled_does_not_run() -> None:
    wheel = TimerWheel()
    ran: list[str] = []
    timers: list[Timer] = []

    def cancel_all() -> None:
        ran.append("first")
        for timer in timers:
            timer.cancel()

    timers += [wheel.call_later(0.01, cancel_all) for _ in range(3)]
    timers[0].cancel()
    wheel.call_later(0.01 + 2 * TICK, lambda: ran.append("last"))
    await eventually(lambda: "last" in ran, what="the last timer")
    assert ran == ["first", "last"]
    timers[0].cancel()  # again, after its time


async def test_timer_started_by_a_timer_runs() -> None:
    wheel = TimerWheel()
    done = asyncio.Event()
    wheel.call_later(0.0, lambda: wheel.call_later(0.0, done.set))
    async with asyncio.timeout(10):
        await done.wait()


async def test_timer_that_fails_is_logged_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    wheel = TimerWheel()
    done = asyncio.Event()
    wheel.call_later(0.0, lambda: 1 // 0)
    wheel.call_later(2 * TICK, done.set)
    async with asyncio.timeout(10):
        await done.wait()
    assert "timer failed: internal error" in caplog.text


async def test_wheel_closed_runs_no_timer() -> None:
    wheel = TimerWheel()
    ran: list[str] = []
    wheel.call_later(0.0, lambda: ran.append("late"))
    wheel.close()
    await asyncio.sleep(3 * TICK)
    assert ran == []
