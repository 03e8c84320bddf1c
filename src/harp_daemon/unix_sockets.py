"""Unix sockets of peers that are not trusted: they may pass descriptors, which no protocol of HARP uses.

The kernel closes a passed descriptor in the process that receives its message, or that closes the socket before. With a
socket that lingers, for example, this process then waits for as long as its peer likes. So the kernel refuses
descriptors, since Linux 6.16; before, they are received, and closed without a wait.
"""

from __future__ import annotations

import os
import socket
import stat
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

_SO_PASSRIGHTS = 83  #: Whether the kernel accepts descriptors from the peer.
_MOST = 253  #: The most descriptors of a message.
_SPACE = socket.CMSG_SPACE(_MOST * array("i").itemsize)
_DISCARDED = 64 * 1024  #: Bytes that are discarded at once.
_MOST_MESSAGES = 1000  #: More messages than the buffer of a socket holds.
_NO_LINGER = bytes(8)


def refuse_descriptors(listening: socket.socket) -> None:
    """Have the kernel refuse descriptors from the peers of a listening Unix socket, or of one of a pair."""
    with suppress(OSError):
        listening.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


class UnixSocket(socket.socket):
    """A connected Unix socket, which takes over `connected`. A peer that passes a descriptor has disconnected."""

    def __init__(self, connected: socket.socket) -> None:
        super().__init__(socket.AF_UNIX, connected.type, connected.proto, fileno=connected.detach())
        refuse_descriptors(self)

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """See `socket.socket`."""
        data, ancillary, _, _ = self.recvmsg(size, _SPACE, flags | socket.MSG_CMSG_CLOEXEC)
        if ancillary:
            _close_passed(ancillary)
            return b""
        return data

    def close(self) -> None:
        """See `socket.socket`; also receive what was not read, so that no descriptor is left in it."""
        flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        with suppress(OSError):
            self.shutdown(socket.SHUT_RD)  # nothing more can arrive
            empty = 0  # messages in a row; those of a peer look like the end
            while empty < (1 if self.type == socket.SOCK_STREAM else _MOST_MESSAGES):
                data, ancillary, _, _ = self.recvmsg(_DISCARDED, _SPACE, flags)
                _close_passed(ancillary)
                empty = 0 if data or ancillary else empty + 1
        super().close()


def _close_passed(ancillary: Iterable[tuple[int, int, bytes]]) -> None:
    """Close passed descriptors without a wait."""
    slow: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors = array("i", data[: len(data) - len(data) % array("i").itemsize])
            slow += [descriptor for descriptor in descriptors if not _close_socket(descriptor)]
    if slow:
        import threading  # the supervisor has no other thread, and needs the module for this only

        threading.Thread(target=_close_all, args=(slow,), daemon=True).start()


def _close_socket(descriptor: int) -> bool:
    """Close a socket that can be closed without a wait; return False for any other descriptor."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with suppress(OSError):
        passed: Any = socket.socket(fileno=descriptor)
        if passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            passed.detach()
            return False
        if passed.family == socket.AF_UNIX:
            passed = UnixSocket(passed)
        passed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        passed.close()
        return True
    return False


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)
