"""Durations of the dispatcher's own steps for its latest jobs, in seconds of the monotonic clock.

They are in memory and for a limited number of jobs: storing them would add a step to every job.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

#: Maximum number of jobs; each needs about 400 bytes.
_MAX_JOBS = 1000


class Timings:
    """The phases of a job that only its dispatcher measures: ``accept``, ``store``, ``store_end``, ``deliver``."""

    def __init__(self) -> None:
        self._jobs: dict[str, dict[str, float]] = {}  # in the order of their first steps; with the time ``ended_at``

    def record_stored(self, job_id: str, received_at: float | None, store_began: float) -> None:
        """Record that a job was stored, the times of its request (None: unknown) and of the begin of the write."""
        phases = self._phases_of(job_id)
        if received_at is not None:
            phases["accept"] = store_began - received_at
        phases["store"] = time.monotonic() - store_began

    def record_end(self, job_id: str, store_began: float) -> None:
        """Record that a job's end was stored, and the time of the begin of the write."""
        phases = self._phases_of(job_id)
        phases["ended_at"] = time.monotonic()
        phases["store_end"] = phases["ended_at"] - store_began

    def record_delivery(self, job_id: str, received_at: float) -> None:
        """Record that the end was sent to a client whose request was received at this time; the first one counts."""
        phases = self._jobs.get(job_id, {})
        ended_at = phases.get("ended_at")
        if ended_at is not None and received_at < ended_at:
            phases.setdefault("deliver", time.monotonic() - ended_at)

    def get_phases(self, job_id: str) -> Mapping[str, float]:
        """Return the known phases of a job in seconds."""
        return self._jobs.get(job_id, {})

    def _phases_of(self, job_id: str) -> dict[str, float]:
        phases = self._jobs.get(job_id)
        if phases is None:
            if len(self._jobs) >= _MAX_JOBS:
                del self._jobs[next(iter(self._jobs))]
            phases = self._jobs[job_id] = {}
        return phases
