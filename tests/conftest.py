"""Settings and fixtures for all tests."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from support.leftovers import find_leftover_tasks, find_leftovers, snapshot

# No deadline, because a slow machine is not an error. The examples are the same each time. To search for more:
# HYPOTHESIS_PROFILE=search ./dev test tests/protocol
settings.register_profile("usual", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))


def pytest_configure() -> None:
    """Let the programs of tests be interrupted, also if this one was started in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long tests on each of several workers, so that no worker has a long one when the others end."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return
    files: dict[Path, list[pytest.Item]] = {}
    others: list[pytest.Item] = []
    for item in items:
        is_long = item.path.parent.name in ("acceptance", "browser")
        (files.setdefault(item.path, []) if is_long else others).append(item)
    short = iter(others)
    ordered: list[pytest.Item] = []
    for worker in range(workers):  # each gets as many consecutive tests at first
        long = [item for file in list(files.values())[worker::workers] for item in file]
        ordered += [*long, *islice(short, max(0, len(items) // workers - len(long)))]
    items[:] = [*ordered, *short]


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
