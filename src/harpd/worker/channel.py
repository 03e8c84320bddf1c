"""The worker's end of its channel to the supervisor: lines of arguments in, whole lines of output out."""

from __future__ import annotations

import _socket  # without the wrappers of `socket`, which each call would pay for
import os
import select
from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, SOL_SOCKET

from harpd.worker.signals import SignalGuard

_READ_SIZE = 1 << 16
#: The option SO_COOKIE, which the module has no name for: it returns a number that no other socket of the system has.
_COOKIE, _COOKIE_SIZE = 57, 8

#: How many forks lie between this process and the one that has loaded this module.
_fork_depth = 0


def _count_fork() -> None:
    global _fork_depth
    _fork_depth += 1


os.register_at_fork(after_in_child=_count_fork)


class Channel:
    """The channel of a worker, and not of the processes that the worker forks. The zygote creates it before the fork.

    Args:
        descriptor: a stream socket; the channel owns it.
        guard: defers signals while bytes are written.

    Raises:
        OSError: in every method: the supervisor has died, or the procedure has closed the descriptor.
    """

    def __init__(self, descriptor: int, guard: SignalGuard) -> None:
        self._socket = _socket.socket(fileno=descriptor)
        self._guard = guard
        self._owner = _fork_depth + 1  # the worker, which is not forked yet
        self._cookie = self._socket.getsockopt(SOL_SOCKET, _COOKIE, _COOKIE_SIZE)
        self._unwritten = memoryview(b"")  # the rest of lines whose writing has begun

    def close(self) -> None:
        """Close it in this process."""
        self._socket.close()

    def read_line(self) -> bytes:
        """Wait for the next line and read it; return b"" if the supervisor has closed its end.

        The supervisor sends one line per call, and waits for the call's end.
        """
        line = self._socket.recv(_READ_SIZE)
        if not line or line.endswith(b"\n"):
            return line
        pieces = [line]
        while not pieces[-1].endswith(b"\n"):
            pieces.append(self._socket.recv(_READ_SIZE))
            if not pieces[-1]:
                raise ConnectionAbortedError("the supervisor closed the channel")
        return b"".join(pieces)

    def exit_if_forked(self) -> None:
        """Exit if the procedure has forked and this is the child: it must not write to the caller."""
        if _fork_depth != self._owner:
            os._exit(0)

    def write(self, lines: bytes) -> None:
        """Write whole lines; wait while the supervisor does not read. A child of the worker exits here."""
        self.exit_if_forked()
        guard = self._guard
        guard.defer()  # an exception between the write and its count would repeat a part of the line
        try:
            if self._unwritten:
                self._unwritten = memoryview(bytes(self._unwritten) + lines)
            elif (written := self._send(lines)) < len(lines):
                self._unwritten = memoryview(lines)[written:]
        finally:
            guard.deliver()
        if self._unwritten:
            self._write_rest()

    def _write_rest(self) -> None:
        writable = select.poll()
        writable.register(self._socket.fileno(), select.POLLOUT)
        while self._unwritten:
            writable.poll()
            self._guard.defer()
            try:
                self._unwritten = self._unwritten[self._send(self._unwritten) :]
            finally:
                self._guard.deliver()

    def _send(self, data: bytes | memoryview) -> int:
        """Send what fits; return how many bytes that are."""
        # The procedure may have closed the descriptor, and its number may belong to another file by now.
        if self._socket.getsockopt(SOL_SOCKET, _COOKIE, _COOKIE_SIZE) != self._cookie:
            raise ConnectionAbortedError("the procedure closed the channel")
        try:
            return self._socket.send(data, MSG_DONTWAIT | MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
