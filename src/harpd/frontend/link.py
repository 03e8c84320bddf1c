"""The frontend's end of a link: the connection to a supervisor that carries all calls that this frontend has there.

`harpd.supervisor.frames` has the format and the flow control.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable

from harpd.supervisor import frames
from harpd.supervisor.frames import COMMANDS_WINDOW, FrameSocket, InvalidFrame

log = logging.getLogger("harpd.frontend")


class Channel(ABC):
    """The part of a link that carries one call; the call derives from it."""

    link: Link  # once it is open
    _number: int
    _command_credit = COMMANDS_WINDOW
    _confirmable_bytes = 0  # since the last credit

    def open(self, link: Link, kind: int, body: bytes) -> None:
        self.link = link
        self._number = link.add(self)
        link.write(self._number, kind, body)

    @property
    def may_send(self) -> bool:
        """Whether commands may be sent now; otherwise `on_credit` follows."""
        return self._command_credit > 0

    def send_commands(self, lines: bytes) -> None:
        self._command_credit -= len(lines)
        self.link.write(self._number, frames.COMMANDS, lines)

    def confirm(self, size: int, reads: bool) -> None:
        """Count lines that were sent to the client; allow the supervisor to send more if the client reads."""
        self._confirmable_bytes += size
        if reads and self._confirmable_bytes >= frames.LINES_WINDOW // 2:
            self.link.write(self._number, frames.CREDIT, frames.encode_credit(self._confirmable_bytes))
            self._confirmable_bytes = 0

    def hang_up(self) -> None:
        """Notify the supervisor that the client has disconnected; `on_closed` follows."""
        self.link.write(self._number, frames.HANG_UP)

    def abandon(self) -> None:
        """Ignore further frames."""
        self.link.abandon(self._number)

    @abstractmethod
    def on_lines(self, kind: int, lines: bytes) -> None:
        """Handle lines for the client. `kind`: LINES, END or ERROR."""

    def add_credit(self, size: int) -> None:
        """Handle that the supervisor has handled commands of this many bytes."""
        self._command_credit += size

    @abstractmethod
    def on_closed(self) -> None:
        """Handle that the supervisor has closed the channel, or that it has died; once, the last notification."""


class Link(FrameSocket):
    """A link, before the preface.

    `inode` is that of the supervisor's socket. `on_lost` is called once, when the supervisor has closed the link or
    died. If the link is not `shared`, it has one channel and is closed with it.
    """

    _log = log

    def __init__(
        self, connection: socket.socket, inode: int | None, on_lost: Callable[[Link], None], shared: bool
    ) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(connection, frames.MAX_LINES_BYTES, self._loop.call_soon)
        self.inode = inode
        self.shared = shared
        self._notify_lost = on_lost
        self._channels: dict[int, Channel | None] = {}  # None: abandoned, but still open in the supervisor
        self._last_number = 0
        self._unsent += frames.PREFACE
        self._loop.add_reader(connection, self._on_ready)

    def close(self) -> None:
        """Close the link; its channels are abandoned."""
        self._channels.clear()
        self._lose()

    def add(self, channel: Channel) -> int:
        number = (self._last_number + 1) % frames.MAX_CHANNELS
        while number in self._channels:
            number = (number + 1) % frames.MAX_CHANNELS
        self._last_number = number
        self._channels[number] = channel
        return number

    def abandon(self, number: int) -> None:
        if number in self._channels:
            self._channels[number] = None

    def _handle(self, number: int, kind: int, body: bytes) -> None:
        if number not in self._channels:
            log.error("received frame of a closed channel", extra={"channel": number, "kind": kind})
            return
        channel = self._channels[number]
        if kind == frames.CLOSED:
            del self._channels[number]
        if channel is not None:
            try:
                if kind == frames.CLOSED:
                    channel.on_closed()
                elif kind == frames.CREDIT:
                    channel.add_credit(frames.decode_credit(body))
                else:
                    channel.on_lines(kind, body)
            except InvalidFrame:
                raise
            except Exception:  # a bug costs one call, not all of the link
                log.exception("connection failed")
                channel.abandon()
                channel.hang_up()
        if not self._channels and not self.shared:
            self._lose()

    def _on_lost(self) -> None:
        self._notify_lost(self)
        channels, self._channels = self._channels, {}
        for channel in filter(None, channels.values()):
            try:
                channel.on_closed()
            except Exception:
                log.exception("connection failed")

    def _watch_writable(self, watch: bool) -> None:
        if watch:
            self._loop.add_writer(self._connection, self._flush)
        else:
            self._loop.remove_writer(self._connection)

    def _unwatch(self) -> None:
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
