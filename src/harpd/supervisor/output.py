"""The output of calls: each line of their stdout and stderr becomes a log event with the call's id.

A pipe stays open after its call's end while a process has its writing end: a service that a procedure has started must
not be killed by its next message. The number of such pipes is bounded; those of the oldest calls are closed first.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Mapping

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
    """What all pipes share. `max_left_open`: how many pipes of ended calls may stay open."""

    def __init__(self, loop: EventLoop, max_left_open: int) -> None:
        self.loop = loop
        self.max_left_open = max_left_open
        self.left_open: dict[OutputPipe, None] = {}  # pipes of ended calls, oldest first


class OutputPipe:
    """The pipe of a worker's stdout or stderr, as `stream` says. Raises OSError if no descriptor is free."""

    def __init__(self, collector: OutputCollector, stream: str) -> None:
        self._collector = collector
        self._descriptor, self.writing_end = os.pipe2(os.O_CLOEXEC)  # the creator closes the writing end
        os.set_blocking(self._descriptor, False)
        self._fields: Mapping[str, str] = {"stream": stream}
        self._partial_line = b""
        self._last: deque[bytes] = deque(maxlen=_MAX_LAST_LINES)
        collector.loop.watch(self._descriptor, READ, self._read)

    def assign(self, fields: Mapping[str, str]) -> None:
        """Assign the pipe to a call, whose log events have these fields."""
        self._fields = {**fields, "stream": self._fields["stream"]}
        self._last.clear()

    def drain(self) -> list[str]:
        """Read all output of a call that has just ended; return its last lines. Long lines are cut."""
        for _ in range(_MAX_DRAIN_READS):
            if not self._read():
                break
        lines = [*self._last, self._partial_line] if self._partial_line else list(self._last)
        return [_text(line)[:_MAX_LAST_LINE_LENGTH] for line in lines[-_MAX_LAST_LINES:]]

    def release(self) -> None:
        """Release the pipe of an ended call; it stays open for processes that still print."""
        if self._descriptor >= 0:
            left_open = self._collector.left_open
            left_open[self] = None
            while len(left_open) > self._collector.max_left_open:
                next(iter(left_open))._close()

    def _read(self) -> bool:
        """Read once, and log the lines that are complete; return whether there was data."""
        if self._descriptor < 0:
            return False
        try:
            data = os.read(self._descriptor, _READ_SIZE)
        except BlockingIOError:
            return False
        if not data:
            self._close()
            return False
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        for line in lines:
            self._log(line)
        while len(self._partial_line) > _MAX_LINE_BYTES:
            cut = _character_start(self._partial_line, _MAX_LINE_BYTES)
            self._log(self._partial_line[:cut])
            self._partial_line = self._partial_line[cut:]
        return True

    def flush(self) -> None:
        """Log the incomplete line."""
        if self._partial_line:
            self._log(self._partial_line)
            self._partial_line = b""

    def _close(self) -> None:
        self.flush()
        self._collector.left_open.pop(self, None)
        self._collector.loop.unwatch(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

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
