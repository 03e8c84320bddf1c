"""The times that a call may take, as a run watches them: to be acknowledged, between two messages, in all.

The host watches the limits of a kept call itself, so that they hold while nobody can reach it, and so that nothing is
lost that was said in time. From here they are enforced later by a margin, should the host fail to: not before the host
has had the time to say what it has kept, however late we ask for it.
"""

from __future__ import annotations

import time

from harp.protocol.ends import Failed
from harpcaller.hosts.connecting import errno_data
from harpcaller.model.jobs import Job

__all__ = ["Deadlines"]

#: The host enforces the limits of a kept call; this much later, in seconds, they are enforced from here.
_MARGIN = 15.0

#: For so many seconds more it may still be busy with giving us the records that it has kept.
_DELIVERY_TIME = 600.0


class Deadlines:
    """The limits of one job's call, on the monotonic clock.

    Args:
        job: the job.
        acknowledgement: seconds that the host may take to acknowledge the call.
    """

    def __init__(self, job: Job, acknowledgement: float) -> None:
        self._job = job
        self._acknowledgement = acknowledgement
        self._last_message_at = self._last_record_at = self._created_at = time.monotonic()
        self._max_silence = min(job.timeout, acknowledgement)
        self._resumable = False
        self._reattached = False
        self._delivering = False  # the host is there, and the time is over
        self._delivery_deadline = float("inf")  # by when it must have said all
        #: Whether the host has acknowledged the call, on the connection now in use.
        self.acknowledged = False
        #: Seconds until the host was asked for the call the first time, for it had to be reached; None: not yet.
        self.connect_seconds: float | None = None
        #: When the call has taken all the time that it may.
        self.deadline = time.monotonic() + job.max_exec_time

    def on_request_sent(self, reattach: bool = False) -> None:
        """The host has been asked for the call; `again`: for one that it may have had for long."""
        self.acknowledged = False
        self._reattached = reattach
        self._max_silence = min(self._job.timeout, self._acknowledgement)
        self.on_message()
        if self.connect_seconds is None and not reattach:
            self.connect_seconds = round(self._last_message_at - self._created_at, 6)

    def on_message(self) -> None:
        """A message has come, or nothing could come until now."""
        self._last_message_at = time.monotonic()

    def on_record(self) -> None:
        """A record has come."""
        self._last_record_at = time.monotonic()

    def postpone(self) -> None:
        """What the host has said in time can't be stored at the moment: nothing is enforced meanwhile."""
        if self._resumable:
            now = time.monotonic()
            self.deadline = max(self.deadline, now + _MARGIN)
            self._delivery_deadline = max(self._delivery_deadline, now + _DELIVERY_TIME)

    def on_acknowledged(self, elapsed: float | None) -> None:
        """The host has acknowledged the call; `elapsed` seconds ago it began there, None: it is a tied one."""
        job = self._job
        self.acknowledged = True
        self._max_silence = job.timeout
        if elapsed is not None:
            now = self._last_record_at = time.monotonic()
            deadline = now + job.max_exec_time - elapsed + _MARGIN
            self.deadline = min(self.deadline, deadline) if self._resumable else deadline
            if not self._delivering:
                self._delivering = now >= self.deadline
                self._delivery_deadline = max(now, self.deadline) + _DELIVERY_TIME
            self._resumable = True
            self._max_silence = job.timeout + job.max_exec_time

    def next_deadline(self, ended: bool) -> float | None:
        """When there is something to look up although nothing comes; None: never.

        Args:
            ended: whether the job has an end; then only the acknowledgement is waited for.
        """
        if ended or self._reattached:
            if not self.acknowledged:
                return self._last_message_at + self._acknowledgement
            if ended:
                return None
        return min(self._enforced_at, self._last_message_at + self._max_silence)

    @property
    def _enforced_at(self) -> float:
        """When `deadline` is enforced from here."""
        if not self._resumable:
            return self.deadline
        return min(max(self.deadline, self._last_record_at + _MARGIN), self._delivery_deadline)

    def expired(self, host: str, ended: bool) -> Failed | None:
        """What a limit that is over means for the job; None: none is.

        Args:
            host: the host, for the message.
            ended: as for `due`.
        """
        due, now = self.next_deadline(ended), time.monotonic()
        if due is None or now < due:
            return None
        in_vain = not self.acknowledged and self._acknowledgement < self._job.timeout and now < self.deadline
        if in_vain or (not self.acknowledged and (ended or self._reattached)):
            message = f"{host}: it did not acknowledge the call within {self._acknowledgement:g} s"
            return Failed("network_error", message, errno_data("ETIMEDOUT"))
        if now >= self._enforced_at:
            return self.max_exec_time_error()
        return Failed("timeout", f"reading the result: {host} sent nothing for {self._job.timeout:g} s")

    def max_exec_time_error(self) -> Failed:
        """The end of a job that has taken all the time that it may."""
        return Failed("timeout", f"maximum execution time: the job took more than {self._job.max_exec_time:g} s")
