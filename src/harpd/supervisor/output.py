"""The output of calls: each line of their stdout and stderr becomes a log event with the call's id.

A pipe stays open after its call's end while a process has its writing end: a service that a procedure has started must
not be killed by its next message. The number of such pipes is bounded; those of the oldest calls are closed first.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Mapping
from functools import partial

from harpd.supervisor.event_loop import READ, EventLoop

log = logging.getLogger("harpd.call")

#: Bytes per read. They are few, so that a call that prints without pause does not delay other calls.
_READ_SIZE = 512
#: The most bytes of a line in one event; a longer line is split into several.
_MAX_LINE_BYTES = 8192
#: How many of the last lines exit info may have, and how many characters of each.
_MAX_LAST_LINES, _MAX_LAST_LINE_LENGTH = 20, 500
#: How many reads drain a pipe at its call's end.
_MAX_DRAIN_READS = 128


class OutputCollector:
    """The reading ends of all calls' pipes.

    Args:
        max_left_open: how many pipes of ended calls may stay open.
    """

    def __init__(self, loop: EventLoop, max_left_open: int) -> None:
        self._loop = loop
        self._max_left_open = max_left_open
        self._left_open: dict[OutputPipe, None] = {}  # pipes of ended calls, oldest first

    def open_pipe(self, stream: str) -> tuple[OutputPipe, int]:
        """Create a pipe for a worker's stdout or stderr, as `stream` says.

        Returns:
            The reading end, for `release`, and the descriptor of the writing end, which the caller closes.

        Raises:
            OSError: no descriptor is free.
        """
        reading, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reading, False)
        pipe = OutputPipe(reading, {"stream": stream})
        self._loop.watch(reading, READ, partial(self._read, pipe))
        return pipe, writing

    def drain_tail(self, pipe: OutputPipe) -> list[str]:
        """Read all output of a call that has just ended; return its last lines."""
        for _ in range(_MAX_DRAIN_READS):
            if not self._read(pipe):
                break
        return pipe.last_lines()

    def release(self, pipe: OutputPipe) -> None:
        """Leave a pipe of an ended call open for processes that go on printing."""
        if pipe.descriptor >= 0:
            self._left_open[pipe] = None
        while len(self._left_open) > self._max_left_open:
            self._close(next(iter(self._left_open)))

    def _read(self, pipe: OutputPipe) -> bool:
        """Read once; return whether there was data."""
        if pipe.descriptor < 0:
            return False
        try:
            data = os.read(pipe.descriptor, _READ_SIZE)
        except BlockingIOError:
            return False
        if data:
            pipe.feed(data)
        else:
            self._close(pipe)
        return bool(data)

    def _close(self, pipe: OutputPipe) -> None:
        pipe.flush()
        self._left_open.pop(pipe, None)
        self._loop.unwatch(pipe.descriptor)
        os.close(pipe.descriptor)
        pipe.descriptor = -1


class OutputPipe:
    """The reading end of a pipe, with its incomplete line. `descriptor` is -1 once it is closed."""

    def __init__(self, descriptor: int, fields: Mapping[str, str]) -> None:
        self.descriptor = descriptor
        self._fields = fields
        self._partial_line = b""
        self._last: deque[bytes] = deque(maxlen=_MAX_LAST_LINES)

    def assign(self, fields: Mapping[str, str]) -> None:
        """Assign the pipe to a call, whose log events have these fields."""
        self._fields = {**fields, "stream": self._fields["stream"]}
        self._last.clear()

    def feed(self, data: bytes) -> None:
        """Log the lines that these bytes complete."""
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        for line in lines:
            self._log(line)
        while len(self._partial_line) > _MAX_LINE_BYTES:
            cut = _character_start(self._partial_line, _MAX_LINE_BYTES)
            self._log(self._partial_line[:cut])
            self._partial_line = self._partial_line[cut:]

    def flush(self) -> None:
        """Log the incomplete line."""
        if self._partial_line:
            self._log(self._partial_line)
            self._partial_line = b""

    def last_lines(self) -> list[str]:
        """Return the last lines, including an incomplete one; long lines are cut."""
        lines = [*self._last, self._partial_line] if self._partial_line else list(self._last)
        return [_text(line)[:_MAX_LAST_LINE_LENGTH] for line in lines[-_MAX_LAST_LINES:]]

    def _log(self, line: bytes) -> None:
        self._last.append(line)
        log.info("call printed", extra={**self._fields, "text": _text(line)})


def _text(line: bytes) -> str:
    return line.decode("utf-8", "backslashreplace")


def _character_start(text: bytes, at: int) -> int:
    """Return the last index up to `at` at which a UTF-8 character begins; `at` if none begins near it."""
    for start in range(at, at - 4, -1):
        if text[start] & 0xC0 != 0x80:
            return start
    return at
