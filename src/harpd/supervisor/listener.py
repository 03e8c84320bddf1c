"""Where connections to the warden arrive: the sockets it listens on, a connection's first line, a last answer."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable

from harp.protocol.fields import ProtocolError
from harp.protocol.json_text import InvalidJSON, JSONObject
from harp.protocol.lines import LineBuffer, LineTooLong
from harp_daemon.sliced_json import decode_slices
from harpd.supervisor.event_loop import READ, WRITE, EventLoop

__all__ = ["FinalReply", "Listener"]

log = logging.getLogger("harpd.supervisor")

_READ_SIZE = 1 << 16
#: The most bytes of a first line; the gate has its own, lower limit for what comes from outside.
_LONGEST_LINE = 1 << 30
#: Seconds without a look at new connections when there is no descriptor for them.
_ACCEPT_PAUSE = 0.1
_BACKLOG = 4096
_CREDENTIALS = struct.Struct("3i")

#: Names in the runtime directory: the socket of the warden that takes new calls; what each warden's own begins with.
ACTIVE_SOCKET, SOCKET_PREFIX = "warden", "warden-"


class Listener:
    """Listens at a socket in the runtime directory that carries this warden's name, and hands on first lines.

    Args:
        loop: the event loop.
        directory: the runtime directory.
        warden: this warden's incarnation.
        serve: called with each connection, its first line and what came behind it; what it raises refuses the
            request.

    Raises:
        OSError: the socket can't be made.
    """

    def __init__(
        self, loop: EventLoop, directory: str, warden: str, serve: Callable[[socket.socket, JSONObject, bytes], None]
    ) -> None:
        self._loop = loop
        self._serve = serve
        # By way of the descriptor, for a socket's address has no more than 107 bytes.
        self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._name = SOCKET_PREFIX + warden
        self._open = True
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(f"/proc/self/fd/{self._directory}/{self._name}")
        os.chmod(self._name, 0o600, dir_fd=self._directory)
        self._listener.listen(_BACKLOG)
        self._listen()

    def become_current(self) -> None:
        """Be the one whom new calls go to: in one step, so that there is always one."""
        making = self._name + ".new"
        os.link(self._name, making, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.rename(making, ACTIVE_SOCKET, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def close(self) -> None:
        """Take no connection any more; remove the socket, and the other name if it is still ours."""
        self._open = False
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        try:
            own = os.stat(self._name, dir_fd=self._directory).st_ino
            os.unlink(self._name, dir_fd=self._directory)
            if os.stat(ACTIVE_SOCKET, dir_fd=self._directory).st_ino == own:
                os.unlink(ACTIVE_SOCKET, dir_fd=self._directory)
        except OSError:
            pass  # the directory is gone, or somebody has tidied up

    def _listen(self) -> None:
        if self._open:
            self._loop.watch(self._listener.fileno(), READ, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptor is free: the listener stays ready, so look away
            log.error("a connection can't be taken", extra={"reason": str(error)})
            self._loop.unwatch(self._listener.fileno())
            self._loop.call_later(_ACCEPT_PAUSE, self._listen)
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid not in (0, os.geteuid()):
            log.error("a connection of another user was refused", extra={"uid": uid})
            connection.close()
            return
        connection.setblocking(False)
        _FirstLine(self._loop, connection, self._serve)


class _FirstLine:
    """Reads a connection's first line, however slowly it comes."""

    def __init__(
        self, loop: EventLoop, connection: socket.socket, done: Callable[[socket.socket, JSONObject, bytes], None]
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._done = done
        self._buffer = LineBuffer(_LONGEST_LINE)
        loop.watch(connection.fileno(), READ, self._on_ready)

    def _on_ready(self) -> None:
        try:
            data = self._connection.recv(_READ_SIZE)
            lines = self._buffer.feed(data)
            if data and not lines:
                return
            self._loop.unwatch(self._connection.fileno())
            if not data:
                self._connection.close()
                return
            request = decode_slices(lines[0])
        except BlockingIOError:
            return
        except (OSError, LineTooLong, InvalidJSON) as error:
            log.error("a connection without a request was closed", extra={"reason": str(error)})
            self._loop.unwatch(self._connection.fileno())
            self._connection.close()
            return
        try:
            self._done(self._connection, request, b"\n".join([*lines[1:], self._buffer.pending]))
        except (KeyError, InvalidJSON, ProtocolError) as error:
            log.error("a request that is none was refused", extra={"reason": repr(error)})
            self._connection.close()


class FinalReply:
    """Sends the last bytes on a connection, then closes it."""

    def __init__(self, loop: EventLoop, connection: socket.socket, data: bytes) -> None:
        self._loop = loop
        self._connection = connection
        self._rest = memoryview(data)
        self._send()

    def _send(self) -> None:
        try:
            self._rest = self._rest[self._connection.send(self._rest) :]
        except BlockingIOError:
            pass
        except OSError:
            self._rest = self._rest[:0]
        if self._rest:
            self._loop.watch(self._connection.fileno(), WRITE, self._send)
        else:
            self._loop.unwatch(self._connection.fileno())
            self._connection.close()
