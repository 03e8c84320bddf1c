"""A client's connection: its requests, the replies, its end.

The connection has no send buffer: `send` waits until the kernel has taken all data. A client that does not read
therefore holds one piece of a reply and delays only itself. Data that a client sends between its request and the reply
is dropped, and the connection then serves no further request. A client that closes its side counts as disconnected:
nothing is waited for on its behalf, but data that is available at once is still sent, because it may be reading.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from harp.protocol.fields import ProtocolError
from harp.protocol.lines import LineBuffer, LineTooLong
from harp_daemon.acceptor import Acceptor
from harp_daemon.memory_quota import Reservation

_READ_BYTES = 64 * 1024

#: Maximum seconds for a client to read the last reply and close.
_CLOSE_TIMEOUT = 2.0

#: Bytes that the kernel holds for a client beyond those on their way to it.
_UNSENT_BYTES = 64 * 1024

#: Seconds that a closing server gives to requests that are being answered.
_DRAIN_TIMEOUT = 5.0


class ClientDisconnected(Exception):
    """A client that has closed the connection or its side, or a server that is closing."""


class Connection:
    """An accepted connection. It closes its non-blocking socket."""

    def __init__(self, accepted: socket.socket, client: str) -> None:
        #: The client's address or user, for the log.
        self.client = client
        self._socket = accepted
        self._loop = asyncio.get_running_loop()
        self._timeout: asyncio.Timeout | None = None
        self._request_received = False
        self._watching = False
        self._disconnected = False
        #: Whether the client has sent data after its request, which is dropped.
        self.has_extra_input = False

    async def read_request(self, max_line: int, seconds: float, reservation: Reservation | None = None) -> bytes:
        """Return the next request line without its line feed.

        Args:
            max_line: maximum length of the line in bytes.
            seconds: maximum time to receive the line.
            reservation: the line's part of the memory for all requests; None if the line is not counted.

        Raises:
            ProtocolError: the line is too long, late or incomplete; with the type ``too_many_connections`` if the
                memory for all requests is exhausted.
            ClientDisconnected: the client sent nothing; for a further request also if `seconds` have passed.
        """
        self._stop_watching()
        again, lines = self._request_received, LineBuffer(max_line)
        try:
            async with asyncio.timeout(seconds) as self._timeout:
                while data := await self._receive():
                    if reservation is not None and not reservation.grow(len(data)):
                        raise ProtocolError("too many long requests at once; try again later", "too_many_connections")
                    if found := lines.feed(data):
                        self._request_received = True
                        self.has_extra_input = len(found) > 1 or bool(lines.pending)
                        return found[0]
        except LineTooLong as error:
            raise ProtocolError(f"the request line is longer than {max_line} bytes") from error
        except TimeoutError as error:
            if self._disconnected or (again and not lines.pending):
                raise ClientDisconnected from error
            raise ProtocolError(f"the request line was not complete within {seconds:g} s") from error
        finally:
            self._timeout = None
        self._disconnected = True
        if not lines.pending:
            raise ClientDisconnected
        raise ProtocolError("the connection was closed in the middle of the request line")

    async def send(self, data: bytes) -> None:
        """Send data and wait until the kernel has taken all of it.

        Raises:
            ClientDisconnected: the data cannot be sent.
        """
        try:
            await self._loop.sock_sendall(self._socket, data)
        except OSError as error:
            self._disconnected = True
            raise ClientDisconnected from error

    @asynccontextmanager
    async def cancel_on_disconnect(self) -> AsyncIterator[None]:
        """Cancel the body of the context if the client disconnects.

        Raises:
            ClientDisconnected: the client disconnected, now or before.
        """
        if not self._watching and not self._disconnected:
            self._watching = True
            self._loop.add_reader(self._socket.fileno(), self._on_readable)
        if self._disconnected:
            raise ClientDisconnected
        self._timeout = wait = asyncio.timeout(None)
        try:
            async with wait:
                yield
        except TimeoutError as error:
            if not wait.expired():
                raise  # raised by the body
            raise ClientDisconnected from error
        finally:
            self._timeout = None

    def mark_disconnected(self) -> None:
        """Treat the client as disconnected."""
        self._disconnected = True
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(self._loop.time())

    async def close(self) -> None:
        """Close the connection so that the sent data arrives.

        Closing a socket with unread data resets the connection, and the client may lose the reply. A client that still
        sends therefore gets some time to read and close.
        """
        self._stop_watching()
        try:
            if not self._disconnected and (not self._request_received or self._socket.recv(1)):
                self._socket.shutdown(socket.SHUT_WR)
                async with asyncio.timeout(_CLOSE_TIMEOUT) as self._timeout:
                    while await self._receive():
                        pass
        except (OSError, TimeoutError):
            pass  # nothing is unread, the connection is closed already, or the time is over
        finally:
            self._timeout = None
            self._socket.close()

    async def _receive(self) -> bytes:
        """Return the next data; empty at the end of the input."""
        try:
            return await self._loop.sock_recv(self._socket, _READ_BYTES)
        except OSError:
            return b""

    def _on_readable(self) -> None:
        """Drop input during `cancel_on_disconnect`, and detect the end of the input."""
        try:
            disconnected = not self._socket.recv(_READ_BYTES)
            self.has_extra_input = True
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            disconnected = True
        if disconnected:
            self._stop_watching()
            self.mark_disconnected()

    def _stop_watching(self) -> None:
        if self._watching:
            self._loop.remove_reader(self._socket.fileno())
            self._watching = False


def make_acceptor(
    answer: Callable[[Connection], Awaitable[None]], max_connections: Callable[[], int], rejection: bytes
) -> Acceptor[Connection]:
    """Return an acceptor of clients.

    Args:
        answer: answers the requests of a connection. May raise `ClientDisconnected`. The connection is closed
            afterwards.
        max_connections: returns the number of connections that are served at once.
        rejection: the line for a connection over this number.
    """
    return Acceptor(
        _connect,
        serve=partial(_serve, answer),
        reject=partial(_serve, lambda connection: connection.send(rejection)),
        max_connections=max_connections,
        rejection=rejection,
    )


async def close_acceptor(acceptor: Acceptor[Connection]) -> None:
    """Stop accepting, end all waits, and give requests that are being answered some time."""
    acceptor.close_listeners()
    for connection in acceptor.connections.values():
        connection.mark_disconnected()
    await acceptor.drain(_DRAIN_TIMEOUT)


def _connect(accepted: socket.socket, client: str) -> Connection:
    if accepted.family != socket.AF_UNIX:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    return Connection(accepted, client)


async def _serve(answer: Callable[[Connection], Awaitable[None]], connection: Connection) -> None:
    try:
        await answer(connection)
    except ClientDisconnected:
        pass  # there is no client to reply to
    except BaseException:
        connection.mark_disconnected()  # so that closing does not wait
        raise
    finally:
        await connection.close()
