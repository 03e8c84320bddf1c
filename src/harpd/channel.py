"""A call's end of its channel to the warden: one line comes in, the lines of the wire go out, each of them whole."""

from __future__ import annotations

import os
import select

from harp.protocol.daemon import Message, encode_message
from harpd.limits import Limits

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

    def __init__(self, descriptor: int, limits: Limits) -> None:
        self._descriptor = descriptor
        self._limits = limits
        self._owner = os.getpid()
        self._identity = _identity(descriptor)
        self._unwritten = bytearray()  # the rest of a line whose writing a limit interrupted goes first
        self._writable = select.poll()
        self._writable.register(descriptor, select.POLLOUT)

    def read_line(self) -> bytes:
        """Read the one line that comes."""
        pieces: list[bytes] = []
        while not pieces or not pieces[-1].endswith(b"\n"):
            piece = os.read(self._descriptor, _READ_SIZE)
            if not piece:
                raise ConnectionAbortedError("the warden closed the channel")
            pieces.append(piece)
        os.set_blocking(self._descriptor, False)
        return b"".join(pieces)

    def write(self, message: Message) -> None:
        """Write a message's line; wait while the warden does not take it.

        A child that the procedure forked has nothing to say to the caller: it ends here.

        Raises:
            NotJSON: the message can't be written as JSON.
        """
        self.write_line(encode_message(message))

    def write_line(self, line: bytes) -> None:
        """Write a line for the warden itself, or one that is encoded already."""
        if os.getpid() != self._owner:
            os._exit(0)
        self._unwritten += line
        while self._unwritten:
            with self._limits:  # an exception between the write and its count would repeat a part of the line
                try:
                    # A procedure that closes what it does not know may have another file under this number by now.
                    if _identity(self._descriptor) != self._identity:
                        raise ConnectionAbortedError("the procedure closed the channel")
                    del self._unwritten[: os.write(self._descriptor, self._unwritten)]
                except BlockingIOError:
                    pass
            if self._unwritten:
                self._writable.poll()


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
