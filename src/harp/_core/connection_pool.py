"""Connections to a harpd or a dispatcher that wait for another request.

Nothing here reads a clock or knows the network. Whether a connection may be used again is its own business
(`Reusable.quiet`); when, and how many wait, is decided here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

__all__ = ["Idle"]

#: The most connections that wait in one place.
_MOST = 32


class Reusable(Protocol):
    """What a connection has to tell."""

    def quiet(self) -> bool:
        """Whether another request may go over the connection, as far as can be known here and now."""


C = TypeVar("C", bound=Reusable)


class Idle(Generic[C]):
    """Connections that wait for another request, the one used last first. Any number of threads may use it.

    Each waits for half of the time that its peer grants at most: after that the peer may be about to close it.

    There is no lock, which a fork or a signal handler could meet taken: each step is one operation of `deque`.

    Args:
        drop: closes a connection, without waiting and from any thread. What is left is dropped with this object.
    """

    def __init__(self, drop: Callable[[C], object]) -> None:
        self._drop = drop
        self._waiting: deque[tuple[C, float]] = deque()

    def take(self, now: float) -> C | None:
        """A connection for one request, which is the caller's from now on; None: there is none, make one."""
        while (newest := self._newest()) is not None:
            conn, until = newest
            if now < until and conn.quiet():
                return conn
            self._drop(conn)
        return None

    def _newest(self) -> tuple[C, float] | None:
        try:
            return self._waiting.pop()
        except IndexError:
            return None

    def put(self, conn: C, keep: float, now: float) -> None:
        """Have a connection wait, over which a request was answered at `now`, and the peer grants `keep` seconds."""
        self._waiting.append((conn, now + keep / 2))
        while (oldest := self._surplus(now)) is not None:
            self._drop(oldest)

    def _surplus(self, now: float) -> C | None:
        """The oldest connection, taken out, when there are too many or its time is over."""
        with suppress(IndexError):  # other threads have taken all
            if len(self._waiting) > _MOST or self._waiting[0][1] <= now:
                return self._waiting.popleft()[0]
        return None

    def drain(self) -> list[C]:
        """Take all connections, to close them."""
        return [conn for conn, _ in iter(self._newest, None)]

    def __del__(self) -> None:
        with suppress(Exception):
            for conn in self.drain():
                self._drop(conn)
