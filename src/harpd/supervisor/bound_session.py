"""The session of a connection-bound call, of a direct client or a legacy dispatcher: it ends with its connection.

The call's output is sent as it arrives, through a bounded buffer; while that is full, the worker waits. The channel to
the frontend is closed only when the call's processes are gone: the close proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from harp.protocol.harpd import Acknowledgement, encode_message
from harp.protocol.json_text import Raw
from harpd.supervisor.call import ERROR_PREFIX, Session, StopReason
from harpd.supervisor.frames import END, ERROR
from harpd.supervisor.link import LinkChannel


class BoundSession(Session):
    """The session of a connection-bound call, and the user of its link channel.

    `buffer_size` is how many bytes may wait until the frontend reads them.
    """

    def __init__(self, channel: LinkChannel, streaming: bool, keep_alive: float | None, buffer_size: int) -> None:
        self._acknowledgement = _encode_acknowledgement(streaming, keep_alive)
        self._buffer_size = buffer_size
        self._channel = channel
        channel.user = self

    # The call: `Session`.

    @property
    def full(self) -> bool:
        """Whether the frontend has to read first."""
        return self._channel.waiting_bytes >= self._buffer_size

    def on_started(self) -> None:
        """Send the acknowledgement."""
        self._channel.send_soon(self._acknowledgement)

    def on_records(self, lines: bytes, count: int) -> None:
        """Send the records."""
        self._channel.send(lines)

    def on_end(self, line: bytes) -> None:
        """Send the closing line."""
        self._channel.send(line, ERROR if line.startswith(ERROR_PREFIX) else END)

    def on_exit(self, exit_info: Callable[[], Raw], stop_report: Mapping[str, Any] | None) -> None:
        """Do nothing: the caller of a connection-bound call receives neither."""

    def on_closed(self, stop_report: Mapping[str, Any] | None) -> None:
        """Close the channel."""
        self.call = None
        self._channel.close_after_flush()

    # The channel: `ChannelUser`.

    def on_commands(self, data: bytes) -> None:
        """Ignore data: the frontend sends none."""

    def on_hang_up(self) -> None:
        """Stop the call; its further output is read and discarded."""
        self.stop(StopReason.CANCELLED)
        self.resume_reading()

    def on_writable(self) -> None:
        """Continue to read the worker's output."""
        self.resume_reading()


@lru_cache(maxsize=64)  # there are a few different ones
def _encode_acknowledgement(streaming: bool, keep_alive: float | None) -> bytes:
    return encode_message(Acknowledgement(streaming, keep_alive=keep_alive))
