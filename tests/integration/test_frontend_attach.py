"""Requests to attach, in a runtime directory with scripted supervisors: dead, silent, dying, one after another."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.json_text import dumps
from harpd.supervisor.listener import ACTIVE_SOCKET
from support.harpd import Harpd
from support.scripted_supervisors import Script, dead_supervisor, make_current, supervisor

FOUND = {"harp": 1, "stream_result": False}


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    """A frontend without a supervisor."""
    harpd = Harpd(tmp_path_factory.mktemp("attach"), "", services=True)
    harpd.runtime_directory.mkdir()
    harpd.start_frontend()
    yield harpd
    assert harpd.stop_frontend() == 0
    assert not harpd.faults()


@pytest.fixture
def directory(frontend: Harpd) -> Path:
    """The runtime directory of the frontend, empty."""
    for file in frontend.runtime_directory.glob("supervisor*"):
        file.unlink()
    return frontend.runtime_directory


def error(type: str, **data: Any) -> dict[str, Any]:
    return {"harp": 1, "error": {"type": type, "message": "m", "data": data}}


def replying(*messages: dict[str, Any]) -> Script:
    return lambda request: b"".join(dumps(message) + b"\n" for message in messages)


def not_found(name: str) -> Script:
    return replying(error("no_such_call", instance=name))


@asynccontextmanager
async def scripted(directory: Path, **scripts: Script) -> AsyncIterator[None]:
    """Run supervisors with these names, the first of which is active."""
    async with AsyncExitStack() as running:
        for name, script in scripts.items():
            await running.enter_async_context(supervisor(directory, name, script))
        make_current(directory, next(iter(scripts)))
        yield


async def attached(frontend: Harpd) -> list[Any]:
    """Return all lines that a request to attach receives."""

    def exchange() -> list[Any]:
        with frontend.attach(str(uuid.uuid4())) as client:
            return client.lines()

    return await asyncio.to_thread(exchange)


async def test_attach_finds_call_in_any_supervisor(frontend: Harpd, directory: Path) -> None:
    reply = [FOUND, {"stream": 1}]
    for where in "abc":
        scripts = {name: replying(*reply) if name == where else not_found(name) for name in "abc"}
        async with scripted(directory, **scripts):
            assert await attached(frontend) == reply


async def test_attach_unknown_call_is_answered_by_active(frontend: Harpd, directory: Path) -> None:
    dead_supervisor(directory, "d")
    async with scripted(directory, b=not_found("b"), a=not_found("a"), c=not_found("c")):
        assert await attached(frontend) == [error("no_such_call", instance="b")]


async def test_attach_other_reply_ends_search(frontend: Harpd, directory: Path) -> None:
    async with scripted(directory, a=not_found("a"), b=replying(error("records_gone"))):
        assert await attached(frontend) == [error("records_gone")]


async def test_attach_without_reply_or_active_fails(frontend: Harpd, directory: Path) -> None:
    async with scripted(directory, a=not_found("a"), b=lambda request: None):
        assert [line["error"]["type"] for line in await attached(frontend)] == ["procedure_loading_error"]
    (directory / ACTIVE_SOCKET).unlink()
    async with supervisor(directory, "a", not_found("a")):
        assert [line["error"]["type"] for line in await attached(frontend)] == ["procedure_loading_error"]


async def test_attach_finds_older_without_active(frontend: Harpd, directory: Path) -> None:
    async with supervisor(directory, "a", replying(FOUND)):
        assert await attached(frontend) == [FOUND]


async def test_attach_waits_after_death_of_active(frontend: Harpd, directory: Path) -> None:
    # The supervisor is asked by both of its names.
    replies = iter((b"", b"", b'{"harp":1,"er', b"", json.dumps(FOUND).encode() + b"\n"))
    async with scripted(directory, a=lambda request: next(replies)):
        assert await attached(frontend) == [FOUND]
