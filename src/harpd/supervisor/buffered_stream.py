"""A connection between a call and whoever hears it: bytes out without waiting, bytes in as they come."""

from __future__ import annotations

import socket
from collections.abc import Callable

from harpd.supervisor.event_loop import READ, WRITE, EventLoop, Timer

__all__ = ["BufferedStream"]

#: Bytes that are read at once: a caller that gives orders without end shares the warden with the others.
_READ_SIZE = 1 << 12
#: Bytes that wait for the socket; past it whoever sends should wait.
_ENOUGH = 256 * 1024
#: Seconds that what may wait waits for more to go out with it.
_SOON = 0.003


class BufferedStream:
    """Owns a non-blocking connection from the gate.

    Args:
        loop: the event loop.
        connection: the connection.
        on_data: called with what comes.
        on_lost: called once when the other side has closed, wholly or its sending half; the connection stays open
            until `close`.
        on_room: called when more may be sent.
    """

    def __init__(
        self,
        loop: EventLoop,
        connection: socket.socket,
        on_data: Callable[[bytes], None],
        on_lost: Callable[[], None],
        on_room: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._on_data = on_data
        self._on_lost = on_lost
        self._on_room = on_room
        self._out = bytearray()
        self._lost = False
        self._closing: Callable[[], None] | None = None
        self._soon: Timer | None = None
        self._watch()

    @property
    def pending_bytes(self) -> int:
        """Bytes that the other side has not taken yet."""
        return len(self._out)

    @property
    def writable(self) -> bool:
        """Whether more should be sent now."""
        return len(self._out) < _ENOUGH and not self._lost

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._connection.fileno() < 0

    def send(self, data: bytes) -> None:
        """Send, now or as soon as it goes. What is sent to a side that is lost is dropped."""
        if not self._lost and not self.closed:
            self._out += data
            self._flush()
            self._watch()

    def send_soon(self, data: bytes) -> None:
        """Send with what comes next, or a little later: each piece costs whoever passes it on."""
        if not self._lost and not self.closed:
            self._out += data
            if self._soon is None:
                self._soon = self._loop.call_later(_SOON, self._send_now)

    def _send_now(self) -> None:
        self._flush()
        self._watch()
        self._close_if_done()

    def close_after_flush(self, closed: Callable[[], None]) -> None:
        """Close once everything is sent; `closed` is called then."""
        self._closing = closed
        if self._soon is not None:
            self._flush()
            self._watch()
        self._close_if_done()

    def detach(self) -> None:
        """Have nothing to do with the connection any more; it stays open."""
        self._loop.unwatch(self._connection.fileno())

    def close(self) -> None:
        """Close now; what is not sent is dropped."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if not self.closed:
            self._loop.unwatch(self._connection.fileno())
            self._connection.close()
        self._out.clear()
        self._lost = True

    def _watch(self) -> None:
        if not self._lost and not self.closed:
            writing = self._out and self._soon is None
            self._loop.watch(self._connection.fileno(), READ | (WRITE if writing else 0), self._on_ready)

    def _on_ready(self) -> None:
        waited = bool(self._out)
        self._flush()
        if waited and self.writable:
            self._on_room()
        if not self._lost and not self.closed:
            self._receive()
        self._watch()
        self._close_if_done()

    def _receive(self) -> None:
        try:
            data = self._connection.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._on_data(data)
        else:
            self._lose()

    def _flush(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        try:
            while self._out and not self.closed:
                del self._out[: self._connection.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._lose()

    def _lose(self) -> None:
        if not self._lost:
            self._lost = True
            self._out.clear()
            if not self.closed:
                self._loop.unwatch(self._connection.fileno())
            self._on_lost()

    def _close_if_done(self) -> None:
        if self._closing is not None and not self._out:
            closed, self._closing = self._closing, None
            self.close()
            closed()
