"""A store of each backend, in its own directory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from harpcaller.store.sqlite import Store
from support.backends import BACKENDS

Reopen = Callable[[], Awaitable[Store]]


@pytest.fixture(params=sorted(BACKENDS))
async def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Reopen]:
    """Return a function that closes the store, if it is open, and opens it again."""
    opened: list[Store] = []

    async def again() -> Store:
        if opened:
            await opened.pop().close()
        opened.append(await BACKENDS[request.param](tmp_path / "store"))
        return opened[-1]

    yield again
    if opened:
        await opened.pop().close()


@pytest.fixture
async def store(reopen: Reopen) -> Store:
    return await reopen()
