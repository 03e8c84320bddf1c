"""Bytes to lines, with a bound. Nothing here reads a socket."""

from __future__ import annotations


class LineTooLong(ValueError):
    """A line is longer than the limit."""


class LineBuffer:
    """Collects bytes as they come and gives back whole lines, without their line feed.

    Args:
        limit: the most bytes that a line may have, its line feed not counted.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._size = 0

    @property
    def pending(self) -> bytes:
        """What has come of a line that is not whole yet."""
        return b"".join(self._pieces)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the lines that they complete.

        Raises:
            LineTooLong: a line is longer than the limit, whole or not. Lines before it in `data` are lost:
                the connection is of no more use.
        """
        *lines, rest = data.split(b"\n")
        if lines:
            self._keep(lines[0])
            lines[0] = self.pending
            self._pieces.clear()
            self._size = 0
            if len(data) > self._limit and len(max(lines, key=len)) > self._limit:
                raise self._too_long()
        if rest:
            self._keep(rest)
        return lines

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            raise self._too_long()
        self._pieces.append(piece)

    def _too_long(self) -> LineTooLong:
        return LineTooLong(f"a line is longer than {self._limit} bytes")
