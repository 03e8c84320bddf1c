"""What both doors are: listeners, a limited number of connections, and a task for each.

A connection over the limit gets a refusal and is closed. When the system has no descriptor or memory for another
one, accepting pauses and goes on by itself.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from harp_daemon.sockets import prepare
from harpcaller.api.connection import ClientDisconnected, Connection
from harpcaller.api.listeners import Listener

log = logging.getLogger(__name__)

#: Connections accepted before others have their turn.
_ACCEPTED_AT_ONCE = 64

#: Connections over the limit that are given the time to read the refusal; those beyond may miss it.
_REFUSED_AT_ONCE = 64

#: The share of the limit below which the next crowd is worth a line in the log, and connections are kept.
_CALM = 0.9

#: Seconds to pause accepting when the system has no more to give.
_ACCEPT_PAUSE = 0.2
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

#: Seconds that a closing door gives to what is being answered.
_LAST_WORDS = 5.0

#: Bytes that the kernel holds for a client beyond those on their way to it.
_UNSENT_BYTES = 64 * 1024


class Door:
    """Accepts connections and has each answered; a context manager that closes what is left.

    Args:
        answer: answers a connection. May raise `ClientDisconnected`. The connection is closed afterwards.
        most: gives the number of connections that are answered at once.
        refusal: what a connection over this number is told, a line.
    """

    def __init__(
        self, answer: Callable[[Connection], Awaitable[None]], most: Callable[[], int], refusal: bytes
    ) -> None:
        self._answer = answer
        self._most = most
        self._refusal = refusal
        self._listeners: set[Listener] = set()
        self._answering: dict[asyncio.Task[None], Connection] = {}
        self._refusing: dict[asyncio.Task[None], Connection] = {}
        self._crowded = False
        self._exhausted = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for listener in list(self._listeners):
            self.close(listener)
        tasks = self._answering | self._refusing
        for connection in tasks.values():
            connection.mark_disconnected()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_LAST_WORDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    @property
    def crowded(self) -> bool:
        """Whether there are nearly as many connections as there may be: none should wait for its next request then."""
        return len(self._answering) > _CALM * self._most()

    def open(self, listener: Listener) -> None:
        """Accept the listener's connections."""
        self._listeners.add(listener)
        self._resume(listener)

    def close(self, listener: Listener) -> None:
        """Accept no more of the listener's connections; those accepted stay."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            asyncio.get_running_loop().remove_reader(listener.socket)
        listener.close()

    def _accept(self, listener: Listener) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, address = listener.socket.accept()
            except BlockingIOError:
                if self._exhausted:
                    self._exhausted = False
                    log.info("accepts connections again")
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause(listener, error)
                    return
                continue  # one connection's fault: it is gone before it was accepted
            try:
                _prepare(accepted)
                self._admit(accepted, _name(accepted, address))
            except OSError:  # it is gone already
                accepted.close()

    def _pause(self, listener: Listener, error: OSError) -> None:
        if not self._exhausted:
            self._exhausted = True
            log.error("can't accept connections", extra={"reason": error.strerror})
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener.socket)
        loop.call_later(_ACCEPT_PAUSE, self._resume, listener)

    def _resume(self, listener: Listener) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener.socket, self._accept, listener)

    def _admit(self, accepted: socket.socket, client: str) -> None:
        held, most = len(self._answering), self._most()
        over = held >= most
        if over and not self._crowded:
            log.warning("too many connections", extra={"connections": held})
        self._crowded = over or (self._crowded and held > _CALM * most)
        if not over:
            self._start(self._answering, self._answer, Connection(accepted, client))
        elif len(self._refusing) < _REFUSED_AT_ONCE:
            self._start(self._refusing, self._refuse, Connection(accepted, client))
        else:
            with accepted:
                accepted.send(self._refusal)

    def _start(
        self,
        tasks: dict[asyncio.Task[None], Connection],
        answer: Callable[[Connection], Awaitable[None]],
        connection: Connection,
    ) -> None:
        task = asyncio.get_running_loop().create_task(_serve(answer, connection))
        tasks[task] = connection
        task.add_done_callback(partial(_dismiss, tasks))

    async def _refuse(self, connection: Connection) -> None:
        await connection.send(self._refusal)


async def _serve(answer: Callable[[Connection], Awaitable[None]], connection: Connection) -> None:
    try:
        await answer(connection)
    except ClientDisconnected:
        pass  # nobody is there to be told anything
    except BaseException:
        connection.abort()
        raise
    await connection.close()


def _dismiss(tasks: dict[asyncio.Task[None], Connection], task: asyncio.Task[None]) -> None:
    del tasks[task]
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("connection failed", exc_info=error)


def _prepare(accepted: socket.socket) -> None:
    if accepted.family == socket.AF_UNIX:
        accepted.setblocking(False)
        return
    prepare(accepted)
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)


def _name(accepted: socket.socket, address: Any) -> str:
    if accepted.family == socket.AF_UNIX:
        _, user, _ = struct.unpack("3i", accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"uid:{user}"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
