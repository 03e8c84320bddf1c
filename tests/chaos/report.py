"""The output of a run at its end: a table of ends and marks, counts, and every violation with its facts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from chaos.faults import History
from chaos.marks import now
from chaos.observations import Observations, ObservedJob, Violation
from chaos.process_tracker import ProcessTracker

#: The eight promises, in short.
PROMISES = (
    "another error of the system",
    "no accepted job is lost",
    "a job is running only while a process runs it, and its end says what happened",
    "a stopped call is dead when its stop is confirmed",
    "a stream has no gap, repetition or reordering",
    "a call starts at most once",
    "values arrive as they were sent",
    "a limit holds",
    "submissions with one request id are one job",
)
#: Number of violations that are printed with all their facts, and of lines of the logs for each.
_MAX_DETAILED, _LINES = 20, 12


def table(observations: Observations, tracker: ProcessTracker) -> Iterator[str]:
    """Yield the table of ends and last marks."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for job in observations.jobs.values():
        marked = tracker.marks_of(job.spec.token)
        if marked.returned:
            mark = "end"
        elif marked.raised:
            mark = "raise"
        else:
            mark = "start only" if marked.starts else "none"
        rows[_end(job)][mark] += 1
    columns = ("none", "start only", "raise", "end")
    yield f"{'jobs by end, and their last mark:':40}" + "".join(f"{column:>12}" for column in columns)
    for end, row in sorted(rows.items()):
        yield f"    {end:36}" + "".join(f"{row[column] or '.':>12}" for column in columns)


def _end(job: ObservedJob) -> str:
    if job.id is None:
        return "(no reply to the submission)"
    end = "(none)" if job.end is None else str(job.end)
    return f"{end}, stop {job.stop}" if job.stop else end


def counts(observations: Observations, history: History) -> Iterator[str]:
    """Yield the numbers of jobs by procedure, followers, and faults by kind."""
    accepted = [job for job in observations.jobs.values() if job.id is not None]
    followers = [follower for job in accepted for follower in job.followers]
    kinds = Counter(job.spec.procedure for job in accepted)
    records = sum(job.records or 0 for job in accepted)
    resumed = sum(follower.interruptions for follower in followers)
    unanswered = len(observations.jobs) - len(accepted)
    yield f"jobs: {len(accepted)} ({_listed(kinds)}); {unanswered} submissions without a job"
    requested = [job for job in accepted if job.spec.request_id is not None]
    yield f"request ids: {len(requested)}, submitted {sum(job.submissions for job in requested)} times by the clients"
    yield f"records: {records}; followers: {len(followers)}, interrupted {resumed} times"
    cancels = sum(job.cancels > 0 for job in accepted)
    if observations.direct_calls:
        ends = Counter(call.end.kind if call.end else "none" for call in observations.direct_calls.values())
        yield f"direct calls: {len(observations.direct_calls)} ({_listed(ends)})"
    yield f"cancels: {cancels}; stop reports checked: {observations.stop_reports_checked}"
    yield f"faults: {history.injected.total()}; {history.without_target} more had no target"
    yield from (f"    {count:4}  {kind}" for kind, count in history.injected.most_common())


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())


def violations(observations: Observations, history: History, run: Path) -> Iterator[str]:
    """Yield every violation; the first few with the log lines about the job."""
    yield f"broken promises: {len(observations.violations)}"
    for number, count in sorted(Counter(violation.promise for violation in observations.violations).items()):
        yield f"    {count:4}  {number}. {PROMISES[number]}"
    for found in observations.violations[:_MAX_DETAILED]:
        yield from _details(found, observations, history, run)


def _details(found: Violation, observations: Observations, history: History, run: Path) -> Iterator[str]:
    job = observations.jobs.get(found.token or "")
    yield ""
    yield f"promise {found.promise}: {found.what}"
    call = observations.direct_calls.get(found.token or "")
    if call is not None:
        yield f"    direct call {call.token} of {call.host}, from {call.submitted:.3f} to {call.ended or 0:.3f}"
        yield from _kills_between(history, call.submitted, call.ended or now())
    if job is None:
        return
    spec = job.spec
    arguments = str(list(spec.arguments))[:200]
    yield f"    {job.id}: {spec.procedure} {arguments} on {spec.host}, queue {spec.queue}, {dict(spec.limits)}"
    yield f"    submitted at {job.submitted:.3f}, ended as {job.end} ({job.ended or 0:.3f}), stop {job.stop}"
    until = job.ended or now()
    for fault, begin, end in history.between(job.submitted, until, spec.host):
        yield f"    meanwhile, {begin:.3f} to {end:.3f}: {fault.kind} {fault.host or ''}"
    yield from _kills_between(history, job.submitted, until)
    if job.id is not None:
        for log in sorted(run.glob("*/*.log")):
            lines = [line for line in log.read_text("utf-8", "replace").splitlines() if job.id in line]
            yield from (f"    {log.relative_to(run)}: {line[:400]}" for line in lines[-_LINES:])


def _kills_between(history: History, since: float, to: float) -> Iterator[str]:
    yield from (f"    meanwhile, {at:.3f}: {place}" for at, place in history.places if since <= at <= to)
