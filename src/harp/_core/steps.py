"""How the client talks to a peer, written once for both shells.

A function of this kind is a generator (`Steps`). It yields what a connection's method returns and is sent the value:
in the synchronous shell this is the value itself, in the asyncio shell it is a coroutine that the shell awaits first.
`harp._net.sync.run` and `harp._net.aio.run` are the two drivers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from harp._core.connection_pool import Poolable
from harp.errors import CommunicationError

__all__ = ["Clock", "Connection", "Steps", "mark_ambiguous"]

T = TypeVar("T")

#: Steps yield the results of a connection's methods, are sent their values, and return their outcome.
Steps: TypeAlias = Generator[Any, Any, T]


class Connection(Poolable, Protocol):
    """What both shells' connections have in common; a step is a call of a method that returns `Any`."""

    def connect(self) -> Any:
        """Connect, or connect again."""

    def close(self) -> Any:
        """Close the connection."""

    def ask(self, line: bytes) -> Any:
        """Send a line and return the first line of the reply."""

    def receive_line(self) -> Any:
        """Wait for a line and return it."""

    def parse_buffered(self, parse: Callable[[Iterable[bytes]], list[Any]]) -> list[Any]:
        """Return what a function parses from the lines that are already here."""

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
