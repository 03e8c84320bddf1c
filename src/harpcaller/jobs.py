"""What a job is, and the states it goes through. Pure: no clock, no input or output.

`TRANSITIONS` is the one place that says which state may follow which; the stores' guards and CHECK constraints,
the documentation and the conformance cases are made from it or tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.jsontext import Raw

__all__ = ["ENDED", "MISSING_RESULT", "TRANSITIONS", "Job", "NewJob", "State", "state_of"]


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


#: The end of a job that was running when the dispatcher died.
MISSING_RESULT = Failed("missing_result", "the dispatcher stopped while the job was running; its end is not known")


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
