"""Splitting of bytes into lines of limited length. This module reads no socket."""

from __future__ import annotations

#: Pieces that are joined: a peer may send a line in pieces of few bytes, each of which needs about 50 bytes of memory.
_MAX_PIECES = 256


class LineTooLong(ValueError):
    """A line is longer than the limit."""


class LineBuffer:
    """A buffer that returns complete lines without their line feed, each of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._joined = 0  # how many of them are pieces that were joined
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
                self._joined = 0
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
        if len(self._pieces) - self._joined == _MAX_PIECES:
            self._pieces[self._joined :] = [b"".join(self._pieces[self._joined :])]
            self._joined += 1

    def _too_long(self) -> LineTooLong:
        return LineTooLong(f"a line is longer than {self._limit} bytes")
