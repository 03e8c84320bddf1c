"""Common parts of both shells' connections: attempts to connect, the receive buffer, the test for idleness."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from harp._core.connections import Endpoint
from harp._net.errors import describe_error
from harp.errors import CommunicationError
from harp.protocol.lines import LineBuffer

#: Seconds to connect, TLS handshake included.
CONNECT_TIMEOUT = 30.0

#: The most bytes in the line of a reply.
REPLY_LIMIT = 64 * 1024 * 1024

#: A peer that has vanished is detected after about two minutes; a peer that is busy is not affected.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

AddressInfo: TypeAlias = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


class ConnectAttempts:
    """The attempts to reach an endpoint: the remaining time is divided equally among the remaining addresses.

    Args:
        endpoint: the endpoint.
        found: its addresses, from `socket.getaddrinfo`.
        deadline: the end of the last attempt, on the monotonic clock.
    """

    def __init__(self, endpoint: Endpoint, found: Sequence[AddressInfo], deadline: float) -> None:
        self._endpoint = endpoint
        self._found = found
        self._deadline = deadline
        self._failures: list[tuple[str, OSError]] = []

    def __iter__(self) -> Iterator[tuple[socket.socket, Any, float]]:
        """Yield, for each address, a new socket, the address to connect it to, and the seconds for this attempt."""
        for index, (family, kind, protocol, _, address) in enumerate(self._found):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:  # this machine does not support the family, or is out of descriptors
                self._failures.append((address[0], error))
                continue
            remaining = max(self._deadline - time.monotonic(), 0.001)
            yield sock, address, remaining / (len(self._found) - index)

    @contextmanager
    def attempt(self, sock: socket.socket, address: Any) -> Iterator[None]:
        """Prepare the socket, which the body connects; a failure closes it and is recorded, not raised."""
        try:
            _prepare(sock)
            yield
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            self._failures.append((address[0], error))

    def failure(self) -> CommunicationError:
        """Return the error that lists all failed attempts."""
        causes = dict.fromkeys(
            describe_error(error) if address == self._endpoint.host else f"{address}: {describe_error(error)}"
            for address, error in self._failures
        )
        failure = self._endpoint.error("cannot connect", "; ".join(causes) or "the name has no address")
        failure.__cause__ = self._failures[-1][1] if self._failures else None
        return failure


def _prepare(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        if hasattr(socket, option):  # not every system has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class ReceiveBuffer:
    """Received data: bytes in, lines out."""

    def __init__(self) -> None:
        self._partial = LineBuffer(REPLY_LIMIT)
        #: The complete lines that were not read yet.
        self.lines: deque[bytes] = deque()

    @property
    def empty(self) -> bool:
        """Whether there is neither a line nor a part of one."""
        return not self.lines and not self._partial.pending

    def parse(self, parse: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """Pass the lines to a function and return its items; remove as many of the first lines as there are items."""
        items = parse(self.lines)
        for _ in items:
            self.lines.popleft()
        return items

    def feed(self, data: bytes) -> None:
        """Add received bytes; no bytes mean that the peer has closed.

        Raises:
            ValueError: a line is too long.
            EOFError: the peer has closed between two lines.
            ConnectionAbortedError: the peer has closed within a line.
        """
        if data:
            self.lines += self._partial.feed(data)
        elif size := len(self._partial.pending):
            raise ConnectionAbortedError(f"the peer closed the connection {size} bytes into a line")
        else:
            raise EOFError("the peer closed the connection before the reply was complete")


def is_idle(sock: socket.socket) -> bool:
    """Return whether there is nothing to read, not even the connection's end. Neither waits nor reads.

    TLS holds no data back, because each read is longer than the longest TLS record (16 KiB).
    """
    try:
        # The method of socket: SSLSocket rejects flags.
        socket.socket.recv(sock, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
