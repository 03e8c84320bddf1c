"""A host that can't be reached: since when, what was tried, when it is tried again, and until when that is borne.

The time is counted on CLOCK_BOOTTIME, so that no step of the wall clock releases a slot too early. It is not stored: a
dispatcher that was restarted counts from its start.
"""

from __future__ import annotations

import datetime
import random
import time
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["Backoff", "LostContact"]

#: Seconds between two attempts to reach a host again: the first pause, and the longest.
_MIN_DELAY, _MAX_DELAY = 0.2, 5.0

#: After so many attempts the pause between two does not grow any more.
_MAX_DOUBLINGS = 16

#: The most characters of an error that are kept: a host may say what it likes.
_MAX_ERROR = 1000


class Backoff:
    """The pauses between attempts to reach a call again.

    They grow with every attempt that brought nothing, however far it came: a host that acknowledges and then breaks off
    is asked no more often than one that does not answer.
    """

    def __init__(self) -> None:
        self._attempts = 0
        self._last_attempt_at = float("-inf")

    def record_attempt(self) -> None:
        """An attempt begins; until there is progress, it was in vain."""
        self._attempts += 1
        self._last_attempt_at = time.monotonic()

    def reset(self) -> None:
        """Something of the call was stored that was not before."""
        self._attempts = 0

    def next_delay(self) -> float:
        """Seconds to wait before the next attempt: not the same for all calls of a host."""
        if not self._attempts and time.monotonic() - self._last_attempt_at >= _MAX_DELAY:
            return 0.0
        whole = min(_MAX_DELAY, _MIN_DELAY * 2.0 ** min(self._attempts, _MAX_DOUBLINGS))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311 - spreads attempts, protects nothing


@dataclass(slots=True)
class LostContact:
    """The contact with a call that was lost.

    Attributes:
        since: when something was heard the last time, seconds since the system's start.
        wall: the same as Unix seconds.
        attempts: how often it was tried to reach the host again.
        error: what came of the last attempt.
    """

    since: float
    wall: float
    attempts: int = 0
    error: str | None = None

    @classmethod
    def begin(cls, ago: float, wall: float) -> Self:
        """Contact was lost this many seconds ago; `wall` is now."""
        return cls(_boottime() - ago, wall - ago)

    def failed(self, error: str) -> None:
        """An attempt failed, or what was there broke."""
        self.error = error[:_MAX_ERROR]

    def as_json(self) -> dict[str, Any]:
        """Return what a job's error and `details` say about the outage."""
        return {"since": self.wall, "attempts": self.attempts, "error": self.error}

    def deadline(self, after: float) -> float:
        """When `after` seconds without contact are over; a time of the monotonic clock."""
        return time.monotonic() + self.since + after - _boottime()

    def told(self) -> str:
        """Since when, and what was tried, for a message."""
        since = datetime.datetime.fromtimestamp(self.wall, datetime.UTC).isoformat(timespec="seconds")
        tried = f"{self.attempts} attempts to reach it again" if self.attempts else "nothing was tried"
        return f"since {since}; {tried}; the last error: {self.error or 'none'}"


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
