"""A call's end of its channel to the warden: a line comes in, the lines of the wire go out, each of them whole."""

from __future__ import annotations

import os
import select

from harpd.worker.signals import SignalGuard

__all__ = ["Channel"]

_READ_SIZE = 1 << 16


class Channel:
    """Speaks for this process, not for those that it forks.

    Args:
        descriptor: a stream socket.
        limits: held back while bytes are written.

    Raises:
        OSError: of every method: the warden is gone, or the procedure closed the descriptor.
    """

    def __init__(self, descriptor: int, limits: SignalGuard) -> None:
        self._descriptor = descriptor
        self._limits = limits
        self._owner = os.getpid()
        self._identity = _identity(descriptor)
        self._begun = b""  # of a line that comes
        self._unwritten = bytearray()  # the rest of a line whose writing a limit interrupted goes first

    def wait_for_line(self) -> bool:
        """Wait until another line begins to come; False: none will."""
        os.set_blocking(self._descriptor, True)
        self._begun = os.read(self._descriptor, _READ_SIZE)
        return bool(self._begun)

    def read_line(self) -> bytes:
        """Read the line that comes. There is only one at a time."""
        pieces = [self._begun] if self._begun else []
        self._begun = b""
        while not pieces or not pieces[-1].endswith(b"\n"):
            piece = os.read(self._descriptor, _READ_SIZE)
            if not piece:
                raise ConnectionAbortedError("the warden closed the channel")
            pieces.append(piece)
        os.set_blocking(self._descriptor, False)
        return b"".join(pieces)

    def write(self, lines: bytes) -> None:
        """Write whole lines; wait while the warden does not take them.

        A child that the procedure forked has nothing to say to the caller: it ends here.
        """
        if os.getpid() != self._owner:
            os._exit(0)
        self._unwritten += lines
        while self._unwritten:
            limits = self._limits
            limits.defer()  # an exception between the write and its count would repeat a part of the line
            try:
                # A procedure that closes what it does not know may have another file under this number by now.
                if _identity(self._descriptor) != self._identity:
                    raise ConnectionAbortedError("the procedure closed the channel")
                del self._unwritten[: os.write(self._descriptor, self._unwritten)]
            except BlockingIOError:
                pass
            finally:
                limits.deliver()
            if self._unwritten:
                writable = select.poll()
                writable.register(self._descriptor, select.POLLOUT)
                writable.poll()


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
