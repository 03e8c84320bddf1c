"""How long the dispatcher's own steps took, of its latest jobs. Times are seconds of the monotonic clock.

In memory, and of so many jobs only: to store how long storing has taken would be one more step for each job.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

__all__ = ["Timings"]

#: Of how many jobs they are kept: some 400 bytes each.
_MOST = 1000


class Timings:
    """The phases of a job that only its dispatcher knows: ``accept``, ``store``, ``store_end``, ``deliver``."""

    def __init__(self) -> None:
        self._jobs: dict[str, dict[str, float]] = {}  # in the order of their first steps
        self._ended: dict[str, float] = {}

    def stored(self, job_id: str, came: float | None, asked: float) -> None:
        """A job is stored. `came`: when its request was here; None: not known. `asked`: when the store was asked."""
        job = self._of(job_id)
        if came is not None:
            job["accept"] = asked - came
        job["store"] = time.monotonic() - asked

    def ended(self, job_id: str, asked: float) -> None:
        """A job's end is stored. `asked`: when the store was asked."""
        now = self._ended[job_id] = time.monotonic()
        self._of(job_id)["store_end"] = now - asked

    def delivered(self, job_id: str, came: float) -> None:
        """Somebody was told of a job's end who asked at this time. The first one who waited for it counts."""
        ended = self._ended.get(job_id)
        if ended is not None and came < ended:
            self._of(job_id).setdefault("deliver", time.monotonic() - ended)

    def of(self, job_id: str) -> Mapping[str, float]:
        """What is known of a job: seconds by phase."""
        return self._jobs.get(job_id, {})

    def _of(self, job_id: str) -> dict[str, float]:
        job = self._jobs.get(job_id)
        if job is None:
            if len(self._jobs) >= _MOST:
                oldest = next(iter(self._jobs))
                del self._jobs[oldest]
                self._ended.pop(oldest, None)
            job = self._jobs[job_id] = {}
        return job
