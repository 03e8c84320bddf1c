"""A host that can't be reached: since when, what was tried, when it is tried again, and until when that is borne.

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

from harp.protocol.json_text import Raw, loads

__all__ = ["LostContact", "Pace"]

#: Seconds between two attempts to reach a host again: the first pause, and the longest.
_PAUSE_FIRST, _PAUSE_LONGEST = 0.2, 5.0

#: After so many attempts the pause between two does not grow any more.
_GROWING = 16

#: The most characters of an error that are kept: a host may say what it likes.
_LONGEST_ERROR = 1000


class Pace:
    """The pauses between attempts to reach a call again.

    They grow with every attempt that brought nothing, however far it came: a host that acknowledges and then breaks off
    is asked no more often than one that does not answer.
    """

    def __init__(self) -> None:
        self._in_vain = 0
        self._tried = float("-inf")

    def tried(self) -> None:
        """An attempt begins; until there is progress, it was in vain."""
        self._in_vain += 1
        self._tried = time.monotonic()

    def progress(self) -> None:
        """Something of the call was stored that was not before."""
        self._in_vain = 0

    def pause(self) -> float:
        """Seconds to wait before the next attempt: not the same for all calls of a host."""
        if not self._in_vain and time.monotonic() - self._tried >= _PAUSE_LONGEST:
            return 0.0
        whole = min(_PAUSE_LONGEST, _PAUSE_FIRST * 2.0 ** min(self._in_vain, _GROWING))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311 - spreads attempts, protects nothing


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
        self.error = error[:_LONGEST_ERROR]

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

    def told(self) -> str:
        """Since when, and what was tried, for a message."""
        since = datetime.datetime.fromtimestamp(self.wall, datetime.UTC).isoformat(timespec="seconds")
        tried = f"{self.attempts} attempts to reach it again" if self.attempts else "nothing was tried"
        return f"since {since}; {tried}; the last error: {self.error or 'none'}"


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
