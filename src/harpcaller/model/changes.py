"""What has changed for a job: the store tells its observers after each commit. Pure."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from harp.protocol.ends import End
from harpcaller.model.jobs import Job, StopState


class ChangeKind(StrEnum):
    """The kind of a change."""

    SUBMITTED = "submitted"
    STARTED = "started"  # it got a slot
    REQUEUED = "requeued"  # its start certainly did not happen
    RECORDS = "records"
    ENDED = "ended"
    STOP = "stop"  # the outcome of the stop of an ended job; its slot may be released
    DELETED = "deleted"


class Change(Struct, frozen=True, gc=False):
    """A committed change of a job. Observers keep neither `job` nor `end`: their payloads may be long."""

    kind: ChangeKind
    job_id: str
    seq: int  # the job's place in the order of submission
    at: float | None = None  # Unix seconds, when it was submitted, got its slot or ended
    job: Job | None = None  # as submitted or started
    end: End | None = None  # of a job that has ended
    stop: StopState | None = None  # of a job that has ended or whose stop has an outcome
    records: int = 0  # number of new records
    record_bytes: int = 0  # their size
