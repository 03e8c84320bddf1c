"""The storage of jobs, their records and their ends. The verbs are the methods of `harpcaller.store.sqlite.Store`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harp.protocol.json_text import Raw


class StorageError(Exception):
    """A store operation failed, for example because the disk is full. The message names the file and the cause."""


class UnknownJob(LookupError):
    """No job has this id."""


class SubmissionRefused(Exception):
    """A submission that the stored jobs do not allow. Nothing is stored."""


class RequestIDReused(SubmissionRefused):
    """A job was submitted with the request id of another call, and the job `job_id`; None: it is of another owner."""

    def __init__(self, request_id: str, job_id: str | None) -> None:
        job = "" if job_id is None else f": job {job_id}"
        super().__init__(f"request_id {request_id!r} was used for another call{job}")


class CannotRerun(SubmissionRefused):
    """A job cannot be submitted again. The message says why, and what to do."""


class LimitReached(SubmissionRefused):
    """A job was submitted above a limit of its owner. `may_pass`: another attempt may succeed."""

    def __init__(self, message: str, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@dataclass(frozen=True, slots=True)
class RecordMatches:
    """The records that have a text, among those that were looked at."""

    records: Sequence[tuple[int, bytes, float]]  #: Number, value and time of each.
    next: int  #: Number of the first record that was not looked at.
    searched_bytes: int


@dataclass(frozen=True, slots=True)
class QueueSummary:
    """A queue with jobs that have not ended or hold a slot, as lists of queues show it."""

    place: int  #: Its place in the order of all queues.
    id: str  #: The 32 hexadecimal digits of its lane.
    name: Raw  #: The text of its first submission.
    concurrency: int
    running: int  #: Number of its jobs that hold a slot.
    queued: int
    oldest: float | None  #: When its first queued job was submitted.


@dataclass(frozen=True, slots=True)
class StoreGauges:
    """The present numbers of jobs."""

    queued: int
    oldest_queued: float | None  #: Submission of the first queued job, Unix time.
    slots_held: int
    running: int
    stuck: int  #: Number of jobs that hold a slot although they ended some time ago.
    queues: int  #: Number of queues with jobs that have not ended or hold a slot.
    full_queues: int  #: Number of these without a free slot.
    of_queues: tuple[tuple[int, int], ...]  #: Queued jobs and held slots of the queues that were asked for.
    queued_of_hosts: dict[str, int] | None  #: By host; None: there are too many.


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """A queue with jobs that have not ended or hold a slot."""

    name: Raw  #: The text of its first submission.
    concurrency: int
    running: int  #: Number of its jobs that hold a slot.
    queued: int
