"""Settings and fixtures for all tests."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import settings

from support.leftovers import find_leftover_tasks, find_leftovers, snapshot

# No deadline, because a slow machine is not an error. The examples are the same each time. To search for more:
# HYPOTHESIS_PROFILE=search ./dev test tests/protocol
settings.register_profile("usual", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process, a descriptor or a thread behind; fixtures of wider scope were there before."""
    before = snapshot()
    yield
    if left := find_leftovers(before):
        pytest.fail("left behind:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def no_task_left_behind(nothing_left_behind: None, request: pytest.FixtureRequest) -> None:
    """The same for tasks in the loop of a test that is a coroutine; the resources of the loop are closed later."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("_no_task_left_behind")


@pytest.fixture
async def _no_task_left_behind() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    if left := await find_leftover_tasks(before):
        pytest.fail("tasks left behind:\n" + "\n".join(left), pytrace=False)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A growing list of the addresses of all attempts to connect."""
    found: list[Any] = []

    def noted(plain: Any) -> Any:
        def connect(sock: socket.socket, address: Any) -> Any:
            found.append(address)
            return plain(sock, address)

        return connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, noted(getattr(socket.socket, name)))
    return found
