"""A connection from the frontend to a call: data is buffered and sent without waiting, and received as it arrives."""

from __future__ import annotations

import socket
from collections.abc import Callable

from harpd.supervisor.event_loop import READ, WRITE, EventLoop, Timer

#: Bytes per read. They are few, so that a client that sends commands without pause does not delay other calls.
_READ_SIZE = 1 << 12
#: From this many buffered bytes on, senders should wait.
_HIGH_WATER = 256 * 1024
#: Seconds for which `send_soon` waits for more data to send with it.
_GATHER_SECONDS = 0.003


class BufferedStream:
    """A buffer in front of a non-blocking connection, which it owns.

    Args:
        on_data: called with received data.
        on_lost: called once when the peer has closed the connection, or its sending half; this end stays open until
            `close`.
        on_writable: called when more may be sent.
    """

    def __init__(
        self,
        loop: EventLoop,
        connection: socket.socket,
        on_data: Callable[[bytes], None],
        on_lost: Callable[[], None],
        on_writable: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._on_data = on_data
        self._on_lost = on_lost
        self._on_writable = on_writable
        self._out = bytearray()
        self._lost = False
        self._closing: Callable[[], None] | None = None
        self._flush_timer: Timer | None = None
        self._flush()

    @property
    def pending_bytes(self) -> int:
        """The number of buffered bytes."""
        return len(self._out)

    @property
    def writable(self) -> bool:
        """Whether more should be sent now."""
        return len(self._out) < _HIGH_WATER and not self._lost

    def send(self, data: bytes) -> None:
        """Send data as soon as possible. Data for a lost peer is dropped."""
        if not self._lost:
            self._out += data
            self._flush()

    def send_soon(self, data: bytes) -> None:
        """Send data with the next `send`, at the latest after 3 ms: each separate piece costs the frontend time."""
        if not self._lost:
            self._out += data
            if self._flush_timer is None:
                self._flush_timer = self._loop.call_later(_GATHER_SECONDS, self._flush_and_close)

    def close_after_flush(self, on_closed: Callable[[], None]) -> None:
        """Close once all data is sent, then call `on_closed`."""
        self._closing = on_closed
        self._flush_and_close()

    def detach(self) -> None:
        """Give the connection back to the caller; it stays open."""
        self._loop.unwatch(self._connection.fileno())

    def close(self) -> None:
        """Close now; unsent data is dropped."""
        self._cancel_flush_timer()
        self._loop.unwatch(self._connection.fileno())
        self._connection.close()
        self._out.clear()
        self._lost = True

    def _on_ready(self) -> None:
        had_data = bool(self._out)
        self._flush()
        if had_data and self.writable:
            self._on_writable()
        if not self._lost:
            self._receive()
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
        self._cancel_flush_timer()
        try:
            while self._out:
                del self._out[: self._connection.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._lose()
        if not self._lost:
            self._loop.watch(self._connection.fileno(), READ | (WRITE if self._out else 0), self._on_ready)

    def _cancel_flush_timer(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None

    def _lose(self) -> None:
        self._lost = True
        self._out.clear()
        self._loop.unwatch(self._connection.fileno())
        self._on_lost()

    def _flush_and_close(self) -> None:
        self._flush()
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._closing is not None and not self._out:
            on_closed, self._closing = self._closing, None
            self.close()
            on_closed()
