"""The session of a connection-bound call: the call ends with its connection.

It serves direct clients and legacy dispatchers. The call's output is sent as it arrives, through a bounded buffer;
while that is full, the worker waits. The connection is closed only when the call's processes are gone: the close proves
it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from harp.protocol.harpd import Acknowledgement, encode_message
from harp.protocol.json_text import Raw
from harpd.supervisor.buffered_stream import BufferedStream
from harpd.supervisor.call import Call, StopReason
from harpd.supervisor.event_loop import EventLoop


class BoundSession:
    """The connection of a call. A `harpd.supervisor.call.CallObserver`.

    Args:
        connection: the connection from the frontend, non-blocking.
        streaming: whether the procedure yields records.
        keep_alive: seconds in the acknowledgement, for which the frontend waits for another request; None: it does not.
        buffer_size: how many bytes may wait until the frontend reads them.
        on_disconnected: called once, when the connection is closed.
    """

    stored_session: Raw | None = None
    call: Call  # set before the connection can become ready

    def __init__(
        self,
        loop: EventLoop,
        connection: socket.socket,
        streaming: bool,
        keep_alive: float | None,
        buffer_size: int,
        on_disconnected: Callable[[BoundSession], None],
    ) -> None:
        self._acknowledgement = Acknowledgement(streaming, keep_alive=keep_alive)
        self._buffer_size = buffer_size
        self._on_disconnected = on_disconnected
        self._stream = BufferedStream(
            loop, connection, lambda data: None, self._on_lost, lambda: self.call.update_watch()
        )

    def discard(self) -> None:
        """Discard the session, but leave the connection open: the call did not start."""
        self._stream.detach()

    @property
    def full(self) -> bool:
        """See `CallObserver`."""
        return self._stream.pending_bytes >= self._buffer_size

    def on_started(self) -> None:
        """See `CallObserver`."""
        self._stream.send_soon(encode_message(self._acknowledgement))

    def on_records(self, lines: bytes, count: int) -> None:
        """See `CallObserver`."""
        self._stream.send(lines)

    def on_end(self, line: bytes) -> None:
        """See `CallObserver`."""
        self._stream.send(line)

    on_rejected = on_end

    def on_exit(self, exit_info: Callable[[], Raw], stop_report: Raw | None) -> None:
        """See `CallObserver`. The caller of a connection-bound call does not receive them."""

    def on_closed(self, stop_report: Raw | None) -> None:
        """See `CallObserver`."""
        self._stream.close_after_flush(lambda: self._on_disconnected(self))

    def _on_lost(self) -> None:
        self.call.stop(StopReason.CANCELLED)
        self.call.update_watch()  # further output is read and dropped
