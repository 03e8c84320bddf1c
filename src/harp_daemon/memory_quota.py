"""Memory that many share: each may have a little for nothing, the rest is counted."""

from __future__ import annotations

from typing import Self

#: Bytes that each share has for nothing, so that small requests pass however much the long ones hold.
_FREE = 64 * 1024


class MemoryQuota:
    """What all request lines together may hold.

    Args:
        limit: bytes, those not counted that each has for nothing.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit

    def try_reserve(self, size: int) -> bool:
        """Take bytes; say whether there were so many left."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def release(self, size: int) -> None:
        """Give back bytes that were taken."""
        self._left += size


class Reservation:
    """What one request line takes of the allowance."""

    def __init__(self, allowance: MemoryQuota) -> None:
        self._allowance = allowance
        self._size = 0
        self._counted = 0

    def grow(self, size: int) -> bool:
        """Grow by so many bytes; False, and nothing is taken, when the allowance is used up."""
        self._size += size
        more = max(self._size - _FREE, 0) - self._counted
        if not self._allowance.try_reserve(more):
            return False
        self._counted += more
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give everything back."""
        self._allowance.release(self._counted)
        self._size = self._counted = 0
