"""What the dispatcher asks of a store: domain verbs, no SQL in, no rows out.

Every verb is one guarded statement or one short transaction, and says whether it happened. The first committed
end of a job wins. `now` is an argument, Unix seconds with fractions: nothing here reads a clock. Every verb may
raise `StorageError`; then it did not happen, and the store goes on working once the cause is gone. A verb whose
awaiter is cancelled may happen all the same.
A backend passes the conformance suite in tests/store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from harp.protocol.ends import End
from harp.protocol.jsontext import Raw
from harpcaller.jobs import Job, NewJob, State

__all__ = ["QueueStatus", "StorageError", "Store", "UnknownJob"]


class StorageError(Exception):
    """The store could not do it: the disk is full, the file can't be read. The message names file and cause."""


class UnknownJob(LookupError):
    """No job has this id."""


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """A queue with jobs that have not ended: its name as the first submitter wrote it, its limit, its counts."""

    name: Raw
    concurrency: int
    running: int
    queued: int


class Store(Protocol):
    """Where jobs, their records and their ends are kept."""

    async def add_job(self, job: NewJob, now: float) -> None:
        """Store a queued job; it is on stable storage when this returns. Makes its queue if there is none.

        Raises `ValueError` when there is a job with this id.
        """

    async def claim_jobs(self, now: float, limit: int, host_concurrency: int) -> list[Job]:
        """Give up to `limit` queued jobs their slot, in the order of submission, and return them as running.

        A queue's running jobs stay within its concurrency and its jobs start first in, first out; the running
        jobs of a host, queued or not, stay within `host_concurrency`.
        """

    async def append_records(self, job_id: str, first: int, records: Sequence[Raw]) -> bool:
        """Append records numbered from `first`; False when the job is not running or has not exactly `first`."""

    async def finish_job(self, job_id: str, end: End, now: float) -> bool:
        """Store a job's end; False when it has one already, or when there is no such job.

        Raises `ValueError` for an end that may not follow the job's state: a queued job can't have returned.
        """

    async def cancel_job(self, job_id: str, now: float) -> State | None:
        """Store the end `Cancelled`; return the state before, None when the job had ended or is not known."""

    async def cancel_queue(self, queue: Raw, now: float) -> list[tuple[str, State]]:
        """Cancel all jobs of a queue in one transaction; return the id and state before of each cancelled one."""

    async def get_job(self, job_id: str) -> Job:
        """Return a job. Raises `UnknownJob`."""

    async def read_records(self, job_id: str, first: int, most_bytes: int) -> list[Raw]:
        """Return records from number `first` on, at least one if there is one, else up to `most_bytes` in sum.

        Empty as well when there is no such job.
        """

    async def list_jobs(
        self, *, ended: bool = False, queue: Raw | None = None, after: int = 0, limit: int = 1000
    ) -> list[tuple[int, Job]]:
        """Return jobs with their place in the order of submission, oldest first, from behind place `after` on.

        Without `ended` only those that have not ended; with `queue` only those of this queue. A page has up to
        `limit` jobs, fewer when their payloads are long; only an empty page says that there are no more.
        """

    async def list_queues(self) -> list[QueueStatus]:
        """Return the queues that have jobs which have not ended, oldest first."""

    async def settle_interrupted(self, end: End, now: float) -> int:
        """Give every running job this end: used once at start, when nothing can be running. Returns how many."""

    async def prune_jobs(self, ended_before: float, limit: int) -> int:
        """Delete up to `limit` jobs that ended before, with their records, and give space back; returns how many.

        Takes its time, in small steps: others are not kept waiting.
        """

    async def close(self) -> None:
        """Finish what was asked for and close. No verb may be called after this."""
