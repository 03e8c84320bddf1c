"""A small event loop over epoll with descriptors and timers; it needs less memory than asyncio."""

from __future__ import annotations

import heapq
import itertools
import logging
import select
import time
from collections.abc import Callable
from typing import TypeAlias

log = logging.getLogger("harpd.supervisor")

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

#: The longest wait in seconds: epoll does not count the time during which the system is suspended, timers do.
_MAX_WAIT = 5.0
#: From this many timers on, cancelled ones are removed whenever the heap has doubled.
_MIN_TIMERS_TO_PURGE = 100

Callback: TypeAlias = Callable[[], object]


class Timer:
    """A callback that runs once, unless it is cancelled before."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Cancel the callback; no effect if it has run."""
        self.callback = None


class EventLoop:
    """An event loop. It logs the exception of a callback and continues."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callback]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._purge_at = _MIN_TIMERS_TO_PURGE
        self._order = itertools.count()
        self._soon: list[Callback] = []
        self._running = True

    def watch(self, descriptor: int, events: int, callback: Callback) -> None:
        """Run the callback whenever the descriptor is ready for one of the events, or hangs up."""
        known = self._watched.get(descriptor)
        if known is None:
            self._epoll.register(descriptor, events)
        elif known[0] != events:
            self._epoll.modify(descriptor, events)
        self._watched[descriptor] = (events, callback)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching the descriptor; call this before the descriptor is closed."""
        if self._watched.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    @staticmethod
    def now() -> float:
        """Return the time of this loop: seconds since boot, the time of suspension included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Run the callback once, that many seconds from now."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (self.now() + seconds, next(self._order), timer))
        if len(self._timers) > self._purge_at:
            # Limits are long and most calls are short: without this, timers of ended calls would accumulate.
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._purge_at = max(_MIN_TIMERS_TO_PURGE, 2 * len(self._timers))
        return timer

    def call_soon(self, callback: Callback) -> None:
        """Run the callback at the end of this turn."""
        self._soon.append(callback)

    def stop(self) -> None:
        """Return from `run` after this turn."""
        self._running = False

    def run(self) -> None:
        """Run callbacks until `stop`."""
        while self._running:
            # After a suspension, all timers are due: data that has arrived meanwhile is handled before them.
            for descriptor, _ in self._epoll.poll(self._wait_seconds()) or self._epoll.poll(0):
                watched = self._watched.get(descriptor)  # an earlier callback of this turn may have removed it
                if watched is not None:
                    _run_callback(watched[1])
            self._run_timers()
            while self._soon:
                soon, self._soon = self._soon, []
                for callback in soon:
                    _run_callback(callback)

    def _wait_seconds(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return min(max(0.0, self._timers[0][0] - self.now()), _MAX_WAIT) if self._timers else -1

    def _run_timers(self) -> None:
        now = self.now()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                _run_callback(callback)


def _run_callback(callback: Callback) -> None:
    try:
        callback()
    except Exception:
        log.exception("callback failed")
