"""The socket of a link, the same at both ends. `harpd.supervisor.frames` has the format and the flow control.

Data is gathered and sent once per turn of the event loop, which is another one in each process. A socket that cannot be
sent to is still read: the peer may have sent data before its death.
"""

from __future__ import annotations

import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable

from harpd.supervisor.frames import FrameBuffer, InvalidFrame, encode_frame

_READ_SIZE = 128 * 1024
#: From this many unsent bytes on, no channel with flow control adds any.
_HIGH_WATER = 1024 * 1024


class FrameSocket(ABC):
    """A socket, non-blocking, that sends and receives frames. A subclass watches it in its event loop.

    Args:
        max_frame_bytes: the most bytes of a frame that is received.
        call_soon: runs a function at the end of this turn of the event loop, or in the next turn.
    """

    def __init__(
        self,
        connection: socket.socket,
        max_frame_bytes: int,
        call_soon: Callable[[Callable[[], None]], object],
        log: logging.Logger,
    ) -> None:
        self._connection = connection
        self._call_soon = call_soon
        self._log = log
        self._frames = FrameBuffer(max_frame_bytes)
        self._unsent = bytearray()
        self._flush_scheduled = False
        self._kernel_full = False  # the socket's buffer has no room
        self._blocked: dict[Callable[[], None], None] = {}  # in the order in which they continue
        self._broken = False  # nothing can be sent; data may still be received
        self._lost = False

    def write(self, number: int, kind: int, body: bytes = b"") -> None:
        """Send a frame of a channel, soon."""
        if not self._broken:
            self._unsent += encode_frame(number, kind, body)
            if not (self._flush_scheduled or self._kernel_full):
                self._flush_scheduled = True
                self._call_soon(self._flush)

    @property
    def writable(self) -> bool:
        """Whether channels may send now."""
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
            self._lose()

    def _flush(self) -> None:
        self._flush_scheduled = False
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # the peer is dead
            self._broken = True
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
            self._lose()

    def _lose(self) -> None:
        """Close the socket; once."""
        if not self._lost:
            self._lost = self._broken = True
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
