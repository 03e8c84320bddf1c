"""An outage of a host: its start, the attempts to reach the host again, and the time at which the host counts as lost.

Measured with CLOCK_BOOTTIME, so that no step of the wall clock releases a slot too early.
"""

from __future__ import annotations

import datetime
import random
import time
from dataclasses import dataclass
from typing import Any, Self

#: Seconds between two attempts to reach a host: the first delay, and the maximum.
_MIN_DELAY, _MAX_DELAY = 0.2, 5.0

#: Maximum number of times that the first delay is doubled.
_MAX_DOUBLINGS = 16

#: Maximum length of a stored error in characters: a host may send any text.
_MAX_ERROR = 1000


class Backoff:
    """The delays between attempts to attach to a call.

    Every attempt without progress doubles the delay, even if the host acknowledged the call: a host that acknowledges
    and then disconnects is asked no more often than one that does not answer.
    """

    def __init__(self) -> None:
        self._attempts = 0
        self._last_attempt_at = float("-inf")

    def record_attempt(self) -> None:
        """Count an attempt."""
        self._attempts += 1
        self._last_attempt_at = time.monotonic()

    def reset(self) -> None:
        """Forget all attempts, because the call has made progress."""
        self._attempts = 0

    def next_delay(self) -> float:
        """Return the seconds to wait before the next attempt, randomized so that the calls of a host spread."""
        if not self._attempts and time.monotonic() - self._last_attempt_at >= _MAX_DELAY:
            return 0.0
        delay = min(_MAX_DELAY, _MIN_DELAY * 2.0 ** min(self._attempts, _MAX_DOUBLINGS))
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreads attempts, protects nothing


@dataclass(slots=True)
class Outage:
    """A time without contact to a call's host.

    Attributes:
        boottime: CLOCK_BOOTTIME of the last received data.
        since: Unix time of the last received data.
        attempts: number of attempts to reach the host again.
        error: error of the last attempt.
    """

    boottime: float
    since: float
    attempts: int = 0
    error: str | None = None

    @classmethod
    def begin(cls, seconds_ago: float, now: float) -> Self:
        """Return an outage that began `seconds_ago`; `now` is Unix time."""
        return cls(_boottime() - seconds_ago, now - seconds_ago)

    def record_error(self, error: str) -> None:
        """Store the error of the last attempt."""
        self.error = error[:_MAX_ERROR]

    def as_json(self) -> dict[str, Any]:
        """Return the outage as it appears in a job's error and in `details`."""
        return {"since": self.since, "attempts": self.attempts, "error": self.error}

    def deadline(self, timeout: float) -> float:
        """Return the monotonic time at which the outage has lasted `timeout` seconds."""
        return time.monotonic() + self.boottime + timeout - _boottime()

    def describe(self) -> str:
        """Return the start, the attempts and the last error for a message."""
        since = datetime.datetime.fromtimestamp(self.since, datetime.UTC).isoformat(timespec="seconds")
        attempts = f"{self.attempts} attempts to reach it again" if self.attempts else "no attempt to reach it again"
        return f"since {since}; {attempts}; last error: {self.error or 'none'}"


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
