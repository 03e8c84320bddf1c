"""`harp.daemon.eventloop`: which loop the daemons run on."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from harp.daemon.eventloop import run


async def kind() -> type[asyncio.AbstractEventLoop]:
    await asyncio.sleep(0)
    return type(asyncio.get_running_loop())


def test_uvloop_is_used_where_it_is_installed() -> None:
    assert run(kind()) is uvloop.Loop


def test_asyncios_own_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARP_EVENT_LOOP", "asyncio")
    assert issubclass(run(kind()), asyncio.SelectorEventLoop)


def test_without_uvloop_asyncios_own_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvloop", None)
    assert issubclass(run(kind()), asyncio.SelectorEventLoop)


def test_what_the_program_raises_comes_out() -> None:
    async def fail() -> None:
        raise LookupError("text")

    with pytest.raises(LookupError, match="text"):
        run(fail())
