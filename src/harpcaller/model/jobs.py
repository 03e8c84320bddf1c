"""What a job is, and the states it goes through. Pure: no clock, no input or output.

`TRANSITIONS` is the one place that says which state may follow which; the stores' guards and CHECK constraints,
the documentation and the conformance cases are made from it or tested against it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.json_text import Raw

__all__ = [
    "ENDED",
    "NO_METADATA",
    "TRANSITIONS",
    "Identity",
    "Job",
    "JobDetails",
    "JobMetadata",
    "NewJob",
    "QueuePosition",
    "Records",
    "State",
    "StopState",
    "state_of",
]


class State(StrEnum):
    """The state of a job; every end has the name of the wire's closing line."""

    QUEUED = "queued"
    RUNNING = "running"
    RETURNED = "returned"
    RAISED = "raised"
    FAILED = "failed"
    CANCELLED = "cancelled"


_NONE = frozenset[State]()

#: Which states may follow which. A job can fail without having run: its host is unknown, say.
TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.QUEUED: frozenset({State.RUNNING, State.CANCELLED, State.FAILED}),
        State.RUNNING: frozenset({State.RETURNED, State.RAISED, State.FAILED, State.CANCELLED}),
        State.RETURNED: _NONE,
        State.RAISED: _NONE,
        State.FAILED: _NONE,
        State.CANCELLED: _NONE,
    }
)

#: The states that no other state follows.
ENDED = frozenset(state for state, following in TRANSITIONS.items() if not following)

_STATES: Mapping[type, State] = MappingProxyType(
    {
        Returned: State.RETURNED,
        Raised: State.RAISED,
        Failed: State.FAILED,
        Cancelled: State.CANCELLED,
    }
)


def state_of(end: End) -> State:
    """The state of a job that has this end."""
    return _STATES[type(end)]


class StopState(StrEnum):
    """What is known of the processes of a job that was stopped. A job that ended by itself has none of these."""

    PENDING = "pending"  # the host has been asked, or is to be asked once it can be reached
    CONFIRMED = "confirmed"  # the host says that nothing of the call is left
    FAILED = "failed"  # something of it survives, or the host was given up as lost
    UNKNOWN = "unknown"  # the host's daemon can't say: one of the field


_NULL = Raw(b"null")


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as it is submitted.

    Attributes:
        id: UUID in its lower-case text form.
        host: name of the host in the registry.
        procedure: name of the procedure.
        arguments: an array or an object.
        timeout: the most seconds between two messages of the job.
        max_exec_time: the most seconds from start to end.
        queue: the queue's name, an object, as the submitter wrote it; None: no queue.
        concurrency: how many jobs of the queue may run at once; counts for the first job of a queue.
        info: any value of the submitter's.
    """

    id: str
    host: str
    procedure: str
    arguments: Raw
    timeout: float
    max_exec_time: float
    queue: Raw | None = None
    concurrency: int = 1
    info: Raw = _NULL


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is stored.

    Attributes:
        id: as in `NewJob`, like all that are not listed here.
        state: where the job stands.
        submitted: when it was stored; Unix seconds with fractions, as the other times.
        started: when it was given its slot; None: not yet, or never.
        ended: when its end was stored; None: not yet.
        end: how it ended, payloads as `Raw`; None: not yet.
        records: how many records of its stream are stored.
        holds_slot: whether it takes a place of its queue and host: from its start until the host has confirmed that
            the call is over, or has been given up as lost. A job that has ended may still hold it.
        stop: what is known of the processes of a job that was stopped; None: it was not.
    """

    id: str
    state: State
    host: str
    procedure: str
    arguments: Raw
    timeout: float
    max_exec_time: float
    queue: Raw | None
    info: Raw
    submitted: float
    started: float | None
    ended: float | None
    end: End | None
    records: int
    holds_slot: bool = False
    stop: StopState | None = None


@dataclass(frozen=True, slots=True)
class JobMetadata:
    """What is known of a job's call beside its end: JSON objects as text, None: nothing.

    Attributes:
        call: where and how it runs: address, attempts, whether the host keeps it.
        stopped: who stopped it, why and when.
        receipt: what the host says of the stop.
        evidence: how the call's process ended, what it used, its last words.
    """

    call: Raw | None = None
    stop_request: Raw | None = None
    stop_report: Raw | None = None
    exit_info: Raw | None = None


NO_METADATA = JobMetadata()


@dataclass(frozen=True, slots=True)
class Records:
    """Records of a stream, one after the other: their values, and when each was made (Unix seconds with fractions)."""

    values: Sequence[Raw] = ()
    timestamps: Sequence[float] = ()

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """Why a queued job has not been given its slot.

    Attributes:
        position: its place among the queued jobs of its queue, or of its host's jobs without a queue; 1: the first.
        concurrency: how many jobs of the queue may hold a slot; None: it has no queue.
        holding: how many hold one.
        holders: the ids of the oldest of these.
        on_host: how many jobs hold a slot on its host, with or without a queue.
    """

    position: int
    concurrency: int | None
    slots_held: int
    slot_holders: tuple[str, ...]
    slots_held_on_host: int


@dataclass(frozen=True, slots=True)
class JobDetails:
    """A job with all that is stored about it.

    Attributes:
        record_bytes: how many bytes the stored records have.
        waiting: for a queued job.
    """

    job: Job
    metadata: JobMetadata
    record_bytes: int
    queue_position: QueuePosition | None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this dispatcher is to its hosts: made with the store, for as long as the store lives.

    Attributes:
        owner: its id; random, so that nobody guesses what is derived from it.
        key: what the secrets of its calls are derived with.
    """

    owner: str = field(repr=False)
    key: bytes = field(repr=False)

    def owner_at(self, host: str) -> str:
        """The name by which a host knows whose calls are ours; of no use at another host."""
        return self._hmac(f"owner {self.owner} at {host}")

    def secret(self, job_id: str) -> str:
        """What a host asks of whoever wants to attach to the job's call."""
        return self._hmac(f"secret of {job_id}")

    def _hmac(self, what: str) -> str:
        return hmac.new(self.key, what.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
