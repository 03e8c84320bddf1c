"""`harp_daemon.event_loop`: how a daemon runs its event loop."""

from __future__ import annotations

import asyncio

import pytest

from harp_daemon.event_loop import run


def test_run_coroutine_returns_its_result() -> None:
    async def answer() -> type[asyncio.AbstractEventLoop]:
        await asyncio.sleep(0)
        return type(asyncio.get_running_loop())

    assert issubclass(run(answer()), asyncio.SelectorEventLoop)


def test_run_coroutine_raises_passes_the_exception() -> None:
    async def fail() -> None:
        raise LookupError("text")

    with pytest.raises(LookupError, match="text"):
        run(fail())
