"""What calls print: each line of their stdout and stderr becomes an event of the log, with the call's id.

A pipe stays open after its call's end for as long as somebody holds it: a service that a procedure started must not
be killed by its own next message. The number of such pipes is bounded; the oldest are closed first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from harpd.eventloop import READ, EventLoop

__all__ = ["Output"]

log = logging.getLogger("harpd.call")

_READ_SIZE = 1 << 16
#: The most bytes of a line that are logged in one event; what is longer goes into several.
_LONGEST = 8192
#: The most pipes: two for each running call, and those that outlived their call.
_MOST_PIPES = 8192


class Output:
    """The reading ends of all calls' pipes."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._pipes: dict[int, _Pipe] = {}

    def open(self, fields: Mapping[str, str], stream: str) -> int:
        """Make a pipe for a call; return the end to write to, which is the caller's to close.

        Args:
            fields: what every event of the pipe carries.
            stream: ``stdout`` or ``stderr``.
        """
        while len(self._pipes) >= _MOST_PIPES:
            self._close(next(iter(self._pipes)))
        reading, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reading, False)
        self._pipes[reading] = _Pipe({**fields, "stream": stream})
        self._loop.watch(reading, READ, lambda: self._read(reading))
        return writing

    def _read(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, _READ_SIZE)
        except BlockingIOError:
            return
        self._pipes[descriptor].take(data)
        if not data:
            self._close(descriptor)

    def _close(self, descriptor: int) -> None:
        self._pipes.pop(descriptor).take(b"")
        self._loop.forget(descriptor)
        os.close(descriptor)


class _Pipe:
    """What came of a line so far."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = fields
        self._begun = b""

    def take(self, data: bytes) -> None:
        """Log the lines that the data completes; no data: the end."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        if not data or len(self._begun) > _LONGEST:
            lines.append(self._begun)
            self._begun = b""
        for line in lines:
            for start in range(0, len(line), _LONGEST):
                text = line[start : start + _LONGEST].decode("utf-8", "backslashreplace")
                log.info("call printed", extra={**self._fields, "text": text})
