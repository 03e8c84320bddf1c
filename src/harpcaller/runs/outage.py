"""An outage of a host: its start, the attempts to reach the host again, and the time at which the host counts as lost.

Measured with CLOCK_BOOTTIME, so that no step of the wall clock releases a slot too early.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from typing import Any, Self

#: Maximum length of a stored error in characters: a host may send any text.
_MAX_ERROR = 1000


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
