"""The worker's end of its channel to the supervisor: lines of arguments in, whole lines of output out."""

from __future__ import annotations

import os
import select
from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, SOL_SOCKET, socket  # without the wrappers of the module `socket`

from harpd.worker.signals import SignalGuard

_READ_SIZE = 1 << 16
#: The option SO_COOKIE, which the module has no name for: it returns a number that no other socket of the system has.
_COOKIE, _COOKIE_SIZE = 57, 8


class Channel:
    """The channel of this process, and not of the processes that it forks.

    A call without records needs two system calls, on the descriptor. Records are written through a socket object, whose
    check of the descriptor and write without waiting are cheaper, but whose creation copies 60 pages.

    Args:
        descriptor: a stream socket.
        guard: defers signals while bytes are written.

    Raises:
        OSError: in every method: the supervisor has died, or the procedure has closed the descriptor.
    """

    def __init__(self, descriptor: int, guard: SignalGuard) -> None:
        self._descriptor = descriptor
        self._guard = guard
        self._owner = os.getpid()
        self._file_id = _file_id(descriptor)
        self._socket: socket | None = None  # created for the first record
        self._cookie = b""
        self._unwritten = memoryview(b"")  # the rest of records whose writing has begun

    def read_line(self) -> bytes:
        """Wait for the next line and read it; return b"" if the supervisor has closed its end.

        The supervisor sends one line per call, and waits for the call's end.
        """
        line = os.read(self._descriptor, _READ_SIZE)
        if not line or line.endswith(b"\n"):
            return line
        pieces = [line]
        while not pieces[-1].endswith(b"\n"):
            pieces.append(os.read(self._descriptor, _READ_SIZE))
            if not pieces[-1]:
                raise ConnectionAbortedError("the supervisor closed the channel")
        return b"".join(pieces)

    def exit_if_forked(self) -> None:
        """Exit if the procedure has forked and this is the child: it must not write to the caller."""
        if os.getpid() != self._owner:
            os._exit(0)

    def write_end(self, lines: bytes) -> None:
        """Write the last lines of a call, while signals are deferred; wait while the supervisor does not read."""
        if self._unwritten:
            lines = bytes(self._unwritten) + lines
            self._unwritten = memoryview(b"")
        self._check_descriptor()
        written = os.write(self._descriptor, lines)
        while written < len(lines):  # a signal that is deferred has interrupted it
            lines = lines[written:]
            written = os.write(self._descriptor, lines)

    def _check_descriptor(self) -> None:
        """Raise ConnectionAbortedError if the procedure has closed the descriptor, whose number may be in use again."""
        if _file_id(self._descriptor) != self._file_id:
            raise ConnectionAbortedError("the procedure closed the channel")

    def write_record(self, line: bytes) -> None:
        """Write the line of a record; wait while the supervisor does not read. A child of the worker exits here."""
        self.exit_if_forked()
        guard = self._guard
        guard.defer()  # an exception between the write and its count would repeat a part of the line
        try:
            if self._unwritten:
                self._unwritten = memoryview(bytes(self._unwritten) + line)
            elif (written := self._send(line)) < len(line):
                self._unwritten = memoryview(line)[written:]
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
        if self._socket is None:
            self._check_descriptor()
            self._socket = socket(fileno=self._descriptor)
            self._cookie = self._socket.getsockopt(SOL_SOCKET, _COOKIE, _COOKIE_SIZE)
        elif self._socket.getsockopt(SOL_SOCKET, _COOKIE, _COOKIE_SIZE) != self._cookie:
            raise ConnectionAbortedError("the procedure closed the channel")
        try:
            return self._socket.send(data, MSG_DONTWAIT | MSG_NOSIGNAL)
        except BlockingIOError:
            return 0


def _file_id(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
