"""The ledger: what clients asked for, and what HARP told them. What is told twice must be the same both times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import harp
from chaos.marks import now
from chaos.orders import Order
from chaos.procedures import record

#: Refusals of a request; they say nothing about the job.
_REFUSALS = frozenset({"storage_error", "invalid_request"})


class Broken(NamedTuple):
    """A broken promise.

    Attributes:
        promise: its number in DESIGN.md; 0: the system did something else that it must not.
        token: of the job; None: it is about no single job.
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
    """The end that `RemoteCall.result` told; None: the job has not ended.

    Raises:
        CommunicationError: it told nothing about the job.
    """
    match outcome:
        case harp.CALL_NOT_FINISHED:
            return None
        case harp.CALL_CANCELLED:
            return End("cancelled")
        case harp.RemoteException():
            return End("raised", outcome.type)
        case harp.RemoteError() if outcome.type in _REFUSALS:
            raise harp.CommunicationError(str(outcome))
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
        order: the job's.
        next: number of the next record; None: it takes whatever comes first.
        resumed: how often it had to begin anew, because the dispatcher could not be reached at all.
        ended: whether it was told that the job had ended.
        wrong: what it should not have been told.
    """

    order: Order
    next: int | None
    resumed: int = 0
    ended: bool = False
    wrong: str | None = None
    _flows: bool = False

    def begin(self) -> None:
        """It asks for the records."""
        self._flows = False

    def broke_off(self, why: str) -> None:
        """It was told that it can't have them now: once they flow the library itself has to see to it that they do."""
        self.resumed += 1
        if self._flows and self.wrong is None:
            self.wrong = f"the library broke off after record {self.next}: {why}"

    def take(self, number: int, value: Any) -> None:
        """A record came."""
        if self.wrong is None:
            if self.next not in (None, number):
                self.wrong = f"record {number} came where record {self.next} was next"
            elif value != record(self.order.token, number, self.order.record_size):
                self.wrong = f"record {number} is {str(value)[:120]}"
        self.next = number + 1
        self._flows = True


@dataclass
class Entry:
    """A job.

    Attributes:
        order: what was asked for.
        submitted: when, as marks have it.
        id: its id; None: no reply came, so there may be no job, or one.
        cancels: how often a cancel was asked for.
        cancelled: what the only cancel said; None: it said nothing, or there were others.
        end: how it ended; None: nobody knows yet.
        told: when its end was first told.
        stop: what the last details said of its stop.
        records: how many records are stored, at the very end.
        followers: who read its records.
    """

    order: Order
    submitted: float = field(default_factory=now)
    id: str | None = None
    cancels: int = 0
    cancelled: bool | None = None
    end: End | None = None
    told: float | None = None
    stop: str | None = None
    records: int | None = None
    followers: list[Follower] = field(default_factory=list)


class Ledger:
    """All jobs of a run, and the promises that were seen broken."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.broken: list[Broken] = []
        #: How many receipts were held against the processes at the moment they came.
        self.receipts = 0

    def add(self, order: Order) -> Entry:
        """A job is about to be submitted."""
        entry = self.entries[order.token] = Entry(order)
        return entry

    def tell(self, entry: Entry, end: End) -> None:
        """A job's end was told."""
        if end == End("failed", "invalid_jobid"):
            self.break_(1, entry.order.token, "the dispatcher does not know this job any more")
        elif entry.end is None:
            entry.end, entry.told = end, now()
        elif entry.end != end:
            self.break_(1, entry.order.token, f"first told to have {entry.end}, then to have {end}")

    def break_(self, promise: int, token: str | None, what: str) -> None:
        """A promise is broken; the same is noted once."""
        broken = Broken(promise, token, what)
        if broken not in self.broken:
            self.broken.append(broken)
