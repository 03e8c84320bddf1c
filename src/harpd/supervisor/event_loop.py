"""A small event loop over epoll with descriptors and timers; it needs less memory than asyncio.

Nearly all timers are cancelled before they are due, and long timers need not be exact. So timers that are due at about
the same time share a bucket, and only the times of the buckets are sorted: cancelling a timer deletes it from a dict.
"""

from __future__ import annotations

import heapq
import logging
import math
import select
import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

log = logging.getLogger("harpd.supervisor")

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

#: The longest wait in seconds: epoll does not count the time during which the system is suspended, timers do.
_MAX_WAIT = 5.0
#: Timers of at least this many seconds are up to `_COARSE_TICK` seconds late, others are exact.
_MIN_COARSE, _COARSE_TICK = 1.0, 0.0625

Callback: TypeAlias = Callable[[], object]


class Timer:
    """A callback that runs once, unless it is cancelled before."""

    __slots__ = ("bucket", "callback")
    callback: Callback
    bucket: dict[Timer, None]  # of timers that are due at the same time

    def cancel(self) -> None:
        """Cancel the callback; no effect if it has run."""
        self.bucket.pop(self, None)


class EventLoop:
    """An event loop. It logs the exception of a callback and continues."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callback]] = {}
        self._buckets: dict[float, dict[Timer, None]] = {}  # by the time when they are due
        self._due_times: list[float] = []  # a heap of the keys
        self._next_callbacks: list[Callback] = []
        self._running = True
        #: Returns the time of this loop: seconds since boot, the time of suspension included.
        self.now: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)

    def watch(self, descriptor: int, events: int, callback: Callback) -> None:
        """Run the callback whenever the descriptor is ready for one of the events, or hangs up."""
        watched = self._watched.get(descriptor)
        if watched is None:
            self._epoll.register(descriptor, events)
        elif watched[0] != events:
            self._epoll.modify(descriptor, events)
        self._watched[descriptor] = (events, callback)

    def unwatch(self, descriptor: int) -> None:
        """Stop watching the descriptor; call this or `forget` before the descriptor is closed."""
        if self._watched.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def forget(self, descriptor: int) -> None:
        """Stop watching a descriptor that is closed next: the kernel does the rest, as no process has a copy of it."""
        self._watched.pop(descriptor, None)

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Run the callback once, that many seconds from now."""
        due = self.now() + seconds
        if seconds >= _MIN_COARSE:
            due = math.ceil(due / _COARSE_TICK) * _COARSE_TICK
        bucket = self._buckets.get(due)
        if bucket is None:
            bucket = self._buckets[due] = {}
            heapq.heappush(self._due_times, due)
        timer = Timer()
        timer.callback, timer.bucket = callback, bucket
        bucket[timer] = None
        return timer

    def call_soon(self, callback: Callback) -> None:
        """Run the callback at the end of this turn."""
        self._next_callbacks.append(callback)

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        while self._running:
            # After a suspension, all timers are due: data that arrived during the suspension is handled first.
            for descriptor, _ in self._epoll.poll(self._wait_seconds()) or self._epoll.poll(0):
                watched = self._watched.get(descriptor)  # an earlier callback of this turn may have removed it
                if watched is not None:
                    try:
                        watched[1]()
                    except Exception:
                        log.exception("callback failed")
            if self._due_times and self._due_times[0] <= self.now():
                self._run_timers()
            while self._next_callbacks:
                callbacks, self._next_callbacks = self._next_callbacks, []
                for callback in callbacks:
                    try:
                        callback()
                    except Exception:
                        log.exception("callback failed")

    def _wait_seconds(self) -> float:
        times = self._due_times
        while times and not self._buckets[times[0]]:  # all of its timers were cancelled
            del self._buckets[heapq.heappop(times)]
        return min(max(0.0, times[0] - self.now()), _MAX_WAIT) if times else -1

    def _run_timers(self) -> None:
        now = self.now()
        while self._due_times and self._due_times[0] <= now:
            bucket = self._buckets.pop(heapq.heappop(self._due_times))
            while bucket:  # a callback may cancel another timer of its bucket
                timer = next(iter(bucket))
                del bucket[timer]
                try:
                    timer.callback()
                except Exception:
                    log.exception("callback failed")
