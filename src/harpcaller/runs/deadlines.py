"""The time limits of a call: to its acknowledgement, between two messages, in total, and without contact to its host.

A host enforces the limits of a resumable call, so that they apply during an outage. The dispatcher enforces them as a
fallback, 15 s later, so that the host has time to deliver the buffered records, however late the dispatcher attaches.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from typing import Any, Self

from harp.protocol.ends import Failed
from harp.protocol.json_text import dumps
from harpcaller.model.jobs import Job

MARGIN = 15.0  #: Seconds after which the dispatcher enforces a limit that the host has not enforced.
_DELIVERY_TIME = 600.0  #: Maximum seconds for the delivery of buffered records after the time limit.
_MAX_ERROR = 1000  #: Maximum length of a stored error in characters: a host may send any text.


class Deadlines:
    """The limits of one job's call, on the monotonic clock. `acknowledgement` is `acknowledgement_timeout`."""

    def __init__(self, job: Job, acknowledgement: float) -> None:
        self._job = job
        self._acknowledgement = acknowledgement
        self._last_message_at = self._last_record_at = time.monotonic()
        self._max_silence = min(job.timeout, acknowledgement)
        self._resumable = False
        self._reattached = False
        self._delivering = False  # the host has acknowledged the call after the time limit
        self._delivery_deadline = float("inf")
        self.acknowledged = False  #: Whether the host has acknowledged the call on the current connection.
        #: Monotonic time at which the call exceeds `max_exec_time`.
        self.deadline = self._last_message_at + job.max_exec_time

    def on_request_sent(self, reattach: bool = False) -> None:
        """Restart the limits for a new request; `reattach`: it attaches to a call that may be running."""
        self.acknowledged = False
        self._reattached = reattach
        self._max_silence = min(self._job.timeout, self._acknowledgement)
        self._last_message_at = time.monotonic()

    def on_message(self) -> None:
        """Restart the limit between two messages."""
        self._last_message_at = time.monotonic()

    def on_record(self) -> None:
        """Restart the limit between two messages, and the limit of the delivery."""
        self._last_message_at = self._last_record_at = time.monotonic()

    def postpone(self) -> None:
        """Postpone the fallback limits while the store cannot store received records."""
        if self._resumable:
            now = time.monotonic()
            self.deadline = max(self.deadline, now + MARGIN)
            self._delivery_deadline = max(self._delivery_deadline, now + _DELIVERY_TIME)

    def on_acknowledged(self, elapsed: float | None) -> None:
        """Start the limits of a call that the host started `elapsed` seconds ago; None: it is connection-bound."""
        job = self._job
        self.acknowledged = True
        self._max_silence = job.timeout
        if elapsed is not None:
            now = self._last_record_at = time.monotonic()
            deadline = now + job.max_exec_time - elapsed + MARGIN
            self.deadline = min(self.deadline, deadline) if self._resumable else deadline
            if not self._delivering:
                self._delivering = now >= self.deadline
                self._delivery_deadline = max(now, self.deadline) + _DELIVERY_TIME
            self._resumable = True
            self._max_silence = job.timeout + job.max_exec_time

    def next_deadline(self, ended: bool) -> float | None:
        """Return the monotonic time of the next limit; None if the call of an ended job was acknowledged."""
        if (ended or self._reattached) and not self.acknowledged:
            return self._last_message_at + self._acknowledgement
        return None if ended else min(self._enforced_at, self._last_message_at + self._max_silence)

    @property
    def _enforced_at(self) -> float:
        """Monotonic time at which the dispatcher enforces `deadline`."""
        if not self._resumable:
            return self.deadline
        return min(max(self.deadline, self._last_record_at + MARGIN), self._delivery_deadline)

    def expired(self, host: str, ended: bool) -> Failed | None:
        """Return the end of a job that exceeded a limit, with the host in its message; None if no limit is exceeded."""
        deadline, now = self.next_deadline(ended), time.monotonic()
        if deadline is None or now < deadline:
            return None
        unanswered = self._acknowledgement < self._job.timeout and now < self.deadline
        if not self.acknowledged and (unanswered or ended or self._reattached):
            message = f"{host} did not acknowledge the call within {self._acknowledgement:g} s"
            return Failed("network_error", message, dumps({"errno": "ETIMEDOUT"}))
        if now >= self._enforced_at:
            return self.max_exec_time_error()
        return Failed("timeout", f"reading the result: no message from {host} for {self._job.timeout:g} s")

    def max_exec_time_error(self) -> Failed:
        """Return the end of a job that exceeded `max_exec_time`."""
        return Failed("timeout", f"maximum execution time: the job took more than {self._job.max_exec_time:g} s")


@dataclass(slots=True)
class Outage:
    """A time without contact to a call's host. Its clock has no steps, which could release a slot too early."""

    boottime: float  # CLOCK_BOOTTIME of the last received data
    since: float  # Unix time of the last received data
    attempts: int = 0  # attempts to reach the host again
    error: str | None = None  # error of the last attempt

    @classmethod
    def started_ago(cls, seconds: float, now: float) -> Self:
        """Return an outage that started `seconds` ago; `now` is Unix time."""
        return cls(time.clock_gettime(time.CLOCK_BOOTTIME) - seconds, now - seconds)

    def record_error(self, error: str) -> None:
        """Store the error of the last attempt."""
        self.error = error[:_MAX_ERROR]

    def as_json(self) -> dict[str, Any]:
        """Return the outage as it appears in a job's error and in `details`."""
        return {"since": self.since, "attempts": self.attempts, "error": self.error}

    def deadline(self, timeout: float) -> float:
        """Return the monotonic time at which the outage has lasted `timeout` seconds."""
        return time.monotonic() + self.boottime + timeout - time.clock_gettime(time.CLOCK_BOOTTIME)

    def describe(self) -> str:
        """Return the start, the attempts and the last error for a message."""
        since = datetime.datetime.fromtimestamp(self.since, datetime.UTC).isoformat(timespec="seconds")
        attempts = f"{self.attempts} attempts to reach it again" if self.attempts else "no attempt to reach it again"
        return f"since {since}; {attempts}; last error: {self.error or 'none'}"
