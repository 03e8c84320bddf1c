"""A shared memory quota. The first bytes of every reservation are free; the bytes after them are counted."""

from __future__ import annotations

from typing import Self

#: Bytes of each reservation that are not counted, so that small requests are accepted while long ones use the quota.
_FREE = 64 * 1024


class MemoryQuota:
    """The quota of all request lines together.

    Args:
        limit: the quota in bytes, without the free bytes of each reservation.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit

    def try_reserve(self, size: int) -> bool:
        """Reserve bytes; return False, and reserve nothing, if fewer are left."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def release(self, size: int) -> None:
        """Return reserved bytes to the quota."""
        self._left += size


class Reservation:
    """The bytes that one request line uses of the quota; a context manager that releases them."""

    def __init__(self, quota: MemoryQuota) -> None:
        self._quota = quota
        #: Number of bytes, with the free ones.
        self.size = 0
        self._counted = 0

    def grow(self, size: int) -> bool:
        """Reserve more bytes; return False, and reserve nothing, if the quota is used up."""
        self.size += size
        if self.size <= _FREE:
            return True
        more = self.size - _FREE - self._counted
        if not self._quota.try_reserve(more):
            return False
        self._counted += more
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release all bytes."""
        if self._counted:
            self._quota.release(self._counted)
        self.size = self._counted = 0
