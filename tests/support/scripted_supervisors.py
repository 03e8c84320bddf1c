"""Scripted supervisors: each answers requests by a script of the test, whether they come as a line or over a link."""

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

from harpd.supervisor.frames import (
    ATTACH,
    CLOSED,
    END,
    ERROR,
    LINES,
    PREFACE,
    START,
    FrameBuffer,
    encode_frame,
)
from harpd.supervisor.listener import ACTIVE_SOCKET, SOCKET_PREFIX

__all__ = ["Script", "dead_supervisor", "make_current", "supervisor"]

#: Returns the reply to a request, before the close; None: no reply and no close. A reply over a link that ends in the
#: middle of a line is sent as a part of a frame, as after the death of the supervisor.
Script: TypeAlias = Callable[[dict[str, Any]], bytes | None]


@asynccontextmanager
async def supervisor(directory: Path, name: str, script: Script) -> AsyncIterator[None]:
    """Run a supervisor with this instance id in a runtime directory."""

    exchanges: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = asyncio.create_task(_answer(reader, writer, script))
        exchanges.add(exchange)
        exchange.add_done_callback(exchanges.discard)

    server = await asyncio.start_unix_server(serve, directory / (SOCKET_PREFIX + name))
    try:
        yield
    finally:
        server.close()
        for exchange in exchanges:  # links stay open until the frontend closes them, and Python 3.12 waits for that
            exchange.cancel()
        await asyncio.gather(*exchanges, return_exceptions=True)
        await server.wait_closed()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, script: Script) -> None:
    try:
        line = await reader.readline()
        if line == PREFACE:
            await _serve_link(reader, writer, script)
        elif line:
            reply = script(json.loads(line))
            if reply is None:
                await reader.read()
            else:
                writer.write(reply)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _serve_link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, script: Script) -> None:
    frames = FrameBuffer(1 << 30)
    while data := await reader.read(1 << 16):
        for channel, kind, body in frames.feed(data):
            if kind in (START, ATTACH):
                reply = script(json.loads(body.partition(b"\n")[0]))
                if reply == b"":
                    return  # it dies
                if reply is not None and not reply.endswith(b"\n"):
                    writer.write(encode_frame(channel, LINES, reply + b"\n")[:-1])
                    return
                if reply is not None:
                    writer.write(encode_frame(channel, _kind(reply), reply) + encode_frame(channel, CLOSED))


def _kind(lines: bytes) -> int:
    """Return the kind of the frame with these lines."""
    last = json.loads(lines.splitlines()[-1])
    return ERROR if "error" in last else END if last.keys() & {"result", "exception"} else LINES


def make_current(directory: Path, name: str) -> None:
    """Make this supervisor the active one, in the way of a real supervisor."""
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
