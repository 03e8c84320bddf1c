"""The network of the synchronous shell: connections that carry JSON lines, streams read from them, and the driver."""

from __future__ import annotations

import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, Self, TypeVar

from harp._core.connections import Peer, Steps
from harp._core.lists import ListBase
from harp._core.streams import StreamBase
from harp._net.connecting import AddressInfo, find_connected, look_up
from harp._net.sockets import (
    FOREIGN_ERRORS,
    READ_BYTES,
    BufferedConnection,
    NamedByClass,
    TLSConnection,
    Uncopyable,
    is_of_program,
)

T = TypeVar("T")
P = ParamSpec("P")

#: Seconds of one wait; a socket rejects a time-out of 25 days.
_LONGEST_WAIT = 1e6


def method(operation: Callable[P, Steps[T]]) -> Callable[P, T]:
    """Return the method that runs the steps of an operation and returns their outcome; the class gives it its name."""

    @wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        steps: Any = operation(*args, **kwargs)
        value = None
        try:
            while True:
                value = steps.send(value)
        except StopIteration as end:
            outcome: T = end.value
            return outcome
        except BaseException as error:
            if steps.gi_frame is None:  # the steps have raised it
                raise
            steps.throw(error)  # KeyboardInterrupt between two steps: they close connections, and raise it again
            while True:
                steps.send(None)

    named: Any = NamedByClass(run)
    method: Callable[P, T] = named
    return method


class _Closable(Uncopyable):
    """Common base of connections and iterators."""

    close: Callable[[], None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class JSONConnection(BufferedConnection, _Closable):
    """TCP connection, reading and writing JSON lines; a context manager that closes it.

    A new object is connected already; it raises as `connect` does, and `HarpException` if `host` or `port` is invalid.
    One thread at a time may use it; any thread may close it. Spec: docs/client-api.md, Networked JSON interface.
    """

    #: The sockets of the attempts to connect; None: no attempt runs, or another thread has closed the connection.
    _connecting: list[socket.socket] | None = None

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.connect()

    @classmethod
    def _unconnected(cls, host: str, port: int) -> Self:
        """Return a connection that is not connected; raise `HarpException` if `host` or `port` is invalid."""
        conn = cls.__new__(cls)
        BufferedConnection.__init__(conn, host, port)
        return conn

    def connect(self) -> None:
        """Connect, again if need be; raise `CommunicationError` if the server cannot be reached within 30 seconds."""
        self.close()
        self._connecting = []
        try:
            opened = self._open_socket()
        finally:
            closed, self._connecting = self._connecting is None, None
        if closed:  # by another thread
            self._close_socket(opened)
            raise self._closed_here()
        opened.settimeout(None)
        self._set_socket(opened)

    _open_socket = method(BufferedConnection._open)

    def _resolve(self, deadline: float) -> Sequence[AddressInfo]:
        found: SimpleQueue[Sequence[AddressInfo] | Exception] = SimpleQueue()
        look_up(self._endpoint.host, self._endpoint.port, found.put)
        try:
            outcome = found.get(timeout=max(deadline - time.monotonic(), 0.001))
        except Empty:
            raise TimeoutError from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _wait_connected(self, sockets: list[socket.socket], deadline: float) -> list[socket.socket]:
        if self._connecting is not None:
            self._connecting = sockets
            found = find_connected(sockets, deadline - time.monotonic())
        if self._connecting is None:
            raise self._closed_here()
        return found

    def _shake_hands(self, sock: ssl.SSLSocket, deadline: float) -> None:
        if self._connecting is not None:
            self._connecting = [sock]
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            sock.do_handshake()
        except OSError:
            if self._connecting is None:
                raise self._closed_here() from None
            raise

    def close(self) -> None:
        """Close the connection, in a forked process only its descriptor; a thread that connects or reads is woken."""
        sock, self._socket = self._socket, None
        connecting, self._connecting = self._connecting, None
        for attempt in connecting or ():  # the thread that connects closes them
            with suppress(OSError):
                socket.socket.shutdown(attempt, socket.SHUT_RDWR)
        if sock is not None:
            self._close_socket(sock)

    close_threadsafe = close
    send = method(BufferedConnection._send)
    receive = method(BufferedConnection._receive)

    def _limit(self, sock: socket.socket, action: str) -> float:
        """Give a socket the time until the deadline, or `_LONGEST_WAIT`; return when it ends, on the monotonic clock.

        Raise `CommunicationError` if it is over.
        """
        seconds, until = None, math.inf
        if self.deadline is not None:
            now = time.monotonic()
            seconds = min(self.deadline.at - now, _LONGEST_WAIT)
            until = now + seconds
            if seconds <= 0:
                late = TimeoutError()
                raise self.error(action, late) from late
        elif sock.gettimeout() is None:
            return until
        try:
            sock.settimeout(seconds)
        except OSError as error:  # another thread has closed it
            raise self.error(action, error) from error
        return until

    def _send_line(self, line: bytes) -> None:
        sock = self._socket
        if sock is None:
            raise self._closed_here()
        until = self._limit(sock, "sending")
        try:
            sent = sock.send(line)
            if sent < len(line):
                sock.sendall(memoryview(line)[sent:])
        except FOREIGN_ERRORS as error:
            if is_of_program(error, until):
                raise
            raise self.error("sending", error) from error

    def receive_line(self) -> bytes:
        """See `BufferedConnection`."""
        lines = self._lines
        while not lines:
            sock = self._socket
            if sock is None:
                raise self._closed_here()
            until = self._limit(sock, "reading")
            try:
                data = sock.recv(READ_BYTES)
                lines += self._partial.feed(data) if data else self._end_of_input()
            except FOREIGN_ERRORS as error:
                if is_of_program(error, until):
                    raise
                if isinstance(error, TimeoutError) and not error.errno:
                    continue  # `_limit` raises if the deadline is over
                raise self.error("reading", error) from error
        return lines.popleft()


class JSONSSLConnection(TLSConnection, JSONConnection):
    """TLS connection, reading and writing JSON lines; otherwise like `JSONConnection`.

    `ca_file`, `tls_minimum` and `verify_hostname` are as for `HarpServer`. Also raises `CommunicationError` if the
    server does not speak TLS or its certificate is not accepted (the message has a hint), and `HarpException` if
    `ca_file` cannot be read. Spec: docs/client-api.md, Networked JSON interface.
    """


class SyncPeer(Peer[JSONConnection]):
    """A peer as a context manager that closes its waiting connections."""

    _now = staticmethod(time.monotonic)
    _sleep = staticmethod(time.sleep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()


class Iteration(_Closable, Iterator[Any]):
    """Common base of the iterators."""

    def all(self) -> list[Any]:
        """Return all remaining items in one list. Spec: docs/client-api.md, RemoteCall.StreamIterator."""
        return list(self)


class Stream(StreamBase[JSONConnection], Iteration):
    """Items read from a connection; see `StreamBase`."""

    _now = staticmethod(time.monotonic)
    _next = method(StreamBase._next_items)

    def __init__(self, *stream: Any) -> None:
        super().__init__(*stream)
        self._reading = threading.Lock()
        self._ended = threading.Event()

    def send_request(self) -> None:
        """Send the reader's first request on the connection, which is open."""
        try:
            self._conn.deadline = None if self._reader.waits else self._reader.deadline()
            self._conn._send_line(self._reader.pop_request(time.monotonic()))
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Any:
        with self._reading:
            if self._parsed and not self._closed:
                return self._parsed.popleft()
            for item in self._next():
                return item
            raise StopIteration

    def close(self) -> None:
        """End the iteration early and close its connection. The iteration of a thread that waits ends, too."""
        if self._end():
            self._ended.set()
            self._conn.close()

    def _sleep(self, seconds: float) -> None:
        self._ended.wait(seconds)


class ListIterator(ListBase[T], _Closable, Iterator[T]):
    """The items of a list of a dispatcher; see `harp.HarpCaller.jobs`. Any number of threads may share it."""

    _next = method(ListBase._next_items)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._reading = threading.Lock()

    def __next__(self) -> T:
        with self._reading:
            found: tuple[T, ...] = self._next()
        for item in found:
            return item
        raise StopIteration

    def all(self) -> list[T]:
        """Return all remaining items in one list. Spec: docs/client-api.md, Lists."""
        return list(self)

    def close(self) -> None:
        """End the iteration early."""
        self._end()
