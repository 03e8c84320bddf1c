"""One client's TLS connection, from the handshake to the close, with a deadline wherever it could be waited for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time

from harp.protocol.ends import Failed
from harp.protocol.harpd import Message, encode_message
from harpd.config.loaded import LoadedConfig

__all__ = ["ClientDisconnected", "TLSStream", "boottime", "format_peer"]

log = logging.getLogger("harpd.frontend")

_CHUNK = 64 * 1024
#: Seconds for TLS's own farewell, the last bytes on their way included.
_CLOSE_TIMEOUT = 30.0
#: After a refusal the client may still be sending. What it sends is read, so that the refusal is not lost by a
#: reset: until it has been silent for the first time, and no longer than the second; seconds.
_QUIET_TIME, _MAX_DISCARD_TIME = 0.5, 10.0


class ClientDisconnected(Exception):
    """The client closed the connection, or takes nothing any more."""


def boottime() -> float:
    """Seconds since the system's start, during which it may have slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def format_peer(address: tuple[object, ...]) -> str:
    """A peer's address and port as text."""
    host = str(address[0]).removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


class TLSStream:
    """The connection.

    Args:
        accepted: the socket, owned by this object.
        peer: the client's address and port.
        generation: certificate and limits.
    """

    def __init__(self, accepted: socket.socket, peer: str, config: LoadedConfig) -> None:
        self.peer = peer
        self._socket = accepted
        self._context = config.context
        self._limits = config.configuration.limits
        #: When it arrived, in seconds since the system's start.
        self.accepted_at = boottime()
        self._reader = asyncio.StreamReader(limit=_CHUNK)
        self._writer: asyncio.StreamWriter

    async def handshake(self) -> bool:
        """Speak TLS; say whether that went well. If it did not, there is nothing to close."""
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(self._reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                self._socket,
                ssl=self._context,
                ssl_handshake_timeout=self._limits.handshake_timeout,
                ssl_shutdown_timeout=_CLOSE_TIMEOUT,
            )
        except OSError as error:  # of the network and of TLS alike
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            log.info("handshake failed", extra={"peer": self.peer, "reason": reason})
            return False
        self._writer = asyncio.StreamWriter(transport, protocol, self._reader, loop)
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
        return data

    async def write(self, data: bytes) -> None:
        """Write; return when no more waits than a little. Raises `ClientDisconnected`."""
        self._writer.write(data)
        await self._wait_writable()

    async def drain(self) -> None:
        """Return when the client has taken all that was written. Raises `ClientDisconnected`."""
        self._writer.transport.set_write_buffer_limits(high=1, low=0)
        await self._wait_writable()

    async def send_last(self, message: Message) -> None:
        """Write a message, the last one. Raises `ClientDisconnected`."""
        self._writer.write(encode_message(message))
        await self.drain()

    async def send_error(self, error: Failed, discard_input: bool, level: int = logging.INFO) -> None:
        """Say that the request is refused, or why the call has ended.

        Args:
            error: what the client is told.
            discard_input: whether more may be on its way from the client.
            level: how much it matters to the log.

        Raises:
            Gone: the client did not wait for it.
        """
        about = {"peer": self.peer, "type": error.type, "reason": error.message}
        log.log(level, "answered with an error", extra=about)
        await self.send_last(error)
        if discard_input:
            with contextlib.suppress(TimeoutError, ClientDisconnected):
                async with asyncio.timeout(_MAX_DISCARD_TIME):
                    while True:
                        async with asyncio.timeout(_QUIET_TIME):
                            await self.read()

    async def _wait_writable(self) -> None:
        """Wait until the client has taken what is more than the buffer's share.

        Raises:
            Gone: the client is gone, or took nothing for as long as it may.
        """
        transport = self._writer.transport
        left = transport.get_write_buffer_size()
        if not left and not transport.is_closing():
            return  # as mostly: no need for a timer
        while True:
            try:
                async with asyncio.timeout(self._limits.write_timeout):
                    await self._writer.drain()
                    return
            except TimeoutError as error:
                before, left = left, transport.get_write_buffer_size()
                if left >= before:
                    log.info("client does not read", extra={"peer": self.peer, "unsent": left})
                    raise ClientDisconnected from error
            except OSError as error:
                raise ClientDisconnected from error

    def abort(self) -> None:
        """Cut the connection."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close the connection, within bounds."""
        self._writer.close()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self._writer.wait_closed()
        except (OSError, asyncio.CancelledError) as error:
            self._writer.transport.abort()
            if isinstance(error, asyncio.CancelledError):
                raise
