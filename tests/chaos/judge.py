"""The judgement at the end: what clients and the dispatcher say of each job, held against its marks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from chaos.census import Census, Truth
from chaos.faults import History
from chaos.ledger import End, Entry, Ledger
from chaos.orders import NOWHERE, QUEUES
from chaos.procedures import result
from chaos.schedule import Kind
from chaos.system import HOST_CONCURRENCY, HOST_LOST_AFTER, KILL_GRACE

#: Ends that say that the call was surely never started.
_NOT_STARTED = frozenset(
    {"too_many_calls", "network_error", "procedure_loading_error", "wrong_instance", "missing_result", "os_error"}
)
#: Seconds that a job may take when nobody has limited it further; a little less, as marks come later than starts.
_LIMIT = 50.0
#: Seconds before its death in which a process may have been told to stop: what it says then need not be kept.
_STOPPING = 3 * KILL_GRACE
#: Seconds for which an outage may go on having effects: a daemon comes up, attempts time out, pauses end. So contact is
#: lost for longer than a fault lasts.
_AFTERMATH = 5.0
#: Faults that cut no contact.
_HARMLESS = frozenset({Kind.STEP_CLOCK, Kind.RELOAD_DISPATCHER, Kind.RELOAD_GATE, Kind.KILL_CALL})


class Judge:
    """Compares.

    Args:
        ledger: what clients were told; broken promises go there.
        census: what is true.
        history: what may explain ends.
    """

    def __init__(self, ledger: Ledger, census: Census, history: History) -> None:
        self._ledger = ledger
        self._census = census
        self._history = history

    def judge(self) -> None:
        """Look at every job, then at the limits."""
        for token, truth in self._census.truths.items():
            if len(truth.starts) > 1:
                self._ledger.break_(5, token, f"its procedure started {len(truth.starts)} times")
            entry = self._ledger.entries.get(token)
            if entry is None or entry.id is None:
                self._ledger.break_(1, token, "its procedure ran, and the dispatcher knows no such job")
        for entry in self._ledger.entries.values():
            if entry.id is not None:
                self._judge_job(entry, self._census.truth(entry.order.token))
        self._judge_limits()

    def _judge_job(self, entry: Entry, truth: Truth) -> None:
        token = entry.order.token
        if entry.end is None:
            self._ledger.break_(1, token, "it was accepted and has no end")
            return
        if fault := self._disagreement(entry, truth, entry.end):
            self._ledger.break_(2, token, f"it ended as {entry.end}, but {fault}")
        if entry.cancelled is True and entry.end != End("cancelled"):
            self._ledger.break_(2, token, f"cancel said that it stopped it, but it ended as {entry.end}")
        if entry.stop == "pending":
            self._ledger.break_(3, token, "its stop is pending though its host can be reached")
        elif entry.stop == "unknown":
            self._ledger.break_(3, token, "its stop is unknown though every host here can say")
        self._judge_records(entry, truth, entry.end)
        if entry.stop == "confirmed" and (left := self._census.living(token)):
            self._ledger.break_(3, token, f"its stop was confirmed, and {len(left)} of its processes live")

    def _disagreement(self, entry: Entry, truth: Truth, end: End) -> str | None:
        """What the marks say against an end."""
        order = entry.order
        match end:
            case End("returned", value):
                if len(truth.starts) != 1 or len(truth.returned) != 1:
                    return f"it has {len(truth.starts)} marks of a start and {len(truth.returned)} of a return"
                return None if value == truth.returned[0] == result(order.token) else f"its result is {value!r}"
            case End("raised", type_):
                return None if truth.raised and type_ == "ValueError" else "no procedure raised that"
            case End("cancelled"):
                return None if entry.cancels else "nobody cancelled it"
            case End("failed", type_):
                return self._unexplained(entry, truth, str(type_))
        return "there is no such end"

    def _unexplained(self, entry: Entry, truth: Truth, type_: str) -> str | None:
        """Why an error can't be: None when something that was done explains it."""
        order = entry.order
        match type_:
            case "unknown_host":
                return None if order.host == NOWHERE else "its host is known"
            case "timeout":
                fits = order.limits or order.procedure == "late" or self._lasted(entry, truth) > _LIMIT
                return None if fits else f"it had no limit and took {self._lasted(entry, truth):.1f} s"
            case "call_died":
                fits = order.procedure == "die" or self._killed(entry, truth)
                return None if fits else "nobody killed it"
            case "shutdown" if not truth.starts and self._struck(entry, self._history.gates):
                return None  # it was refused by a gate that was about to end
            case "shutdown":
                return None if self._struck(entry, self._history.shutdowns) else "its host was not told to end calls"
            case "lost_contact":
                return self._outage_short_of(entry, 0.0)
            case "host_lost":
                return self._outage_short_of(entry, HOST_LOST_AFTER / 2)
            case "missing_result" if self._struck(entry, [*self._history.supervisors, *self._history.shutdowns]):
                return None  # whoever held its end is gone
            case _ if type_ in _NOT_STARTED:
                return None if not truth.starts else "its procedure did start"
        return "nothing explains that error"

    def _lasted(self, entry: Entry, truth: Truth) -> float:
        begin = truth.main.began if truth.main is not None else entry.submitted
        return (entry.told or begin) - begin

    def _killed(self, entry: Entry, truth: Truth) -> bool:
        return not self._history.killed.isdisjoint(truth.starts) or self._struck(entry, self._history.supervisors)

    @staticmethod
    def _struck(entry: Entry, blows: Iterable[tuple[str, float]]) -> bool:
        """Whether the job's host was struck while the job was under way, or shortly before."""
        assert entry.told is not None
        since = entry.submitted - _AFTERMATH
        return any(host == entry.order.host and since <= at <= entry.told for host, at in blows)

    def _outage_short_of(self, entry: Entry, least: float) -> str | None:
        assert entry.told is not None
        faults = self._history.between(entry.submitted - _AFTERMATH, entry.told, entry.order.host)
        outages = [end - begin for fault, begin, end in faults if fault.kind not in _HARMLESS]
        if outages and sum(outages) >= least:
            return None
        return f"its host was out of reach for {sum(outages):.1f} s only"

    def _judge_records(self, entry: Entry, truth: Truth, end: End) -> None:
        """All records are stored that were handed over, and every follower has seen all of them to the last."""
        token, stored = entry.order.token, entry.records
        for follower in entry.followers:
            if follower.wrong is not None:
                self._ledger.break_(4, token, f"to a follower {follower.wrong}")
            elif follower.ended and follower.next not in (None, stored) and (follower.next or 0) < (stored or 0):
                self._ledger.break_(4, token, f"a follower got the end after record {follower.next} of {stored}")
        if stored is None:
            return
        handed_over = len(truth.records)
        if end.kind == "returned" and not stored == handed_over == entry.order.records:
            asked_for = f"{entry.order.records} were asked for"
            self._ledger.break_(4, token, f"{stored} records are stored, {handed_over} handed over; {asked_for}")
        elif stored > handed_over + 1:  # the last one may have been marked no more
            self._ledger.break_(4, token, f"{stored} records are stored, and only {handed_over} were handed over")
        elif stored < (least := self._surely_kept(entry, truth, end)):
            self._ledger.break_(4, token, f"{stored} records are stored, though {least} were handed over in time")

    def _surely_kept(self, entry: Entry, truth: Truth, end: End) -> int:
        """How many records a job has at least that did not return: those from before it was stopped, if it was."""
        if truth.main is None or self._struck(entry, self._history.supervisors):
            return 0
        if end == End("failed", "call_died"):
            return len(truth.records)
        if end != End("failed", "lost_contact"):
            return 0
        died = truth.main.seen
        return sum(at < died - _STOPPING for at in truth.records)

    def _judge_limits(self) -> None:
        queues: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        hosts: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for life in [*self._census.lives.values(), *self._census.rested]:
            entry = self._ledger.entries.get(life.token)
            if not life.main or entry is None or self._given_up(entry):
                continue
            hosts[life.host].append((life.began, life.seen, life.token))
            if entry.order.queue is not None:
                queues[entry.order.queue].append((life.began, life.seen, life.token))
        for queue, spans in queues.items():
            self._judge_limit(f"queue {queue}", QUEUES[queue], spans)
        for host, spans in hosts.items():
            self._judge_limit(f"host {host}", HOST_CONCURRENCY, spans)

    @staticmethod
    def _given_up(entry: Entry) -> bool:
        """Whether the host was given up while it had the job: the one case in which a limit may be exceeded."""
        return entry.end == End("failed", "host_lost") or entry.stop == "failed"

    def _judge_limit(self, name: str, most: int, spans: list[tuple[float, float, str]]) -> None:
        """Processes that surely lived at the same moment are not more than there may be."""
        # Both ends of a span are alive: what begins at a moment is counted before what ends at it.
        moments = [(begin, False, token) for begin, _, token in spans] + [(end, True, token) for _, end, token in spans]
        living: set[str] = set()
        for at, ends, token in sorted(moments):
            if ends:
                living.discard(token)
                continue
            living.add(token)
            if len(living) > most:
                all_ = ", ".join(sorted(living))
                self._ledger.break_(7, token, f"{name} had {len(living)} of {most} at {at:.3f}: {all_}")
                return
