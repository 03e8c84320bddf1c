"""A small event loop over epoll: descriptors and timers. The warden needs no more, and no library's weight."""

from __future__ import annotations

import heapq
import itertools
import logging
import select
import time
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["READ", "WRITE", "EventLoop", "Timer"]

log = logging.getLogger("harpd.supervisor")

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

#: Seconds after which timers are looked at in any case: a wait does not count the time that the system slept.
_LONGEST_WAIT = 5.0
#: So many cancelled timers are never worth a cleaning.
_MANY = 100

Callback: TypeAlias = Callable[[], None]


class Timer:
    """A callback that is due once, unless it is cancelled before."""

    __slots__ = ("_on_cancel", "callback")

    def __init__(self, callback: Callback, on_cancel: Callback) -> None:
        self.callback: Callback | None = callback
        self._on_cancel = on_cancel

    def cancel(self) -> None:
        """Forget the callback."""
        if self.callback is not None:
            self.callback = None
            self._on_cancel()


class EventLoop:
    """Runs callbacks when descriptors are ready and when timers are due. A failing callback ends no other."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callback]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._cancelled = 0
        self._order = itertools.count()
        self._running = True

    def watch(self, descriptor: int, events: int, callback: Callback) -> None:
        """Call back while the descriptor is ready for one of the events; 0: only watch for its end (hang-up)."""
        known = self._watched.get(descriptor)
        if known is None:
            self._epoll.register(descriptor, events)
        elif known[0] != events:
            self._epoll.modify(descriptor, events)
        self._watched[descriptor] = (events, callback)

    def unwatch(self, descriptor: int) -> None:
        """Watch the descriptor no more; call it before the descriptor is closed."""
        if self._watched.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    @staticmethod
    def now() -> float:
        """The time of this loop, in seconds: the system's since boot, during which it may have slept."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Call back once, that many seconds from now."""
        timer = Timer(callback, self._on_cancel)
        heapq.heappush(self._timers, (self.now() + seconds, next(self._order), timer))
        return timer

    def _on_cancel(self) -> None:
        # Limits are long, most calls are short: without this the limits of calls that have ended would pile up.
        self._cancelled += 1
        if self._cancelled > _MANY and 2 * self._cancelled > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def stop(self) -> None:
        """Return from `run` after this turn."""
        self._running = False

    def run(self) -> None:
        """Serve until `stop`."""
        while self._running:
            # A process that was halted wakes up with everything due: what has come meanwhile goes before the timers.
            for descriptor, _ in self._epoll.poll(self._patience()) or self._epoll.poll(0):
                watched = self._watched.get(descriptor)  # an earlier callback of this turn may have forgotten it
                if watched is not None:
                    _guard(watched[1])
            self._run_timers()

    def _patience(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            self._pop()
        return min(max(0.0, self._timers[0][0] - self.now()), _LONGEST_WAIT) if self._timers else -1

    def _run_timers(self) -> None:
        now = self.now()
        while self._timers and self._timers[0][0] <= now:
            callback = self._pop()
            if callback is not None:
                _guard(callback)

    def _pop(self) -> Callback | None:
        timer = heapq.heappop(self._timers)[2]
        callback, timer.callback = timer.callback, None
        if callback is None:
            self._cancelled -= 1
        return callback


def _guard(callback: Callback) -> None:
    try:
        callback()
    except Exception:
        log.exception("fault in the warden")
