"""Jobs, their states and their stored data. Pure: no clock, no input or output.

`TRANSITIONS` defines the states that may follow each state; stores and documentation are tested against it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from msgspec import Struct

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.json_text import Raw


class State(StrEnum):
    """The state of a job. The last four are the states of ends, with the names that they have in the protocol."""

    QUEUED = "queued"
    RUNNING = "running"
    RETURNED = "returned"
    RAISED = "raised"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: The states that may follow each state. A job can fail before it runs, for example because its host is unknown. It is
#: queued again if its start certainly did not happen.
TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED, State.FAILED}),
    State.RUNNING: frozenset({State.QUEUED, State.RETURNED, State.RAISED, State.FAILED, State.CANCELLED}),
    **dict.fromkeys((State.RETURNED, State.RAISED, State.FAILED, State.CANCELLED), frozenset()),
}

#: The states of jobs that have ended: no other state follows.
ENDED = frozenset(state for state, following in TRANSITIONS.items() if not following)

#: Number of characters that a list shows of a message or of a payload.
PREVIEW_LENGTH = 200

_STATES = {Returned: State.RETURNED, Raised: State.RAISED, Failed: State.FAILED, Cancelled: State.CANCELLED}


def state_of(end: End) -> State:
    """Return the state of a job that has this end."""
    return _STATES[type(end)]


class StopState(StrEnum):
    """The state of the processes of a job that was stopped; a job that was not stopped has no such state."""

    PENDING = "pending"  # the stop command was sent, or will be once the host can be reached
    CONFIRMED = "confirmed"  # the host reports that no process of the call remains
    FAILED = "failed"  # a process survives, or the host was declared lost
    UNKNOWN = "unknown"  # the host runs a legacy harpd, which cannot report it


# A job cannot be part of a cycle, so that the garbage collector need not visit it: a request has up to 10,000.
class NewJob(Struct, frozen=True, gc=False):
    """A job that is not stored yet."""

    id: str  # UUID in its lower-case text form
    host: str  # name in the registry
    procedure: str
    arguments: Raw  # JSON array or object
    timeout: float  # maximum seconds between two messages
    max_exec_time: float  # maximum seconds from start to end
    queue: Raw | None = None  # name of the queue, a JSON object, as the submitter wrote it
    concurrency: int = 1  # maximum number of running jobs of the queue; the first job of a queue decides
    info: Raw = Raw(b"null")
    start_within: float = 0.0  # seconds for which a start that certainly did not happen is tried again
    request_id: str | None = None  # all submissions with the same request id are one job
    call_digest: bytes = b""  # of the submitted call, if it has a request id
    owner: str | None = None  # the principal that submits it
    request_ids_of: str = ""  # the owner among whose request ids its own is unique; empty: among those of all clients
    max_running: int | None = None  # it waits while as many jobs of its owner hold a slot
    max_queued: int | None = None  # it is refused if more jobs of its owner would be queued
    max_record_bytes: int | None = None  # of its records and its result, by its rule; None: the setting decides alone
    secrets: bytes | None = None  # encrypted values of `arguments`
    end: Failed | None = None  # it is stored as a job that has ended before it was queued
    rerun_of: str | None = None  # id of the job that is submitted again


class Job(Struct, frozen=True, gc=False):
    """A stored job. Times are Unix seconds with fractions; None: not yet, or never."""

    id: str
    state: State
    host: str
    procedure: str
    arguments: Raw
    timeout: float
    max_exec_time: float
    queue: Raw | None
    info: Raw
    submitted: float  # time at which it was stored
    started: float | None  # time at which it got its slot
    ended: float | None  # time at which its end was stored
    end: End | None  # payloads are `Raw`
    records: int  # number of stored records
    holds_slot: bool = False  # in its queue and on its host, until the host confirms the end of the call or is lost
    stop: StopState | None = None  # None: it was not stopped
    start_within: float = 0.0  # seconds for which a start that certainly did not happen is tried again
    tried: float | None = None  # time of the first start, if the job was queued again after it
    owner: str | None = None  # the principal that submitted it; None: unknown, because it is from before access rules
    max_running: int | None = None  # it waits while as many jobs of its owner hold a slot
    secrets: bytes | None = None  # encrypted values of `arguments`, until the job has ended
    rerun_of: str | None = None  # id of the job that was submitted again
    max_record_bytes: int | None = None  # of its records and its result, by its rule; None: the setting decides alone


class Subject(Struct, frozen=True):
    """What decides who may do something with a job."""

    owner: str | None
    host: str
    procedure: str
    arguments: Raw  # perhaps only their beginning
    queue: Raw | None
    is_refused: bool = False  # whether it was stored as a job that has ended


class JobSummary(Struct, frozen=True):
    """What a list shows of a job. Times are Unix seconds with fractions; None: not yet, or never."""

    seq: int  # in the order of submission; not for clients, because it tells the number of all jobs
    id: str
    state: State
    host: str
    procedure: str
    queue_id: str | None  # 32 hexadecimal digits; None: it has no queue
    queue: Raw | None  # name of the queue, as the submitter wrote it
    owner: str | None
    submitted: float
    started: float | None
    ended: float | None
    records: int
    end_type: str | None  # type of the error or exception
    end_message: str | None  # its first characters
    stop: StopState | None
    holds_slot: bool
    arguments_preview: str  # the first characters of the JSON text
    info_preview: str
    rerun_of: str | None  # id of the job that was submitted again
    unreachable_since: float | None = None  # time since which the host of the running call has not been reached
    subject: Subject | None = None  # if it is needed for decisions


class JobPage(Struct, frozen=True):
    """A part of a list: the jobs that fit a filter among the entries that were looked at."""

    summaries: Sequence[JobSummary]
    next: str | None  # cursor of the next part
    complete: bool  # whether there are no further entries
    examined: int  # number of entries that were looked at
    searched_to: float | None  # submission time of the last one


class ValueCount(Struct, frozen=True):
    """The number of jobs with a value; `more`: there are or may be more than this number."""

    value: str
    count: int
    more: bool = False


class JobCounts(Struct, frozen=True):
    """Numbers of jobs by facet and value, at a time. `exact`: all numbers and values are complete."""

    by: Mapping[str, Sequence[ValueCount]]
    exact: bool
    at: float


class Bucket(Struct, frozen=True):
    """The numbers of jobs that were submitted, and that ended in each way, in the `step` seconds from `at` on."""

    at: float
    submitted: int = 0
    returned: int = 0
    raised: int = 0
    failed: int = 0
    cancelled: int = 0


class JobStatistics(Struct, frozen=True):
    """Numbers of jobs over time. Buckets without jobs are included."""

    step: float
    buckets: Sequence[Bucket]
    complete: bool = True  # False: there were too many jobs to look at all of them


class JobMetadata(Struct, frozen=True):
    """The stored data of a job's call in addition to its end. Each attribute is a JSON object as text."""

    call: Raw | None = None  # address, attempts, whether the call is resumable
    stop_request: Raw | None = None  # reason, requester and time of the stop
    stop_report: Raw | None = None  # the host's report of the stop
    exit_info: Raw | None = None  # exit, resources and last output of the call's process


NO_METADATA = JobMetadata()


class Records(Struct, frozen=True):
    """Consecutive records of a stream: their values, and the time of each (Unix seconds with fractions).

    A value is checked JSON text in UTF-8 without a line feed, as `Raw`. It is not a `Raw`: Python's garbage collector
    visits each object of a subclass, so that 100,000 records that wait would halt the process for 40 ms.
    """

    values: Sequence[bytes] = ()
    timestamps: Sequence[float] = ()

    def __len__(self) -> int:
        return len(self.values)


class QueuePosition(Struct, frozen=True):
    """The position of a queued job, and the slots for which it waits."""

    position: int  # among the queued jobs of its lane, from 1
    concurrency: int | None  # maximum number of jobs of the queue that hold a slot; None: it has no queue
    slots_held: int  # number of jobs of the lane that hold a slot
    slot_holders: tuple[str, ...]  # ids of the oldest of these jobs
    slots_held_on_host: int  # number of jobs that hold a slot on its host, with or without a queue
    slots_held_by_owner: int = 0  # number of jobs of its owner that hold a slot, if the job has `max_running`
    position_of_owner: int | None = None  # among the queued jobs of its lane and its owner, if it was asked for


class JobDetails(Struct, frozen=True):
    """A job with all its stored data except the records."""

    job: Job
    metadata: JobMetadata
    record_bytes: int  # total size of its stored records
    queue_position: QueuePosition | None  # None: it is not queued
    queue_id: str | None = None  # 32 hexadecimal digits; None: it has no queue


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of this dispatcher towards its hosts: random, created with the store, and never changed."""

    owner: str = field(repr=False)
    key: bytes = field(repr=False)  # the secrets of calls are derived from it
    shared_secrets_until: float = 0.0  # the latest submission of jobs whose secret does not depend on the host

    def owner_at(self, host: str) -> str:
        """Return the owner name for one host; no other host accepts it."""
        return self._derive(f"owner {self.owner} at {host}")

    def secret(self, job_id: str, host: str, submitted: float) -> str:
        """Return the secret that a host requires from a client that attaches to the job's call.

        It differs between hosts, so that none learns the secret of a call on another one; but not for jobs submitted
        before it did: their calls may be running.
        """
        is_shared = submitted <= self.shared_secrets_until
        return self._derive(f"secret of {job_id}" if is_shared else f"secret of {job_id} at {host}")

    def _derive(self, purpose: str) -> str:
        return hmac.digest(self.key, purpose.encode("utf-8", "surrogatepass"), "sha256").hex()
