"""The interface of a store: domain verbs that take and return jobs, never SQL or rows.

Every verb is one guarded statement or one short transaction, and returns whether it changed anything. The first
committed end of a job wins. `now` is an argument, Unix seconds with fractions: no verb reads a clock. Every verb may
raise `StorageError`; then nothing was changed, and the store works again as soon as the cause is removed. A verb
begins when it is called, and the caller need not wait for it; one whose awaiter is cancelled may complete all the same.
A backend passes the conformance suite in tests/store.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from harp.protocol.ends import End
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import (
    NO_METADATA,
    Identity,
    Job,
    JobDetails,
    JobMetadata,
    NewJob,
    Records,
    State,
    StopState,
)


class StorageError(Exception):
    """A store operation failed, for example because the disk is full. The message names the file and the cause."""


class UnknownJob(LookupError):
    """No job has this id."""


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """A queue with jobs that have not ended or hold a slot."""

    name: Raw  #: As the first submitter wrote it.
    concurrency: int
    running: int  #: Number of its jobs that hold a slot.
    queued: int


class Store(Protocol):
    """The storage of jobs, their records and their ends."""

    def add_job(self, job: NewJob, now: float) -> Awaitable[None]:
        """Store a queued job; it is on stable storage when this returns. Create its queue if it does not exist.

        Raises `ValueError` if a job with this id exists.
        """

    def add_jobs(self, jobs: Sequence[NewJob], now: float) -> Awaitable[None]:
        """Store queued jobs in this order, all or none, as `add_job` does."""

    def claim_jobs(self, now: float, limit: int, max_calls_per_host: int) -> Awaitable[list[Job]]:
        """Assign slots to at most `limit` queued jobs in the order of submission; return them as running jobs.

        The jobs of a queue that hold a slot stay within its concurrency, and its jobs start first in, first out. The
        jobs that hold a slot on a host, with or without a queue, stay within `max_calls_per_host`. No job starts
        before it was submitted, whatever `now` is.
        """

    def append_records(self, job_id: str, first: int, records: Records) -> Awaitable[bool]:
        """Append records numbered from `first`; return False if the job is not running or has not `first` records.

        Raises `ValueError` if a record has no time or contains a line feed.
        """

    def finish_job(
        self,
        job_id: str,
        end: End,
        now: float,
        *,
        stop: StopState | None = None,
        keep_slot: bool = False,
        metadata: JobMetadata = NO_METADATA,
    ) -> Awaitable[bool]:
        """Store the end of a job and its metadata, and release its slot unless `keep_slot` is set.

        Returns False, and stores nothing, if the job has ended or is unknown. Raises `ValueError` for an end that may
        not follow the job's state: a queued job cannot return, keep a slot or be stopped.
        """

    def cancel_job(self, job_id: str, now: float, stop_request: Raw | None = None) -> Awaitable[State | None]:
        """Store the end `Cancelled`; return the state before, or None if the job has ended or is unknown.

        `stop_request` is stored as metadata. A job that was running keeps its slot, and its stop is pending.
        """

    def cancel_queue(
        self, queue: Raw, now: float, stop_request: Raw | None = None, *, limit: int = 500
    ) -> Awaitable[list[tuple[str, State]]]:
        """Cancel at most `limit` jobs of a queue as `cancel_job` does; return id and state before of each.

        Queued jobs come first, so that none of them gets the slot of another job of the queue. Fewer than `limit`
        jobs are the last ones.
        """

    def finalize_stop(
        self, job_id: str, stop: StopState, *, keep_slot: bool = False, metadata: JobMetadata = NO_METADATA
    ) -> Awaitable[bool]:
        """Store the outcome of a job's stop and its metadata, and release its slot unless `keep_slot` is set.

        Returns False, and stores nothing, if the job has not ended, holds no slot or is unknown.
        """

    def update_metadata(self, job_id: str, metadata: JobMetadata) -> Awaitable[bool]:
        """Store the metadata that is not None, whatever the job's state; return False if the job is unknown."""

    def list_slot_holders(self) -> Awaitable[list[Job]]:
        """Return all jobs that hold a slot, in the order of submission."""

    def get_job(self, job_id: str) -> Awaitable[Job]:
        """Return a job. Raises `UnknownJob`."""

    def get_details(self, job_id: str) -> Awaitable[JobDetails]:
        """Return a job with everything that is stored about it, from one snapshot. Raises `UnknownJob`."""

    def read_records(self, job_id: str, first: int, max_bytes: int) -> Awaitable[Records]:
        """Return records from number `first` on: up to `max_bytes` in total, but at least one if there is one.

        The result is empty if the job is unknown.
        """

    def get_identity(self) -> Awaitable[Identity]:
        """Return the identity of the dispatcher that owns this store. It never changes."""

    def list_jobs(
        self,
        *,
        ended: bool = False,
        host: str | None = None,
        queue: Raw | None = None,
        newest_first: bool = False,
        after: int | None = None,
        limit: int = 1000,
    ) -> Awaitable[list[tuple[int, Job]]]:
        """Return one page of jobs with their sequence numbers, in the order of submission or newest first.

        It has the jobs of a host, of a queue, or all of them; with `ended` also those that have ended, whose number
        does not change the cost. It begins after the job with the sequence number `after`. A page with long payloads
        has fewer than `limit` jobs; only an empty page is the last one.
        """

    def list_queues(self) -> Awaitable[list[QueueStatus]]:
        """Return the queues with jobs that have not ended or hold a slot, oldest first."""

    async def prune_jobs(self, ended_before: float, limit: int) -> int:
        """Delete up to `limit` jobs that ended before a time, with their records; return how many were deleted.

        A job that holds a slot stays. The work is done in small steps, so that other verbs do not wait for it.
        """

    async def close(self) -> None:
        """Complete the verbs that were called, and close. No verb may be called after this."""
