"""The worker's end of its channel to the supervisor: lines of arguments in, whole lines of output out."""

from __future__ import annotations

import os

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
        self._file = os.fstat(descriptor)

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

    def write(self, lines: bytes) -> None:
        """Write whole lines; wait while the supervisor does not read. A child of the worker exits here.

        Signals are deferred meanwhile, because an exception would cut a line. That does not delay the exception of a
        stop: the supervisor reads the output of a call that it stops.
        """
        self.exit_if_forked()
        self._guard.defer()
        try:
            # The procedure may have closed the descriptor, and its number may belong to another file by now.
            file = os.fstat(self._descriptor)
            if file.st_ino != self._file.st_ino or file.st_dev != self._file.st_dev:
                raise ConnectionAbortedError("the procedure closed the channel")
            written = os.write(self._descriptor, lines)
            while written < len(lines):  # a signal has interrupted it
                lines = lines[written:]
                written = os.write(self._descriptor, lines)
        finally:
            self._guard.deliver()
