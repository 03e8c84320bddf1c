"""One client's TLS connection, from the handshake to the close; every wait has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from harpd.config.loaded import LoadedConfig
from harpd.frontend.arrival_clock import ArrivalClock, boottime

log = logging.getLogger("harpd.frontend")

_CHUNK = 64 * 1024
#: Seconds for the TLS shutdown, including the last buffered bytes.
_CLOSE_TIMEOUT = 30.0
#: After an error the client may still be sending. Its data is read and discarded, because unread data would make the
#: kernel reset the connection, and the client could lose the error. Reading ends after `_QUIET_TIME` seconds without
#: data, at the latest after `_MAX_DISCARD_TIME` seconds.
_QUIET_TIME, _MAX_DISCARD_TIME = 0.5, 10.0


class ClientDisconnected(Exception):
    """The client closed the connection or stopped reading."""


class _Protocol(asyncio.StreamReaderProtocol):
    """A stream's protocol, which stores a time before the arrival of the data that was not taken yet."""

    def __init__(self, reader: asyncio.StreamReader, arrival_clock: ArrivalClock) -> None:
        super().__init__(reader)
        self._arrival_clock = arrival_clock
        self._arrived_at: float | None = None

    def data_received(self, data: bytes) -> None:
        if self._arrived_at is None:
            self._arrived_at = self._arrival_clock.earliest_arrival()
        super().data_received(data)

    def take_arrival_time(self, default: float) -> float:
        """Return the time of all data up to now; the default if the rest of older data is read."""
        arrived_at, self._arrived_at = self._arrived_at, None
        return default if arrived_at is None else arrived_at


class TLSStream:
    """A client's connection.

    Args:
        accepted: the socket, which this object owns.
        peer: the client's address and port.
        config: certificate and limits.
        arrival_clock: tells when data arrived.

    Attributes:
        arrived_at: a time by `boottime` before the arrival of the data that was read last.
    """

    def __init__(self, accepted: socket.socket, peer: str, config: LoadedConfig, arrival_clock: ArrivalClock) -> None:
        self.peer = peer
        self._socket = accepted
        self._context = config.context
        self._limits = config.configuration.limits
        self._reader = asyncio.StreamReader(limit=_CHUNK)
        self._protocol = _Protocol(self._reader, arrival_clock)
        self.arrived_at = boottime()
        self._writer: asyncio.StreamWriter

    async def handshake(self) -> bool:
        """Run the TLS handshake; return whether it succeeded. After a failure the socket is closed."""
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: self._protocol,
                self._socket,
                ssl=self._context,
                ssl_handshake_timeout=self._limits.handshake_timeout,
                ssl_shutdown_timeout=_CLOSE_TIMEOUT,
            )
        except OSError as error:  # includes ssl.SSLError
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            log.info("TLS handshake failed", extra={"peer": self.peer, "reason": reason})
            return False
        self._writer = asyncio.StreamWriter(transport, self._protocol, self._reader, loop)
        transport.set_write_buffer_limits(high=_CHUNK)
        return True

    async def read(self) -> bytes:
        """Read some bytes. Raises `ClientDisconnected`."""
        try:
            data = await self._reader.read(_CHUNK)
        except OSError as error:
            raise ClientDisconnected from error
        if not data:
            raise ClientDisconnected
        self.arrived_at = self._protocol.take_arrival_time(default=self.arrived_at)
        return data

    async def write(self, data: bytes) -> None:
        """Write data; wait while the buffer is full. Raises `ClientDisconnected`."""
        self._writer.write(data)
        await self._wait_writable()

    async def drain(self) -> None:
        """Wait until all written data is sent. Raises `ClientDisconnected`."""
        self._writer.transport.set_write_buffer_limits(high=1, low=0)
        await self._wait_writable()

    async def discard_input(self) -> None:
        """Read and discard data that the client is still sending, for a limited time."""
        with contextlib.suppress(TimeoutError, ClientDisconnected):
            async with asyncio.timeout(_MAX_DISCARD_TIME):
                while True:
                    async with asyncio.timeout(_QUIET_TIME):
                        await self.read()

    async def _wait_writable(self) -> None:
        """Wait until the write buffer is below its limit.

        Raises:
            ClientDisconnected: the client disconnected, or read nothing for `limits.write_timeout` seconds.
        """
        transport = self._writer.transport
        unsent = transport.get_write_buffer_size()
        if not unsent and not transport.is_closing():
            return  # the usual case; a timer would cost time
        while True:
            try:
                async with asyncio.timeout(self._limits.write_timeout):
                    await self._writer.drain()
                    return
            except TimeoutError as error:
                before, unsent = unsent, transport.get_write_buffer_size()
                if unsent >= before:
                    log.info("client does not read", extra={"peer": self.peer, "unsent": unsent})
                    raise ClientDisconnected from error
            except OSError as error:
                raise ClientDisconnected from error

    def abort(self) -> None:
        """Abort the connection."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close the connection; abort it after a deadline."""
        if not self._writer.transport.is_closing():
            self._writer.close()  # a second close makes abort raise AttributeError: asyncio of Python 3.11.2
        with contextlib.suppress(OSError):
            try:
                async with asyncio.timeout(_CLOSE_TIMEOUT):
                    await self._writer.wait_closed()
            finally:
                self.abort()
