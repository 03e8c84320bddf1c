"""Common parts of both shells' connections: errors, connecting, the receive buffer, the test for idleness.

Each error of socket, ssl, json and the protocol becomes a `CommunicationError` whose message contains host, port and
cause. Its `__cause__` is the original: an `OSError` if the network or the peer broke the connection, an `EOFError` if
the peer closed it between lines, a `ValueError` if the peer sent invalid data.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from harp._core.connections import Endpoint, Steps
from harp.protocol.lines import LineBuffer

#: Seconds to connect, TLS handshake included.
CONNECT_TIMEOUT = 30.0

#: The most bytes in the line of a reply.
REPLY_LIMIT = 64 * 1024 * 1024

#: A peer that has vanished is detected after about two minutes; a peer that is busy is not affected.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

#: An integer, because `|` of two flags enters eleven functions of the module `enum`.
_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)

AddressInfo: TypeAlias = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


#: Remedies for a certificate that is not accepted, by OpenSSL's error number.
_HINTS = {
    9: "check the clocks of both machines",
    10: "renew the server's certificate",
    62: "call the host by a name that its certificate has, or give it a certificate with this name",
    64: "call the host by a name that its certificate has, or give it a certificate with this address",
}


#: The foreign errors that become a `CommunicationError`.
FOREIGN_ERRORS = (OSError, EOFError, ValueError)


def describe_error(error: Exception) -> str:
    """Return an error's cause in words, with a hint where there is one."""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = _HINTS.get(error.verify_code, "ca_file must contain the authority that issued it")
        return f"the server's certificate is not accepted: {error.verify_message.rstrip('.')} ({hint})"
    if isinstance(error, ssl.SSLError) and error.reason:
        words = error.reason.lower().replace("_", " ")
        return f"{words} (it does not speak TLS)" if error.reason == "WRONG_VERSION_NUMBER" else words
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)


def connect_socket(
    endpoint: Endpoint,
    found: Sequence[AddressInfo],
    deadline: float,
    connect: Callable[[socket.socket, Any, float], Any],
) -> Steps[socket.socket]:
    """Return a socket that is connected to the first address that can be reached.

    The remaining time is divided equally among the remaining addresses.

    Args:
        endpoint: the peer, for the message.
        found: its addresses, from `socket.getaddrinfo`.
        deadline: the end of the last attempt, on the monotonic clock.
        connect: a step that connects a socket to an address within a number of seconds.

    Raises:
        CommunicationError: no address can be reached; lists all failed attempts.
    """
    failures: list[tuple[str, OSError]] = []
    for index, (family, kind, protocol, _, address) in enumerate(found):
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:  # this machine does not support the family, or is out of descriptors
            failures.append((address[0], error))
            continue
        try:
            _prepare(sock)
            remaining = max(deadline - time.monotonic(), 0.001)
            yield connect(sock, address, remaining / (len(found) - index))
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            failures.append((address[0], error))
        else:
            return sock
    causes = dict.fromkeys(
        describe_error(error) if address == endpoint.host else f"{address}: {describe_error(error)}"
        for address, error in failures
    )
    cause = failures[-1][1] if failures else None
    raise endpoint.error("cannot connect", "; ".join(causes) or "the name has no address") from cause


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
        socket.socket.recv(sock, 1, _PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
