"""The memory of long replies to all clients together.

Theory of operation: a client may leave a long reply unread, so each such reply needs a share of a limited memory until
it is sent. Without one, the reply is discarded, and its request waits; when there is a share, the reply is built again.
A waiting request so costs no memory. A client that waits has no share, so that no client waits for a waiting one. A
reply that is longer than the limit gets its share when no other client has one. Shares are given in the order of the
requests; short replies need none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_FREE = 64 * 1024  #: Bytes of each reply that are not counted, so that short replies never wait.


class ReplyMemory:
    """The memory of all clients. `limit` returns its bytes, without the free ones of each reply."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: dict[ReplyShare, tuple[int, Callable[[], object]]] = {}  # in order

    @property
    def is_short(self) -> bool:
        """Whether a reply waits for memory."""
        return bool(self._waiting)

    def _has_room(self, size: int) -> bool:
        return not self._used or self._used + size <= self._limit()

    def _give_shares(self) -> None:
        """Give shares to those that wait, in order."""
        while self._waiting:
            share, (size, retry) = next(iter(self._waiting.items()))
            if not self._has_room(size):
                return
            del self._waiting[share]
            self._used += size
            share.size = size
            asyncio.get_running_loop().call_soon(retry)


class ReplyShare:
    """The share of one client."""

    def __init__(self, memory: ReplyMemory) -> None:
        self._memory = memory
        self.size = 0  #: Counted bytes.

    def reserve(self, length: int, retry: Callable[[], object]) -> bool:
        """Reserve memory for a reply of `length` bytes; return False if there is none now.

        Then the caller discards the reply. `retry` is called when there is memory, which is then reserved already.
        """
        memory, size = self._memory, max(0, length - _FREE)
        if size > self.size:
            self.release()
            if memory.is_short or not memory._has_room(size):
                memory._waiting[self] = size, retry
                return False
        released, self.size = self.size - size, size
        memory._used -= released
        if released > 0:
            memory._give_shares()
        return True

    @property
    def is_waiting(self) -> bool:
        """Whether `retry` will be called."""
        return self in self._memory._waiting

    def release(self) -> None:
        """Return the share, or wait no longer for one."""
        memory = self._memory
        memory._used -= self.size
        self.size = 0
        memory._waiting.pop(self, None)
        memory._give_shares()
