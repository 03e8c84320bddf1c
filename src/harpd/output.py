"""What calls print: each line of their stdout and stderr becomes an event of the log, with the call's id.

A pipe stays open after its call's end for as long as somebody holds it: a service that a procedure started must not
be killed by its own next message. The number of such pipes is bounded; those of the oldest calls are closed first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from harpd.eventloop import READ, EventLoop

__all__ = ["Output"]

log = logging.getLogger("harpd.call")

#: The most bytes that are read at once: a call that prints without end shares the warden with the others.
_READ_SIZE = 512
#: The most bytes of a line that are logged in one event; what is longer goes into several.
_LONGEST = 8192


class Output:
    """The reading ends of all calls' pipes.

    Args:
        loop: the event loop.
        most_left: how many pipes may outlive their calls.
    """

    def __init__(self, loop: EventLoop, most_left: int) -> None:
        self._loop = loop
        self._most_left = most_left
        self._pipes: dict[int, _Pipe] = {}
        self._left: dict[int, None] = {}  # in the order of their calls' ends

    def open(self, fields: Mapping[str, str], stream: str) -> tuple[int, int]:
        """Make a pipe for a call.

        Args:
            fields: what every event of the pipe carries.
            stream: ``stdout`` or ``stderr``.

        Returns:
            The end to read, for `leave`, and the end to write, which is the caller's to close.

        Raises:
            OSError: no descriptor is free.
        """
        reading, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reading, False)
        self._pipes[reading] = _Pipe({**fields, "stream": stream})
        self._loop.watch(reading, READ, lambda: self._read(reading))
        return reading, writing

    def leave(self, reading: int) -> None:
        """The pipe's call has ended; what it left running may go on printing."""
        if reading in self._pipes:
            self._left[reading] = None
        while len(self._left) > self._most_left:
            self._close(next(iter(self._left)))

    def _read(self, reading: int) -> None:
        try:
            data = os.read(reading, _READ_SIZE)
        except BlockingIOError:
            return
        self._pipes[reading].take(data)
        if not data:
            self._close(reading)

    def _close(self, reading: int) -> None:
        self._pipes.pop(reading).end()
        self._left.pop(reading, None)
        self._loop.forget(reading)
        os.close(reading)


class _Pipe:
    """What came of a line so far."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = fields
        self._begun = b""

    def take(self, data: bytes) -> None:
        """Log the lines that the data completes."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            self._log(line)
        while len(self._begun) > _LONGEST:
            cut = _character_start(self._begun, _LONGEST)
            self._log(self._begun[:cut])
            self._begun = self._begun[cut:]

    def end(self) -> None:
        """Log what is left of a line."""
        if self._begun:
            self._log(self._begun)

    def _log(self, line: bytes) -> None:
        log.info("call printed", extra={**self._fields, "text": line.decode("utf-8", "backslashreplace")})


def _character_start(text: bytes, at: int) -> int:
    """The last place up to `at` at which a character of UTF-8 begins; `at` when there is none near."""
    for start in range(at, at - 4, -1):
        if text[start] & 0xC0 != 0x80:
            return start
    return at
