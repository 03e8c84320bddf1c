"""The sockets that the doors listen on: opened, described for the log, and cleared away."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harp_daemon.sockets import ResolveError, listening_places
from harpcaller.config import Address

_BACKLOG = 1024


class Listener:
    """A socket that listens. Closing it removes the file of a Unix socket, unless it is another's by now.

    Args:
        listening: the socket, non-blocking.
        path: the file, of a Unix socket.
    """

    def __init__(self, listening: socket.socket, path: Path | None = None) -> None:
        self.socket = listening
        self.path = path
        self._identity = _identity(path) if path is not None else None

    @property
    def fields(self) -> dict[str, str | int]:
        """Where it listens, as fields for the log."""
        if self.path is not None:
            return {"address": f"unix:{self.path}"}
        address, port = self.socket.getsockname()[:2]
        return {"address": address, "port": port}

    def close(self) -> None:
        """Stop listening. Closing again does nothing."""
        if self.path is not None and self.socket.fileno() >= 0:
            try:
                with _directory_lock(self.path):
                    if _identity(self.path) == self._identity:
                        self.path.unlink()
            except OSError:
                pass  # it has been removed with its directory, or may not be: the next start deals with it
        self.socket.close()


def reason(error: OSError | ResolveError) -> str:
    """Why it can't be listened on."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


async def listen_tcp(address: Address) -> list[Listener]:
    """Listen on an address; a name may stand for several.

    Args:
        address: where.

    Raises:
        OSError: it can't be listened on.
        ResolveError: it is not an address, and no address is known for it as a name.
    """
    opened: list[Listener] = []
    port = address.port
    try:
        for family, host in await asyncio.to_thread(listening_places, address.host):
            listening = socket.socket(family, socket.SOCK_STREAM)
            opened.append(Listener(listening))
            listening.setblocking(False)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host is not None)
            listening.bind((host, port))
            listening.listen(_BACKLOG)
            port = listening.getsockname()[1]  # when 0 was asked for, one free port for all
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened


def listen_unix(path: Path, mode: int) -> Listener:
    """Listen on a Unix socket; a file that a dead process left is taken over.

    Args:
        path: where; its directory is made if it is missing.
        mode: the file's permissions, from its first moment on never more than these.

    Raises:
        OSError: it can't be listened on; `errno.EADDRINUSE`: a running process does.
    """
    path.parent.mkdir(mode=0o755, exist_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listening.fileno(), mode)  # on Linux the file is made with the socket's own permissions
        with _directory_lock(path):
            if _is_abandoned(path):
                path.unlink()
            listening.bind(str(path))
            path.chmod(mode)  # what the umask took away
            listening.listen(_BACKLOG)
        listening.setblocking(False)
        return Listener(listening, path)
    except BaseException:
        listening.close()
        raise


def _is_abandoned(path: Path) -> bool:
    """Whether the path is a socket that nobody listens on."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        # A full backlog is BlockingIOError: somebody listens.
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


@contextmanager
def _directory_lock(path: Path) -> Iterator[None]:
    """Nobody else of ours takes over or removes a socket in this directory meanwhile."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
