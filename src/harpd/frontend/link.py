"""The frontend's side of a link: the connection to a supervisor that carries all calls that this frontend has there.

Data for the supervisor is gathered and sent once per turn of the event loop. The socket is not an asyncio transport:
what a supervisor sent before its death must be read, even if sending to it has failed.

`harpd.supervisor.frames` has the format and the flow control.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Protocol

from harpd.supervisor.frames import (
    ATTACH,
    CLOSED,
    COMMANDS,
    COMMANDS_WINDOW,
    CREDIT,
    HANG_UP,
    LINES_WINDOW,
    MAX_CHANNELS,
    MAX_LINES_BYTES,
    PREFACE,
    START,
    FrameBuffer,
    InvalidFrame,
    decode_credit,
    encode_credit,
    encode_frame,
)

log = logging.getLogger("harpd.frontend")

_READ_SIZE = 1 << 18


class ChannelUser(Protocol):
    """The call that uses a channel."""

    def on_lines(self, kind: int, lines: bytes) -> None:
        """Handle lines for the client. `kind`: LINES, END or ERROR."""

    def on_credit(self) -> None:
        """Handle that more commands may be sent."""

    def on_closed(self) -> None:
        """Handle that the supervisor has closed the channel, or that it has died; once, the last notification."""


class LinkChannel:
    """The part of a link that carries one call.

    Attributes:
        link: the link.
        user: receives the notifications; None: they are ignored.
    """

    __slots__ = ("_command_credit", "_number", "_taken_bytes", "link", "user")

    def __init__(self, link: Link, number: int, user: ChannelUser) -> None:
        self.link = link
        self.user: ChannelUser | None = user
        self._number = number
        self._command_credit = COMMANDS_WINDOW
        self._taken_bytes = 0  # since the last credit

    @property
    def may_send(self) -> bool:
        """Whether commands may be sent now; otherwise `on_credit` follows."""
        return self._command_credit > 0

    def send_commands(self, lines: bytes) -> None:
        """Send complete command lines."""
        self._command_credit -= len(lines)
        self.link.write(self._number, COMMANDS, lines)

    def take(self, size: int, reads: bool) -> None:
        """Count lines as taken; allow the supervisor to send more if the client reads."""
        self._taken_bytes += size
        if reads and self._taken_bytes >= LINES_WINDOW // 2:
            self.link.write(self._number, CREDIT, encode_credit(self._taken_bytes))
            self._taken_bytes = 0

    def hang_up(self) -> None:
        """Tell the supervisor that the client has disconnected; `on_closed` follows."""
        self.link.write(self._number, HANG_UP)

    # For the link.

    def handle(self, kind: int, body: bytes) -> None:
        """Handle a frame. Raises `InvalidFrame`."""
        if kind == CREDIT:
            self._command_credit += decode_credit(body)
            if self.user is not None:
                self.user.on_credit()
        elif self.user is not None:
            self.user.on_lines(kind, body)

    def on_closed(self) -> None:
        """Notify the user that the channel is closed."""
        user, self.user = self.user, None
        if user is not None:
            try:
                user.on_closed()
            except Exception:  # a bug costs one call, not all of the link
                log.exception("connection failed")


class Link:
    """A link, which owns its connection.

    Args:
        connection: the connection, non-blocking.
        inode: of the supervisor's socket.
        on_lost: called once, when the supervisor has closed the link or died.

    Attributes:
        shared: whether further calls may use the link. Otherwise it is closed with its last channel.
    """

    def __init__(
        self, connection: socket.socket, inode: int | None, on_lost: Callable[[Link], None], shared: bool
    ) -> None:
        self.inode = inode
        self.shared = shared
        self._connection = connection
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._frames = FrameBuffer(MAX_LINES_BYTES)
        self._channels: dict[int, LinkChannel] = {}
        self._last_number = 0
        self._unsent = bytearray()
        self._flush_scheduled = False
        self._send_blocked = False
        self._broken = False  # nothing can be sent; data may still be received
        self._lost = False
        self._loop.add_reader(connection, self._on_readable)
        self._send(PREFACE)

    @property
    def usable(self) -> bool:
        """Whether calls can be sent."""
        return not self._broken

    @property
    def in_use(self) -> bool:
        """Whether a channel is open."""
        return bool(self._channels)

    def start(self, user: ChannelUser, facts: bytes, arguments: bytes) -> LinkChannel:
        """Start a call; return its channel. `facts`: see `harpd.supervisor.main`."""
        channel = self._open(user)
        self.write(self._last_number, START, b"%b\n%b" % (facts, arguments))
        return channel

    def attach(self, user: ChannelUser, facts: bytes) -> LinkChannel:
        """Attach to a call; return the channel."""
        channel = self._open(user)
        self.write(self._last_number, ATTACH, facts)
        return channel

    def close(self) -> None:
        """Close the link; its channels are closed without a notification."""
        for channel in self._channels.values():
            channel.user = None
        self._lose()

    def _open(self, user: ChannelUser) -> LinkChannel:
        number = self._last_number
        while True:
            number = (number + 1) % MAX_CHANNELS
            if number not in self._channels:
                break
        self._last_number = number
        channel = self._channels[number] = LinkChannel(self, number, user)
        if self._lost:  # as if it was lost a moment later
            self._loop.call_soon(self._close_all)
        return channel

    # For channels.

    def write(self, number: int, kind: int, body: bytes = b"") -> None:
        """Send a frame in the next turn of the loop."""
        self._send(encode_frame(number, kind, body))

    # The connection.

    def _send(self, data: bytes) -> None:
        if self._broken:
            return
        self._unsent += data
        if not (self._flush_scheduled or self._send_blocked):
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._broken:
            return
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            if not self._send_blocked:
                self._send_blocked = True
                self._loop.add_writer(self._connection, self._flush)
            return
        except OSError:  # the supervisor is dead; its last data is still read
            self._broken = True
            self._unsent.clear()
        if self._send_blocked:
            self._send_blocked = False
            self._loop.remove_writer(self._connection)

    def _on_readable(self) -> None:
        try:
            data = self._connection.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose()
            return
        try:
            for number, kind, body in self._frames.feed(data):
                self._handle(number, kind, body)
        except InvalidFrame as error:
            log.error("invalid data from supervisor", extra={"reason": str(error)})
            self._lose()

    def _handle(self, number: int, kind: int, body: bytes) -> None:
        channel = self._channels.get(number)
        if channel is None:
            log.error("received frame of a closed channel", extra={"channel": number, "kind": kind})
            return
        try:
            if kind == CLOSED:
                del self._channels[number]
                channel.on_closed()
            else:
                channel.handle(kind, body)
        except InvalidFrame:
            raise
        except Exception:  # a bug costs one call, not all of the link
            log.exception("connection failed")
            channel.user = None
            channel.hang_up()
        if kind == CLOSED and not self.shared and not self._channels:
            self._lose()

    def _lose(self) -> None:
        if self._lost:
            return
        self._lost = self._broken = True
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()
        self._unsent.clear()
        self._on_lost(self)
        self._close_all()

    def _close_all(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.on_closed()
