"""Many timers on one timer of the event loop.

Nearly all deadlines of a daemon are cancelled before they pass, and none has to be exact. Timers that are due in the
same `TICK` share one bucket: starting and cancelling a timer changes one set, and the loop has one timer in all.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from heapq import heappop, heappush

log = logging.getLogger(__name__)

#: Seconds between two buckets. A timer is at most this late, and never early.
TICK = 0.05


class Timer:
    """A timer that runs its callback once, unless it is cancelled before."""

    __slots__ = ("_bucket", "callback")

    def __init__(self, bucket: set[Timer], callback: Callable[[], object]) -> None:
        self._bucket = bucket
        self.callback = callback
        bucket.add(self)

    def cancel(self) -> None:
        """Do not run the callback; do nothing if it has run."""
        self._bucket.discard(self)


class TimerWheel:
    """All timers of one event loop; created and used in that loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buckets: dict[int, set[Timer]] = {}  # by the number of the tick
        self._ticks: list[int] = []  # a heap of the keys
        self._alarm: asyncio.TimerHandle | None = None

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Return a timer that runs the callback after at least `seconds`; in the next tick if they are negative."""
        tick = math.ceil((self._loop.time() + max(0.0, seconds)) / TICK)
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = set()
            heappush(self._ticks, tick)
            if self._ticks[0] == tick:
                self._set_alarm()
        return Timer(bucket, callback)

    def close(self) -> None:
        """Cancel all timers."""
        self._buckets.clear()
        self._ticks.clear()
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._loop.call_at(self._ticks[0] * TICK, self._run_due) if self._ticks else None

    def _run_due(self) -> None:
        now = self._loop.time()
        while self._ticks and self._ticks[0] * TICK <= now:
            bucket = self._buckets.pop(heappop(self._ticks))
            while bucket:  # a callback may cancel another timer of its bucket
                timer = bucket.pop()
                try:
                    timer.callback()
                except Exception:
                    log.exception("timer failed: internal error")
        while self._ticks and not self._buckets[self._ticks[0]]:  # all of its timers were cancelled
            del self._buckets[heappop(self._ticks)]
        self._set_alarm()
