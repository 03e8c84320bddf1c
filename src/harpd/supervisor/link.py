"""The supervisor's side of a link: the connection to a frontend that carries all calls of that frontend.

Data for the frontend is gathered and sent once per turn of the event loop. While the frontend does not read, the
unsent data of the link is bounded by `_HIGH_WATER`, and the data of each call waits in its channel.

`harpd.supervisor.frames` has the format and the flow control.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from harp.protocol.fields import ProtocolError, check
from harp.protocol.json_text import InvalidJSON, loads
from harpd.supervisor.event_loop import READ, WRITE, EventLoop
from harpd.supervisor.frames import (
    ATTACH,
    CLOSED,
    COMMANDS,
    COMMANDS_WINDOW,
    CREDIT,
    ERROR,
    HANG_UP,
    LINES,
    LINES_WINDOW,
    MAX_LINES_BYTES,
    START,
    Frame,
    FrameBuffer,
    InvalidFrame,
    decode_credit,
    encode_credit,
    encode_frame,
    split_lines,
)

log = logging.getLogger("harpd.supervisor")

_READ_SIZE = 1 << 17
#: The most bytes of a frame; the frontend has a lower limit for requests from the network.
_MAX_FRAME_BYTES = 1 << 30
#: From this many unsent bytes on, no channel adds any.
_HIGH_WATER = 1024 * 1024
#: From this many bytes on that wait in a channel, its user should wait.
_CHANNEL_HIGH_WATER = 64 * 1024
#: Seconds for which `send_soon` waits for more data to send with it.
_GATHER_SECONDS = 0.003


class ChannelUser(Protocol):
    """The session that uses a channel."""

    def on_commands(self, data: bytes) -> None:
        """Handle data from the client."""

    def on_hang_up(self) -> None:
        """Handle that the client has disconnected; once. The channel stays open until it is closed here."""

    def on_writable(self) -> None:
        """Handle that more may be sent."""


class RequestHandler(Protocol):
    """The receiver of the first frame of each channel. KeyError or ProtocolError close the channel."""

    def on_start(self, channel: LinkChannel, facts: Mapping[str, Any], arguments: bytes) -> None:
        """Start a call."""

    def on_attach(self, channel: LinkChannel, facts: Mapping[str, Any]) -> None:
        """Attach to a call."""


class LinkChannel:
    """The part of a link that carries one call.

    Attributes:
        user: receives the frames of the channel; its creator sets it before the loop continues.
    """

    user: ChannelUser

    def __init__(self, link: Link, number: int) -> None:
        self._link = link
        self._number = number
        self._hung_up = False
        self._credit = LINES_WINDOW
        self._gathered = b""  # lines that are sent with the next ones
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._waiting_bytes = 0
        self._handled_bytes = 0  # of commands, since the last credit
        self._closing = False

    @property
    def waiting_bytes(self) -> int:
        """The number of bytes that wait because the client, or the frontend, does not read."""
        return self._waiting_bytes

    @property
    def writable(self) -> bool:
        """Whether more should be sent now."""
        return self._waiting_bytes < _CHANNEL_HIGH_WATER and not self._hung_up

    def send(self, lines: bytes, kind: int = LINES) -> None:
        """Send lines as soon as possible. Lines for a client that has disconnected are dropped."""
        if self._hung_up:
            return
        lines, self._gathered = self._gathered + lines, b""
        if self._waiting or self._credit <= 0 or not self._link.writable or len(lines) > MAX_LINES_BYTES:
            *parts, last = split_lines(lines)
            self._waiting.extend((LINES, part) for part in parts)
            self._waiting.append((kind, last))
            self._waiting_bytes += len(lines)
            self.send_waiting()
        else:
            self._credit -= len(lines)
            self._link.write(self._number, kind, lines)

    def send_soon(self, lines: bytes) -> None:
        """Send lines with the next `send`, at the latest after 3 ms: each separate frame costs the frontend time."""
        if not self._hung_up:
            self._gathered += lines
            self._link.gather(self)

    def flush_gathered(self) -> None:
        """Send the lines of `send_soon`, unless they were sent with others, and the credit for commands."""
        if self._gathered:
            self.send(b"")
        if self._handled_bytes >= COMMANDS_WINDOW // 2 and not self._hung_up:
            self._link.write(self._number, CREDIT, encode_credit(self._handled_bytes))
            self._handled_bytes = 0

    def reject(self, error: bytes) -> None:
        """Send an error line and close the channel."""
        *parts, last = split_lines(error)
        for part in parts:
            self._link.write(self._number, LINES, part)
        self._link.write(self._number, ERROR, last)
        self.close()

    def close_after_flush(self) -> None:
        """Close once all lines are sent."""
        self.flush_gathered()
        self._closing = True
        self._close_if_done()

    def close(self) -> None:
        """Close now; lines that wait are dropped."""
        self._drop_waiting()
        self._link.forget(self._number)

    # For the link.

    def send_waiting(self) -> None:
        """Send the lines that wait, as far as credit and link allow."""
        while self._waiting and self._credit > 0 and self._link.writable:
            kind, lines = self._waiting.popleft()
            self._waiting_bytes -= len(lines)
            self._credit -= len(lines)
            self._link.write(self._number, kind, lines)
        if self._waiting and self._credit > 0:
            self._link.wait_until_writable(self)

    def resume(self) -> None:
        """Send more, because the frontend has read; then let the user send."""
        self.send_waiting()
        if self.writable:
            self.user.on_writable()
        self._close_if_done()

    def handle(self, kind: int, body: bytes) -> None:
        """Handle a frame. Raises `InvalidFrame`."""
        if kind == COMMANDS:
            self._handle_commands(body)
        elif kind == HANG_UP:
            self.hang_up()
        elif kind == CREDIT:
            self._credit += decode_credit(body)
            self.resume()
        else:
            raise InvalidFrame(f"unexpected frame of kind {kind}")

    def _handle_commands(self, data: bytes) -> None:
        if self._hung_up:
            return
        self._handled_bytes += len(data)
        if self._handled_bytes >= COMMANDS_WINDOW // 2:
            self._link.gather(self)  # the credit waits, so that a client that floods has a bounded share of the time
        self.user.on_commands(data)

    def hang_up(self) -> None:
        """Tell the user that the client has disconnected; drop all lines for it."""
        if not self._hung_up:
            self._drop_waiting()
            self.user.on_hang_up()
            self._close_if_done()

    def _drop_waiting(self) -> None:
        self._hung_up = True
        self._gathered = b""
        self._waiting.clear()
        self._waiting_bytes = 0

    def _close_if_done(self) -> None:
        if self._closing and not self._waiting:
            self._closing = False
            self.close()


class Link:
    """A link, which owns its connection.

    Args:
        connection: the connection, non-blocking, after the preface.
        handler: receives the first frame of each channel.
        on_lost: called once when the link is lost, after its channels were hung up.
    """

    def __init__(
        self,
        loop: EventLoop,
        connection: socket.socket,
        handler: RequestHandler,
        on_lost: Callable[[Link], None],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._handler = handler
        self._on_lost = on_lost
        self._frames = FrameBuffer(_MAX_FRAME_BYTES)
        self._channels: dict[int, LinkChannel] = {}
        self._unsent = bytearray()
        self._flush_scheduled = False
        self._blocked_by_kernel = False
        self._gathering: list[LinkChannel] = []
        self._blocked: dict[LinkChannel, None] = {}  # in the order in which they continue
        self._lost = False
        loop.watch(connection.fileno(), READ, self._on_ready)

    @property
    def has_channels(self) -> bool:
        """Whether a channel is open."""
        return bool(self._channels)

    @property
    def writable(self) -> bool:
        """Whether channels may send now."""
        return len(self._unsent) < _HIGH_WATER

    def receive(self, data: bytes) -> None:
        """Handle received data. If it is invalid, the link is lost."""
        try:
            for frame in self._frames.feed(data):
                self._handle(frame)
        except InvalidFrame as error:
            log.error("invalid frame", extra={"reason": str(error)})
            self._lose()

    def finish(self, deadline: float) -> None:
        """Handle the frames that have arrived, and send all unsent data, before the exit of this process.

        `deadline`: most seconds for it.
        """
        self._on_ready()
        if not self._lost:
            self._connection.settimeout(deadline)
            with contextlib.suppress(OSError):
                self._connection.sendall(self._unsent)

    # For channels.

    def write(self, number: int, kind: int, body: bytes = b"") -> None:
        """Send a frame at the end of this turn of the loop."""
        if self._lost:
            return
        self._unsent += encode_frame(number, kind, body)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def gather(self, channel: LinkChannel) -> None:
        """Flush the lines that the channel has gathered, soon."""
        if not self._gathering:
            self._loop.call_later(_GATHER_SECONDS, self._flush_gathered)
        self._gathering.append(channel)

    def wait_until_writable(self, channel: LinkChannel) -> None:
        """Resume the channel when the link is writable."""
        self._blocked[channel] = None

    def forget(self, number: int) -> None:
        """Close a channel; its number is free."""
        if self._channels.pop(number, None) is not None:
            self.write(number, CLOSED)

    def _flush_gathered(self) -> None:
        channels, self._gathering = self._gathering, []
        for channel in channels:
            channel.flush_gathered()

    # The connection.

    def _on_ready(self) -> None:
        if self._unsent:
            self._flush()
        if self._lost:
            return
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

    def _handle(self, frame: Frame) -> None:
        number, kind, body = frame
        channel = self._channels.get(number)
        if kind in (START, ATTACH):
            if channel is not None:
                raise InvalidFrame(f"channel {number} is in use")
            self._open(number, kind, body)
        elif channel is not None:  # else the frame crossed the close of the channel
            try:
                channel.handle(kind, body)
            except InvalidFrame:
                raise
            except Exception:  # a bug costs one call, not all of the link
                log.exception("callback failed")
                channel.hang_up()

    def _open(self, number: int, kind: int, body: bytes) -> None:
        channel = self._channels[number] = LinkChannel(self, number)
        head, _, arguments = body.partition(b"\n")
        try:
            facts = loads(head)
            check(isinstance(facts, dict), "expected an object")
            if kind == START:
                self._handler.on_start(channel, facts, arguments)
            else:
                self._handler.on_attach(channel, facts)
        except (KeyError, InvalidJSON, ProtocolError) as error:
            log.error("invalid request", extra={"reason": repr(error)})
            channel.close()
        except Exception:
            log.exception("callback failed")
            channel.close()

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._lost:
            return
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._lose()
            return
        if self._blocked_by_kernel != bool(self._unsent):
            self._blocked_by_kernel = bool(self._unsent)
            self._loop.watch(self._connection.fileno(), READ | (WRITE if self._unsent else 0), self._on_ready)
        while self._blocked and self.writable:
            channel = next(iter(self._blocked))
            del self._blocked[channel]
            channel.resume()

    def _lose(self) -> None:
        """Close the connection and hang up all channels."""
        if self._lost:
            return
        self._lost = True
        self._loop.unwatch(self._connection.fileno())
        self._connection.close()
        self._unsent.clear()
        self._blocked.clear()
        for channel in list(self._channels.values()):
            channel.hang_up()
        self._on_lost(self)
