"""The limit of a call's output in the log: lines and bytes a second. Lines beyond it are dropped and counted."""

from __future__ import annotations

from collections.abc import Callable

from harpd.supervisor.event_loop import EventLoop, Timer

#: Seconds for which the limit counts.
_WINDOW = 1.0


class OutputLimit:
    """The limit of all pipes of a process: so many lines and bytes in each second.

    `on_dropped` receives the number of lines and bytes that were dropped, at the end of each second with dropped lines.
    """

    def __init__(self, loop: EventLoop, limits: tuple[int, int], on_dropped: Callable[[int, int], None]) -> None:
        self._loop = loop
        self._on_dropped = on_dropped
        self._lines, self._bytes = limits
        self._used_lines = self._used_bytes = 0
        self._dropped_lines = self._dropped_bytes = 0
        self._ends_at = 0.0  # the end of the window
        self._timer: Timer | None = None

    def reset(self, limits: tuple[int, int]) -> None:
        """Begin the output of a call, with these limits."""
        self.finish()
        self._lines, self._bytes = limits
        self._ends_at = 0.0

    def accept(self, size: int) -> bool:
        """Return whether a line of this size may be logged; otherwise it counts as dropped."""
        now = self._loop.now()
        if now >= self._ends_at:
            self.finish()
            self._ends_at = now + _WINDOW
            self._used_lines = self._used_bytes = 0
        has_room = not self._used_bytes or self._used_bytes + size <= self._bytes  # also for one line that is too long
        if has_room and self._used_lines < self._lines and not self.is_dropping:
            self._used_lines += 1
            self._used_bytes += size
            return True
        self.drop(1, size)
        return False

    @property
    def is_dropping(self) -> bool:
        """Whether the limit has been reached in this window."""
        return self._timer is not None

    def drop(self, lines: int, size: int) -> None:
        """Count lines that are not logged."""
        self._dropped_lines += lines
        self._dropped_bytes += size
        if self._timer is None:
            self._timer = self._loop.call_later(max(self._ends_at - self._loop.now(), 0.0), self.finish)

    def finish(self) -> None:
        """Report the lines that were dropped."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            lines, size = self._dropped_lines, self._dropped_bytes
            self._dropped_lines = self._dropped_bytes = 0
            self._on_dropped(lines, size)
