"""Who hears a tied call: one connection, whose end is the call's end.

A call of a direct client, or of a dispatcher of the field. What it says goes out as it comes, through a bounded
buffer; while that is full the process waits. The connection is closed only when the call's processes are gone: the
close is the proof of death.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from harp.protocol.ends import Failed
from harp.protocol.harpd import Acknowledgement, encode_message
from harp.protocol.json_text import Raw
from harpd.supervisor.buffered_stream import BufferedStream
from harpd.supervisor.call import Call, StopReason
from harpd.supervisor.event_loop import EventLoop

__all__ = ["BoundSession"]


class BoundSession:
    """The one connection of a call. A `harpd.supervisor.call.CallObserver`.

    Args:
        loop: the event loop.
        connection: the gate's connection, non-blocking.
        streaming: whether records will come.
        keep: what the acknowledgement says of the client's connection.
        most: bytes that may wait for the gate.
        on_closed: called once, when the connection is closed.
    """

    def __init__(
        self,
        loop: EventLoop,
        connection: socket.socket,
        streaming: bool,
        keep: float | None,
        most: int,
        on_closed: Callable[[], None],
    ) -> None:
        self._acknowledgement = Acknowledgement(streaming, keep_alive=keep)
        self._most = most
        self._on_closed = on_closed
        self._call: Call | None = None
        self._gate = BufferedStream(loop, connection, lambda data: None, self._on_lost, self._on_room)

    def bind_call(self, call: Call) -> None:
        """From now on this is the call."""
        self._call = call

    def release(self) -> None:
        """There is no call: leave the connection, which stays open, to whoever gave it."""
        self._gate.detach()

    @property
    def full(self) -> bool:
        """See `CallObserver`."""
        return self._gate.pending_bytes >= self._most

    def on_started(self) -> None:
        """See `CallObserver`."""
        self._gate.send_soon(encode_message(self._acknowledgement))

    def on_records(self, lines: bytes, count: int) -> None:
        """See `CallObserver`."""
        self._gate.send(lines)

    def on_end(self, line: bytes) -> None:
        """See `CallObserver`."""
        self._gate.send(line)

    def on_rejected(self, end: Failed) -> None:
        """See `CallObserver`."""
        self._gate.send(encode_message(end))

    def on_exit(self, evidence: Callable[[], Raw], receipt: Raw | None) -> None:
        """See `CallObserver`; a tied caller is told nothing of this."""

    def on_closed(self, receipt: Raw | None) -> None:
        """See `CallObserver`."""
        self._gate.close_after_flush(self._on_closed)

    def _on_room(self) -> None:
        if self._call is not None:
            self._call.resume_reading()

    def _on_lost(self) -> None:
        if self._call is not None:
            self._call.stop(StopReason.CANCELLED)
            self._call.resume_reading()  # what the process still says is read, and dropped
