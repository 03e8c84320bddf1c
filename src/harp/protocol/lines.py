"""Splitting of bytes into lines of limited length. This module reads no socket."""

from __future__ import annotations

#: Bytes of a line from which joining takes a millisecond and more. Python lets other threads run only while it joins as
#: many.
_LONG = 1024 * 1024
#: Pieces that are joined: a peer may send a line in pieces of few bytes, each of which needs about 50 bytes of memory.
_MAX_PIECES = 256


class LineTooLong(ValueError):
    """A line is longer than the limit."""


class LongLine:
    """The pieces of a long line without its line feed. A thread joins them, once: the event loop would halt."""

    def __init__(self, pieces: list[bytes], size: int) -> None:
        self._pieces = pieces
        self._size = size

    def __len__(self) -> int:
        return self._size

    def join(self) -> bytes:
        """Return the line and drop its pieces."""
        line = b"".join(self._pieces)
        self._pieces.clear()
        return line


class LineBuffer:
    """A buffer that returns complete lines without their line feed, each of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._joined = 0  # how many of them are pieces that were joined, or long enough
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
        long, lines = self.feed_long(data)
        return lines if long is None else [long.join(), *lines]

    def feed_long(self, data: bytes) -> tuple[LongLine | None, list[bytes]]:
        """Add received bytes as `feed` does; return the first line unjoined if it is long, and the other lines."""
        long = None
        *lines, rest = data.split(b"\n")
        if lines:
            if self._pieces:
                self._add(lines[0])
                if self.size >= _LONG:
                    long = LongLine(self._pieces, self.size)
                    del lines[0]
                else:
                    lines[0] = self.pending
                self._pieces = []
                self._joined = 0
                self.size = 0
            if len(data) > self._limit and len(max(lines, key=len, default=b"")) > self._limit:
                raise self._too_long()
        if rest:
            self._add(rest)
        return long, lines

    def _add(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size > self._limit:
            raise self._too_long()
        self._pieces.append(piece)
        if len(self._pieces) - self._joined == _MAX_PIECES:
            recent = self._pieces[self._joined :]
            if sum(map(len, recent)) < _LONG:
                self._pieces[self._joined :] = [b"".join(recent)]
            self._joined = len(self._pieces)

    def _too_long(self) -> LineTooLong:
        return LineTooLong(f"a line is longer than {self._limit} bytes")
