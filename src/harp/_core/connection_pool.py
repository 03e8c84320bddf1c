"""Open connections to one harpd or dispatcher that wait for their next request.

Nothing here reads a clock or knows the network. A connection decides whether it can be used again
(`Poolable.is_idle`); the pool decides when and how many wait.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

#: The most connections that wait in one pool.
_CAPACITY = 32


class Poolable(Protocol):
    """A connection that can wait in a pool."""

    def is_idle(self) -> bool:
        """Return whether the connection is open and its peer has sent nothing since the last reply."""

    def close_threadsafe(self) -> None:
        """Close the connection without waiting, from any thread."""


C = TypeVar("C", bound=Poolable)


class ConnectionPool(Generic[C]):
    """Connections that wait for their next request; the most recently used one is used first.

    Waiting connections are closed with the pool.

    Each waits for at most half of the time that its peer grants: after that, the peer may be about to close it.
    Any number of threads may use a pool. There is no lock, because a fork or a signal handler could find it locked:
    each step is one operation of `deque`.

    Args:
        enabled: whether connections stay open at all.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        #: Whether the peer has granted keep-alive before.
        self.granted = False
        self._waiting: deque[tuple[C, float]] = deque()

    def get(self, now: float) -> C | None:
        """Return a connection for one request, and remove it from the pool; None when there is none."""
        while (newest := self._remove_newest()) is not None:
            conn, deadline = newest
            if now < deadline and conn.is_idle():
                return conn
            conn.close_threadsafe()
        return None

    def _remove_newest(self) -> tuple[C, float] | None:
        try:
            return self._waiting.pop()
        except IndexError:
            return None

    def put(self, conn: C, seconds: float | None, now: float) -> bool:
        """Add a connection whose request has been answered.

        Args:
            conn: the connection.
            seconds: how long the peer keeps it open for another request; None: not at all.
            now: the time of the answer.

        Returns:
            Whether the pool has taken it. If not, the caller closes it.
        """
        if seconds is None or not self.enabled:
            return False
        self.granted = True
        self._waiting.append((conn, now + seconds / 2))
        while (oldest := self._remove_surplus(now)) is not None:
            oldest.close_threadsafe()
        return True

    def _remove_surplus(self, now: float) -> C | None:
        """Return the oldest connection, removed, if there are too many or its time is over."""
        with suppress(IndexError):  # other threads have taken all
            if len(self._waiting) > _CAPACITY or self._waiting[0][1] <= now:
                return self._waiting.popleft()[0]
        return None

    def drain(self) -> list[C]:
        """Remove all connections and return them; the caller closes them."""
        return [conn for conn, _ in iter(self._remove_newest, None)]

    def __del__(self) -> None:
        with suppress(Exception):
            for conn in self.drain():
                conn.close_threadsafe()
