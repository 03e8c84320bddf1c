"""The frontend's ends of its links to all supervisors of its runtime directory.

A link carries all calls that this frontend has in a supervisor; `harpd.supervisor.frames` has the format and the flow
control. New calls use the link to the active supervisor. A supervisor has only its own calls. So a request to attach is
sent to one supervisor after the other, the active one first. The client receives ``no_such_call`` only if every
running supervisor has sent this reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial

from harpd.control.supervisor_client import SupervisorClient, SupervisorNotRunning, retry_until_active
from harpd.supervisor import frames
from harpd.supervisor.frames import COMMANDS_WINDOW, FrameSocket, InvalidFrame
from harpd.supervisor.listener import ACTIVE_SOCKET

log = logging.getLogger("harpd.frontend")

#: Seconds between two checks while the last calls are stopped.
_STOP_INTERVAL = 0.02


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
        """Handle that the supervisor has closed the channel, or has died; called once, as the last notification."""


class Link(FrameSocket):
    """A link, before the preface.

    `identity` is that of the supervisor's socket. `on_lost` is called once, when the supervisor has closed the link or
    died. If the link is not `shared`, it has one channel and is closed with it.
    """

    _log = log

    def __init__(
        self,
        connection: socket.socket,
        identity: tuple[int, int] | None,
        on_lost: Callable[[Link], None],
        shared: bool,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(connection, frames.MAX_LINES_BYTES, self._loop.call_soon)
        self.identity = identity
        self.shared = shared
        self._notify_lost = on_lost
        self._channels: dict[int, Channel | None] = {}  # None: abandoned, but still open in the supervisor
        self._last_number = 0
        self._unsent += frames.PREFACE
        self._loop.add_reader(connection, self._on_ready)

    def close(self) -> None:
        """Close the link; its channels are abandoned."""
        self._channels.clear()
        self._close_socket()

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
            self._close_socket()

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


class SupervisorLinks:
    """The links of one runtime directory, opened when they are needed."""

    def __init__(self, client: SupervisorClient) -> None:
        self.client = client
        self._shared: dict[tuple[int, int], Link] = {}  # by the identity of the supervisor's socket
        self._all: set[Link] = set()

    def find_link(self, name: str = ACTIVE_SOCKET) -> Link | None:
        """Return the open link to the supervisor of this socket, usually of the active one; None if no link is open."""
        identity = self.client.identify(name)
        link = None if identity is None else self._shared.get(identity)
        return None if link is None or link.broken else link

    def is_active(self, link: Link) -> bool:
        return link.identity is not None and link.identity == self.client.identify()

    async def connect_active(self, shared: bool = True) -> Link:
        """Return a link to the active supervisor; wait a short time for a supervisor that is starting.

        `shared`: calls share the link; otherwise it is opened for one call. Raises `SupervisorError`.
        """
        return await retry_until_active(partial(self._connect, ACTIVE_SOCKET, shared))

    async def attach(self, attach: Callable[[Link], Awaitable[bytes | None]]) -> bytes | None:
        """Attach to a call in the supervisor that has it. If no supervisor has it, return the active one's error line.

        `attach` tries one link; it returns None, or the error line. b"": the supervisor died.
        Raises `SupervisorError`: a supervisor sent no reply, or none is active. So the call may exist.
        """
        return await retry_until_active(partial(self._attach_once, attach))

    async def wait_until_unused(self, deadline: float) -> None:
        """Wait until all channels are closed, for at most this number of seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                while True:
                    if not any(link.has_channels for link in self._all):
                        return
                    await asyncio.sleep(_STOP_INTERVAL)

    def close(self) -> None:
        for link in list(self._all):
            link.close()

    async def _connect(self, name: str, shared: bool = True) -> Link:
        """Return a link to a supervisor; an open one if it is shared. Raises `SupervisorError`."""
        if shared and (link := self.find_link(name)) is not None:
            return link
        connection = await self.client.connect(name)
        if shared and (link := self.find_link(name)) is not None:  # another task has connected since
            connection.close()
            return link
        identity = self.client.identify(os.path.basename(connection.getpeername()))  # of the supervisor's own socket
        link = Link(connection, identity, self._on_lost, shared)
        self._all.add(link)
        if shared and identity is not None:
            self._shared[identity] = link
        return link

    def _on_lost(self, link: Link) -> None:
        self._all.discard(link)
        self._shared = {identity: other for identity, other in self._shared.items() if other is not link}

    async def _attach_once(self, attach: Callable[[Link], Awaitable[bytes | None]]) -> bytes | None:
        """Try each supervisor. Raises `SupervisorNotRunning`: perhaps a supervisor that has the call was not asked."""
        version = self.client.version()
        own = self.client.identify()
        others = [name for name in self.client.socket_names() if self.client.identify(name) != own]
        error: bytes | None = b""
        # The active one again if there are others: it then has the calls of a supervisor that has died since.
        for name in (ACTIVE_SOCKET, *others, ACTIVE_SOCKET) if others else (ACTIVE_SOCKET,):
            try:
                link = await self._connect(name)
            except SupervisorNotRunning:
                error = b""
                continue
            error = await attach(link)
            if error is None:
                return None
            if not error:
                break  # one that has replied before may have its calls now
        if not error:
            raise SupervisorNotRunning("the supervisor died")
        if not await self.client.confirm(version):
            raise SupervisorNotRunning("the sockets of supervisors have just changed")
        return error
