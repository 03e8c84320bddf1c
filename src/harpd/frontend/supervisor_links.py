"""The links of a frontend to all supervisors of its runtime directory.

New calls use the link to the active supervisor. A supervisor has only its own calls. So a request to attach is sent to
one supervisor after the other, the active one first. The client receives "no such call" only if every running
supervisor has sent this reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from functools import partial

from harpd.control.supervisor_client import SupervisorClient, SupervisorNotRunning, retry_until_active
from harpd.frontend.link import Link
from harpd.supervisor.listener import ACTIVE_SOCKET

#: Seconds between two checks while the last calls are stopped.
_STOP_INTERVAL = 0.02


class SupervisorLinks:
    """The links of one runtime directory, opened when they are needed."""

    def __init__(self, client: SupervisorClient) -> None:
        self._client = client
        self._shared: dict[int, Link] = {}  # by the inode of the supervisor's socket
        self._all: set[Link] = set()

    def find(self, name: str = ACTIVE_SOCKET) -> Link | None:
        """Return the open link to the supervisor of this socket, usually the active one; None if there is none."""
        inode = self._client.inode(name)
        link = None if inode is None else self._shared.get(inode)
        return None if link is None or link.broken else link

    def is_active(self, link: Link) -> bool:
        return link.inode is not None and link.inode == self._client.inode()

    async def connect_active(self, shared: bool = True) -> Link:
        """Return a link to the active supervisor; wait a short time for one that is starting.

        Unless it is shared, it is a new one for one call. Raises `SupervisorError`.
        """
        return await retry_until_active(partial(self._connect, ACTIVE_SOCKET, shared))

    async def attach(self, attach: Callable[[Link], Awaitable[bytes | None]]) -> bytes | None:
        """Attach to a call in the supervisor that has it. If none has it, return the error line of the active one.

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
        if shared and (link := self.find(name)) is not None:
            return link
        connection = await self._client.connect(name)
        if shared and (link := self.find(name)) is not None:  # another task has connected meanwhile
            connection.close()
            return link
        inode = self._client.inode(os.path.basename(connection.getpeername()))  # of the supervisor's own socket
        link = Link(connection, inode, self._on_lost, shared)
        self._all.add(link)
        if shared and inode is not None:
            self._shared[inode] = link
        return link

    def _on_lost(self, link: Link) -> None:
        self._all.discard(link)
        self._shared = {inode: other for inode, other in self._shared.items() if other is not link}

    async def _attach_once(self, attach: Callable[[Link], Awaitable[bytes | None]]) -> bytes | None:
        """Send the request to each supervisor.

        Raises `SupervisorNotRunning` if no supervisor is active and no other one has the call.
        """
        active_error = b""
        for name in (ACTIVE_SOCKET, *self._client.socket_names()):
            try:
                error = await attach(await self._connect(name))
            except SupervisorNotRunning:
                continue
            if error is None:
                return None
            if name == ACTIVE_SOCKET:
                active_error = error
        if not active_error:
            raise SupervisorNotRunning
        return active_error
