"""The network of the synchronous shell: connections that carry JSON lines, streams read from them, and the driver."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, Self, TypeVar

from harp._core.connections import ConnectionPool, Peer, Steps
from harp._core.streams import Reader, StreamBase
from harp._net.sockets import FOREIGN_ERRORS, READ_BYTES, BufferedConnection, TLSConnection, Uncopyable
from harp.errors import CommunicationError

T = TypeVar("T")
P = ParamSpec("P")


def run(steps: Steps[T]) -> T:
    """Run steps and return their outcome."""
    value: Any = None
    try:
        while True:
            value = steps.send(value)
    except StopIteration as end:
        outcome: T = end.value
        return outcome


def method(operation: Callable[P, Steps[T]]) -> Callable[P, T]:
    """Return the method that runs an operation; without the underscore of the operation's name."""

    @wraps(operation)
    def run_operation(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(operation(*args, **kwargs))

    run_operation.__name__ = operation.__name__.removeprefix("_")
    return run_operation


class _Closable(Uncopyable, ABC):
    """Common base of connections and iterators."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class JSONConnection(BufferedConnection, _Closable):
    """TCP connection, reading and writing JSON lines; a context manager that closes it.

    A new object is connected already. One thread at a time may use a connection; any thread may call `close`.

    Args:
        host: name or address of the server; every address of a name is tried.
        port: its port.

    Raises:
        CommunicationError: the server cannot be reached within 30 seconds.
        HarpException: `host` or `port` is invalid.

    Spec: docs/client-api.md, Networked JSON interface.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.connect()

    def connect(self) -> None:
        """Connect to the address given to the constructor; an open connection is closed first.

        Raises:
            CommunicationError: the server cannot be reached within 30 seconds.
        """
        self.close()
        self._process = os.getpid()
        try:
            opened = run(self._open())
        except BaseException:
            self._socket = None
            raise
        if self._socket is None:  # closed by another thread
            self._close_socket(opened)
            raise self._closed_here()
        self._set_socket(opened)

    def _resolve(self, deadline: float) -> Any:
        return socket.getaddrinfo(self._endpoint.host, self._endpoint.port, type=socket.SOCK_STREAM)

    def _connect_socket(self, sock: socket.socket, address: Any, deadline: float) -> None:
        self._socket = sock  # another thread's `close` ends the attempt
        try:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            sock.connect(address)
            sock.settimeout(None)
        except OSError:
            if self._socket is None:
                raise self._closed_here() from None
            raise

    def _shake_hands(self, sock: ssl.SSLSocket, deadline: float) -> None:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        sock.do_handshake()
        sock.settimeout(None)

    def close(self) -> None:
        """Close the connection, if it is open. A thread that connects it or reads is woken.

        In a forked process this closes only the descriptor of this process.
        """
        sock, self._socket = self._socket, None
        if sock is not None:
            self._close_socket(sock)

    close_threadsafe = close
    send = method(BufferedConnection._send)
    receive = method(BufferedConnection._receive)

    def _send_line(self, line: bytes) -> None:
        sock = self._socket
        if sock is None:
            raise self._closed_here()
        try:
            sent = sock.send(line)
            if sent < len(line):
                sock.sendall(memoryview(line)[sent:])
        except FOREIGN_ERRORS as error:
            raise self.error("sending", error) from error

    def receive_line(self) -> bytes:
        """See `BufferedConnection`."""
        lines = self._lines
        while not lines:
            sock = self._socket
            if sock is None:
                raise self._closed_here()
            try:
                data = sock.recv(READ_BYTES)
                lines += self._partial.feed(data) if data else self._end_of_input()
            except FOREIGN_ERRORS as error:
                raise self.error("reading", error) from error
        return lines.popleft()

    def exchange(self, line: bytes) -> bytes:
        """Send a line and return the first line of the reply. Raise `CommunicationError`."""
        try:
            self._send_line(line)
        except CommunicationError:
            # A peer that refuses a request may send the reason and close before it has read all of the request.
            with suppress(CommunicationError):
                return self.receive_line()
            raise
        return self.receive_line()


class JSONSSLConnection(TLSConnection, JSONConnection):
    """TLS connection, reading and writing JSON lines; otherwise like `JSONConnection`. The minimum is TLS 1.2.

    Args:
        host: name or address of the server.
        port: its port.
        ca_file: PEM file with the authorities that may issue the server's certificate, which must be valid for
            `host`; None verifies neither.

    Raises:
        CommunicationError: the server cannot be reached within 30 seconds, does not speak TLS, or its certificate
            is not accepted; the message has a hint.
        HarpException: `host` or `port` is invalid, or `ca_file` cannot be read.

    Spec: docs/client-api.md, Networked JSON interface.
    """


class SyncPeer(Peer[JSONConnection]):
    """A peer as a context manager that closes its waiting connections."""

    _now = staticmethod(time.monotonic)
    _sleep = staticmethod(time.sleep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for conn in self._pool.drain():
            conn.close()


class Iteration(_Closable, Iterator[Any]):
    """Common base of the iterators."""

    def all(self) -> list[Any]:
        """Return all remaining items in one list. Spec: docs/client-api.md, RemoteCall.StreamIterator."""
        return list(self)


class Stream(StreamBase[JSONConnection], Iteration):
    """Items read from a connection; see `StreamBase`."""

    _now = staticmethod(time.monotonic)

    def __init__(
        self, conn: JSONConnection, reader: Reader, pool: ConnectionPool[JSONConnection] | None = None
    ) -> None:
        self._reading = threading.Lock()
        self._ended = threading.Event()
        super().__init__(conn, reader, pool)

    def send_request(self) -> None:
        """Send the reader's first request on the connection, which is open."""
        request = self._reader.take_request()
        assert request is not None
        try:
            self._reader.connected(time.monotonic())
            self._conn._send_line(request)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Any:
        with self._reading:
            if self._parsed and not self._closed:
                return self._parsed.popleft()
            for item in run(self._next_items()):
                return item
            raise StopIteration

    def close(self) -> None:
        """End the iteration early and close its connection; has no effect after the end.

        A thread that waits for an item, or for the dispatcher to come back, is woken: its iteration ends.
        """
        if self._end():
            self._ended.set()
            self._conn.close()

    def _sleep(self, seconds: float) -> None:
        self._ended.wait(seconds)
