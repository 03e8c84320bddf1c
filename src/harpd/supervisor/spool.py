"""The spool of a resumable call: numbered records that its dispatcher has not acknowledged.

Records are stored as they were written, in chunks, with the time of their arrival. Acknowledged chunks are deleted, and
no others. Pure: no clock, no input or output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from harpd.supervisor.fair_shares import Account, FairShares

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
    """The bytes that all calls share. When `limit` is reached, spools of `GUARANTEED_BYTES` or more are paused.

    An account that is below its share of the limit is not: see `harpd.supervisor.fair_shares`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = FairShares()
        self._paused: dict[Account, dict[Callable[[], None], None]] = {}

    @property
    def used(self) -> int:
        """The bytes that are in use."""
        return self._used.total

    def is_exhausted(self, account: Account) -> bool:
        """Return whether no new call of an account should begin: guaranteed bytes and ends use twice the limit."""
        return not self._used.may_add(account, 2 * self.limit)

    def reserve(self, account: Account, size: int) -> None:
        self._used.add(account, size)

    def release(self, account: Account, size: int) -> None:
        """Count bytes as free; resume the paused calls for which there is room."""
        self._used.add(account, -size)
        for paused in [paused for paused in self._paused if self._used.may_add(paused, self.limit)]:
            for resume in self._paused.pop(paused):
                resume()

    def may_grow(self, account: Account, resume: Callable[[], None]) -> bool:
        """Return whether a spool of `GUARANTEED_BYTES` or more may grow; if not, `resume` is called once it may."""
        if self._used.may_add(account, self.limit):
            return True
        self._paused.setdefault(account, {})[resume] = None
        return False
