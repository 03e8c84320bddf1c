"""Delays between repeated attempts."""

from __future__ import annotations

import random
import time

#: Maximum number of times that the first delay is doubled.
_MAX_DOUBLINGS = 16


class Backoff:
    """The delays in seconds between attempts at one thing that fails.

    Every attempt without progress doubles the delay. Delays are randomized, so that many attempts spread.
    """

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
        delay = min(self._max_delay, self._min_delay * 2.0 ** min(self._attempts, _MAX_DOUBLINGS))
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreads attempts, protects nothing
