"""A TCP proxy that disturbs connections as real networks do.

There is one in front of each host, and the dispatcher connects only to it. The data is TLS, which it does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import socket
import struct
from enum import StrEnum

_CHUNK = 1 << 16
#: A slow network: bytes of one write, and seconds between them.
_DRIP_BYTES, _DRIP_PAUSE = 64, 0.02
#: Maximum bytes before a reset; a TLS handshake and a request have several thousand.
_RESET_AFTER = 6000
#: Ports that the system gives to no program that does not ask for them.
_PORTS = (20000, 32000)
#: A value of SO_LINGER with which a close sends a reset.
_ABORTIVE = struct.pack("ii", 1, 0)


class Mode(StrEnum):
    """The treatment of connections by the proxy."""

    PASS = "pass"
    CUT = "cut"  # closes both sides of all present and new connections
    HALF_OPEN = "half-open"  # closes one side silently; the other one gets a reset if it sends after the fault
    STALLED = "stalled"  # accepts connections and passes no data until the fault ends
    SLOW = "slow"  # passes a few bytes at a time
    RESET = "reset"  # passes some bytes, then resets both sides
    REFUSE = "refuse"  # accepts no new connections; the others are not disturbed


def reserve_port() -> socket.socket:
    """Reserve a free port of 127.0.0.1 until the socket is closed; a program may listen on it before.

    The port is below the range from which the system chooses, so that no other program gets it by chance while nobody
    listens on it. SO_REUSEADDR is set after the bind: a port that another run has reserved is then in use here.
    """
    while True:
        reservation = socket.socket()
        try:
            reservation.bind(("127.0.0.1", random.SystemRandom().randrange(*_PORTS)))
        except OSError as error:
            reservation.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return reservation


class Proxy:
    """A proxy for one host.

    Args:
        target: the port of the host on 127.0.0.1.
        seed: for random choices: which side, how many bytes.

    Attributes:
        port: the port on which it listens.
        mode: the present mode.
    """

    def __init__(self, target: int, seed: str) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._reservation = reserve_port()
        self.port: int = self._reservation.getsockname()[1]
        self.mode = Mode.PASS
        self._server: asyncio.Server | None = None
        self._listening = asyncio.Lock()
        self._connections: set[_ProxiedConnection] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def start(self) -> None:
        """Listen, unless the mode is to refuse connections. Modes may be set at the same time: the last one counts."""
        async with self._listening:
            if self.mode is Mode.REFUSE:
                self._stop_listening()
            elif self._server is None:
                self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=512)

    async def set(self, mode: Mode) -> None:
        """Set the mode of all present and new connections."""
        self.mode = mode
        await self.start()
        if self.mode is not mode:  # a later call has replaced it
            return
        if mode is Mode.STALLED:
            self._flowing.clear()
        else:
            self._flowing.set()
        for passage in list(self._connections):
            passage.apply_mode(mode)

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self) -> None:
        """Close the listening socket and all connections."""
        self._stop_listening()
        for passage in list(self._connections):
            passage.abort()
        while self._connections:
            await asyncio.sleep(0.01)
        self._reservation.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passage = _ProxiedConnection(self, reader, writer, self._random)
        self._connections.add(passage)
        try:
            await passage.run(self._target)
        finally:
            self._connections.discard(passage)

    async def wait_while_stalled(self) -> None:
        """Wait while the mode is stalled."""
        await self._flowing.wait()


class _ProxiedConnection:
    """One connection through the proxy: two sides, a task for each direction."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random
    ) -> None:
        self._proxy = proxy
        self._random = rng
        self._near = reader, writer
        self._writers = [writer]
        self._bytes_until_reset: int | None = None  # bytes until a reset
        self._open_side: asyncio.StreamWriter | None = None  # the side that stayed open
        self._task = asyncio.current_task()

    async def run(self, target: int) -> None:
        try:
            self.apply_mode(self._proxy.mode)
            await self._proxy.wait_while_stalled()
            far = await asyncio.open_connection("127.0.0.1", target)
            self._writers.append(far[1])
            self.apply_mode(self._proxy.mode)
            there = asyncio.create_task(self._pump(self._near[0], far[1]))
            back = asyncio.create_task(self._pump(far[0], self._near[1]))
            try:
                await asyncio.gather(there, back)
            finally:
                there.cancel()
                back.cancel()
        except (OSError, asyncio.CancelledError):
            pass  # a side has closed, or the proxy cuts the connection
        finally:
            for writer in self._writers:
                writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            await self._proxy.wait_while_stalled()
            if self._open_side is not None:
                if self._proxy.mode is not Mode.HALF_OPEN:
                    self._reset()
                continue
            if self._proxy.mode is Mode.SLOW:
                await self._send_slowly(data, writer)
            elif self._bytes_until_reset is not None and len(data) >= self._bytes_until_reset:
                _write(writer, data[: self._bytes_until_reset])
                await asyncio.sleep(0)
                self._reset()
            else:
                if self._bytes_until_reset is not None:
                    self._bytes_until_reset -= len(data)
                _write(writer, data)
            await writer.drain()
        if self._open_side is None:
            await self._proxy.wait_while_stalled()
            with contextlib.suppress(OSError):
                writer.write_eof()
        elif writer is self._open_side:
            await asyncio.Event().wait()  # this side is closed; the other one must not notice
        else:
            self.abort()

    async def _send_slowly(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(data), _DRIP_BYTES):
            if self._proxy.mode is not Mode.SLOW:
                _write(writer, data[at:])
                return
            _write(writer, data[at : at + _DRIP_BYTES])
            await asyncio.sleep(_DRIP_PAUSE)

    def apply_mode(self, mode: Mode) -> None:
        """Apply a mode to this connection."""
        self._bytes_until_reset = self._random.randrange(1, _RESET_AFTER) if mode is Mode.RESET else None
        if mode is Mode.CUT:
            self.abort()
        elif mode is Mode.HALF_OPEN and self._open_side is None:
            open_side = self._random.randrange(len(self._writers))
            self._open_side = self._writers[open_side]
            for number, writer in enumerate(self._writers):
                if number != open_side:
                    writer.close()

    def _reset(self) -> None:
        for writer in self._writers:
            connection = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE)
        self.abort()

    def abort(self) -> None:
        """Close both sides immediately."""
        for writer in self._writers:
            writer.transport.abort()
        if self._task is not None:
            self._task.cancel()


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if writer.transport.is_closing():
        raise ConnectionResetError
    writer.write(data)
