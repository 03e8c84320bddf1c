"""The time limits of a call: to its acknowledgement, between two messages, and in total.

A host enforces the limits of a resumable call itself, so that they hold during an outage and no record that was made
in time is lost. The dispatcher enforces the same limits as a fallback, 15 s later. It gives the host time to deliver
the buffered records first, however late it attaches.
"""

from __future__ import annotations

import time

from harp.protocol.ends import Failed
from harp.protocol.json_text import dumps
from harpcaller.model.jobs import Job

#: Seconds after which the dispatcher enforces a limit that the host has not enforced.
MARGIN = 15.0

_TIMED_OUT = dumps({"errno": "ETIMEDOUT"})

#: Maximum seconds for the delivery of buffered records after the time limit.
_DELIVERY_TIME = 600.0


class Deadlines:
    """The limits of one job's call, on the monotonic clock.

    `acknowledgement` is the maximum time to the acknowledgement in seconds.
    """

    def __init__(self, job: Job, acknowledgement: float) -> None:
        self._job = job
        self._acknowledgement = acknowledgement
        self._last_message_at = self._last_record_at = self._created_at = time.monotonic()
        self._max_silence = min(job.timeout, acknowledgement)
        self._resumable = False
        self._reattached = False
        self._delivering = False  # acknowledged after the time limit
        self._delivery_deadline = float("inf")  # the end of the delivery
        #: Whether the host has acknowledged the call on the current connection.
        self.acknowledged = False
        #: Seconds until the request was sent for the first time; None before that.
        self.connect_seconds: float | None = None
        #: Monotonic time at which the call exceeds `max_exec_time`.
        self.deadline = time.monotonic() + job.max_exec_time

    def on_request_sent(self, reattach: bool = False) -> None:
        """Restart the limits for a new request; `reattach`: it attaches to a call that may be running."""
        self.acknowledged = False
        self._reattached = reattach
        self._max_silence = min(self._job.timeout, self._acknowledgement)
        self.on_message()
        if self.connect_seconds is None and not reattach:
            self.connect_seconds = round(self._last_message_at - self._created_at, 6)

    def on_message(self) -> None:
        """Restart the limit between two messages."""
        self._last_message_at = time.monotonic()

    def on_record(self) -> None:
        """Record the time of a received record."""
        self._last_record_at = time.monotonic()

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
        """Return the monotonic time of the next limit, or None. After the end only the acknowledgement has one."""
        if ended or self._reattached:
            if not self.acknowledged:
                return self._last_message_at + self._acknowledgement
            if ended:
                return None
        return min(self._enforced_at, self._last_message_at + self._max_silence)

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
        unanswered = not self.acknowledged and self._acknowledgement < self._job.timeout and now < self.deadline
        if unanswered or (not self.acknowledged and (ended or self._reattached)):
            message = f"{host} did not acknowledge the call within {self._acknowledgement:g} s"
            return Failed("network_error", message, _TIMED_OUT)
        if now >= self._enforced_at:
            return self.max_exec_time_error()
        return Failed("timeout", f"reading the result: no message from {host} for {self._job.timeout:g} s")

    def max_exec_time_error(self) -> Failed:
        """Return the end of a job that exceeded `max_exec_time`."""
        return Failed("timeout", f"maximum execution time: the job took more than {self._job.max_exec_time:g} s")
