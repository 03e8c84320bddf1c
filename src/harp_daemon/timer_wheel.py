"""Many timers on one timer of the event loop; and the delays between attempts.

Nearly all deadlines of a daemon are cancelled before they pass, and none has to be exact. Timers that are due in the
same `TICK` share one bucket: starting and cancelling a timer changes one set, and the loop has one timer in all.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from heapq import heappop, heappush

log = logging.getLogger(__name__)

#: Seconds between two buckets. A timer is at most this late, and never early.
TICK = 0.05


class Timer:
    """A timer that runs its callback once, unless it is cancelled before."""

    __slots__ = ("bucket", "callback")
    callback: Callable[[], object]
    bucket: set[Timer]  # of timers that are due in the same tick

    def cancel(self) -> None:
        """Do not run the callback; no effect if it has run."""
        self.bucket.discard(self)


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
        timer = Timer()
        timer.callback, timer.bucket = callback, bucket
        bucket.add(timer)
        return timer

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


class Backoff:
    """The delays in seconds between attempts at one thing: doubled by each attempt without progress, and randomized."""

    def __init__(self, min_delay: float, max_delay: float) -> None:
        self._min_delay = min_delay
        self._max_delay = max_delay
        self._attempts = 0
        self._last_attempt_at = float("-inf")

    def record_attempt(self) -> None:
        """Count an attempt."""
        self._attempts += 1
        self._last_attempt_at = time.monotonic()

    def reset(self) -> None:
        """Forget all attempts, because there was progress."""
        self._attempts = 0

    def next_delay(self) -> float:
        """Return the seconds to wait before the next attempt; 0 after a reset, if the last one is `max_delay` ago."""
        if not self._attempts and time.monotonic() - self._last_attempt_at >= self._max_delay:
            return 0.0
        delay = min(self._max_delay, self._min_delay * 2.0 ** min(self._attempts, 16))
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreads attempts, needs no secrecy
