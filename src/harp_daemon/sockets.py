"""The sockets of both daemons: addresses, listeners, socket options, and the name of a peer."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harp_daemon.unix_sockets import refuse_descriptors

_BACKLOG = 1024
#: A lost peer is noticed after about two minutes.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


class ListenError(Exception):
    """An address cannot be listened on; the message is the reason. `in_use`: a process or a file has the address."""

    def __init__(self, reason: str, in_use: bool = False) -> None:
        super().__init__(reason)
        self.in_use = in_use


class ResolveError(ListenError):
    """An address is neither an IP address nor a name that resolves. The message names it and the reason."""


class Listener:
    """A listening socket, non-blocking; a Unix socket has a file with a mode. `name` is its address as configured."""

    def __init__(self, listening: socket.socket, path: Path | None = None, name: str = "", mode: int = 0o600) -> None:
        self.socket = listening
        self.path = path
        self.name = name
        self._mode = mode
        self._identity = _file_identity(path) if path is not None else None

    @property
    def is_tls(self) -> bool:
        """Whether its clients must speak TLS."""
        return self.name.startswith("tls:")

    @property
    def fields(self) -> dict[str, str | int]:
        """The address, as fields for the log."""
        if self.path is not None:
            return {"address": f"unix:{self.path}"}
        address, port = self.socket.getsockname()[:2]
        return {"address": address, "port": port}

    @property
    def is_missing(self) -> bool:
        """Whether the file of a Unix socket was removed, so that no client can connect."""
        return self.path is not None and _file_identity(self.path) is None

    def open_again(self) -> None:
        """Listen on a new socket with a new file. Raises `ListenError`; then the old socket stays."""
        assert self.path is not None
        again = listen_unix(self.path, self._mode, self.name)
        self.socket.close()
        self.socket, self._identity = again.socket, again._identity

    def close(self) -> None:
        """Stop listening and remove the file of a Unix socket, unless another process has replaced it; once only."""
        if self.path is not None and self.socket.fileno() >= 0:
            # OSError: the directory was removed or is read-only; the next start removes the file.
            with suppress(OSError), _path_lock(self.path):
                if _file_identity(self.path) == self._identity:
                    self.path.unlink()
        self.socket.close()


def listen_tcp(address: str | None, port: int, name: str = "") -> list[Listener]:
    """Listen on all addresses of `resolve`, or raise `ListenError`; port 0 is a free port, the same for all."""
    opened: list[Listener] = []
    try:
        for family, host in resolve(address):
            dual_stack = address in (None, "*") and family == socket.AF_INET6
            listening = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=dual_stack)
            opened.append(Listener(listening, name=name))
            listening.setblocking(False)
            port = listening.getsockname()[1]
    except OSError as error:
        for listener in opened:
            listener.close()
        raise _to_listen_error(error) from error
    return opened


def resolve(address: str | None) -> Sequence[tuple[socket.AddressFamily, str]]:
    """Return the addresses to bind for a configured address or name; None or ``*``: every address.

    It may wait for a name server. On a machine without IPv6, the IPv6 addresses of a name are ignored if the name has
    others: many hosts files give ``localhost`` both. Raises `ResolveError`: it is no address, and does not resolve.
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
    addresses = list(dict.fromkeys((family, str(name[0])) for family, _, _, _, name in found))
    ipv4 = [one for one in addresses if one[0] == socket.AF_INET]
    return addresses if not ipv4 or _can_bind(socket.AF_INET6, "::1") else ipv4


def _can_bind(family: socket.AddressFamily, address: str) -> bool:
    """Return whether this machine has the address, on any port."""
    with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def listen_unix(path: Path, mode: int, name: str = "") -> Listener:
    """Listen on a Unix socket; its file has these permissions from the start. The socket of a dead process is replaced.

    The directory is created if it is missing. Raises `ListenError`.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        os.fchmod(listening.fileno(), mode)  # Linux creates the file with the permissions of the socket
        with _path_lock(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            # Only a socket without a process refuses; a full backlog has another error.
            if path.is_socket() and probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()
            listening.bind(str(path))
            path.chmod(mode)  # the umask has removed some
            refuse_descriptors(listening)
            listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise _to_listen_error(error) from error
    return Listener(listening, path, name, mode)


def _to_listen_error(error: OSError) -> ListenError:
    return ListenError(error.strerror or str(error), error.errno == errno.EADDRINUSE)


@contextmanager
def _path_lock(path: Path) -> Iterator[None]:
    """Lock a path: HARP's processes replace or remove its socket under this lock. Raises OSError.

    The lock is a file beside it that only this user can open: others could hold a lock on the directory for ever.
    """
    file = path.with_name(f".{path.name}.lock")
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise PermissionError(errno.EACCES, f"{file}: not a private file of this user; remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _file_identity(file) != (status.st_dev, status.st_ino):
                continue  # the last holder has removed it
            yield
            file.unlink()
            return
        finally:
            os.close(descriptor)


def _file_identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        found = path.lstat()
        return found.st_dev, found.st_ino
    return None


def configure_socket(connection: socket.socket) -> None:
    """Make a socket non-blocking; a TCP socket also sends without delay and detects a lost peer. Raises OSError."""
    connection.setblocking(False)
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def peer_name(connection: socket.socket, address: Any) -> str:
    """Return the peer as text for logs: its address, from `accept`; for a Unix socket, its user."""
    if connection.family == socket.AF_UNIX:
        return f"uid:{peer_process(connection)[1]}"
    host = str(address[0]).removeprefix("::ffff:")  # IPv4 on a socket for both
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def peer_process(connection: socket.socket) -> tuple[int, int]:
    """Return the process id and the user id of the peer of a Unix socket. Raises OSError."""
    pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user
