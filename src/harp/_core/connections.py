"""Connections to one peer: where it listens, what a shell's connection can do, and which ones wait for a request.

Each exchange with a peer is written once for both shells, as a generator (`Steps`). It calls a method of a connection,
yields the return value, and receives the result. In the synchronous shell, the return value is the result. In the
asyncio shell, it is a coroutine, which the driver awaits. The two drivers are `harp._net.sync.run` and
`harp._net.aio.run`.
"""

from __future__ import annotations

import ipaddress
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from harp.errors import CommunicationError, HarpException

T = TypeVar("T")

#: A generator that yields what a connection's methods return, receives their results, and returns its outcome.
Steps: TypeAlias = Generator[Any, Any, T]

#: The most connections that wait in one pool.
_CAPACITY = 32


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host, by name or address, and a port. Raises `HarpException` if one of them is invalid."""

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
        """The name that the server's certificate must contain: without an address's zone or a trailing dot."""
        address = self.host.partition("%")[0]
        try:
            return str(ipaddress.ip_address(address))
        except ValueError:
            return self.host.rstrip(".")


class Connection(Protocol):
    """The common interface of both shells' connections; a call of a method that returns `Any` is a step."""

    def connect(self) -> Any:
        """Connect, or connect again."""

    def close(self) -> Any:
        """Close the connection."""

    def close_threadsafe(self) -> None:
        """Close the connection without waiting, from any thread."""

    def is_idle(self) -> bool:
        """Return whether the connection is open and its peer has sent nothing since the last reply."""

    def exchange(self, line: bytes) -> Any:
        """Send a line and return the first line of the reply."""

    def receive_line(self) -> Any:
        """Wait for a line and return it."""

    def parse_buffered(self, parse: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """Pass the lines that have arrived already to a function, and return its items."""

    def error(self, action: str, cause: Exception) -> CommunicationError:
        """Return the error for an action that failed because of an error of the network, of TLS or of the protocol."""


C = TypeVar("C", bound=Connection)


class ConnectionPool(Generic[C]):
    """Connections that wait for their next request; the most recently used one is used first.

    Each waits for at most half of the time that its peer grants: after that, the peer may be about to close it.
    Waiting connections are closed with the pool. Any number of threads may use a pool. There is no lock, because a fork
    or a signal handler could find it locked: each step is one operation of `deque`.

    Args:
        enabled: whether connections stay open at all.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        #: Whether the peer has granted keep-alive before.
        self.granted = False
        self._waiting: deque[tuple[C, float]] = deque()
        # Not `__del__`: in cyclic garbage, it may be called after the sockets are deleted, which then warn.
        weakref.finalize(self, _close_all, self._waiting)

    def get(self, now: float) -> C | None:
        """Remove and return a connection for one request; None when there is none."""
        while self._waiting:
            try:
                conn, deadline = self._waiting.pop()
            except IndexError:  # another thread has removed it
                break
            if now < deadline and conn.is_idle():
                return conn
            conn.close_threadsafe()
        return None

    def put(self, conn: C, seconds: float | None, now: float) -> bool:
        """Add a connection whose request has been answered, if it can be used again.

        Args:
            conn: the connection.
            seconds: how long the peer keeps it open for another request; None: not at all.
            now: the time of the answer.

        Returns:
            Whether the pool has the connection now. If not, the caller closes it.
        """
        if seconds is None or not self.enabled:
            return False
        self.granted = True
        self._waiting.append((conn, now + seconds / 2))
        try:
            while len(self._waiting) > _CAPACITY or self._waiting[0][1] <= now:
                self._waiting.popleft()[0].close_threadsafe()
        except IndexError:  # other threads have removed all
            pass
        return True

    def drain(self) -> list[C]:
        """Remove all connections and return them; the caller closes them."""
        drained = []
        with suppress(IndexError):
            while True:
                drained.append(self._waiting.pop()[0])
        return drained

    def __reduce__(self) -> tuple[Any, ...]:
        return ConnectionPool, (self.enabled,)


def _close_all(waiting: Iterable[tuple[Connection, float]]) -> None:
    for conn, _ in waiting:
        with suppress(Exception):
            conn.close_threadsafe()


class Peer(ABC, Generic[C]):
    """A server that requests are sent to, over connections that may wait for the next one."""

    #: Returns the time of the monotonic clock in seconds.
    _now: Callable[[], float]
    #: A step that waits for a number of seconds.
    _sleep: Callable[[float], Any]
    _endpoint: Endpoint
    _pool: ConnectionPool[C]

    @abstractmethod
    def _open(self) -> Any:
        """Return a new connection that is connected; a step."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy has connections of its own.
        return {**self.__dict__, "_pool": ConnectionPool(self._pool.enabled)}


def mark_ambiguous(error: CommunicationError, reused: bool) -> CommunicationError:
    """Return the error of a call. If the connection was reused, its message adds that the call may have run.

    The peer may have closed the connection, because it was idle for too long, just when the request was sent, or it may
    have failed in the middle of the call. The client cannot tell these apart, so the call is not sent again.
    """
    if not reused:
        return error
    return CommunicationError(f"{error} (a keep-alive connection broke: it is not known whether the call ran)")
