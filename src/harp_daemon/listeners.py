"""Listening sockets of both daemons: resolved, opened, described for the log, and removed."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: A family of addresses, and an address to bind.
BindAddress = tuple[socket.AddressFamily, str]

_BACKLOG = 1024


class ListenError(Exception):
    """An address cannot be listened on. The message is the reason.

    Attributes:
        in_use: whether the address is in use by a process or, for a Unix socket, by another file.
    """

    def __init__(self, reason: str, in_use: bool = False) -> None:
        super().__init__(reason)
        self.in_use = in_use


class ResolveError(ListenError):
    """An address is neither an IP address nor a name that resolves. The message names it and the reason."""


class Listener:
    """A listening socket, non-blocking; a Unix socket has a file."""

    def __init__(self, listening: socket.socket, path: Path | None = None) -> None:
        self.socket = listening
        self.path = path
        self._identity = _file_identity(path) if path is not None else None

    @property
    def fields(self) -> dict[str, str | int]:
        """The address, as fields for the log."""
        if self.path is not None:
            return {"address": f"unix:{self.path}"}
        address, port = self.socket.getsockname()[:2]
        return {"address": address, "port": port}

    def close(self) -> None:
        """Stop listening and remove the file of a Unix socket, unless another process has replaced it; once only."""
        if self.path is not None and self.socket.fileno() >= 0:
            # OSError: the directory was removed or is read-only; the next start removes the file.
            with suppress(OSError), _directory_lock(self.path):
                if _file_identity(self.path) == self._identity:
                    self.path.unlink()
        self.socket.close()


def listen_tcp(address: str | None, port: int) -> list[Listener]:
    """Listen on all addresses that `resolve` returns; port 0 is a free port, the same for all.

    Raises:
        ListenError: one of the addresses cannot be listened on; then none is.
    """
    opened: list[Listener] = []
    try:
        for family, host in resolve(address):
            dual_stack = address in (None, "*") and family == socket.AF_INET6
            listening = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=dual_stack)
            opened.append(Listener(listening))
            listening.setblocking(False)
            port = listening.getsockname()[1]
    except OSError as error:
        for listener in opened:
            listener.close()
        raise _to_listen_error(error) from error
    return opened


def resolve(address: str | None) -> list[BindAddress]:
    """Return the addresses to bind for a configured address or name; None or ``*``: every address.

    It may wait for a name server. On a machine without IPv6, the IPv6 addresses of a name are ignored if the name has
    others: many hosts files give ``localhost`` both.

    Raises:
        ResolveError: it is not an address, and as a name it does not resolve.
    """
    if address is None or address == "*":
        # One socket for IPv6 and IPv4, if possible.
        dual_stack = socket.has_dualstack_ipv6() and _can_bind(socket.AF_INET6, "::")
        return [(socket.AF_INET6, "::") if dual_stack else (socket.AF_INET, "0.0.0.0")]  # noqa: S104 - as configured
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # from the codec that prepares a name for DNS
        raise ResolveError(f"cannot resolve {address!r}: not a valid host name") from error
    except OSError as error:
        raise ResolveError(f"cannot resolve {address!r}: {error.strerror}") from error
    addresses: list[BindAddress] = list(dict.fromkeys((family, str(name[0])) for family, _, _, _, name in found))
    ipv4 = [one for one in addresses if one[0] == socket.AF_INET]
    return addresses if not ipv4 or _can_bind(socket.AF_INET6, "::1") else ipv4


def _can_bind(family: socket.AddressFamily, address: str) -> bool:
    """Return whether this machine has the address, on any port."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def listen_unix(path: Path, mode: int) -> Listener:
    """Listen on a Unix socket, whose file has these permissions from its creation on; replace that of a dead process.

    The directory is created if it is missing. Raises `ListenError` if the socket cannot be listened on.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        os.fchmod(listening.fileno(), mode)  # Linux creates the file with the permissions of the socket
        with _directory_lock(path):
            if _is_abandoned(path):
                path.unlink()
            listening.bind(str(path))
            path.chmod(mode)  # the umask has removed some
            listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise _to_listen_error(error) from error
    return Listener(listening, path)


def _to_listen_error(error: OSError) -> ListenError:
    return ListenError(error.strerror or str(error), error.errno == errno.EADDRINUSE)


def _is_abandoned(path: Path) -> bool:
    """Return whether the path is a socket that no process listens on."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        # A full backlog raises BlockingIOError: a process listens.
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


@contextmanager
def _directory_lock(path: Path) -> Iterator[None]:
    """Lock the directory of `path`: HARP's processes replace or remove sockets in it under this lock."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
