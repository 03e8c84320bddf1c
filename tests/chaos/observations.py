"""What clients requested and received. Two replies about one fact must be equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import harp
from chaos.job_specs import JobSpec
from chaos.marks import now
from chaos.procedures import record


class Violation(NamedTuple):
    """A broken promise.

    Attributes:
        promise: its number in docs/guarantees.md; 0: another error of the system.
        token: the job's token; None: it concerns no single job.
        what: the facts.
    """

    promise: int
    token: str | None
    what: str


class End(NamedTuple):
    """How a job ended: ``returned`` with its value, ``raised`` and ``failed`` with the type, or ``cancelled``."""

    kind: str
    detail: Any = None

    def __str__(self) -> str:
        return self.kind if self.detail is None or self.kind == "returned" else f"{self.kind} {self.detail}"


def end_of(outcome: Any) -> End | None:
    """Return the end in an outcome of `RemoteCall.result`; None: the job has not ended.

    Raises:
        CommunicationError: the outcome does not describe the job.
    """
    match outcome:
        case harp.CALL_NOT_FINISHED:
            return None
        case harp.CALL_CANCELLED:
            return End("cancelled")
        case harp.RemoteException():
            return End("raised", outcome.type)
        case harp.RemoteError():
            return End("failed", outcome.type)
        case harp.CommunicationError():
            raise outcome
        case _:
            return End("returned", outcome)


@dataclass
class Follower:
    """A reader of a job's records.

    Attributes:
        spec: the job.
        next: number of the next record; None: it accepts any first number.
        interruptions: how often it had to start again because the dispatcher could not be reached.
        ended: whether it has received the end of the stream.
        problem: the first invalid record or interruption.
    """

    spec: JobSpec
    next: int | None
    interruptions: int = 0
    ended: bool = False
    problem: str | None = None
    _received_any: bool = False

    def on_connect(self) -> None:
        """Note that the follower sends its request."""
        self._received_any = False

    def on_interrupted(self, why: str) -> None:
        """Note an error. After the first record, the library must continue without one."""
        self.interruptions += 1
        if self._received_any and self.problem is None:
            self.problem = f"the library failed after record {self.next}: {why}"

    def on_record(self, number: int, value: Any) -> None:
        """Check a received record."""
        if self.problem is None:
            if self.next not in (None, number):
                self.problem = f"record {number} was received instead of record {self.next}"
            elif value != record(self.spec.token, number, self.spec.record_size):
                self.problem = f"record {number} is {str(value)[:120]}"
        self.next = number + 1
        self._received_any = True


@dataclass
class ObservedJob:
    """A job.

    Attributes:
        spec: the submitted job.
        submitted: time of the submission, by the clock of the marks.
        id: its id; None: no reply was received, so the job may exist or not.
        submissions: how often a client submitted it; the library repeats some of them.
        cancels: number of cancel requests.
        cancelled: the reply to the only cancel; None: no reply, or several cancels.
        end: its end; None: not received yet.
        ended: when its end was first received.
        stop: the state of its stop in the last details.
        records: number of stored records at the end of the run.
        followers: its followers.
    """

    spec: JobSpec
    submitted: float = field(default_factory=now)
    id: str | None = None
    submissions: int = 0
    cancels: int = 0
    cancelled: bool | None = None
    end: End | None = None
    ended: float | None = None
    stop: str | None = None
    records: int | None = None
    followers: list[Follower] = field(default_factory=list)


@dataclass
class DirectCall:
    """A call without a dispatcher.

    Attributes:
        token: identifies it in its marks.
        host: the host that it calls.
        submitted: when it started, by the clock of the marks.
        end: its end; ``broken``: the connection failed; None: not ended yet.
        ended: when it ended.
        record_size: size of each record, if it is a stream.
        records: number of received records.
        problem: the first invalid record.
    """

    token: str
    host: str
    submitted: float = field(default_factory=now)
    end: End | None = None
    ended: float | None = None
    record_size: int = 0
    records: int = 0
    problem: str | None = None

    def on_record(self, value: Any) -> None:
        """Check a received record."""
        if self.problem is None and value != record(self.token, self.records, self.record_size):
            self.problem = f"record {self.records} is {str(value)[:120]}"
        self.records += 1


class Observations:
    """All jobs and direct calls of a run by token, and the violations that were found."""

    def __init__(self) -> None:
        self.jobs: dict[str, ObservedJob] = {}
        self.direct_calls: dict[str, DirectCall] = {}
        self.violations: list[Violation] = []
        #: How many stop reports were compared with the processes when they were received.
        self.stop_reports_checked = 0

    def add(self, spec: JobSpec) -> ObservedJob:
        """Add a job that is about to be submitted."""
        job = self.jobs[spec.token] = ObservedJob(spec)
        return job

    def record_end(self, job: ObservedJob, end: End) -> None:
        """Note the end of a job that a client has received."""
        if end == End("failed", "invalid_jobid"):
            self.add_violation(1, job.spec.token, "the dispatcher no longer knows this job")
        elif job.end is None:
            job.end, job.ended = end, now()
        elif job.end != end:
            self.add_violation(1, job.spec.token, f"the first reply was {job.end}, a later one {end}")

    def add_violation(self, promise: int, token: str | None, what: str) -> None:
        """Add a violation, each one once."""
        broken = Violation(promise, token, what)
        if broken not in self.violations:
            self.violations.append(broken)
