"""The worker's end of its channel to the supervisor: lines of arguments in, whole lines of output out."""

from __future__ import annotations

import _socket  # without the wrappers of `socket`, for the many records of a stream
import os
import select

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
    """The channel of this process, and not of the processes that it forks.

    Args:
        descriptor: a stream socket.
        guard: defers signals while bytes are written.

    Raises:
        OSError: in every method: the supervisor has died, or the procedure has closed the descriptor.
    """

    def __init__(self, descriptor: int, guard: SignalGuard) -> None:
        self._descriptor = descriptor
        self._socket = _socket.socket(fileno=descriptor)
        self._guard = guard
        self._owner = _fork_depth
        self._cookie = self._socket.getsockopt(_socket.SOL_SOCKET, _COOKIE, _COOKIE_SIZE)
        self._line_start = b""  # the first bytes of the next line, from `wait_for_line`
        self._unwritten = memoryview(b"")  # the rest of lines whose writing has begun

    def wait_for_line(self) -> bool:
        """Wait until the next line begins to arrive; return False if the supervisor has closed its end."""
        os.set_blocking(self._descriptor, True)
        self._line_start = os.read(self._descriptor, _READ_SIZE)
        return bool(self._line_start)

    def read_line(self) -> bytes:
        """Read the next line. The supervisor sends one per call and waits for the call's end."""
        pieces = [self._line_start] if self._line_start else []
        self._line_start = b""
        while not pieces or not pieces[-1].endswith(b"\n"):
            piece = os.read(self._descriptor, _READ_SIZE)
            if not piece:
                raise ConnectionAbortedError("the supervisor closed the channel")
            pieces.append(piece)
        os.set_blocking(self._descriptor, False)
        return b"".join(pieces)

    def write(self, lines: bytes) -> None:
        """Write whole lines; wait while the supervisor does not read.

        A child that the procedure has forked must not write to the caller: it exits here.
        """
        if _fork_depth != self._owner:
            os._exit(0)
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
        writable.register(self._descriptor, select.POLLOUT)
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
        if self._socket.getsockopt(_socket.SOL_SOCKET, _COOKIE, _COOKIE_SIZE) != self._cookie:
            raise ConnectionAbortedError("the procedure closed the channel")
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
