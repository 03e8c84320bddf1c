"""Connections that carry JSON lines: `JSONConnection`, `JSONSSLConnection`, and what their asyncio twins share.

This is the border to the network: every error of socket, ssl and json is mapped here, once, by
`Endpoint.mapped`. What comes out is `CommunicationError` with host, port and cause, or `HarpException` when the
caller's own value or file is at fault. The cause tells what happened: `OSError` the network or the peer broke off,
`EOFError` the peer closed and had said whole lines or nothing, `ValueError` what it said makes no sense.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Self, TypeAlias

from harp._net.tls import tls_context
from harp.errors import CommunicationError, HarpException
from harp.protocol.json_text import NotJSON, dumps, loads
from harp.protocol.lines import LineBuffer

__all__ = [
    "CONNECT_DEADLINE",
    "REPLY_LIMIT",
    "Dial",
    "Endpoint",
    "Incoming",
    "JSONConnection",
    "JSONSSLConnection",
    "encoded",
    "quiet",
]

#: Seconds that a connection may take to come to be, TLS handshake included.
CONNECT_DEADLINE = 30.0

#: The most bytes that a reply's line may have.
REPLY_LIMIT = 64 * 1024 * 1024

#: The most bytes taken from the network at once.
_CHUNK = 64 * 1024

#: A peer that vanished without a word is noticed after about two minutes; a peer that is only busy never is.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

#: What to do about a certificate that was not accepted, by OpenSSL's number of the fault.
_CURES = {
    9: "check the clocks of both machines",
    10: "renew the server's certificate",
    62: "call the host by a name that its certificate has, or give it a certificate with this name",
    64: "call the host by a name that its certificate has, or give it a certificate with this address",
}

AddressInfo: TypeAlias = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens: a name or an address, and a port."""

    host: str
    port: int

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise HarpException(f"host: expected a name or an address, got {self.host!r}")
        if not isinstance(self.port, int) or isinstance(self.port, bool) or not 0 < self.port < 65536:
            raise HarpException(f"port: expected a number from 1 to 65535, got {self.port!r}")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def server_name(self) -> str:
        """The name that the server's certificate has to carry: no zone of an address, no dot at the end."""
        address = self.host.partition("%")[0]
        try:
            return str(ipaddress.ip_address(address))
        except ValueError:
            return self.host.rstrip(".")

    def error(self, doing: str, cause: str) -> CommunicationError:
        """The error that says what could not be done with this peer, and why."""
        return CommunicationError(f"{self}: {doing}: {cause}")

    def mapped(self, doing: str) -> _Mapped:
        """Turn errors of the network, of TLS, of JSON and of the protocol into `CommunicationError`."""
        return _Mapped(self, doing)


class _Mapped:
    """The context manager of `Endpoint.mapped`; a class, as a generator would cost each call more than its lines do."""

    __slots__ = ("_doing", "_endpoint")

    def __init__(self, endpoint: Endpoint, doing: str) -> None:
        self._endpoint = endpoint
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (OSError, EOFError, ValueError)):
            raise self._endpoint.error(self._doing, _cause(error)) from error


def _cause(error: Exception) -> str:
    """What went wrong, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        cure = _CURES.get(error.verify_code, "ca_file must hold the authority that issued it")
        return f"the server's certificate is not accepted: {error.verify_message.rstrip('.')} ({cure})"
    if isinstance(error, ssl.SSLError) and error.reason:
        words = error.reason.lower().replace("_", " ")
        return f"{words} (it does not speak TLS)" if error.reason == "WRONG_VERSION_NUMBER" else words
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)


class Dial:
    """The attempts to reach an endpoint: each of its addresses has its share of the time that is left.

    Args:
        endpoint: what is to be reached.
        found: its addresses, as `socket.getaddrinfo` gives them.
        last: the deadline on the monotonic clock.
    """

    def __init__(self, endpoint: Endpoint, found: Sequence[AddressInfo], last: float) -> None:
        self._endpoint = endpoint
        self._found = found
        self._last = last
        self._failures: list[tuple[str, OSError]] = []

    def __iter__(self) -> Iterator[tuple[socket.socket, Any, float]]:
        """For each address a new socket, the address to connect it to, and the seconds that this may take."""
        for index, (family, kind, protocol, _, address) in enumerate(self._found):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:  # this machine does not speak this family, or has no descriptor left
                self._failures.append((address[0], error))
                continue
            left = max(self._last - time.monotonic(), 0.001)
            yield sock, address, left / (len(self._found) - index)

    @contextmanager
    def attempt(self, sock: socket.socket, address: Any) -> Iterator[None]:
        """Prepare the socket to be connected here; a failure closes it, and is noted, not raised."""
        try:
            _prepare(sock)
            yield
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            self._failures.append((address[0], error))

    def failure(self) -> CommunicationError:
        """The error that tells of every attempt."""
        causes = dict.fromkeys(
            _cause(error) if address == self._endpoint.host else f"{address}: {_cause(error)}"
            for address, error in self._failures
        )
        failure = self._endpoint.error("can't connect", "; ".join(causes) or "it has no address")
        failure.__cause__ = self._failures[-1][1] if self._failures else None
        return failure


def _prepare(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        if hasattr(socket, option):  # not every system has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class Incoming:
    """What has come from a peer: bytes in, lines out."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._buffer = LineBuffer(REPLY_LIMIT)
        self._lines: deque[bytes] = deque()

    def line(self) -> bytes | None:
        """The next whole line, None when more has to be read."""
        return self._lines.popleft() if self._lines else None

    def take(self, read: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """What a function makes of the lines that are there; it takes as many of the first ones as it gives items."""
        items = read(self._lines)
        for _ in items:
            self._lines.popleft()
        return items

    @property
    def waiting(self) -> bool:
        """Whether there are lines that nobody has taken."""
        return bool(self._lines)

    @property
    def empty(self) -> bool:
        """Whether nothing is left of what has come, no line and no part of one."""
        return not self._lines and not self._buffer.pending

    def feed(self, data: bytes) -> None:
        """Take what was read; no bytes mean that the peer has closed. Raises `CommunicationError`."""
        with self._endpoint.mapped("reading"):
            if not data:
                self._end()
            self._lines.extend(self._buffer.feed(data))

    def _end(self) -> NoReturn:
        size = len(self._buffer.pending)
        if size:
            raise ConnectionAbortedError(f"the peer closed the connection {size} bytes into a line")
        raise EOFError("the peer closed the connection before it had said all")


def quiet(sock: socket.socket) -> bool:
    """Whether nothing has come that nobody has read, not even the connection's end. Neither waits nor reads."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return False
    try:
        # Of socket itself: an SSLSocket does not peek.
        socket.socket.recv(sock, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def encoded(obj: Any) -> bytes:
    """An object as a line. Raises `HarpException` that says what in it has no form in JSON, and where."""
    try:
        return bytes(dumps(obj)) + b"\n"
    except NotJSON as error:
        raise HarpException(f"can't be sent as JSON: {error}") from error


class JSONConnection:
    """TCP connection, reading and writing JSON lines; a context manager that closes it.

    A new object is connected already. One connection is for one thread at a time; `close` may be called by any.

    Args:
        host: name or address of the server; every address of a name is tried.
        port: its port.

    Raises:
        CommunicationError: the server can't be reached within `CONNECT_DEADLINE` seconds.
        HarpException: `host` or `port` is none.

    Spec: docs/client-api.md, Networked JSON interface.
    """

    def __init__(self, host: str, port: int) -> None:
        #: What it connects to.
        self.endpoint = Endpoint(host, port)
        self._socket: socket.socket | None = None
        self.connect()

    def connect(self) -> None:
        """Connect to the address given to the constructor; an open connection is closed first.

        Raises:
            CommunicationError: the server can't be reached within `CONNECT_DEADLINE` seconds.
        """
        self.close()
        self._incoming = Incoming(self.endpoint)
        self._process = os.getpid()
        try:
            opened = self._open(time.monotonic() + CONNECT_DEADLINE)
        except BaseException:
            self._socket = None
            raise
        if self._socket is None:
            opened.close()
            raise self._closed_here()
        self._socket = opened

    def _open(self, last: float) -> socket.socket:
        """Connect before `last`, a time of the monotonic clock."""
        with self.endpoint.mapped("can't find its address"):
            found = socket.getaddrinfo(self.endpoint.host, self.endpoint.port, type=socket.SOCK_STREAM)
        dial = Dial(self.endpoint, found, last)
        for sock, address, seconds in dial:
            self._socket = sock  # `close`, by another thread, ends the attempt
            with dial.attempt(sock, address):
                sock.settimeout(seconds)
                sock.connect(address)
                sock.settimeout(None)
            if sock.fileno() >= 0:  # what has failed is closed
                return sock
            self._connected()  # raises when it was `close` that ended it
        raise dial.failure()

    def close(self) -> None:
        """Close the connection; nothing happens when it is closed. A thread that connects it or reads is woken.

        In a process that was forked from the one that had it connected, only the copy here is closed.
        """
        sock, self._socket = self._socket, None
        if sock is None:
            return
        if self._process == os.getpid():
            with suppress(OSError):
                # Of socket itself: that of an SSLSocket takes TLS away from under a reading thread.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        with suppress(OSError):
            sock.close()

    def send(self, obj: Any) -> None:
        """Send an object as a JSON line.

        Args:
            obj: anything JSON can carry, typically a dict.

        Raises:
            HarpException: the object has no form in JSON; the message says where in it.
            CommunicationError: it can't be sent.
        """
        self.send_line(encoded(obj))

    def receive(self) -> Any:
        """Wait for a JSON line, however long that takes, and return its value, typically a dict.

        Raises:
            CommunicationError: the peer closed the connection, the line is longer than `REPLY_LIMIT` bytes or not
                JSON.
        """
        line = self.receive_line()
        with self.endpoint.mapped("reading"):
            return loads(line)

    def send_line(self, line: bytes) -> None:
        """Send a line that is JSON already, line feed included. Raises `CommunicationError`."""
        with self.endpoint.mapped("sending"):
            self._connected().sendall(line)

    def receive_line(self) -> bytes:
        """Wait for a line and return it without its line feed. Raises `CommunicationError`."""
        while (line := self._incoming.line()) is None:
            with self.endpoint.mapped("reading"):
                data = self._connected().recv(_CHUNK)
            self._incoming.feed(data)
        return line

    def take(self, read: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """What a function makes of the lines that have come already; see `Incoming.take`."""
        return self._incoming.take(read)

    def quiet(self) -> bool:
        """Whether another request may go over the connection: it is open and of this process, and nothing has come."""
        sock = self._socket
        return sock is not None and self._process == os.getpid() and self._incoming.empty and quiet(sock)

    def ask(self, line: bytes) -> bytes:
        """Send a line and return the first line of the answer. Raises `CommunicationError`."""
        try:
            self.send_line(line)
        except CommunicationError:
            # A peer that refuses a request may say why and close before it has read all of it.
            with suppress(CommunicationError):
                return self.receive_line()
            raise
        return self.receive_line()

    def _connected(self) -> socket.socket:
        if self._socket is None:
            raise self._closed_here()
        return self._socket

    def _closed_here(self) -> CommunicationError:
        return self.endpoint.error("not connected", "the connection was closed on this side")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.endpoint} {'closed' if self._socket is None else 'connected'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} can't be copied or pickled: it holds an open connection")


class JSONSSLConnection(JSONConnection):
    """TLS connection, reading and writing JSON lines; otherwise as `JSONConnection`. TLS 1.2 is the floor.

    Args:
        host: name or address of the server.
        port: its port.
        ca_file: PEM file with the authorities that the server's certificate must come from, and it must be for
            `host`; None verifies neither.

    Raises:
        CommunicationError: the server can't be reached within `CONNECT_DEADLINE` seconds, does not speak TLS, or
            its certificate is not accepted; the message says what to do.
        HarpException: `host` or `port` is none, or `ca_file` can't be read.

    Spec: docs/client-api.md, Networked JSON interface.
    """

    def __init__(self, host: str, port: int, ca_file: str | os.PathLike[str] | None = None) -> None:
        self._ca_file = ca_file
        super().__init__(host, port)

    def _open(self, last: float) -> socket.socket:
        context = tls_context(self._ca_file)
        sock = super()._open(last)
        try:
            sock.settimeout(max(last - time.monotonic(), 0.001))
            with self.endpoint.mapped("TLS handshake"):
                secured = context.wrap_socket(sock, server_hostname=self.endpoint.server_name)
        except BaseException:
            sock.close()
            raise
        secured.settimeout(None)
        return secured
