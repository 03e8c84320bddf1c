"""The spool of a resumable call: numbered records that its dispatcher has not acknowledged.

Records are stored as they were written, in chunks, with the time of their arrival. Acknowledged chunks are deleted, and
no others. Pure: no clock, no input or output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

#: Bytes that each call may always buffer, even if the others have used up the memory.
GUARANTEED_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """Records that arrived together."""

    first: int  # the number of the first one
    count: int
    lines: bytes  # each with its line feed
    time: float  # of their arrival, Unix seconds


class Spool:
    """The records of one call, from the first record that is not acknowledged."""

    def __init__(self) -> None:
        self.first = 0  # the number of the first record in the spool
        self.end = 0  # the number of the next record
        self.size = 0  # the bytes of all records in the spool
        self._chunks: OrderedDict[int, Chunk] = OrderedDict()

    def append(self, lines: bytes, count: int, time: float) -> None:
        self._chunks[self.end] = Chunk(self.end, count, lines, time)
        self.end += count
        self.size += len(lines)

    def acknowledge(self, number: int) -> int:
        """Delete chunks with records below a number only; return how many bytes that has freed."""
        before = self.size
        while self._chunks:
            chunk = next(iter(self._chunks.values()))
            if chunk.first + chunk.count > number:
                break
            del self._chunks[chunk.first]
            self.size -= len(chunk.lines)
        self.first = next(iter(self._chunks), self.end)
        return before - self.size

    def chunk_from(self, number: int) -> Chunk:
        """Return the next records from a number on, which is at least `first` and below `end`."""
        if number in self._chunks:
            return self._chunks[number]
        for chunk in self._chunks.values():
            skipped = number - chunk.first
            if skipped < chunk.count:
                return Chunk(number, chunk.count - skipped, chunk.lines.split(b"\n", skipped)[skipped], chunk.time)
        raise IndexError(number)


class SpoolQuota:
    """The bytes that all calls share. When `limit` is reached, spools of `GUARANTEED_BYTES` or more are paused."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._paused: dict[Callable[[], None], None] = {}

    @property
    def exhausted(self) -> bool:
        """Whether more than twice the limit is used, by guaranteed bytes and ends: no new call should begin."""
        return self._used > 2 * self.limit

    def reserve(self, size: int) -> None:
        self._used += size

    def release(self, size: int) -> None:
        """Count bytes as free; resume the paused calls if there is room."""
        self._used -= size
        if self._paused and self._used < self.limit:
            paused, self._paused = self._paused, {}
            for resume in paused:
                resume()

    def may_grow(self, resume: Callable[[], None]) -> bool:
        """Return whether a spool of `GUARANTEED_BYTES` or more may grow; if not, `resume` is called once it may."""
        if self._used < self.limit:
            return True
        self._paused[resume] = None
        return False
