"""How the client talks to a peer, written once for both shells.

A function of this kind is a generator (`Steps`). It yields the return value of a connection's method and is sent the
result. In the synchronous shell these are the same; in the asyncio shell the return value is a coroutine, which the
shell awaits. `harp._net.sync.run` and `harp._net.aio.run` are the two drivers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

from harp._core.connection_pool import ConnectionPool, Poolable
from harp._core.endpoint import Endpoint
from harp.errors import CommunicationError

T = TypeVar("T")

#: Steps yield the results of a connection's methods, are sent their values, and return their outcome.
Steps: TypeAlias = Generator[Any, Any, T]


class Connection(Poolable, Protocol):
    """The common interface of both shells' connections; a call of a method that returns `Any` is a step."""

    def connect(self) -> Any:
        """Connect, or connect again."""

    def close(self) -> Any:
        """Close the connection."""

    def exchange(self, line: bytes) -> Any:
        """Send a line and return the first line of the reply."""

    def receive_line(self) -> Any:
        """Wait for a line and return it."""

    def parse_buffered(self, parse: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """Pass the lines that have arrived already to a function, and return its items."""

    def map_errors(self, action: str) -> AbstractContextManager[None]:
        """Turn errors of the network, of TLS, of JSON and of the protocol into `CommunicationError`."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of one shell.

    Args:
        now: returns the time of the monotonic clock in seconds.
        sleep: a step that waits for a number of seconds.
    """

    now: Callable[[], float]
    sleep: Callable[[float], Any]


C = TypeVar("C", bound=Connection)


class PooledPeer(ABC, Generic[C]):
    """A peer that requests are sent to, over connections that may wait for the next one."""

    _clock: ClassVar[Clock]
    _endpoint: Endpoint
    _pool: ConnectionPool[C]

    @abstractmethod
    def _open(self) -> Any:
        """Return a new connection that is connected; a step."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy has connections of its own.
        return {**self.__dict__, "_pool": ConnectionPool(self._pool.enabled)}


@contextmanager
def mark_ambiguous(reused: bool) -> Iterator[None]:
    """Add to a `CommunicationError` on a reused connection that the call may have run.

    The peer may have closed the connection, because it was idle for too long, just when the request was sent, or it may
    have failed in the middle of the call. The client cannot tell these apart, so the call is not sent again.
    """
    try:
        yield
    except CommunicationError as error:
        if not reused:
            raise
        text = f"{error} (a keep-alive connection broke: it is not known whether the call ran)"
        raise CommunicationError(text) from error.__cause__
