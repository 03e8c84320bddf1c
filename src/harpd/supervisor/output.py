"""What calls print: each line of their stdout and stderr becomes an event of the log, with the call's id.

A pipe stays open after its call's end for as long as somebody holds it: a service that a procedure started must not
be killed by its own next message. The number of such pipes is bounded; those of the oldest calls are closed first.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Mapping
from functools import partial

from harpd.supervisor.event_loop import READ, EventLoop

__all__ = ["OutputCollector", "OutputPipe"]

log = logging.getLogger("harpd.call")

#: The most bytes that are read at once: a call that prints without end shares the warden with the others.
_READ_SIZE = 512
#: The most bytes of a line that are logged in one event; what is longer goes into several.
_LONGEST = 8192
#: How many of the last lines are evidence, how many characters of each, and how many reads fetch what is there still.
_LAST_LINES, _LINE_SHOWN, _LAST_READS = 20, 500, 128


class OutputCollector:
    """The reading ends of all calls' pipes.

    Args:
        loop: the event loop.
        most_left: how many pipes may outlive their calls.
    """

    def __init__(self, loop: EventLoop, most_left: int) -> None:
        self._loop = loop
        self._most_left = most_left
        self._left: dict[OutputPipe, None] = {}  # in the order of their calls' ends

    def open_pipe(self, fields: Mapping[str, str], stream: str) -> tuple[OutputPipe, int]:
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
        pipe = OutputPipe(reading, {**fields, "stream": stream})
        self._loop.watch(reading, READ, partial(self._on_ready, pipe))
        return pipe, writing

    def drain_tail(self, pipe: OutputPipe) -> list[str]:
        """The last lines of a pipe whose call has just ended."""
        for _ in range(_LAST_READS):
            if not self._read(pipe):
                break
        return pipe.last_lines()

    def release(self, pipe: OutputPipe) -> None:
        """The pipe's call has ended; what it left running may go on printing."""
        if pipe.descriptor >= 0:
            self._left[pipe] = None
        while len(self._left) > self._most_left:
            self._close(next(iter(self._left)))

    def _on_ready(self, pipe: OutputPipe) -> None:
        self._read(pipe)

    def _read(self, pipe: OutputPipe) -> bool:
        """Read once; whether there was something."""
        if pipe.descriptor < 0:
            return False
        try:
            data = os.read(pipe.descriptor, _READ_SIZE)
        except BlockingIOError:
            return False
        pipe.feed(data)
        if not data:
            self._close(pipe)
        return bool(data)

    def _close(self, pipe: OutputPipe) -> None:
        pipe.flush()
        self._left.pop(pipe, None)
        self._loop.unwatch(pipe.descriptor)
        os.close(pipe.descriptor)
        pipe.descriptor = -1


class OutputPipe:
    """A pipe's end to read, and what came of a line so far. `descriptor` is -1 once it is closed."""

    def __init__(self, descriptor: int, fields: Mapping[str, str]) -> None:
        self.descriptor = descriptor
        self._fields = fields
        self._begun = b""
        self._last: deque[bytes] = deque(maxlen=_LAST_LINES)

    def assign(self, fields: Mapping[str, str]) -> None:
        """From now on it is another call's."""
        self._fields = {**fields, "stream": self._fields["stream"]}
        self._last.clear()

    def feed(self, data: bytes) -> None:
        """Log the lines that the data completes."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            self._log(line)
        while len(self._begun) > _LONGEST:
            cut = _character_start(self._begun, _LONGEST)
            self._log(self._begun[:cut])
            self._begun = self._begun[cut:]

    def flush(self) -> None:
        """Log what is left of a line."""
        if self._begun:
            self._log(self._begun)
            self._begun = b""

    def last_lines(self) -> list[str]:
        """The last lines, the one that is not whole too; long ones cut."""
        lines = [*self._last, self._begun] if self._begun else list(self._last)
        return [_text(line)[:_LINE_SHOWN] for line in lines[-_LAST_LINES:]]

    def _log(self, line: bytes) -> None:
        self._last.append(line)
        log.info("call printed", extra={**self._fields, "text": _text(line)})


def _text(line: bytes) -> str:
    return line.decode("utf-8", "backslashreplace")


def _character_start(text: bytes, at: int) -> int:
    """The last place up to `at` at which a character of UTF-8 begins; `at` when there is none near."""
    for start in range(at, at - 4, -1):
        if text[start] & 0xC0 != 0x80:
            return start
    return at
