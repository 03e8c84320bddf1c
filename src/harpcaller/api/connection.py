"""One client's connection to a door: its request line, the lines that go back, the next request, and its leaving.

There is no buffer here: what is sent is handed to the kernel, and the sender waits until it has taken it. So a
client that does not read holds one piece of the answer and delays nobody but itself. What a client sends after its
request and before the answer is dropped, and no other request follows then. When it ends its side of the connection
it has left: nothing is waited for on its behalf from then on, but what can be said without waiting is still sent, as
it may be reading.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from harp.protocol.fields import ProtocolError
from harp.protocol.lines import LineBuffer, LineTooLong
from harp_daemon.memory_quota import Reservation

__all__ = ["ClientLeft", "Connection"]

_READ_BYTES = 64 * 1024

#: Seconds that a client may take to read a refusal and close, after which the connection is closed anyway.
_LINGER = 2.0


class ClientLeft(Exception):
    """The client has closed the connection or its side of it, or the door is closing."""


class Connection:
    """A connection that a door has accepted.

    Args:
        accepted: the socket, non-blocking; this object closes it.
        client: who it is, for the log.
    """

    def __init__(self, accepted: socket.socket, client: str) -> None:
        #: Who the client is, for the log.
        self.client = client
        self._socket = accepted
        self._loop = asyncio.get_running_loop()
        self._wait: asyncio.Timeout | None = None
        self._asked = False
        self._watched = False
        self._left = False
        #: Whether the client has sent more than its request, which is dropped.
        self.said_more = False

    async def request_line(self, longest: int, seconds: float, share: Reservation | None = None) -> bytes:
        """Read the request.

        Args:
            longest: the most bytes that the line may have.
            seconds: how long the client may take.
            share: what the line takes of the memory that all requests share; None: it is not counted.

        Returns:
            The line without its line feed.

        Raises:
            ProtocolError: the line is too long, late or cut off; of type ``too_many_connections`` when too many
                long ones are here at once.
            ClientLeft: it sent nothing; of a further request neither within that time.
        """
        self._unwatch()
        again, lines = self._asked, LineBuffer(longest)
        try:
            async with asyncio.timeout(seconds) as self._wait:
                while data := await self._receive():
                    if share is not None and not share.grow(len(data)):
                        raise ProtocolError("too many long requests at once; try again later", "too_many_connections")
                    if found := lines.feed(data):
                        self._asked = True
                        self.said_more = len(found) > 1 or bool(lines.pending)
                        return found[0]
        except LineTooLong as error:
            raise ProtocolError(f"the request line is longer than {longest} bytes") from error
        except TimeoutError as error:
            if self._left or (again and not lines.pending):
                raise ClientLeft from error
            raise ProtocolError(f"the request line was not whole within {seconds:g} s") from error
        finally:
            self._wait = None
        self._left = True
        if not lines.pending:
            raise ClientLeft
        raise ProtocolError("the connection was closed in the middle of the request line")

    async def send(self, data: bytes) -> None:
        """Send, and wait until the kernel has taken all of it. Raises `ClientLeft` when it can't be sent any more."""
        try:
            await self._loop.sock_sendall(self._socket, data)
        except OSError as error:
            self._left = True
            raise ClientLeft from error

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """A context to wait in for something else than the client; when the client leaves, the waiting is over.

        Raises:
            ClientLeft: it has left, now or before. What was waited for is cancelled.
        """
        if not self._watched and not self._left:
            self._watched = True
            self._loop.add_reader(self._socket.fileno(), self._look)
        if self._left:
            raise ClientLeft
        self._wait = wait = asyncio.timeout(None)
        try:
            async with wait:
                yield
        except TimeoutError as error:
            if not wait.expired():
                raise  # not ours
            raise ClientLeft from error
        finally:
            self._wait = None

    def leave(self) -> None:
        """Treat the client as one that has left."""
        self._left = True
        if self._wait is not None and not self._wait.expired():
            self._wait.reschedule(self._loop.time())

    async def close(self) -> None:
        """Close the connection so that what was sent arrives.

        Closing a socket that holds unread data resets the connection, and the client might lose its answer. So a
        client that still sends is given a moment to read and close.
        """
        self._unwatch()
        try:
            if not self._left and (not self._asked or self._has_unread()):
                self._socket.shutdown(socket.SHUT_WR)
                async with asyncio.timeout(_LINGER) as self._wait:
                    while await self._receive():
                        pass
        except (OSError, TimeoutError):
            pass  # it is gone, or had its moment
        finally:
            self._wait = None
            self._socket.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._unwatch()
        self._socket.close()

    async def _receive(self) -> bytes:
        """What comes next; nothing at the end of what the client sends."""
        try:
            return await self._loop.sock_recv(self._socket, _READ_BYTES)
        except OSError:
            return b""

    def _look(self) -> None:
        """The socket is readable while something else is waited for."""
        try:
            gone = not self._socket.recv(_READ_BYTES)
            self.said_more = True
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            gone = True
        if gone:
            self._unwatch()
            self.leave()

    def _has_unread(self) -> bool:
        try:
            return bool(self._socket.recv(1))
        except OSError:
            return False

    def _unwatch(self) -> None:
        if self._watched:
            self._loop.remove_reader(self._socket.fileno())
            self._watched = False
