"""Connections to one peer: its endpoint, the interface of both shells' connections, and their pool.

Each exchange with a peer is written once for both shells, as a generator (`Steps`). It calls a method of a connection,
yields the return value, and receives the result. In the synchronous shell, the return value is the result. In the
asyncio shell, it is a coroutine, which the driver awaits. The two drivers are `harp._net.sync.method` and
`harp._net.aio.method`.
"""

from __future__ import annotations

import ipaddress
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeAlias, TypeVar

from harp.errors import CommunicationError, HarpException

T = TypeVar("T")

#: A generator that yields the return values of a connection's methods, receives their results, and returns its outcome.
Steps: TypeAlias = Generator[Any, Any, T]

#: A PEM file with authorities; None: the peer's certificate is not verified.
CAFile: TypeAlias = str | os.PathLike[str] | None


class TLSContext(Protocol):
    """An `ssl.SSLContext`; nothing here uses TLS."""

    wrap_socket: Any


@dataclass(frozen=True, slots=True)
class DispatcherTLS:
    """TLS to a dispatcher: the server's authorities (None: the system's) and the client's certificate; or a context.

    Without `keyfile`, the key is in `certfile`. Each connection reads the files again if they have changed.
    """

    ca_file: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    context: Any = None

    def __deepcopy__(self, memo: object) -> DispatcherTLS:
        return self  # a context cannot be copied


def parse_tls(
    tls: TLSContext | bool | None, ca_file: CAFile, certfile: CAFile, keyfile: CAFile
) -> DispatcherTLS | None:
    """Return the options of TLS; None: the connection has no TLS. Raise `HarpException` if they are invalid."""
    paths: dict[str, Any] = {}
    for name, path in (("ca_file", ca_file), ("certfile", certfile), ("keyfile", keyfile)):
        if path is not None:
            try:
                paths[name] = os.fsdecode(path)
            except TypeError:
                raise HarpException(f"{name}: expected the path of a file, got {path!r}") from None
    if "keyfile" in paths and "certfile" not in paths:
        raise HarpException("keyfile: it needs certfile, the certificate of this key")
    if tls is None or tls is True:
        return DispatcherTLS(**paths) if paths or tls else None
    if tls is False:
        context, reason = None, "tls is False"
    elif hasattr(tls, "wrap_socket"):
        context, reason = DispatcherTLS(context=tls), "the context of tls has its own files"
    else:
        raise HarpException(f"tls: expected True, False or an ssl.SSLContext, got {tls!r}")
    if paths:
        raise HarpException(f"{next(iter(paths))}: it cannot be used: {reason}")
    return context


#: The most connections that wait in one pool.
_CAPACITY = 32


#: Characters of URLs and of addresses in brackets, which no name and no address has.
_NO_HOST = frozenset("/[]@")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host, by name or address, and a port; or ``unix:/PATH``, a Unix socket, whose port has no meaning.

    Raises `HarpException` if one of them is invalid.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise HarpException(f"host: expected a name, an address or unix:/PATH, got {self.host!r}")
        if self.host.startswith("unix:") and not self.host.startswith("unix:/"):
            raise HarpException(f"host: expected the absolute path of a Unix socket, got {self.host!r}")
        if self.path is None and (self.host.count(":") == 1 or not _NO_HOST.isdisjoint(self.host)):
            hint = "the port is an argument of its own"
            raise HarpException(f"host: expected a name or an address without brackets; {hint}, got {self.host!r}")
        if not isinstance(self.port, int) or isinstance(self.port, bool) or not 0 < self.port < 65536:
            raise HarpException(f"port: expected a number from 1 to 65535, got {self.port!r}")

    def __str__(self) -> str:
        if self.path is not None:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def path(self) -> str | None:
        """The path of the Unix socket; None: it is a TCP port."""
        return self.host.removeprefix("unix:") if self.host.startswith("unix:") else None

    def check_tcp(self) -> None:
        """Raise `HarpException` for a Unix socket."""
        if self.path is not None:
            raise HarpException(f"host: a harpd is called over TLS on a TCP port, got {self.host!r}")

    @property
    def server_name(self) -> str:
        """The name that the server's certificate must contain: without an address's zone or a trailing dot."""
        address = self.host.partition("%")[0]
        try:
            return str(ipaddress.ip_address(address))
        except ValueError:
            return self.host.rstrip(".")


#: Seconds: 30 years. Longer time-outs exceed the range of the system's functions; not every integer has a float.
_LONGEST_TIMEOUT = 1e9


class Deadline(NamedTuple):
    """The time of the monotonic clock until which a peer must have replied, and the seconds from the beginning."""

    at: float
    seconds: float

    @classmethod
    def after(cls, seconds: float, now: float) -> Self:
        """Return the deadline in some seconds, any positive number; `now` is the time of the monotonic clock."""
        seconds = float(min(seconds, _LONGEST_TIMEOUT))
        return cls(now + seconds, seconds)


def earlier(first: Deadline | None, second: Deadline | None) -> Deadline | None:
    """Return the earlier one of two deadlines; None stands for no deadline."""
    return min(filter(None, (first, second)), default=None)


class Connection:
    """The common interface of both shells' connections. A call that returns `Any` is a step."""

    #: Until when `connect`, `exchange` and `receive_line` must be done; None: `connect` has its usual limit, the others
    #: have none. After it they raise an error whose cause is a `TimeoutError`.
    deadline: Deadline | None = None
    #: Returns the context for TLS, the same one until its files change; None: the connection has no TLS.
    make_context: Callable[[], Any] | None = None
    #: What is sent over this connection, and only with TLS, a Unix socket or to a loopback address: "token".
    confidential: str | None = None

    connect: Callable[[], Any]
    close: Callable[[], Any]
    #: Closes the connection without waiting, from any thread.
    close_threadsafe: Callable[[], None]
    #: Returns whether no other machine can read what is sent: over TLS, a Unix socket, or to a loopback address.
    is_private: Callable[[], bool]
    #: Returns the error for something confidential that was not sent.
    not_private: Callable[[str], HarpException]
    #: Returns whether the connection is open and its peer has not sent data since the last reply.
    is_idle: Callable[[], bool]
    #: Waits for a line and returns it without its line feed.
    receive_line: Callable[[], Any]
    #: Sends a line and returns the first line of the reply.
    exchange: Callable[[bytes], Steps[Any]]
    #: Passes the lines that have arrived already to a function, and returns its items.
    parse_buffered: Callable[[Callable[[Iterable[bytes]], list[Any]]], list[Any]]
    #: Returns the error for an action that failed because of an error of the network, of TLS or of the protocol.
    error: Callable[[str, Exception], CommunicationError]


C = TypeVar("C", bound=Connection)


class ConnectionPool(Generic[C]):
    """Connections that wait for their next request, if this is enabled; the most recently used one is used first.

    Each waits for at most half of the time that its peer grants: after that, the peer may be about to close it.
    Waiting connections are closed with the pool. Any number of threads may use a pool. There is no lock, because a fork
    or a signal handler could find it locked: each step is one operation of `deque`.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        #: Whether the peer has granted keep-alive before.
        self.granted = False
        self._waiting: deque[tuple[C, float]] = deque()
        # Not `__del__`: in cyclic garbage, it may be called after the sockets are deleted, which then warn.
        weakref.finalize(self, _close_all, self._waiting)

    def get(self, now: float) -> C | None:
        """Remove and return a connection for one request; None if the pool has no usable connection."""
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
        """Add a connection whose request has been answered; return whether it was added. If not, the caller closes it.

        The peer keeps it open for a number of seconds; None: not at all.
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

    def close(self) -> None:
        """Close all waiting connections."""
        _close_all(self._waiting)

    def __reduce__(self) -> tuple[Any, ...]:
        return ConnectionPool, (self.enabled,)


def _close_all(waiting: deque[tuple[Any, float]]) -> None:
    with suppress(IndexError):
        while True:
            waiting.pop()[0].close_threadsafe()


class Peer(Generic[C]):
    """A server that requests are sent to, over connections that may wait for the next one."""

    #: Returns the time of the monotonic clock in seconds.
    _now: Callable[[], float]
    #: A step that waits for a number of seconds.
    _sleep: Callable[[float], Any]
    _endpoint: Endpoint
    _pool: ConnectionPool[C]

    def __getstate__(self) -> dict[str, Any]:
        # A copy has separate connections.
        return {**self.__dict__, "_pool": ConnectionPool(self._pool.enabled)}


def mark_ambiguous(error: CommunicationError, reused: bool) -> CommunicationError:
    """Return the error of a call. If the connection was reused, its message adds that the call may have run."""
    if not reused:
        return error
    return CommunicationError(f"{error} (a keep-alive connection broke: it is not known whether the call ran)")
