"""What a kept call has said and its dispatcher has not stored yet: numbered records, read from any number on.

Records are kept as they were written, many in a piece, with the time they came. What is acknowledged goes; nothing
else ever does. Pure: no clock, no input or output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["GUARANTEED_BYTES", "Chunk", "Spool", "SpoolQuota"]

#: Bytes that every call may keep, however much the others keep.
GUARANTEED_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """Records that came together.

    Attributes:
        first: number of the first one.
        count: how many there are.
        lines: their lines, each with its line feed.
        at: when they came, Unix seconds with fractions.
    """

    first: int
    count: int
    lines: bytes
    time: float

    def from_number(self, number: int) -> Chunk:
        """The part from a number on; the number is one of the piece's."""
        if number == self.first:
            return self
        skipped = number - self.first
        lines = self.lines.split(b"\n", skipped)[skipped]
        return Chunk(number, self.count - skipped, lines, self.time)


class Spool:
    """The records of one call, from the first that is not acknowledged.

    Attributes:
        first: number of the first record that is still here.
        end: number of the record to come.
        size: bytes of all that are here.
    """

    def __init__(self) -> None:
        self.first = 0
        self.end = 0
        self.size = 0
        self._pieces: OrderedDict[int, Chunk] = OrderedDict()

    def append(self, lines: bytes, count: int, at: float) -> None:
        """Take the next `count` records."""
        self._pieces[self.end] = Chunk(self.end, count, lines, at)
        self.end += count
        self.size += len(lines)

    def acknowledge(self, number: int) -> int:
        """Drop records below a number; return how many bytes that gave back."""
        before = self.size
        while self._pieces:
            piece = next(iter(self._pieces.values()))
            if piece.first + piece.count > number:
                break
            del self._pieces[piece.first]
            self.size -= len(piece.lines)
        self.first = next(iter(self._pieces), self.end)
        return before - self.size

    def start_at(self, number: int) -> None:
        """Begin with this number: what came before is not known here."""
        self.first = self.end = number

    def chunk_from(self, number: int) -> Chunk | None:
        """Records from a number on, some of them; None: there are none. The number is not below `first`."""
        if number >= self.end:
            return None
        if number in self._pieces:
            return self._pieces[number]
        for piece in self._pieces.values():
            if number < piece.first + piece.count:
                return piece.from_number(number)
        return None


class SpoolQuota:
    """The memory that all spools share. Past it, every call with more than `GUARANTEED_BYTES` waits.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._waiting: dict[object, Callable[[], None]] = {}

    @property
    def exhausted(self) -> bool:
        """Whether so much is held, shares and ends too, that nobody else should begin."""
        return self._held > 2 * self.limit

    def reserve(self, size: int) -> None:
        """Count bytes that are kept."""
        self._held += size

    def release(self, size: int) -> None:
        """Count bytes that are not kept any more; who waited for room is called."""
        self._held -= size
        if self._waiting and self._held < self.limit:
            waiting, self._waiting = self._waiting, {}
            for call in waiting.values():
                call()

    def may_grow(self, held: int, who: object, wake: Callable[[], None]) -> bool:
        """Whether somebody who keeps `held` bytes may take more; if not, `wake` is called once there is room."""
        if held < GUARANTEED_BYTES or self._held < self.limit:
            return True
        self._waiting[who] = wake
        return False
