"""Accepting connections: from several listeners, up to a limit.

A connection over the limit is rejected with a reply and closed. When the system has no descriptor or memory for
another connection, accepting pauses, and continues later.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

from harp_daemon.sockets import Listener, configure_socket, peer_name

C = TypeVar("C")

log = logging.getLogger(__name__)

#: Connections accepted before other tasks get their turn.
_ACCEPT_BATCH = 64
#: Connections over the limit that are rejected in a separate task; further connections may miss the reply.
_MAX_REJECTING = 64
#: The share of the limit above which it is nearly reached. Below it, the next rejection is logged again.
_CALM_SHARE = 0.9
#: Seconds to pause accepting when the system is exhausted.
_ACCEPT_PAUSE = 0.2
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor(Generic[C]):
    """Accepts connections. `connect` makes one of an accepted socket, the name of its peer, and the listener.

    `serve` serves and closes a connection: a coroutine, or a future that is done when the connection is closed, and
    whose cancellation closes it. `reject` sends the reply to a connection over the limit and closes it; while too many
    are being rejected, others are sent `rejection` without waiting. A reload may change what `max_connections` returns.
    """

    def __init__(
        self,
        connect: Callable[[socket.socket, str, Listener], C],
        serve: Callable[[C], Awaitable[None]],
        reject: Callable[[C], Awaitable[None]],
        max_connections: Callable[[], int],
        rejection: bytes = b"",
    ) -> None:
        self._connect = connect
        self._serve = serve
        self._reject = reject
        self._max_connections = max_connections
        self._rejection = rejection
        self._listeners: set[Listener] = set()
        self._serving: dict[asyncio.Future[None], C] = {}
        self._rejecting: dict[asyncio.Future[None], C] = {}
        self._crowded = False
        self._exhausted = False

    @property
    def connections(self) -> Mapping[asyncio.Future[None], C]:
        """The open connections by their tasks, also while they are rejected."""
        return self._serving | self._rejecting

    @property
    def near_capacity(self) -> bool:
        """Whether the limit is nearly reached; then no connection should wait for another request."""
        return len(self._serving) > _CALM_SHARE * self._max_connections()

    def open(self, listeners: Iterable[Listener]) -> None:
        """Accept connections from the listeners."""
        for listener in listeners:
            self._listeners.add(listener)
            self._resume(listener)

    def close_listeners(self) -> None:
        """Stop accepting and close the listeners; the open connections stay."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener.socket)
            listener.close()
        self._listeners.clear()

    async def drain(self, seconds: float) -> None:
        """Wait until all connections are closed; after this time cancel their tasks."""
        if tasks := self.connections.keys():
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _accept(self, listener: Listener) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                accepted, address = listener.socket.accept()
            except BlockingIOError:
                if self._exhausted:
                    self._exhausted = False
                    log.info("accepting connections again")
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    continue  # this connection was closed before it was accepted
                if not self._exhausted:
                    self._exhausted = True
                    log.error("cannot accept connections", extra={"reason": error.strerror})
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener.socket)
                loop.call_later(_ACCEPT_PAUSE, self._resume, listener)
                return
            try:
                configure_socket(accepted)
                self._admit(accepted, peer_name(accepted, address), listener)
            except OSError:  # the peer has closed it already
                accepted.close()

    def _resume(self, listener: Listener) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener.socket, self._accept, listener)

    def _admit(self, accepted: socket.socket, peer: str, listener: Listener) -> None:
        count, limit = len(self._serving), self._max_connections()
        over = count >= limit
        if over and not self._crowded:
            log.warning("too many connections", extra={"connections": count})
        self._crowded = over or (self._crowded and count > _CALM_SHARE * limit)
        if not over:
            self._start(self._serving, self._serve, self._connect(accepted, peer, listener))
        elif len(self._rejecting) < _MAX_REJECTING:
            self._start(self._rejecting, self._reject, self._connect(accepted, peer, listener))
        else:
            with accepted:
                accepted.send(self._rejection)

    def _start(
        self, tasks: dict[asyncio.Future[None], C], serve: Callable[[C], Awaitable[None]], connection: C
    ) -> None:
        task = asyncio.ensure_future(serve(connection))
        tasks[task] = connection
        task.add_done_callback(partial(_on_done, tasks))


def _on_done(tasks: dict[asyncio.Future[None], Any], task: asyncio.Future[None]) -> None:
    del tasks[task]
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("connection failed", exc_info=error)
