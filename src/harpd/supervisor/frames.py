"""The frames of a link: the connection between a frontend and a supervisor that carries all calls between them.

The frontend opens a link with the line `PREFACE`. Then both sides send frames: a header with channel number, length and
kind, and the body. The frontend chooses the number of a channel, and a channel carries one call:

    frontend                                            supervisor
    START   header, a line feed, the arguments          LINES   complete lines for the client, or a part of a long line
    ATTACH  header                                      END     the same; the closing line of the call is the last one
    COMMANDS  commands of the client                    ERROR   the same; the closing line is an error
    HANG_UP   the client has disconnected               CLOSED  the channel is closed; its number is free
    CREDIT    bytes of lines that were sent on          CREDIT  bytes of commands that were handled

Flow control: each side sends at most a window of bytes that the other has not credited: `LINES_WINDOW` for lines,
`COMMANDS_WINDOW` for commands, each plus the frame that exceeds it. So a slow client pauses its own call only. Short
calls need no credit.

The loss of the link hangs up all of its channels.

`FrameSocket` is the socket, the same at both ends. Data is gathered and sent once per turn of the event loop; the two
processes have different event loops. A socket that cannot be sent to is still read: the peer may have sent data before
its death.
"""

from __future__ import annotations

import logging
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

#: The version of this format, windows included. Frontend and supervisor of two versions reject each other.
VERSION = 2
PREFACE = b'{"link":%d}\n' % VERSION

START, ATTACH, COMMANDS, HANG_UP, CREDIT, LINES, END, ERROR, CLOSED = range(1, 10)

#: The most bytes of lines in a frame. Short frames let other calls pass between two parts of a long line.
MAX_LINES_BYTES = 64 * 1024
LINES_WINDOW = 256 * 1024
#: Small, because a command costs more time than a line: a window of short commands takes less than a millisecond.
COMMANDS_WINDOW = 512
#: Channel numbers are below this number.
MAX_CHANNELS = 1 << 32

_READ_SIZE = 128 * 1024
#: From this many unsent bytes on, no channel with flow control adds any.
_HIGH_WATER = 1024 * 1024

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
    return _HEADER.pack(channel, len(body), kind) + body


def encode_credit(size: int) -> bytes:
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
    """A buffer that collects received bytes and returns complete frames. `limit`: the most bytes of a frame's body."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._partial = bytearray()  # the beginning of a frame
        self._needed = 0  # bytes of that frame

    @property
    def size(self) -> int:
        """The bytes of the incomplete frame."""
        return len(self._partial)

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """Add received bytes; return the frames that they complete. Raises `InvalidFrame`."""
        if self._partial:
            self._partial += data
            if len(self._partial) < self._needed:
                return []
            data, self._partial = memoryview(self._partial), bytearray()
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
            frames.append(Frame(channel, kind, bytes(data[body:start])))
        if start < size:
            self._partial += data[start:]
            self._needed = needed
        return frames


class FrameSocket(ABC):
    """A socket, non-blocking, that sends and receives frames. A subclass watches it in its event loop."""

    _log: logging.Logger  # of the process

    def __init__(
        self, connection: socket.socket, max_frame_bytes: int, call_soon: Callable[[Callable[[], None]], object]
    ) -> None:
        self._channels: dict[int, Any] = {}  # the open channels, by number
        self._connection = connection
        self._call_soon = call_soon
        self._frames = FrameBuffer(max_frame_bytes)
        self._unsent = bytearray()
        self._flush_scheduled = False
        self._kernel_full = False  # the socket's buffer has no room
        self._blocked: dict[Callable[[], None], None] = {}  # in the order in which they continue
        self.broken = False  # data cannot be sent, but may still be received
        self._lost = False

    def write(self, number: int, kind: int, body: bytes = b"") -> None:
        """Send a frame of a channel, soon."""
        if not self.broken:
            self._unsent += encode_frame(number, kind, body)
            if not (self._flush_scheduled or self._kernel_full):
                self._flush_scheduled = True
                self._call_soon(self._flush)

    @property
    def has_channels(self) -> bool:
        return bool(self._channels)

    @property
    def writable(self) -> bool:
        return len(self._unsent) < _HIGH_WATER

    def wait_until_writable(self, resume: Callable[[], None]) -> None:
        """Call a function when channels may send, after those that wait already."""
        self._blocked[resume] = None

    def receive(self, data: bytes) -> None:
        """Handle received data. If it is invalid, the link is lost."""
        try:
            for number, kind, body in self._frames.feed(data):
                self._handle(number, kind, body)
        except InvalidFrame as error:
            self._log.error("invalid frame", extra={"reason": str(error)})
            self._close_socket()

    def _flush(self) -> None:
        self._flush_scheduled = False
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # the peer is dead
            self.broken = True
            self._unsent.clear()
        if self._kernel_full != bool(self._unsent):
            self._kernel_full = not self._kernel_full
            self._watch_writable(self._kernel_full)
        while self._blocked and self.writable:
            resume = next(iter(self._blocked))
            del self._blocked[resume]
            resume()

    def _on_ready(self) -> None:
        """Receive data; also send, because the supervisor's loop has one callback for both."""
        if self._kernel_full:
            self._flush()
        try:
            data = self._connection.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.receive(data)
        else:
            self._close_socket()

    def _close_socket(self) -> None:
        """Close the socket; once."""
        if not self._lost:
            self._lost = self.broken = True
            self._unwatch()
            self._connection.close()
            self._unsent.clear()
            self._blocked.clear()
            self._on_lost()

    @abstractmethod
    def _handle(self, number: int, kind: int, body: bytes) -> None:
        """Handle a frame. Raises `InvalidFrame`."""

    @abstractmethod
    def _on_lost(self) -> None:
        """Handle that the socket is closed: close all channels."""

    @abstractmethod
    def _watch_writable(self, watch: bool) -> None:
        """Begin to call `_flush` when the socket is writable, or stop it."""

    @abstractmethod
    def _unwatch(self) -> None:
        """Stop watching the socket."""
