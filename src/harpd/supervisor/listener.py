"""The supervisor's listeners: their sockets, the first line of each connection, and final replies.

A supervisor has one listener for control requests, and one for the calls of a frontend that runs as another user. Both
have a socket of the same name: the first in the runtime directory, the second in the directory ``frontend`` below.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from functools import partial

from harp.protocol.json_text import InvalidJSON, JSONObject
from harp.protocol.lines import LineBuffer, LineTooLong
from harp.protocol.schema import ProtocolError
from harp_daemon.sliced_json import decode_slices
from harp_daemon.sockets import peer_process
from harp_daemon.unix_sockets import UnixSocket, refuse_descriptors
from harpd.supervisor.event_loop import READ, WRITE, EventLoop
from harpd.supervisor.runtime_directory import (
    FRONTEND_DIRECTORY,
    identify,
    is_open,
    open_frontend_directory,
    open_runtime_directory,
)

log = logging.getLogger("harpd.supervisor")

_READ_SIZE = 1 << 16
#: The most bytes of a first line. The longest is a request for the calls of an owner.
_MAX_LINE_BYTES = 1024 * 1024
#: The most connections that have not sent their first line, and that do not read their reply; the oldest one gives way.
_MAX_WAITING = 256
#: Seconds without accepting after no descriptor was free.
_ACCEPT_PAUSE = 0.1
_BACKLOG = 4096

#: Names in the runtime directory: the socket of the supervisor that accepts new calls, and the prefix of each
#: supervisor's own socket, before its instance id.
ACTIVE_SOCKET, SOCKET_PREFIX = "supervisor", "supervisor-"


class Listener:
    """A listening socket in the runtime directory, named by the instance id. Raises OSError if it cannot be created.

    `on_request` receives each connection, its first line, and the data after it. If it raises KeyError, InvalidJSON or
    ProtocolError, the connection is closed. `frontend`: the user and the group of the frontend, who owns the socket,
    and may connect to it beside root and the user of this process; None: only these two may.
    """

    def __init__(
        self,
        loop: EventLoop,
        directory: str,
        instance: str,
        on_request: Callable[[socket.socket, JSONObject, bytes], None],
        frontend: tuple[int, int] | None = None,
    ) -> None:
        self._loop = loop
        self._on_request = on_request
        self._frontend = frontend
        self._peers = {0, os.geteuid()} if frontend is None else {0, os.geteuid(), frontend[0]}
        self._path = directory if frontend is None else os.path.join(directory, FRONTEND_DIRECTORY)
        self._open_directory = partial(
            open_runtime_directory if frontend is None else open_frontend_directory, directory
        )
        self._name = SOCKET_PREFIX + instance
        self.is_active = False  #: Whether this listener receives all new calls.
        self._waiting: dict[socket.socket, None] = {}  # connections without their first line, the oldest first
        self._directory = self._open_directory()
        self._listen()

    def _listen(self) -> None:
        """Create the socket. Raises OSError; then only files may be changed."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # Bound through a descriptor: a socket's address has at most 107 bytes.
            listener.bind(f"/proc/self/fd/{self._directory}/{self._name}")
            os.chmod(self._name, 0o600, dir_fd=self._directory)
            if self._frontend is not None:
                os.chown(self._name, *self._frontend, dir_fd=self._directory, follow_symlinks=False)
            refuse_descriptors(listener)
            listener.listen(_BACKLOG)
            identity = identify(self._name, self._directory)
        except OSError:
            listener.close()
            raise
        self._listener, self._identity = listener, identity
        self._watch()

    def restore(self) -> bool:
        """Create the sockets again if they, or their directory, have been removed; return whether. Raises OSError.

        If another supervisor has become active, the socket of new calls is left to it.
        """
        if self._listener.fileno() < 0:
            return False
        if not is_open(self._path, self._directory):
            directory = self._open_directory()
            os.close(self._directory)
            self._directory = directory
        active, has_name = self._find(ACTIVE_SOCKET), self._find(self._name) == self._identity
        self.is_active &= active in (None, self._identity)
        if has_name and (not self.is_active or active is not None):
            return False
        if not has_name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=self._directory)
            removed = self._listener
            self._listen()
            self._loop.unwatch(removed.fileno())
            removed.close()
        if self.is_active:
            self.become_active()
        return True

    def _find(self, name: str) -> tuple[int, int] | None:
        return identify(name, self._directory)

    def become_active(self) -> None:
        """Receive all new calls from now on. The socket's name is replaced in one step, so that it always exists."""
        new_name = self._name + ".new"
        os.link(self._name, new_name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.rename(new_name, ACTIVE_SOCKET, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self.is_active = True

    def retire(self) -> None:
        """Leave the new calls to another supervisor: `restore` creates only this supervisor's socket from now on."""
        self.is_active = False

    def close(self) -> None:
        """Stop accepting; remove the socket, and the other name if it still refers to this socket."""
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        try:
            for name in (self._name, ACTIVE_SOCKET):
                if self._find(name) == self._identity:
                    os.unlink(name, dir_fd=self._directory)
        except OSError:
            pass  # the directory or the socket has been removed
        os.close(self._directory)

    def _watch(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.watch(self._listener.fileno(), READ, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptor is free; the listener stays ready, so it is not watched for a while
            log.error("cannot accept connection", extra={"reason": str(error)})
            self._loop.unwatch(self._listener.fileno())
            self._loop.call_later(_ACCEPT_PAUSE, self._watch)
            return
        _, uid = peer_process(connection)
        if uid not in self._peers:
            log.error("rejected connection of another user", extra={"uid": uid})
            connection.close()
            return
        connection = UnixSocket(connection)
        connection.setblocking(False)
        self._waiting[connection] = None
        if len(self._waiting) > _MAX_WAITING:
            self._close_waiting(next(iter(self._waiting)))
        buffer = LineBuffer(_MAX_LINE_BYTES)
        self._loop.watch(connection.fileno(), READ, lambda: self._read_request(connection, buffer))

    def _close_waiting(self, connection: socket.socket) -> None:
        del self._waiting[connection]
        self._loop.unwatch(connection.fileno())
        connection.close()

    def _read_request(self, connection: socket.socket, buffer: LineBuffer) -> None:
        """Read once. `buffer`: the received part of the first line."""
        try:
            data = connection.recv(_READ_SIZE)
            lines = buffer.feed(data)
            if data and not lines:
                return
            request = decode_slices(lines[0]) if data else None
        except BlockingIOError:
            return
        except (OSError, LineTooLong, InvalidJSON) as error:
            log.error("cannot read request", extra={"reason": str(error)})
            request = None
        if request is None:
            self._close_waiting(connection)
            return
        self._loop.unwatch(connection.fileno())
        del self._waiting[connection]
        try:
            self._on_request(connection, request, b"\n".join([*lines[1:], buffer.pending]))
        except (KeyError, InvalidJSON, ProtocolError) as error:
            log.error("invalid request", extra={"reason": repr(error)})
            connection.close()


class FinalReplies:
    """The last bytes on connections that are closed then. Of too many that are not read, the oldest one gives way."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._unsent: dict[socket.socket, bytes] = {}  # the oldest first

    def send(self, connection: socket.socket, data: bytes) -> None:
        """Send the last bytes on a connection, as soon as it is writable; then close it."""
        self._unsent[connection] = data
        if self._continue(connection):
            self._loop.watch(connection.fileno(), WRITE, lambda: self._continue(connection))
            if len(self._unsent) > _MAX_WAITING:
                self._close(next(iter(self._unsent)))

    def _continue(self, connection: socket.socket) -> bool:
        """Send more; return whether some bytes are left."""
        try:
            self._unsent[connection] = self._unsent[connection][connection.send(self._unsent[connection]) :]
        except BlockingIOError:
            return True
        except OSError:
            self._unsent[connection] = b""
        if not self._unsent[connection]:
            self._close(connection)
            return False
        return True

    def _close(self, connection: socket.socket) -> None:
        del self._unsent[connection]
        self._loop.unwatch(connection.fileno())
        connection.close()
