"""Accepting connections: from several listeners, up to a limit.

Theory of operation: a connection is new until its client has authenticated, or has sent a valid request where no one
authenticates (`Acceptor.confirm`). Anyone can open new connections and send nothing, so these give way to others:

- Each peer has a limited number of them. A peer is an address, the /64 network of an IPv6 address, or a user of a Unix
  socket. The limit does not apply to a known peer: one that has authenticated within the last hour.
- At the limit of all connections, the oldest new connection is closed in favour of the next one; those of known peers
  only when no other peer has one.

A connection over a limit is rejected with a reply and closed. When the system has no descriptor or memory for another
connection, accepting pauses, and continues later.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

from harp_daemon.sockets import Listener, ListenError, configure_socket, peer_name
from harp_daemon.unix_sockets import UnixSocket

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
#: Seconds between two checks whether the files of Unix sockets exist: programs that clean directories remove them.
_FILE_CHECK = 2.0
#: Seconds for which a peer that has authenticated is known, and the most peers that are.
_KNOWN_TIME, _MAX_KNOWN = 3600.0, 10_000
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor(Generic[C]):
    """Accepts connections. `connect` makes one of an accepted socket, the name of its peer, and the listener.

    `serve` serves and closes a connection: a coroutine, or a future that is done when the connection is closed, and
    whose cancellation closes it. `reject` sends the reply to a connection over the limit and closes it; while too many
    are being rejected, others are sent `rejection` without waiting. `max_per_peer` returns the maximum number of new
    connections of one peer; None: no limit. A reload may change what it and `max_connections` return.
    """

    def __init__(
        self,
        connect: Callable[[socket.socket, str, Listener], C],
        serve: Callable[[C], Awaitable[None]],
        reject: Callable[[C], Awaitable[None]],
        max_connections: Callable[[], int],
        rejection: bytes = b"",
        max_per_peer: Callable[[], int] | None = None,
    ) -> None:
        self._connect = connect
        self._serve = serve
        self._reject = reject
        self._max_connections = max_connections
        self._rejection = rejection
        self._max_per_peer = max_per_peer
        self._new: dict[C, tuple[str, asyncio.Future[None]]] = {}  # of unknown peers, the oldest first
        self._new_of_known: dict[C, tuple[str, asyncio.Future[None]]] = {}
        self._per_peer: dict[str, int] = {}  # the numbers of connections in `_new`
        self._known: dict[str, float] = {}  # the time of the last authentication, the latest peer last
        self._crowding: set[str] = set()  # peers at their limit
        self._listeners: set[Listener] = set()
        self._file_check: asyncio.TimerHandle | None = None
        self._removed: set[Listener] = set()  # whose files could not be made again
        self._serving: dict[asyncio.Future[None], C] = {}
        self._rejecting: dict[asyncio.Future[None], C] = {}
        self._crowded = False
        self._exhausted = False

    @property
    def connections(self) -> Mapping[asyncio.Future[None], C]:
        """The open connections by their tasks, also while they are rejected."""
        return self._serving | self._rejecting

    def confirm(self, connection: C) -> None:
        """Note that the client of a connection has authenticated; its peer is known from now on."""
        peer = self._forget_new(connection)
        if peer is not None:
            self._known.pop(peer, None)
            self._known[peer] = time.monotonic()
            if len(self._known) > _MAX_KNOWN:
                del self._known[next(iter(self._known))]

    @property
    def near_capacity(self) -> bool:
        """Whether the limit is nearly reached; then no connection should wait for another request."""
        return len(self._serving) > _CALM_SHARE * self._max_connections()

    def open(self, listeners: Iterable[Listener]) -> None:
        """Accept connections from the listeners."""
        for listener in listeners:
            self._listeners.add(listener)
            self._resume(listener)
        if self._file_check is None and any(listener.path is not None for listener in self._listeners):
            self._check_files()

    def _check_files(self) -> None:
        loop = asyncio.get_running_loop()
        self._file_check = loop.call_later(_FILE_CHECK, self._check_files)
        for listener in self._listeners:
            if not listener.is_missing:
                self._removed.discard(listener)
                continue
            loop.remove_reader(listener.socket)
            try:
                listener.open_again()
                log.warning("removed socket made again", extra=listener.fields)
            except ListenError as error:
                if listener not in self._removed:  # once
                    log.error("cannot make removed socket again", extra={**listener.fields, "reason": str(error)})
                self._removed.add(listener)
            self._resume(listener)

    def close_listeners(self) -> None:
        """Stop accepting and close the listeners; the open connections stay."""
        if self._file_check is not None:
            self._file_check.cancel()
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
            if accepted.family == socket.AF_UNIX:
                accepted = UnixSocket(accepted)
            try:
                configure_socket(accepted)
                self._admit(accepted, address, listener)
            except OSError:  # the peer has closed it already
                accepted.close()

    def _resume(self, listener: Listener) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener.socket, self._accept, listener)

    def _admit(self, accepted: socket.socket, address: Any, listener: Listener) -> None:
        name = peer_name(accepted, address)
        peer = name if accepted.family == socket.AF_UNIX else network(address[0])
        count, limit = len(self._serving), self._max_connections()
        full = count >= limit
        if full and not self._crowded:
            log.warning("too many connections", extra={"connections": count})
        self._crowded = full or (self._crowded and count > _CALM_SHARE * limit)
        is_known = self._is_known(peer)
        if (is_known or self._has_room(peer)) and (not full or self._make_room()):
            connection = self._connect(accepted, name, listener)
            task = self._start(self._serving, self._serve, connection)
            if is_known:
                self._new_of_known[connection] = peer, task
            else:
                self._new[connection] = peer, task
                self._per_peer[peer] = self._per_peer.get(peer, 0) + 1
        elif len(self._rejecting) < _MAX_REJECTING:
            self._start(self._rejecting, self._reject, self._connect(accepted, name, listener))
        else:
            with accepted:
                if not listener.is_tls:
                    accepted.send(self._rejection)

    def _is_known(self, peer: str) -> bool:
        since = self._known.get(peer)
        return since is not None and time.monotonic() - since < _KNOWN_TIME

    def _has_room(self, peer: str) -> bool:
        """Return whether an unknown peer may have another new connection."""
        if self._max_per_peer is None or self._per_peer.get(peer, 0) < self._max_per_peer():
            return True
        if peer not in self._crowding:
            self._crowding.add(peer)
            log.warning("too many connections of a peer", extra={"peer": peer, "connections": self._per_peer[peer]})
        return False

    def _make_room(self) -> bool:
        """Close the oldest new connection; return False if there is no new one."""
        for connections in (self._new, self._new_of_known):
            if connections:
                connection = next(iter(connections))
                _, task = connections[connection]
                self._forget_new(connection)
                task.cancel()
                return True
        return False

    def _forget_new(self, connection: C) -> str | None:
        """Count a connection as new no more; return its peer, None if it was not new."""
        if (found := self._new.pop(connection, None)) is None:
            known = self._new_of_known.pop(connection, None)
            return None if known is None else known[0]
        peer = found[0]
        self._per_peer[peer] -= 1
        if not self._per_peer[peer]:
            del self._per_peer[peer]
            self._crowding.discard(peer)
        return peer

    def _start(
        self, tasks: dict[asyncio.Future[None], C], serve: Callable[[C], Awaitable[None]], connection: C
    ) -> asyncio.Future[None]:
        task = asyncio.ensure_future(serve(connection))
        tasks[task] = connection
        task.add_done_callback(partial(self._on_done, tasks))
        return task

    def _on_done(self, tasks: dict[asyncio.Future[None], C], task: asyncio.Future[None]) -> None:
        self._forget_new(tasks.pop(task))
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("connection failed", exc_info=error)


def network(address: str) -> str:
    """Return the part of an address that one peer has: an IPv4 address, or the first 64 bits of an IPv6 address."""
    if ":" not in address or address.startswith("::ffff:"):
        return address.removeprefix("::ffff:")
    packed = ipaddress.IPv6Address(address.partition("%")[0]).packed
    return address if packed[:8] == bytes(8) else f"{ipaddress.IPv6Address(packed[:8] + bytes(8))}/64"
