"""The supervisor's end of a link: the connection to a frontend that carries all calls of that frontend.

While the frontend does not read, the unsent data of the link is bounded, and each call's data waits in its channel.
`harpd.supervisor.frames` has the format and the flow control.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from harp.protocol.json_text import InvalidJSON, NotJSON, Raw, loads
from harp.protocol.schema import ProtocolError, check
from harpd.supervisor import frames
from harpd.supervisor.event_loop import READ, WRITE, EventLoop
from harpd.supervisor.frames import COMMANDS_WINDOW, FrameSocket, InvalidFrame

log = logging.getLogger("harpd.supervisor")

#: How many times as long as a request line the frame of a request may be, because of escapes; and bytes of other facts.
_MAX_EXPANSION, _MAX_FACTS_BYTES = 6, 64 * 1024
#: The most bytes of the header of a request: decoding it is one turn.
_MAX_HEADER_BYTES = 512 * 1024
#: From this many bytes on that wait in a channel, its user should wait.
_CHANNEL_HIGH_WATER = 64 * 1024
#: The most channels of a link, and bytes that wait because the frontend does not read: a frontend that is not sound, or
#: was taken over, cannot fill the memory. A sound one reads always, and has a channel for each of its connections.
_MAX_CHANNELS, _MAX_UNSENT = 50_000, 64 * 1024 * 1024
#: The bytes that a link may hold in any case, whatever the others hold.
_ALWAYS_HELD = 1024 * 1024
#: The most links without a channel; the oldest one gives way. A sound frontend has one.
_MAX_UNUSED_LINKS = 256
#: Seconds for which `send_soon` waits for more data to send with it. With 0.003, short calls on a busy machine have
#: separate acknowledgements: frontend, supervisor and client need a twentieth more.
_GATHER_SECONDS = 0.01


class _ChannelUser(Protocol):
    """The session that uses a channel. After `on_hang_up`, the channel stays open until it is closed here."""

    def on_commands(self, data: bytes) -> None: ...
    def on_hang_up(self) -> None: ...
    def on_writable(self) -> None: ...


class LinkChannel:
    """The part of a link that carries one call."""

    user: _ChannelUser  # set before the loop continues, unless the channel is rejected

    def __init__(self, link: Link, number: int) -> None:
        self.waiting_bytes = 0  # because the client, or the frontend, does not read
        self._link = link
        self._number = number
        self._hung_up = False
        self._credit = frames.LINES_WINDOW
        self._gathered = b""  # lines that are sent with the next lines
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._handled_bytes = 0  # of commands, since the last credit
        self._closing = False

    @property
    def writable(self) -> bool:
        return self.waiting_bytes < _CHANNEL_HIGH_WATER and not self._hung_up

    def send(self, lines: bytes, kind: int = frames.LINES) -> None:
        """Send lines as soon as possible. Lines for a client that has disconnected are discarded."""
        if self._hung_up:
            return
        lines, self._gathered = self._gathered + lines, b""
        if self._waiting or self._credit <= 0 or not self._link.writable or len(lines) > frames.MAX_LINES_BYTES:
            *parts, last = frames.split_lines(lines)
            self._waiting.extend((frames.LINES, part) for part in parts)
            self._waiting.append((kind, last))
            self.waiting_bytes += len(lines)
            self.send_waiting()
        else:
            self._credit -= len(lines)
            self._link.write(self._number, kind, lines)

    def send_soon(self, lines: bytes) -> None:
        """Send lines with the next `send`, at the latest after 10 ms: each separate frame costs the frontend time."""
        if not self._hung_up:
            self._gathered += lines
            self._link.gather(self)

    def flush_gathered(self) -> None:
        """Send the lines of `send_soon`, unless they were sent with others, and the credit for commands."""
        if self._gathered:
            self.send(b"")
        if self._handled_bytes >= COMMANDS_WINDOW // 2 and not self._hung_up:
            self._link.write(self._number, frames.CREDIT, frames.encode_credit(self._handled_bytes))
            self._handled_bytes = 0

    def reject(self, error: bytes) -> None:
        self.send(error, frames.ERROR)
        self.close_after_flush()

    def close_after_flush(self) -> None:
        """Close once all lines are sent. The user receives no further notifications."""
        self.flush_gathered()
        self._closing = True
        self.resume()

    def close(self) -> None:
        """Close now; lines that wait are discarded."""
        self._discard_waiting()
        self._link.close_channel(self._number)

    def send_waiting(self) -> None:
        while self._waiting and self._credit > 0 and self._link.writable:
            kind, lines = self._waiting.popleft()
            self.waiting_bytes -= len(lines)
            self._credit -= len(lines)
            self._link.write(self._number, kind, lines)
        if self._waiting and self._credit > 0:
            self._link.wait_until_writable(self.resume)

    def resume(self) -> None:
        """Send more, because the frontend has read; then let the user send."""
        self.send_waiting()
        if not self._closing:
            if self.writable:
                self.user.on_writable()
        elif not self._waiting:
            self.close()

    def handle(self, kind: int, body: bytes) -> None:
        if kind == frames.HANG_UP:
            self.hang_up()
        elif kind == frames.CREDIT:
            self._credit += frames.decode_credit(body)
            self.resume()
        elif kind != frames.COMMANDS:
            raise InvalidFrame(f"unexpected frame of kind {kind}")
        elif not (self._hung_up or self._closing):
            self._handled_bytes += len(body)
            if self._handled_bytes >= COMMANDS_WINDOW // 2:
                self._link.gather(self)  # the credit waits: a client that floods has a bounded share of the time
            self.user.on_commands(body)

    def hang_up(self) -> None:
        """Notify the user that the client has disconnected; discard all lines for it."""
        if not self._hung_up:
            self._discard_waiting()
            if self._closing:
                self.close()
            else:
                self.user.on_hang_up()

    def _discard_waiting(self) -> None:
        self._hung_up = True
        self._gathered = b""
        self._waiting.clear()
        self.waiting_bytes = 0


class Links(set["Link"]):
    """All open links."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0  #: The bytes of all their frames that are incomplete, or that the frontends have not read.
        self._unused: dict[Link, None] = {}  # the links without a channel, those of the longest time first

    def add_unused(self, link: Link) -> None:
        """Note that a link has no channel."""
        self._unused[link] = None
        if len(self._unused) > _MAX_UNUSED_LINKS:
            next(iter(self._unused)).close()

    def remove_unused(self, link: Link) -> None:
        """Note that a link has a channel, or is closed."""
        self._unused.pop(link, None)


class Link(FrameSocket):
    """A link, after the preface.

    `limits`: the most bytes of a request line, and of all of them together, in the frontend.

    `on_start` and `on_attach` receive each channel with the header, and with the arguments. If one of them raises
    KeyError or ProtocolError, the channel is closed. The link is one of `links` until all channels were hung up.
    `before_sending` is called before data is sent.
    """

    _log = log

    def __init__(
        self,
        loop: EventLoop,
        connection: socket.socket,
        limits: tuple[int, int],
        on_start: Callable[[LinkChannel, Mapping[str, Any], Raw], None],
        on_attach: Callable[[LinkChannel, Mapping[str, Any]], None],
        links: Links,
        before_sending: Callable[[], object],
    ) -> None:
        request_line, request_memory = limits
        super().__init__(connection, _MAX_EXPANSION * request_line + _MAX_FACTS_BYTES, loop.call_soon)
        self._loop = loop
        self._on_start, self._on_attach = on_start, on_attach
        self._channels: dict[int, LinkChannel] = {}
        self._gathering: list[LinkChannel] = []
        self._before_sending = before_sending
        self._links, self._held, self._max_held = links, 0, 2 * request_memory  # an earlier frontend may still run
        self._watch_writable(False)
        links.add(self)
        links.add_unused(self)

    def close(self) -> None:
        """Close the link: it uses memory that others need."""
        log.error("frontend has too many links, or too long requests; link closed")
        self._close_socket()

    def receive(self, data: bytes) -> None:
        """See `FrameSocket`."""
        super().receive(data)
        if not self._lost:
            self._set_held(self._frames.size + len(self._unsent))
            if self._held > _ALWAYS_HELD and self._links.held > self._max_held:
                self.close()

    def _set_held(self, size: int) -> None:
        self._links.held += size - self._held
        self._held = size

    def finish(self, deadline: float) -> None:
        """Handle the frames that have arrived, and send all data within this time: this process exits."""
        self._on_ready()
        self._before_sending()
        if not self._lost:
            self._connection.settimeout(deadline)
            with contextlib.suppress(OSError):
                self._connection.sendall(self._unsent)

    def _flush(self) -> None:
        self._before_sending()
        super()._flush()

    def gather(self, channel: LinkChannel) -> None:
        """Flush the lines that the channel has gathered, soon."""
        if not self._gathering:
            self._loop.call_later(_GATHER_SECONDS, self._flush_gathered)
        self._gathering.append(channel)

    def close_channel(self, number: int) -> None:
        """Close a channel; its number is free."""
        if self._channels.pop(number, None) is not None:
            self.write(number, frames.CLOSED)
            if not self._channels and not self._lost:
                self._links.add_unused(self)

    def _flush_gathered(self) -> None:
        channels, self._gathering = self._gathering, []
        for channel in channels:
            channel.flush_gathered()

    def _handle(self, number: int, kind: int, body: bytes) -> None:
        channel = self._channels.get(number)
        if kind in (frames.START, frames.ATTACH):
            if channel is not None:
                raise InvalidFrame(f"channel {number} is in use")
            if len(self._channels) >= _MAX_CHANNELS or len(self._unsent) > _MAX_UNSENT:
                raise InvalidFrame("too many channels are open, or too many replies were not read")
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
        self._links.remove_unused(self)
        channel = self._channels[number] = LinkChannel(self, number)
        head = body[: body.find(b"\n")] if kind == frames.START else body
        try:
            check(len(head) <= _MAX_HEADER_BYTES, f"expected a header of at most {_MAX_HEADER_BYTES} bytes")
            header = loads(head)
            check(isinstance(header, dict), "expected an object")
            if kind == frames.START:
                self._on_start(channel, header, Raw(memoryview(body)[len(head) + 1 :]))
            else:
                self._on_attach(channel, header)
        except (KeyError, InvalidJSON, NotJSON, ProtocolError) as error:
            log.error("invalid request", extra={"reason": repr(error)})
            channel.close()
        except Exception:
            log.exception("callback failed")
            channel.close()

    def _on_lost(self) -> None:
        for channel in list(self._channels.values()):
            channel.hang_up()
        self._set_held(0)
        self._links.remove_unused(self)
        self._links.discard(self)

    def _watch_writable(self, watch: bool) -> None:
        self._loop.watch(self._connection.fileno(), READ | (WRITE if watch else 0), self._on_ready)

    def _unwatch(self) -> None:
        self._loop.unwatch(self._connection.fileno())
