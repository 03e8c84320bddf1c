"""`harp_daemon.event_loop`: which loop the daemons run on."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from harp_daemon.event_loop import run


async def kind() -> type[asyncio.AbstractEventLoop]:
    await asyncio.sleep(0)
    return type(asyncio.get_running_loop())


def test_uvloop_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARP_EVENT_LOOP", "uvloop")
    assert run(kind()) is uvloop.Loop


def test_else_it_is_asyncios_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARP_EVENT_LOOP", raising=False)
    assert issubclass(run(kind()), asyncio.SelectorEventLoop)


def test_what_the_program_raises_comes_out() -> None:
    async def fail() -> None:
        raise LookupError("text")

    with pytest.raises(LookupError, match="text"):
        run(fail())
