"""The worker's end of its channel to the supervisor: lines of arguments in, whole lines of output out."""

from __future__ import annotations

import os
import select

from harpd.worker.signals import SignalGuard

_READ_SIZE = 1 << 16


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
        self._guard = guard
        self._owner = os.getpid()
        self._file_id = _file_id(descriptor)
        self._line_start = b""  # the first bytes of the next line, from `wait_for_line`
        self._unwritten = bytearray()  # includes the rest of a line whose writing a signal has interrupted

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
        if os.getpid() != self._owner:
            os._exit(0)
        self._unwritten += lines
        while self._unwritten:
            guard = self._guard
            guard.defer()  # an exception between the write and its count would repeat a part of the line
            try:
                # The procedure may have closed the descriptor, and its number may belong to another file by now.
                if _file_id(self._descriptor) != self._file_id:
                    raise ConnectionAbortedError("the procedure closed the channel")
                del self._unwritten[: os.write(self._descriptor, self._unwritten)]
            except BlockingIOError:
                pass
            finally:
                guard.deliver()
            if self._unwritten:
                writable = select.poll()
                writable.register(self._descriptor, select.POLLOUT)
                writable.poll()


def _file_id(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
