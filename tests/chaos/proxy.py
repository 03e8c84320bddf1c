"""A TCP proxy that spoils what passes through it, in the ways of real networks.

One of them stands before each host; the dispatcher knows no other way. Bytes pass unread: what goes through is TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from enum import StrEnum

_CHUNK = 1 << 16
#: How slow a slow network is: bytes at a time, and seconds between them.
_DRIP_BYTES, _DRIP_PAUSE = 64, 0.02
#: The most bytes that pass before a reset; a TLS handshake and a request have some thousand.
_RESET_AFTER = 6000
#: With SO_LINGER like this, closing sends a reset.
_ABORTIVE = struct.pack("ii", 1, 0)


class Mode(StrEnum):
    """What the proxy does to connections."""

    PASS = "pass"
    CUT = "cut"  # closes both sides, of those there are and of those that come
    HALF_OPEN = "half-open"  # closes one side; the other one hears nothing, and a reset when it speaks after the fault
    STALLED = "stalled"  # takes connections and passes nothing until the fault ends
    SLOW = "slow"  # passes a few bytes at a time
    RESET = "reset"  # passes some bytes, then resets both sides in the middle of whatever that was
    REFUSE = "refuse"  # takes no new connection; those there are stay well


def reserve_port() -> socket.socket:
    """Bind a free port of 127.0.0.1 and keep it from becoming anybody's by chance; one may listen there meanwhile."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


class Proxy:
    """A proxy on a port of its own.

    Args:
        target: the port of 127.0.0.1 that it leads to.
        seed: for the small choices: which side, how many bytes.

    Attributes:
        port: where it listens.
        mode: what it does now.
    """

    def __init__(self, target: int, seed: str) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._holder = reserve_port()
        self.port: int = self._holder.getsockname()[1]
        self.mode = Mode.PASS
        self._server: asyncio.Server | None = None
        self._passages: set[_Passage] = set()
        self._healed = asyncio.Event()
        self._healed.set()

    async def start(self) -> None:
        """Begin to listen."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=512)

    async def set(self, mode: Mode) -> None:
        """Do this from now on, to the connections that there are as well."""
        self.mode = mode
        if mode is Mode.REFUSE:
            self._stop_listening()
        else:
            await self.start()
        if mode is Mode.STALLED:
            self._healed.clear()
        else:
            self._healed.set()
        for passage in list(self._passages):
            passage.suffer(mode)

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self) -> None:
        """Close everything."""
        self._stop_listening()
        for passage in list(self._passages):
            passage.abort()
        while self._passages:
            await asyncio.sleep(0.01)
        self._holder.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passage = _Passage(self, reader, writer, self._random)
        self._passages.add(passage)
        try:
            await passage.run(self._target)
        finally:
            self._passages.discard(passage)

    async def healed(self) -> None:
        """Wait while nothing passes."""
        await self._healed.wait()


class _Passage:
    """One connection through the proxy: two sides, a task for each direction."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chance: random.Random
    ) -> None:
        self._proxy = proxy
        self._random = chance
        self._near = reader, writer
        self._writers = [writer]
        self._left: int | None = None  # bytes until a reset
        self._deaf: asyncio.StreamWriter | None = None  # the side that stayed open
        self._task = asyncio.current_task()

    async def run(self, target: int) -> None:
        try:
            self.suffer(self._proxy.mode)
            await self._proxy.healed()
            far = await asyncio.open_connection("127.0.0.1", target)
            self._writers.append(far[1])
            self.suffer(self._proxy.mode)
            there = asyncio.create_task(self._pump(self._near[0], far[1]))
            back = asyncio.create_task(self._pump(far[0], self._near[1]))
            try:
                await asyncio.gather(there, back)
            finally:
                there.cancel()
                back.cancel()
        except (OSError, asyncio.CancelledError):
            pass  # a side is gone, or the proxy was told to cut
        finally:
            for writer in self._writers:
                writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            await self._proxy.healed()
            if self._deaf is not None:
                if self._proxy.mode is not Mode.HALF_OPEN:
                    self._reset()
                continue
            if self._proxy.mode is Mode.SLOW:
                await self._drip(data, writer)
            elif self._left is not None and len(data) >= self._left:
                _write(writer, data[: self._left])
                await asyncio.sleep(0)
                self._reset()
            else:
                if self._left is not None:
                    self._left -= len(data)
                _write(writer, data)
            await writer.drain()
        if self._deaf is None:
            await self._proxy.healed()
            with contextlib.suppress(OSError):
                writer.write_eof()
        elif writer is self._deaf:
            await asyncio.Event().wait()  # this side is closed, and the other one is not to know
        else:
            self.abort()

    async def _drip(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(data), _DRIP_BYTES):
            if self._proxy.mode is not Mode.SLOW:
                _write(writer, data[at:])
                return
            _write(writer, data[at : at + _DRIP_BYTES])
            await asyncio.sleep(_DRIP_PAUSE)

    def suffer(self, mode: Mode) -> None:
        """Begin what a mode does to this connection."""
        self._left = self._random.randrange(1, _RESET_AFTER) if mode is Mode.RESET else None
        if mode is Mode.CUT:
            self.abort()
        elif mode is Mode.HALF_OPEN and self._deaf is None:
            deaf = self._random.randrange(len(self._writers))
            self._deaf = self._writers[deaf]
            for number, writer in enumerate(self._writers):
                if number != deaf:
                    writer.close()

    def _reset(self) -> None:
        for writer in self._writers:
            connection = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE)
        self.abort()

    def abort(self) -> None:
        """Close both sides, now."""
        for writer in self._writers:
            writer.transport.abort()
        if self._task is not None:
            self._task.cancel()


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if writer.transport.is_closing():
        raise ConnectionResetError
    writer.write(data)
