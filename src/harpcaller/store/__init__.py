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
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import NO_METADATA, Identity, Job, JobDetails, JobMetadata, NewJob, Records, State, StopState

__all__ = ["QueueStatus", "StorageError", "Store", "UnknownJob"]


class StorageError(Exception):
    """The store could not do it: the disk is full, the file can't be read. The message names file and cause."""


class UnknownJob(LookupError):
    """No job has this id."""


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """A queue with jobs that have not ended or hold a slot.

    Attributes:
        name: as the first submitter wrote it.
        concurrency: its limit.
        running: how many of its jobs hold a slot.
        queued: how many wait.
    """

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

    async def add_jobs(self, jobs: Sequence[NewJob], now: float) -> None:
        """Store queued jobs in this order, all or none, as `add_job` does."""

    async def claim_jobs(self, now: float, limit: int, max_calls_per_host: int) -> list[Job]:
        """Give up to `limit` queued jobs their slot, in the order of submission, and return them as running.

        The jobs of a queue that hold a slot stay within its concurrency, and its jobs start first in, first out. The
        jobs that hold a slot on a host, with or without a queue, stay within `max_calls_per_host`. No job starts
        before it was submitted, whatever `now` is.
        """

    async def append_records(self, job_id: str, first: int, records: Records) -> bool:
        """Append records numbered from `first`; False when the job is not running or has not exactly `first`.

        Raises `ValueError` for a record without its time, or with a line feed in it.
        """

    async def finish_job(
        self,
        job_id: str,
        end: End,
        now: float,
        *,
        stop: StopState | None = None,
        keep_slot: bool = False,
        metadata: JobMetadata = NO_METADATA,
    ) -> bool:
        """Store a job's end and what is known beside it; its slot is free then, unless it is kept.

        False when the job has an end already, or when there is no such job: then nothing is stored. Raises `ValueError`
        for an end that may not follow the job's state: a queued job can't have returned, nor keep a slot or be stopped.
        """

    async def cancel_job(self, job_id: str, now: float, stop_request: Raw | None = None) -> State | None:
        """Store the end `Cancelled`; return the state before, None when the job had ended or is not known.

        `stopped` is stored as that fact. A job that was running keeps its slot, and its stop is pending then.
        """

    async def cancel_queue(self, queue: Raw, now: float, stop_request: Raw | None = None) -> list[tuple[str, State]]:
        """Cancel all jobs of a queue in one transaction, as `cancel_job`; return id and state before of each."""

    async def finalize_stop(
        self, job_id: str, stop: StopState, *, keep_slot: bool = False, metadata: JobMetadata = NO_METADATA
    ) -> bool:
        """Store how the stop of a job turned out, and free its slot unless it is kept.

        False, and nothing stored, when the job has not ended, holds no slot, or is not known.
        """

    async def update_metadata(self, job_id: str, metadata: JobMetadata) -> bool:
        """Store those metadata of a job that are given, whatever its state; False when there is no such job."""

    async def release_slot(self, job_id: str) -> bool:
        """Free the slot of a job that has ended; False when it has not, holds none, or is not known."""

    async def list_slot_holders(self) -> list[Job]:
        """Return all jobs that hold a slot, in the order of submission."""

    async def get_job(self, job_id: str) -> Job:
        """Return a job. Raises `UnknownJob`."""

    async def get_details(self, job_id: str) -> JobDetails:
        """Return a job with all that is stored about it, as of one moment. Raises `UnknownJob`."""

    async def read_records(self, job_id: str, first: int, max_bytes: int) -> Records:
        """Return records from number `first` on, at least one if there is one, else up to `max_bytes` in sum.

        Empty as well when there is no such job.
        """

    async def get_identity(self) -> Identity:
        """Return who the dispatcher of this store is to its hosts: always the same."""

    async def list_jobs(
        self,
        *,
        ended: bool = False,
        host: str | None = None,
        queue: Raw | None = None,
        newest_first: bool = False,
        after: int | None = None,
        limit: int = 1000,
    ) -> list[tuple[int, Job]]:
        """Return jobs with their place in the order of submission, oldest first or newest first.

        Without `ended` only those that have not ended; with `host` or `queue`, of which only one may be given, only
        those of that host or queue. A page begins behind place `after`, or with the first of the list; it has up to
        `limit` jobs, fewer when their payloads are long; only an empty page says that there are no more. However many
        other jobs there are, a page takes no longer for those that have ended.
        """

    async def list_queues(self) -> list[QueueStatus]:
        """Return the queues that have jobs which have not ended or hold a slot, oldest first."""

    async def prune_jobs(self, ended_before: float, limit: int) -> int:
        """Delete up to `limit` jobs that ended before, with their records, and give space back; returns how many.

        A job that holds a slot stays.

        Takes its time, in small steps: others are not kept waiting.
        """

    async def close(self) -> None:
        """Finish what was asked for and close. No verb may be called after this."""
