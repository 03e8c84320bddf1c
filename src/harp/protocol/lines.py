"""Splitting of bytes into lines of limited length. This module reads no socket."""

from __future__ import annotations


class LineTooLong(ValueError):
    """A line is longer than the limit."""


class LineBuffer:
    """A buffer that returns complete lines without their line feed, each of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        #: Bytes of the incomplete line.
        self.size = 0

    @property
    def pending(self) -> bytes:
        """The received part of an incomplete line."""
        return b"".join(self._pieces)

    def feed(self, data: bytes) -> list[bytes]:
        """Add received bytes and return the lines that they complete.

        Raises `LineTooLong` if a line is longer than the limit, complete or not. The lines before it in `data`
        are lost; close the connection.
        """
        *lines, rest = data.split(b"\n")
        if lines:
            if self._pieces:
                self._add(lines[0])
                lines[0] = self.pending
                self._pieces.clear()
                self.size = 0
            if len(data) > self._limit and len(max(lines, key=len)) > self._limit:
                raise self._too_long()
        if rest:
            self._add(rest)
        return lines

    def _add(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size > self._limit:
            raise self._too_long()
        self._pieces.append(piece)

    def _too_long(self) -> LineTooLong:
        return LineTooLong(f"a line is longer than {self._limit} bytes")
