"""A host that can't be reached: since when, what was tried, and until when that is borne.

Counted on the clock that runs since the system's start, so that no step of the wall clock frees a slot too early; with
the name of that start beside it, so that a dispatcher that was started again goes on counting.
"""

from __future__ import annotations

import datetime
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from harp.protocol.jsontext import Raw, loads

__all__ = ["LostContact"]

#: After so many attempts the pause between two does not grow any more.
_GROWING = 16


@dataclass(slots=True)
class LostContact:
    """The contact with a call that was lost.

    Attributes:
        since: when something was heard the last time, seconds since the system's start.
        wall: the same as Unix seconds.
        attempts: how often it was tried to reach the host again.
        error: what came of the last attempt.
        noted: whether the store knows.
    """

    since: float
    wall: float
    attempts: int = 0
    error: str | None = None
    noted: bool = False

    @classmethod
    def begin(cls, ago: float, wall: float) -> Self:
        """Contact was lost this many seconds ago; `wall` is now."""
        return cls(_boottime() - ago, wall - ago)

    @classmethod
    def resumed(cls, fact: Raw | None, wall: float) -> Self:
        """What an earlier dispatcher noted; if that says nothing or is of another start of the system: from now on."""
        known = loads(fact) if fact is not None else None
        if isinstance(known, dict) and known.get("boot") == _boot():
            return cls(float(known["boottime"]), float(known["since"]), int(known["attempts"]), known["error"], True)
        return cls.begin(0.0, wall)

    def failed(self, error: str) -> None:
        """An attempt failed, or what was there broke."""
        self.error = error

    def fact(self) -> dict[str, Any]:
        """What is stored of it."""
        return {
            "since": self.wall,
            "attempts": self.attempts,
            "error": self.error,
            "boot": _boot(),
            "boottime": self.since,
        }

    def deadline(self, after: float) -> float:
        """When `after` seconds without contact are over; a time of the monotonic clock."""
        return time.monotonic() + self.since + after - _boottime()

    def pause(self, first: float, longest: float) -> float:
        """Seconds before the next attempt: more with each, and not the same for all."""
        whole = min(longest, first * 2.0 ** min(self.attempts, _GROWING))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311 - spreads attempts, protects nothing

    def told(self) -> str:
        """Since when, and what was tried, for a message."""
        since = datetime.datetime.fromtimestamp(self.wall, datetime.UTC).isoformat(timespec="seconds")
        tried = f"{self.attempts} attempts to reach it again" if self.attempts else "nothing was tried"
        return f"since {since}; {tried}; the last error: {self.error or 'none'}"


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
