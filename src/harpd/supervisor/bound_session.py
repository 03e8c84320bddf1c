"""The session of a connection-bound call: the call ends with its connection.

It serves direct clients and legacy dispatchers. The call's output is sent as it arrives, through a bounded buffer;
while that is full, the worker waits. The channel to the frontend is closed only when the call's processes are gone: the
close proves it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from harp.protocol.harpd import Acknowledgement, encode_message
from harp.protocol.json_text import Raw
from harpd.supervisor.call import Call, StopReason
from harpd.supervisor.frames import END, ERROR
from harpd.supervisor.link import LinkChannel

#: The start of a closing line that is an error, as `encode_message` writes it.
_ERROR_PREFIX = b'{"harp":1,"error":'


class BoundSession:
    """The connection of a call: a `harpd.supervisor.call.CallObserver` and the user of a link channel.

    Args:
        channel: the channel to the frontend.
        streaming: whether the procedure yields records.
        keep_alive: seconds in the acknowledgement, for which the frontend waits for another request; None: it does not.
        buffer_size: how many bytes may wait until the frontend reads them.
    """

    stored_session: Raw | None = None
    call: Call  # set before the connection can become ready

    def __init__(
        self,
        channel: LinkChannel,
        streaming: bool,
        keep_alive: float | None,
        buffer_size: int,
    ) -> None:
        self._acknowledgement = _encode_acknowledgement(streaming, keep_alive)
        self._buffer_size = buffer_size
        self._channel = channel
        channel.user = self

    @property
    def full(self) -> bool:
        """See `CallObserver`."""
        return self._channel.waiting_bytes >= self._buffer_size

    def on_started(self) -> None:
        """See `CallObserver`."""
        self._channel.send_soon(self._acknowledgement)

    def on_records(self, lines: bytes, count: int) -> None:
        """See `CallObserver`."""
        self._channel.send(lines)

    def on_end(self, line: bytes) -> None:
        """See `CallObserver`."""
        self._channel.send(line, ERROR if line.startswith(_ERROR_PREFIX) else END)

    on_rejected = on_end

    def on_exit(self, exit_info: Callable[[], Raw], stop_report: Raw | None) -> None:
        """See `CallObserver`. The caller of a connection-bound call does not receive them."""

    def on_closed(self, stop_report: Raw | None) -> None:
        """See `CallObserver`."""
        self._channel.close_after_flush()

    # The channel: `ChannelUser`.

    def on_commands(self, data: bytes) -> None:
        """See `ChannelUser`. The frontend sends none."""

    def on_hang_up(self) -> None:
        """See `ChannelUser`."""
        self.call.stop(StopReason.CANCELLED)
        self.call.update_watch()  # further output is read and dropped

    def on_writable(self) -> None:
        """See `ChannelUser`."""
        self.call.update_watch()


@lru_cache(maxsize=64)  # there are a few different ones
def _encode_acknowledgement(streaming: bool, keep_alive: float | None) -> bytes:
    return encode_message(Acknowledgement(streaming, keep_alive=keep_alive))
