"""A shared memory quota. The first bytes of every reservation are free; the bytes after them are counted."""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of each reservation that are not counted, so that small requests are accepted while long requests use it.
_FREE = 64 * 1024


@dataclass
class MemoryQuota:
    """The quota of all request lines together, in bytes without the free bytes of each reservation."""

    available: int


class Reservation:
    """The part of the quota that a request line uses."""

    def __init__(self, quota: MemoryQuota) -> None:
        self._quota = quota
        #: Number of bytes, including the free bytes.
        self.size = 0
        self._counted = 0

    def grow(self, size: int) -> bool:
        """Reserve more bytes; return False, without effect, if the quota is used up."""
        self.size += size
        more = self.size - _FREE - self._counted
        if more > 0:
            if more > self._quota.available:
                return False
            self._quota.available -= more
            self._counted += more
        return True

    def release(self) -> None:
        """Release all bytes; releasing again has no effect."""
        self._quota.available += self._counted
        self.size = self._counted = 0
