"""The checks at the end: what clients and dispatcher report about each job, compared with its marks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from chaos.faults import History
from chaos.job_specs import QUEUES, UNKNOWN_HOST
from chaos.observations import DirectCall, End, Observations, ObservedJob
from chaos.procedures import result
from chaos.process_tracker import MarkedJob, ProcessTracker
from chaos.schedule import Kind
from chaos.system import HOST_TIMEOUT, KILL_GRACE, MAX_CALLS_PER_HOST, START_WITHIN

#: Errors of calls that were not started.
_NOT_STARTED = frozenset(
    {"too_many_calls", "network_error", "procedure_loading_error", "wrong_instance", "missing_result", "os_error"}
)
#: Of these, the replies of a host after which a start is always tried again. `network_error` may also be the end of a
#: connection-bound call.
_TRIED_AGAIN = frozenset({"too_many_calls", "procedure_loading_error"})
#: The default limit of a job in seconds; a little less, because marks are later than starts. No job without an own
#: limit works for so long: it reaches the limit only if outages have delayed it for half of this time.
_LIMIT = 50.0
#: Seconds before its death in which a process may have been stopping: records of this time may be dropped.
_STOP_TIME = 3 * KILL_GRACE
#: Seconds after a fault in which contact may still be lost: a daemon starts, attempts time out, pauses end.
_AFTER_EFFECTS = 5.0
#: Faults that do not interrupt contact.
_WITHOUT_OUTAGE = frozenset(
    {
        Kind.STEP_CLOCK,
        Kind.RELOAD_DISPATCHER,
        Kind.RELOAD_FRONTEND,
        Kind.KILL_CALL,
        Kind.LEAVE_DISPATCHER_LOG,
        Kind.LEAVE_HOST_LOGS,
        Kind.REWRITE_HOSTS_FILE,
        Kind.CROWD,
        Kind.CLEAN_RUNTIME_DIRECTORY,
    }
)


class Checker:
    """Compares observations with marks.

    Args:
        observations: what clients received; receives violations.
        tracker: the processes, from the marks.
        history: the injected faults, which may explain ends.
    """

    def __init__(self, observations: Observations, tracker: ProcessTracker, history: History) -> None:
        self._observations = observations
        self._tracker = tracker
        self._history = history

    def check(self) -> None:
        """Check every job, then the limits."""
        for token, marked in self._tracker.jobs.items():
            if len(marked.starts) > 1:
                self._observations.add_violation(5, token, f"its procedure started {len(marked.starts)} times")
            job = self._observations.jobs.get(token)
            if token not in self._observations.direct_calls and (job is None or job.id is None):
                self._observations.add_violation(1, token, "its procedure ran, but the dispatcher has no such job")
        for job in self._observations.jobs.values():
            if job.id is not None:
                self._check_job(job, self._tracker.marks_of(job.spec.token))
        for call in self._observations.direct_calls.values():
            self._check_direct_call(call, self._tracker.marks_of(call.token))
        self._check_limits()

    def _check_direct_call(self, call: DirectCall, marked: MarkedJob) -> None:
        if call.end is None:
            return  # the client has reported it
        add = self._observations.add_violation
        if call.problem is not None:
            add(4, call.token, f"a direct call: {call.problem}")
        elif call.records > len(marked.records) + 1:
            add(4, call.token, f"a direct call received {call.records} records, {len(marked.records)} were passed on")
        match call.end:
            case End("returned", value):
                right = len(marked.starts) == 1 and value == result(call.token) and marked.returned == [value]
                problem = None if right else f"its marks are {len(marked.starts)} starts, {marked.returned} returned"
                if call.records != len(marked.records):
                    add(4, call.token, f"{call.records} records were received, {len(marked.records)} were passed on")
            case End("raised", type_):
                problem = None if marked.raised and type_ == "ValueError" else "its procedure did not raise that"
            case End("failed", "too_many_calls"):
                problem = "its procedure started" if marked.starts else None
            case _:
                problem = None if self._disturbed(call) else "no fault explains this error"
        if problem is not None:
            add(2, call.token, f"a direct call ended as {call.end}, but {problem}")

    def _disturbed(self, call: DirectCall) -> bool:
        """Return whether a process of the call's host was killed or stopped in this time."""
        assert call.ended is not None
        faults = self._history.between(call.submitted - _AFTER_EFFECTS, call.ended, call.host)
        history = self._history
        kills = [*history.workers, *history.zygotes, *history.supervisors]
        since = call.submitted - _AFTER_EFFECTS
        return any(fault.host == call.host for fault, _, _ in faults) or any(
            host == call.host and since <= at <= call.ended for host, at in kills
        )

    def _check_job(self, job: ObservedJob, marked: MarkedJob) -> None:
        token = job.spec.token
        if job.end is None:
            self._observations.add_violation(1, token, "it was accepted and has no end")
            return
        if fault := self._contradiction(job, marked, job.end):
            self._observations.add_violation(2, token, f"it ended as {job.end}, but {fault}")
        if job.cancelled is True and job.end != End("cancelled"):
            self._observations.add_violation(2, token, f"cancel returned True, but it ended as {job.end}")
        if job.stop == "pending":
            self._observations.add_violation(3, token, "its stop is pending although its host can be reached")
        elif job.stop == "unknown":
            self._observations.add_violation(3, token, "its stop is unknown although every host can confirm it")
        self._check_records(job, marked, job.end)
        if job.stop == "confirmed" and (left := self._tracker.living(token)):
            self._observations.add_violation(3, token, f"its stop was confirmed, but {len(left)} of its processes live")

    def _contradiction(self, job: ObservedJob, marked: MarkedJob, end: End) -> str | None:
        """Return how the marks contradict an end; None: they do not."""
        spec = job.spec
        match end:
            case End("returned", value):
                if len(marked.starts) != 1 or len(marked.returned) != 1:
                    return f"it has {len(marked.starts)} marks of a start and {len(marked.returned)} of a return"
                return None if value == marked.returned[0] == result(spec.token) else f"its result is {value!r}"
            case End("raised", type_):
                return None if marked.raised and type_ == "ValueError" else "its procedure did not raise that"
            case End("cancelled"):
                return None if job.cancels else "no client cancelled it"
            case End("failed", type_):
                return self._unexplained(job, marked, str(type_))
        return "this end does not exist"

    def _unexplained(self, job: ObservedJob, marked: MarkedJob, type_: str) -> str | None:
        """Return why an error is not possible; None: a fault explains it."""
        spec = job.spec
        match type_:
            case "unknown_host":
                known = spec.host != UNKNOWN_HOST and not self._had_half_hosts(job)
                return "its host is known" if known else None
            case "timeout":
                if spec.limits or spec.procedure == "late":
                    return None
                took = self._lasted(job, marked)
                if took <= _LIMIT:
                    return f"it had no limit and took {took:.1f} s"
                return None if spec.endless else self._missing_outage(job, _LIMIT / 2)
            case "call_died":
                fits = spec.procedure == "die" or self._killed(job, marked)
                return None if fits else "no fault killed it"
            case "shutdown" if not marked.starts and self._affected_by(job, self._history.frontend_stops):
                return None  # a stopping frontend has refused it
            case "shutdown":
                return (
                    None if self._affected_by(job, self._history.call_stops) else "no fault ended the calls of its host"
                )
            case "lost_contact":
                return self._missing_outage(job, 0.0)
            case "host_lost":
                return self._missing_outage(job, HOST_TIMEOUT / 2)
            case "missing_result" if self._affected_by(job, [*self._history.supervisors, *self._history.call_stops]):
                return None  # the supervisor that had its end has died
            case "system_error" if self._affected_by(job, [*self._history.zygotes, *self._history.supervisors]):
                return None if not marked.starts else "its procedure started"
            case _ if type_ in _NOT_STARTED and marked.starts:
                return "its procedure started"
            case _ if type_ in _TRIED_AGAIN and self._ended_early(job):
                return f"its start was not tried again for {START_WITHIN:g} s"
            case _ if type_ in _NOT_STARTED:
                return None
        return "no fault explains this error"

    def _had_half_hosts(self, job: ObservedJob) -> bool:
        """Return whether a dispatcher may have started with an incomplete hosts file before the job ended."""
        assert job.ended is not None
        return any(begin <= job.ended and job.submitted <= end for begin, end in self._history.half_hosts)

    def _ended_early(self, job: ObservedJob) -> bool:
        """Return whether a job ended before `START_WITHIN`, by a clock that was not changed in this time."""
        assert job.ended is not None
        faults = self._history.between(job.submitted, job.ended, job.spec.host)
        stepped = any(fault.kind is Kind.STEP_CLOCK for fault, _, _ in faults)
        return not stepped and job.ended - job.submitted < START_WITHIN

    def _lasted(self, job: ObservedJob, marked: MarkedJob) -> float:
        begin = marked.main.started_at if marked.main is not None else job.submitted
        return (job.ended or begin) - begin

    def _killed(self, job: ObservedJob, marked: MarkedJob) -> bool:
        if not self._history.killed_calls.isdisjoint(marked.starts):
            return True
        kills = [*self._history.supervisors, *self._history.zygotes]
        if not marked.starts:  # a worker that was killed before its first mark
            kills += self._history.workers
        return self._affected_by(job, kills)

    @staticmethod
    def _affected_by(job: ObservedJob, events: Iterable[tuple[str, float]]) -> bool:
        """Return whether an event concerns the job's host, between shortly before the submission and the end."""
        assert job.ended is not None
        since = job.submitted - _AFTER_EFFECTS
        return any(host == job.spec.host and since <= at <= job.ended for host, at in events)

    def _missing_outage(self, job: ObservedJob, least: float) -> str | None:
        assert job.ended is not None
        faults = self._history.between(job.submitted - _AFTER_EFFECTS, job.ended, job.spec.host)
        outages = [end - begin for fault, begin, end in faults if fault.kind not in _WITHOUT_OUTAGE]
        if outages and sum(outages) >= least:
            return None
        return f"its host was unreachable for only {sum(outages):.1f} s"

    def _check_records(self, job: ObservedJob, marked: MarkedJob, end: End) -> None:
        """Check that all passed-on records are stored, and that every follower has received all of them."""
        token, stored = job.spec.token, job.records
        for follower in job.followers:
            if follower.problem is not None:
                self._observations.add_violation(4, token, f"a follower: {follower.problem}")
            elif follower.ended and follower.next not in (None, stored) and (follower.next or 0) < (stored or 0):
                self._observations.add_violation(
                    4, token, f"a follower received the end after record {follower.next} of {stored}"
                )
        if stored is None:
            return
        passed_on = len(marked.records)
        if end.kind == "returned" and not stored == passed_on == job.spec.records:
            requested = f"{job.spec.records} were requested"
            self._observations.add_violation(
                4, token, f"{stored} records are stored, {passed_on} were passed on; {requested}"
            )
        elif stored > passed_on + 1:  # the last one may have no mark
            self._observations.add_violation(
                4, token, f"{stored} records are stored, but only {passed_on} were passed on"
            )
        elif stored < (least := self._min_records(job, marked, end)):
            self._observations.add_violation(
                4, token, f"only {stored} records are stored, but {least} were passed on in time"
            )

    def _min_records(self, job: ObservedJob, marked: MarkedJob, end: End) -> int:
        """Return the minimum number of stored records of a job that did not return: those from before its stop."""
        if marked.main is None or self._affected_by(job, self._history.supervisors):
            return 0
        if end == End("failed", "call_died"):
            return len(marked.records)
        if end != End("failed", "lost_contact"):
            return 0
        died = marked.main.last_seen
        return sum(at < died - _STOP_TIME for at in marked.records)

    def _check_limits(self) -> None:
        queues: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        hosts: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for lifetime in [*self._tracker.lifetimes.values(), *self._tracker.earlier_lifetimes]:
            job = self._observations.jobs.get(lifetime.token)
            if not lifetime.main or job is None or self._host_was_lost(job):
                continue
            hosts[lifetime.host].append((lifetime.started_at, lifetime.last_seen, lifetime.token))
            if job.spec.queue is not None:
                queues[job.spec.queue].append((lifetime.started_at, lifetime.last_seen, lifetime.token))
        for queue, spans in queues.items():
            self._check_limit(f"queue {queue}", QUEUES[queue], spans)
        for host, spans in hosts.items():
            self._check_limit(f"host {host}", MAX_CALLS_PER_HOST, spans)

    @staticmethod
    def _host_was_lost(job: ObservedJob) -> bool:
        """Return whether the job's host was declared lost: the only case in which a limit may be exceeded."""
        return job.end == End("failed", "host_lost") or job.stop == "failed"

    def _check_limit(self, name: str, most: int, spans: list[tuple[float, float, str]]) -> None:
        """Check that not more processes than allowed certainly lived at the same time."""
        # A process lives at both ends of its span: at equal times, beginnings count before ends.
        times = [(begin, False, token) for begin, _, token in spans] + [(end, True, token) for _, end, token in spans]
        living: set[str] = set()
        for at, ends, token in sorted(times):
            if ends:
                living.discard(token)
                continue
            living.add(token)
            if len(living) > most:
                all_ = ", ".join(sorted(living))
                self._observations.add_violation(7, token, f"{name} had {len(living)} of {most} at {at:.3f}: {all_}")
                return
