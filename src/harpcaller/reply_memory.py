"""The memory of long replies to all clients together.

Theory of operation: a client may not read its long reply, so each long reply needs a share of a limited memory until it
is sent. Without a share, the reply is discarded, and its request waits; later the reply is built again. A waiting
request therefore needs no memory, and it has no share, so that waiting clients do not block each other. A reply that is
longer than the limit gets a share when no other client has one. Shares are given in the order of the requests. Short
replies need no share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_UNCOUNTED = 64 * 1024  #: Bytes of each reply that are not counted, so that short replies never wait.


class ReplyMemory:
    """The memory of all clients. `limit` returns its bytes, without the uncounted bytes of each reply."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: dict[ReplyShare, tuple[int, Callable[[], object]]] = {}  # the first request first

    @property
    def has_waiting(self) -> bool:
        """Whether a reply waits for memory."""
        return bool(self._waiting)

    def _has_room(self, size: int) -> bool:
        return not self._used or self._used + size <= self._limit()

    def _give_shares(self) -> None:
        """Give shares to the waiting clients, in order."""
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
        """Reserve memory for a reply of `length` bytes; return False if the memory is exhausted.

        Then the caller discards the reply. `retry` is called when the memory is reserved.
        """
        memory, size = self._memory, max(0, length - _UNCOUNTED)
        if size > self.size:
            self.release()
            if memory.has_waiting or not memory._has_room(size):
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
        """Return the share, or stop waiting for a share."""
        memory = self._memory
        memory._used -= self.size
        self.size = 0
        memory._waiting.pop(self, None)
        memory._give_shares()
