"""A client's connection: its requests, the replies, its end. It is driven by events of its socket and needs no task.

A connection reads a request line, its server answers it, and then it reads the next request line or is closed.

- A reply is written immediately. Bytes that do not fit in the kernel's buffer are sent later. A server that sends a
  long reply waits after each piece until it is sent (`Connection.on_sent`), so a client that does not read occupies
  the memory of one piece and delays no other client. Long pieces of all clients share a limited memory: see
  `reply_memory`. If others wait for memory, a client that does not read its long piece for some time is disconnected.
- Data that a client sends between its request and the reply is discarded, and the connection then serves no further
  request.
- A client that closes its side counts as disconnected, although it may still read: available data is sent, but the
  server does not wait for further data.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from harp.protocol.lines import LineBuffer, LineTooLong, LongLine
from harp.protocol.schema import ProtocolError
from harp_daemon.acceptor import Acceptor
from harp_daemon.memory_quota import MemoryQuota, Reservation
from harp_daemon.sockets import Listener
from harp_daemon.timer_wheel import Timer, TimerWheel
from harpcaller.access.client import Client
from harpcaller.api.handshakes import HandshakeQueue
from harpcaller.reply_memory import ReplyMemory, ReplyShare

log = logging.getLogger(__name__)

READ_BYTES = 64 * 1024
_CLOSE_TIMEOUT = 2.0  #: Maximum seconds for a client to read the last reply and close.
UNSENT_BYTES = 64 * 1024  #: Maximum unsent bytes in the kernel's buffer for a client.
_DRAIN_TIMEOUT = 5.0  #: Maximum seconds that a closing server waits for the requests in progress.


class ClientDisconnected(Exception):
    """A client that has closed the connection or its side, or a server that is closing."""


class Server(ABC):
    """A server of client connections: it answers each request, then calls `Connection.read_request` or `close`.

    A connection over `max_connections` or `max_per_peer` receives the line `rejection`. `request_memory` is the maximum
    number of bytes of all long requests that are being received or answered; `reply_memory` returns the maximum for all
    long replies.
    """

    def __init__(
        self,
        max_connections: Callable[[], int],
        rejection: bytes,
        request_memory: int,
        reply_memory: Callable[[], int],
        max_per_peer: Callable[[], int] | None = None,
    ) -> None:
        self.memory = MemoryQuota(request_memory)
        self.reply_memory = ReplyMemory(reply_memory)
        self.timers = TimerWheel()
        self.handshakes = HandshakeQueue()
        self._rejection = rejection
        self.acceptor = Acceptor(self._connect, self._serve, self._reject, max_connections, rejection, max_per_peer)

    @abstractmethod
    def _request_limits(self) -> tuple[int, float]:
        """Return the maximum length of a request line in bytes, and the maximum seconds to receive it."""

    @abstractmethod
    def _write_timeout(self) -> float:
        """Return the maximum seconds for which a client may not read a long reply while others wait for memory."""

    @abstractmethod
    def _on_request(self, connection: Connection, line: bytes) -> None:
        """Answer a request: a line without its line feed."""

    def _on_long_request(self, connection: Connection, line: LongLine) -> None:
        """Answer a request whose pieces are not joined."""
        self._on_request(connection, line.join())

    @abstractmethod
    def _on_failed(self, connection: Connection, error: BaseException) -> None:
        """Send the error of a request and close the connection.

        It is a `ProtocolError` if the line is too long, late or incomplete. Its type is ``too_many_connections`` if the
        memory for all requests is exhausted.
        """

    def serve(self, listeners: Sequence[Listener]) -> None:
        """Accept connections from the listeners."""
        self.acceptor.open(listeners)

    async def aclose(self) -> None:
        """Stop accepting connections, end all waits, and wait a limited time for the requests in progress."""
        self.acceptor.close_listeners()
        for connection in self.acceptor.connections.values():
            connection.mark_disconnected()
        await self.acceptor.drain(_DRAIN_TIMEOUT)

    @abstractmethod
    def _identify(self, accepted: socket.socket, peer: str, listener: Listener) -> Client:
        """Return the client of a connection, before its first request. `peer` is its address or user."""

    def _connect(self, accepted: socket.socket, peer: str, listener: Listener) -> Connection:
        if accepted.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        return Connection(accepted, self._identify(accepted, peer, listener), self)

    def _serve(self, connection: Connection) -> asyncio.Future[None]:
        connection.begin(connection.read_request)
        return connection.closed

    def _reject(self, connection: Connection) -> asyncio.Future[None]:
        def send_rejection() -> None:
            connection.write(self._rejection)
            connection.close()

        connection.begin(send_rejection)
        return connection.closed


class Connection:
    """An accepted connection, which closes its non-blocking socket."""

    def __init__(self, accepted: socket.socket, client: Client, server: Server) -> None:
        self.client = client  #: The identity that the client has proven so far.
        self.is_closing = False  #: Whether no further data can be sent.
        self.disconnected = False  #: Whether the client has closed its side, or the server is closing.
        self.has_extra_input = False  #: Whether the client has sent data after its request, which is discarded.
        self.received_at = 0.0  #: Time at which the last request was complete, on the monotonic clock.
        self.keep_alive = False  #: Whether the last request requested keep-alive; set by the server.
        self.request_name = "invalid"  #: The kind of the last request, for metrics; set by the server.
        self.is_identified = False  #: Whether the first request has been accepted; set by the server.
        #: The name and the digest of the token in the first request; set by the server.
        self.token: tuple[str, str] | None = None
        #: Called once when all data is in the kernel's buffer, or the connection is closed.
        self.on_sent: Callable[[], object] | None = None
        self._socket = accepted
        self._send: Callable[[Any], int] = accepted.send
        self._server = server
        self._memory = Reservation(server.memory)
        self._reply_share = ReplyShare(server.reply_memory)
        self._timer: Timer | None = None
        self._loop = asyncio.get_running_loop()
        self._is_reading = False
        self._line_limit = 0
        self._lines: LineBuffer | None = None  # the buffer of a request that arrives in parts
        self._request_received = False
        self._unsent: memoryview | None = None
        self._task: asyncio.Task[None] | None = None  # executes a request that needs a task
        self._on_disconnect: Callable[[], object] | None = None
        #: Done when the connection is closed; cancelling it closes the connection.
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.closed.add_done_callback(self._on_closed)
        self._loop.add_reader(accepted.fileno(), self._on_readable)

    def begin(self, on_ready: Callable[[], object]) -> None:
        """Call a function when the connection can be used."""
        on_ready()

    async def begin_later(self, preparation: Awaitable[None]) -> None:
        """Begin after a preparation. Until then, what the client sends is not read."""
        self._loop.remove_reader(self._socket.fileno())
        await preparation
        if not self.closed.done():
            self._loop.add_reader(self._socket.fileno(), self._on_readable)
            self.begin(self.read_request)

    # Requests.

    def read_request(self) -> None:
        """Wait for the next request, after all of the last reply was sent."""
        self._on_disconnect = None
        if self._unsent is not None:
            self.on_sent = self.read_request
            return
        self.release_memory()
        if self.disconnected:
            self.abort()
        else:
            self._is_reading = True
            self._line_limit, seconds = self._server._request_limits()
            self._timer = self._server.timers.call_later(seconds, lambda: self._on_late_request(seconds))

    def release_memory(self) -> None:
        """Return the memory of the request to the quota."""
        if self._memory.size:
            self._memory.release()

    def on_disconnect(self, notify: Callable[[], object]) -> None:
        """Call a function once if the client has disconnected, or disconnects before its next request."""
        self._on_disconnect = notify
        if self.disconnected:
            self._notify_disconnected()

    def remove_disconnect_handler(self) -> None:
        """Remove the function of `on_disconnect`."""
        self._on_disconnect = None

    def _notify_disconnected(self) -> None:
        notify, self._on_disconnect = self._on_disconnect, None
        if notify is not None:
            notify()

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        self._on_data(data)

    def _on_data(self, data: bytes) -> None:
        """Handle received data; none at its end."""
        if not data:
            self._on_end_of_input()
        elif not self._is_reading:
            self.has_extra_input = True
        elif self._lines is None and data.find(b"\n") == len(data) - 1 <= self._line_limit:
            self._on_line(data[:-1])  # usually a request arrives as a whole
        else:
            self._on_part(data)

    def _on_part(self, data: bytes) -> None:
        if not self._memory.grow(len(data)):
            self._refuse("too many long requests at once; try again later", "too_many_connections")
            return
        lines = self._lines = self._lines or LineBuffer(self._line_limit)
        try:
            long, complete_lines = lines.feed_long(data)
        except LineTooLong:
            self._refuse(f"the request line is longer than {self._line_limit} bytes")
            return
        if long is not None:
            self.has_extra_input = bool(complete_lines or lines.size)
            self._end_request()
            self._server._on_long_request(self, long)
        elif complete_lines:
            self.has_extra_input = len(complete_lines) > 1 or lines.size > 0
            self._on_line(complete_lines[0])

    def _on_line(self, line: bytes) -> None:
        self._end_request()
        self._server._on_request(self, line)

    def _end_request(self) -> None:
        self._request_received = True
        self.received_at = time.monotonic()
        self._end_reading()

    def _on_late_request(self, seconds: float) -> None:
        if self._request_received and not self._has_part():
            self.abort()
        else:
            self._refuse(f"the request line was not complete within {seconds:g} s")

    def _on_end_of_input(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        if self._has_part():
            self.disconnected = True
            self._refuse("the connection was closed in the middle of the request line")
        elif self.is_closing and self._unsent is None:
            self.abort()
        else:
            self.mark_disconnected()

    def mark_disconnected(self) -> None:
        """Treat the client as disconnected."""
        self.disconnected = True
        if self._is_reading:
            self.abort()
        else:
            self._notify_disconnected()

    def _refuse(self, message: str, error_type: str = "invalid_request") -> None:
        self._end_reading()
        self._server._on_failed(self, ProtocolError(message, error_type))

    def _has_part(self) -> bool:
        """Return whether a part of a request was received."""
        return self._lines is not None and self._lines.size > 0

    def _end_reading(self) -> None:
        self._is_reading = False
        self._lines = None
        self._cancel_timer()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Replies.

    def reserve(self, length: int, retry: Callable[[], object]) -> bool:
        """Reserve memory for the next data, of `length` bytes; return False if the memory is exhausted.

        Then the caller discards the data. `retry` is called to build it again, unless the connection is closed before.
        """

        def retry_if_open() -> None:
            if not self.closed.done():
                retry()

        return self.closed.done() or self._reply_share.reserve(length, retry_if_open)

    @property
    def is_waiting_for_memory(self) -> bool:
        """Whether the `retry` of `reserve` will be called."""
        return self._reply_share.is_waiting

    def write(self, data: bytes | memoryview) -> None:
        """Send data. All of the data before must have been sent: see `on_sent`."""
        assert self._unsent is None
        if self.closed.done():
            return
        try:
            sent = self._send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.abort()
            return
        if sent < len(data):
            self._unsent = memoryview(data)[sent:]
            self._loop.add_writer(self._socket.fileno(), self._on_writable)
            if self._reply_share.size and self._timer is None:
                self._watch_reader(None)
        elif self._reply_share.size:
            self._cancel_timer()
            self._reply_share.release()

    def _watch_reader(self, unsent_before: int | None) -> None:
        """Disconnect a client that has not read since the last check, if others wait for memory."""
        assert self._unsent is not None
        unsent = len(self._unsent)
        if unsent == unsent_before and self._server.reply_memory.has_waiting:
            log.info("client does not read", extra={"peer": self.client.peer, "unsent": unsent})
            self.abort()
        else:
            seconds = self._server._write_timeout()
            self._timer = self._server.timers.call_later(seconds, lambda: self._watch_reader(unsent))

    @property
    def is_sent(self) -> bool:
        """Whether all data is in the kernel's buffer."""
        return self._unsent is None

    def _on_writable(self) -> None:
        assert self._unsent is not None
        unsent, self._unsent = self._unsent, None
        self._loop.remove_writer(self._socket.fileno())
        self.write(unsent)
        if self._unsent is None:
            self._notify_sent()

    def _notify_sent(self) -> None:
        notify, self.on_sent = self.on_sent, None
        if notify is not None:
            notify()

    async def send(self, data: bytes) -> None:
        """Send data and wait until all of it is in the kernel's buffer. Raises `ClientDisconnected`."""
        self.write(data)
        if self._unsent is not None:
            sent = asyncio.Event()
            self.on_sent = sent.set
            await sent.wait()
        if self.closed.done():
            raise ClientDisconnected

    # Work for a request that needs a task.

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that answers a request, until the connection is closed.

        It may raise `ClientDisconnected`; any other exception is passed to `Server._on_failed`.
        """
        self._task = self._loop.create_task(self._run(work))

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except ClientDisconnected:
            self.abort()  # there is no client to reply to
        except Exception as error:  # noqa: BLE001 - the client gets it
            self._server._on_failed(self, error)
        finally:
            self._task = None

    # The end.

    def close(self) -> None:
        """Close the connection so that the sent data arrives.

        Closing a socket with unread data resets the connection, and the client may not receive the reply. A client that
        still sends therefore gets some time to read and close.
        """
        if self.closed.done():
            return
        self.is_closing = True
        if self._unsent is not None:
            self.on_sent = self.close
            return
        try:
            if not self.disconnected and (not self._request_received or self._socket.recv(1)):
                self._socket.shutdown(socket.SHUT_WR)
                self._timer = self._server.timers.call_later(_CLOSE_TIMEOUT, self.abort)
                return
        except OSError:
            pass  # no data is unread, or the connection is closed already
        self.abort()

    def abort(self) -> None:
        """Close the connection immediately, and cancel the task of its request."""
        if not self.closed.done():
            self.closed.set_result(None)
            self._release()

    def expel(self, reply: bytes) -> None:
        """Close the connection of a client that has lost its rights, if it waits for its next request or for a reply.

        Other requests are being answered, and end soon.
        """
        if self._is_reading or self._unsent is not None:
            self.abort()
        elif self._on_disconnect is not None:
            self.write(reply)
            self.close()
            self._notify_disconnected()

    def _on_closed(self, closed: asyncio.Future[None]) -> None:
        if closed.cancelled():
            self._release()

    def _release(self) -> None:
        self._end_reading()
        self.is_closing = self.disconnected = True
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self.release_memory()
        self._unsent = None
        self._reply_share.release()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._notify_sent()
        self._notify_disconnected()
