"""Scripted supervisors: each answers the first line of every connection by a script of the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

from harpd.supervisor.listener import ACTIVE_SOCKET, SOCKET_PREFIX

__all__ = ["Script", "dead_supervisor", "make_current", "supervisor"]

#: Returns the reply to a request, before the close; None: no reply and no close.
Script: TypeAlias = Callable[[dict[str, Any]], bytes | None]


@asynccontextmanager
async def supervisor(directory: Path, name: str, script: Script) -> AsyncIterator[None]:
    """Run a supervisor with this instance id in a runtime directory."""

    exchanges: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = asyncio.create_task(_answer(reader, writer, script))
        exchanges.add(exchange)
        exchange.add_done_callback(exchanges.discard)

    async with await asyncio.start_unix_server(serve, directory / (SOCKET_PREFIX + name)):
        yield
    await asyncio.gather(*exchanges)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, script: Script) -> None:
    request = await reader.readline()
    if request:
        reply = script(json.loads(request))
        if reply is None:
            await reader.read()
        else:
            writer.write(reply)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def make_current(directory: Path, name: str) -> None:
    """Make this supervisor the active one, like a supervisor does itself."""
    (directory / "new").hardlink_to(directory / (SOCKET_PREFIX + name))
    (directory / "new").replace(directory / ACTIVE_SOCKET)


def dead_supervisor(directory: Path, name: str) -> None:
    """Leave the socket of a supervisor that was killed."""
    descriptor = os.open(directory, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{descriptor}/{SOCKET_PREFIX}{name}")
    finally:
        os.close(descriptor)
