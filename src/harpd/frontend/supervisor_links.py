"""The links of a frontend to all supervisors of its runtime directory.

New calls use the link to the active supervisor. A supervisor has only its own calls. So a request to attach is sent to
one supervisor after the other, the active one first. The client receives "no such call" only if every running
supervisor has sent this reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from functools import partial

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import decode_message
from harpd.control.supervisor_client import (
    REPLY_TIMEOUT,
    SupervisorClient,
    SupervisorError,
    SupervisorNotRunning,
    retry_until_active,
)
from harpd.frontend.link import ChannelUser, Link, LinkChannel
from harpd.supervisor.frames import ERROR
from harpd.supervisor.listener import ACTIVE_SOCKET

#: Seconds between two looks while the last calls are stopped.
_STOP_INTERVAL = 0.02


class SupervisorLinks:
    """The links of one runtime directory, opened when they are needed.

    Args:
        client: the client of the supervisors.
    """

    def __init__(self, client: SupervisorClient) -> None:
        self._client = client
        self._shared: dict[int, Link] = {}  # by the inode of the supervisor's socket
        self._all: set[Link] = set()

    def active(self) -> Link | None:
        """Return the open link to the active supervisor; None if there is none."""
        return self._open_link(ACTIVE_SOCKET)

    def is_active(self, link: Link) -> bool:
        """Return whether the supervisor of this link is the active one."""
        return link.inode is not None and link.inode == self._client.inode()

    async def connect_active(self, shared: bool = True) -> Link:
        """Return a link to the active supervisor; wait a short time for one that is starting.

        Args:
            shared: whether several calls use the link; otherwise it is a new one.

        Raises:
            SupervisorError: no supervisor is active within that time.
        """
        return await retry_until_active(partial(self._connect, ACTIVE_SOCKET, shared))

    async def attach(self, facts: bytes) -> AttachReply:
        """Attach to a call in the supervisor that has it.

        Args:
            facts: the first frame, see `harpd.supervisor.main`.

        Returns:
            The reply of that supervisor. If no supervisor has the call: the reply of the active one.

        Raises:
            SupervisorError: a supervisor sent no reply, or none is active. Then it is unknown whether the call exists.
        """
        return await retry_until_active(partial(self._find_call, facts))

    async def wait_until_unused(self, deadline: float) -> None:
        """Wait until all channels are closed, for at most this number of seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline):
                while True:
                    if not any(link.in_use for link in self._all):
                        return
                    await asyncio.sleep(_STOP_INTERVAL)

    def close(self) -> None:
        """Close all links."""
        for link in list(self._all):
            link.close()

    async def _connect(self, name: str, shared: bool = True) -> Link:
        """Return a link to a supervisor; an open one if it is shared.

        Raises `SupervisorNotRunning` and `SupervisorError`.
        """
        link = self._open_link(name) if shared else None
        if link is not None:
            return link
        connection = await self._client.connect(name)
        link = self._open_link(name) if shared else None
        if link is not None:  # another task has connected meanwhile
            connection.close()
            return link
        inode = self._client.inode(os.path.basename(connection.getpeername()))  # of the supervisor's own socket
        link = Link(connection, inode, self._on_lost, shared)
        self._all.add(link)
        if shared and inode is not None:
            self._shared[inode] = link
        return link

    def _open_link(self, name: str) -> Link | None:
        """Return the open link to the supervisor of this socket; None if there is none."""
        inode = self._client.inode(name)
        link = None if inode is None else self._shared.get(inode)
        return link if link is not None and link.usable else None

    def _on_lost(self, link: Link) -> None:
        self._all.discard(link)
        self._shared = {inode: other for inode, other in self._shared.items() if other is not link}

    async def _find_call(self, facts: bytes) -> AttachReply:
        """Send the request to each supervisor once.

        Raises `SupervisorNotRunning` if no supervisor is active and no other one has the call.
        """
        active = await self._try_attach(ACTIVE_SOCKET, facts)
        if active is not None and active.found:
            return active
        for name in self._client.socket_names():
            if active is None or self._client.inode(name) != active.inode:
                other = await self._try_attach(name, facts)
                if other is not None and other.found:
                    return other
        if active is None:
            raise SupervisorNotRunning
        return active

    async def _try_attach(self, name: str, facts: bytes) -> AttachReply | None:
        """Send the request to one supervisor; return None if it is dead."""
        inode = self._client.inode(name)
        try:
            link = await self._connect(name)
        except SupervisorNotRunning:
            return None
        reply = AttachReply(link, facts, inode)
        try:
            async with asyncio.timeout(REPLY_TIMEOUT):
                await reply.received
        except BaseException as error:
            reply.channel.user = None
            reply.channel.hang_up()
            if isinstance(error, TimeoutError):
                raise SupervisorError(f"the supervisor did not reply within {REPLY_TIMEOUT:g} s") from error
            raise
        return reply if reply.frames else None


class AttachReply:
    """The reply of a supervisor to a request to attach.

    Args:
        link: the link to the supervisor.
        facts: the first frame of the channel.
        inode: of the supervisor's socket.

    Attributes:
        channel: the channel of the request.
        received: is done when there is a reply, or the channel is closed.
        frames: the frames that were received: kind and lines.
    """

    def __init__(self, link: Link, facts: bytes, inode: int | None) -> None:
        self.inode = inode
        self.frames: list[tuple[int, bytes]] = []
        self.received: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed = False
        self.channel: LinkChannel = link.attach(self, facts)

    @property
    def found(self) -> bool:
        """Whether the supervisor has the call."""
        kind, lines = self.frames[0]
        if kind == ERROR:
            try:
                match decode_message(lines.removesuffix(b"\n")):
                    case Failed("no_such_call"):
                        return False
            except ProtocolError:
                pass
        return True

    def pass_on(self, user: ChannelUser) -> None:
        """Give the channel and the received frames to the call that continues with them."""
        self.channel.user = user
        for kind, lines in self.frames:
            user.on_lines(kind, lines)
        if self._closed:
            user.on_closed()

    # The channel: `ChannelUser`.

    def on_lines(self, kind: int, lines: bytes) -> None:
        """See `ChannelUser`."""
        self.frames.append((kind, lines))
        self._set_received()

    def on_credit(self) -> None:
        """See `ChannelUser`. There were no commands."""

    def on_closed(self) -> None:
        """See `ChannelUser`."""
        self._closed = True
        self._set_received()

    def _set_received(self) -> None:
        if not self.received.done():
            self.received.set_result(None)
