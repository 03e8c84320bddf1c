"""The supervisor client and the links with scripted supervisors: dead, silent, dying, one after another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from harpd.control import supervisor_client as module
from harpd.control.supervisor_client import SupervisorClient, SupervisorError, SupervisorNotRunning
from harpd.frontend.link import SupervisorLinks
from harpd.supervisor.listener import ACTIVE_SOCKET
from support.scripted_supervisors import Script, dead_supervisor, make_current, supervisor

IDS = [f"{number}e8400e2-9b1d-41d4-a716-446655440000" for number in range(3)]


def line(**members: Any) -> bytes:
    return json.dumps({"harp": 1, **members}).encode() + b"\n"


def replying(data: bytes | None) -> Script:
    return lambda request: data


def listing(name: str, *calls: str) -> Script:
    return replying(line(calls=calls, instance=name))


@asynccontextmanager
async def scripted(directory: Path, **scripts: Script) -> AsyncIterator[SupervisorClient]:
    """Run supervisors with these names, the first of which is active; yield a client."""
    async with AsyncExitStack() as running:
        for name, script in scripts.items():
            await running.enter_async_context(supervisor(directory, name, script))
        make_current(directory, next(iter(scripts)))
        yield running.enter_context(SupervisorClient(directory))


@asynccontextmanager
async def links_of(client: SupervisorClient) -> AsyncIterator[SupervisorLinks]:
    links = SupervisorLinks(client)
    try:
        yield links
    finally:
        links.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_START_TIMEOUT", 0.3)
    monkeypatch.setattr(module, "REPLY_TIMEOUT", 0.2)


@pytest.mark.usefixtures("impatient")
async def test_list_calls_without_reply_fails(tmp_path: Path) -> None:
    async with scripted(tmp_path, a=listing("a"), b=replying(None)) as client:
        with pytest.raises(SupervisorError, match="did not reply"):
            await client.list_calls("o")


@pytest.mark.usefixtures("impatient")
async def test_request_without_active_supervisor_fails(tmp_path: Path) -> None:
    async with supervisor(tmp_path, "a", listing("a")):
        with SupervisorClient(tmp_path) as client:
            async with links_of(client) as links:
                for operation in (client.list_calls("o"), links.connect_active()):
                    with pytest.raises(SupervisorError, match="no supervisor has accepted the call within"):
                        await operation


async def test_list_calls_waits_after_death_of_active(tmp_path: Path) -> None:
    answers = iter((b"", line(calls=[], instance="a")))
    async with scripted(tmp_path, a=lambda request: next(answers)) as client:
        assert (await client.list_calls("o")).instance == "a"


async def test_connect_waits_for_starting_supervisor(tmp_path: Path) -> None:
    with SupervisorClient(tmp_path) as client:
        async with links_of(client) as links:
            reaching = asyncio.create_task(links.connect_active())
            async with supervisor(tmp_path, "a", replying(b"")):
                make_current(tmp_path, "a")
                assert links.is_active(await reaching)


async def test_list_calls_merges_all_supervisors(tmp_path: Path) -> None:
    dead_supervisor(tmp_path, "d")
    async with scripted(tmp_path, b=listing("b", IDS[0]), a=listing("a", *IDS[1:]), c=listing("c", IDS[0])) as client:
        found = await client.list_calls("o")
    assert (sorted(found.calls), found.instance) == (IDS, "b")


@pytest.mark.parametrize("answer", [b'{"ok":true}\n', b'{"harp":1,"calls":5,"instance":"a"}\n', line(result=1)])
async def test_list_calls_invalid_reply_fails(tmp_path: Path, answer: bytes) -> None:
    async with scripted(tmp_path, a=replying(answer)) as client:
        with pytest.raises(SupervisorError, match="invalid list of calls"):
            await client.list_calls("o")


@pytest.mark.parametrize(
    ("answer", "fault"), [(b"nonsense\n", "no reply"), (b"", "no reply"), (b'{"error":"e"}\n', "e")]
)
async def test_control_request_returns_reply_or_fails(tmp_path: Path, answer: bytes, fault: str) -> None:
    async with scripted(tmp_path, a=replying(answer)) as client:
        with pytest.raises(SupervisorError, match=fault):
            await client.request({"control": "status"})


def test_removed_directory_is_left_to_the_supervisor(tmp_path: Path) -> None:
    """If root looks for supervisors of another user, that user could not write to a directory of root."""
    directory = tmp_path / "run"
    with SupervisorClient(directory) as client:
        directory.rmdir()
        assert client.socket_names() == []
        assert not directory.exists()
        directory.mkdir()
        dead_supervisor(directory, "a")
        assert client.socket_names() == ["supervisor-a"]


async def test_remove_dead_removes_sockets_of_dead(tmp_path: Path) -> None:
    dead_supervisor(tmp_path, "d")
    async with supervisor(tmp_path, "a", replying(b"")):
        make_current(tmp_path, "d")
        with SupervisorClient(tmp_path) as client:
            assert client.socket_names() == ["supervisor-a", "supervisor-d"]
            with pytest.raises(SupervisorNotRunning):
                await client.connect()
            await client.remove_dead_sockets()
            assert client.socket_names() == ["supervisor-a"]
            assert not (tmp_path / ACTIVE_SOCKET).exists()
