"""The frames of a link: the connection between a frontend and a supervisor that carries all calls between them.

The frontend opens a link with the line `PREFACE`. Then both sides send frames: a header with channel number, length and
kind, and the body. The frontend chooses the number of a channel, and a channel carries one call:

    frontend                                            supervisor
    START   facts, a line feed, the arguments           LINES   complete lines for the client, or a part of a long line
    ATTACH  facts                                       END     the same; the closing line of the call is the last one
    COMMANDS  commands of the client                    ERROR   the same; the closing line is an error
    HANG_UP   the client has disconnected               CLOSED  the channel is closed; its number is free
    CREDIT    bytes that the client's side has taken    CREDIT  bytes of commands that were handled

Flow control: each side sends at most a window of bytes that the other has not credited: `LINES_WINDOW` for lines,
`COMMANDS_WINDOW` for commands, each plus the frame that exceeds it. So a slow client pauses its own call only. Short
calls need no credit.

The loss of the link hangs up all of its channels. Pure: no input or output here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

#: The version of this format. Frontend and supervisor of two versions reject each other.
VERSION = 1
PREFACE = b'{"link":%d}\n' % VERSION

START, ATTACH, COMMANDS, HANG_UP, CREDIT, LINES, END, ERROR, CLOSED = range(1, 10)

#: The most bytes of lines in a frame. Short frames let other calls pass between two parts of a long line.
MAX_LINES_BYTES = 64 * 1024
LINES_WINDOW = 256 * 1024
#: Small, because a command costs more time than a line: a window of the shortest ones takes less than a millisecond.
COMMANDS_WINDOW = 512
#: Channel numbers are below this one.
MAX_CHANNELS = 1 << 32

_HEADER = struct.Struct("<IIB")
_CREDIT = struct.Struct("<I")


class InvalidFrame(ValueError):
    """The peer does not follow the format."""


class Frame(NamedTuple):
    """A frame: the number of its channel, its kind, and its body."""

    channel: int
    kind: int
    body: bytes


def encode_frame(channel: int, kind: int, body: bytes = b"") -> bytes:
    """Return the bytes of a frame."""
    return _HEADER.pack(channel, len(body), kind) + body


def encode_credit(size: int) -> bytes:
    """Return the body of a CREDIT frame."""
    return _CREDIT.pack(size)


def decode_credit(body: bytes) -> int:
    """Return the number of bytes in a CREDIT frame. Raises `InvalidFrame`."""
    if len(body) != _CREDIT.size:
        raise InvalidFrame(f"credit: expected {_CREDIT.size} bytes, got {len(body)}")
    size: int = _CREDIT.unpack(body)[0]
    return size


def split_lines(lines: bytes) -> Iterator[bytes]:
    """Yield parts of at most `MAX_LINES_BYTES`; only a line that is longer is cut."""
    start = 0
    while len(lines) - start > MAX_LINES_BYTES:
        end = lines.rfind(b"\n", start, start + MAX_LINES_BYTES) + 1 or start + MAX_LINES_BYTES
        yield lines[start:end]
        start = end
    yield lines[start:]


class FrameBuffer:
    """A buffer that collects received bytes and returns complete frames.

    Args:
        limit: the most bytes of a frame's body.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._size = 0
        self._needed = 0  # bytes of the first frame

    def feed(self, data: bytes) -> list[Frame]:
        """Add received bytes; return the frames that they complete. Raises `InvalidFrame`."""
        if self._pieces:
            self._pieces.append(data)
            self._size += len(data)
            if self._size < self._needed:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
        frames = []
        start, size = 0, len(data)
        needed = _HEADER.size
        while size - start >= _HEADER.size:
            channel, length, kind = _HEADER.unpack_from(data, start)
            if length > self._limit:
                raise InvalidFrame(f"a frame is longer than {self._limit} bytes")
            body = start + _HEADER.size
            if size - body < length:
                needed += length
                break
            start = body + length
            frames.append(Frame(channel, kind, data[body:start]))
        if start < size:
            self._pieces.append(data[start:])
            self._size, self._needed = size - start, needed
        return frames
