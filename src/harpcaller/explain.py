"""The details of a job, and one sentence that explains its state. It does no input or output.

Spec: docs/protocol.md, Details.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harp.protocol.ends import Failed, Raised
from harp.protocol.json_text import Envelope, Raw, dumps, loads
from harpcaller.config import Config
from harpcaller.hosts.registry import Host
from harpcaller.model.jobs import Job, JobDetails, JobMetadata, QueuePosition, State, StopState
from harpcaller.model.phases import measure_phases, read_object, read_seconds
from harpcaller.runs.host_starts import FailingStarts
from harpcaller.runs.run import Run

_MAX_QUOTE = 300  #: Maximum number of characters of a message in a sentence.


@dataclass(frozen=True, slots=True)
class ExplainContext:
    """The state of the dispatcher that is not in the store."""

    run: Run | None  # of the job's call
    host: Host | None  # None: the registry does not have the job's host
    registry_loaded: bool
    config: Config
    active_calls: int
    store_failing: bool  # whether the store currently rejects data of active calls
    now: float  # Unix seconds
    failing: FailingStarts | None = None  # the failed starts on the job's host
    hidden_holders: int = 0  # number of slot holders of the job's queue that the client may not read
    sees_others: bool = True  # whether the client may know of jobs of other owners: how many there are, who stopped one


def describe_job(details: JobDetails, context: ExplainContext) -> Envelope:
    """Return the object of the reply to `get_details`; payloads are `Raw`."""
    job, metadata = details.job, details.metadata
    return Envelope(
        job=job.id,
        state=job.state.value,
        host=job.host,
        procedure=job.procedure,
        owner=job.owner,
        queue=job.queue,
        position=_position(details.queue_position, context) if details.queue_position else None,
        time=Envelope(submit=job.submitted, start=job.started, end=job.ended),
        limits=Envelope(
            timeout=job.timeout,
            max_exec_time=job.max_exec_time,
            start_within=job.start_within,
            running=job.max_running,
        ),
        failed_starts=_failed_starts(job, context),
        call=_call(metadata.call, context),
        records=Envelope(count=job.records, bytes=details.record_bytes),
        stop=job.stop.value if job.stop else None,
        holds_slot=job.holds_slot,
        stop_request=_stop_request(metadata, context),
        stop_report=metadata.stop_report,
        exit_info=metadata.exit_info,
        phases=_phases(job, metadata),
        why=_why(details, context),
    )


def _position(waiting: QueuePosition, context: ExplainContext) -> int:
    if context.sees_others:
        return waiting.position
    assert waiting.position_of_owner is not None
    return waiting.position_of_owner


_PUBLIC = frozenset({"administrator", "dispatcher"})  # in place of a client's address


def _stop_request(metadata: JobMetadata, context: ExplainContext) -> Raw | None:
    """Return who stopped the job, without the names of a client that the reader must not know."""
    stop_request = metadata.stop_request
    if stop_request is None or context.sees_others or loads(stop_request).get("by") in _PUBLIC:
        return stop_request
    return dumps({key: value for key, value in loads(stop_request).items() if key not in ("by", "principal")})


def _phases(job: Job, metadata: JobMetadata) -> Envelope:
    connect = read_seconds(read_object(metadata.call), "connect_seconds")
    return Envelope(measure_phases(job.submitted, job.started, job.ended, connect, metadata.exit_info))


def _call(stored: Raw | None, context: ExplainContext) -> Envelope | Raw | None:
    run = context.run
    if run is None:
        return stored
    outage = None if run.outage is None else Envelope(run.outage.as_json())
    return Envelope(run.describe_call(), last_contact=run.last_contact(context.now), outage=outage)


def _failed_starts(job: Job, context: ExplainContext) -> Envelope | None:
    """Return the failed starts on the host of a job that has not been started."""
    if context.failing is None or not (job.state is State.QUEUED or (context.run and not context.run.is_acknowledged)):
        return None
    return Envelope(context.failing.describe(context.now))


def _why(details: JobDetails, context: ExplainContext) -> str:
    match details.job.state:
        case State.QUEUED:
            return _why_queued(details.job, details.queue_position, context)
        case State.RUNNING:
            return _why_running(details.job, context)
    return _how_ended(details, context) + _stop(details, context)


def _why_queued(job: Job, waiting: QueuePosition | None, context: ExplainContext) -> str:
    if waiting is None:
        return "it is about to start"
    position = f"position {_position(waiting, context)}"
    if not context.sees_others:
        position += " of its owner's jobs"
    if waiting.concurrency is not None and waiting.slots_held >= waiting.concurrency:
        others = [f"{context.hidden_holders} of other owners"] if context.hidden_holders else []
        shown = len(waiting.slot_holders) + context.hidden_holders
        more = ", ..." if waiting.slots_held > shown else ""
        holders = f"{waiting.slots_held} of {waiting.concurrency}: {', '.join([*waiting.slot_holders, *others])}{more}"
        queue = job.queue.decode("utf-8", "replace") if job.queue is not None else "null"
        return f"queue {queue} is full ({holders}), {position}"
    if waiting.slots_held_on_host >= context.config.max_calls_per_host:
        calls = f"{waiting.slots_held_on_host} of {context.config.max_calls_per_host} calls"
        return f"host {job.host} is full ({calls}), {position}"
    if job.max_running is not None and waiting.slots_held_by_owner >= job.max_running:
        return f"its owner has reached its limit ({waiting.slots_held_by_owner} of {job.max_running} jobs), {position}"
    if context.failing is not None and not context.failing.may_try:
        failed = context.failing.describe(context.now)
        attempts = f"{failed['attempts']} attempts, last error: {_quote(failed['error'])}"
        wait = f"next attempt in {failed['next'] - context.now:.1f} s, {position}"
        return f"host {job.host} accepts no starts since {_format_time(failed['since'])} ({attempts}); {wait}"
    if not context.registry_loaded:
        return "the hosts registry is not loaded yet"
    if context.store_failing:
        return "the store cannot write data of running calls; no job starts until it can"
    if context.active_calls >= context.config.max_calls:
        return f"the dispatcher is full ({context.active_calls} of {context.config.max_calls} calls), {position}"
    if not context.sees_others and waiting.position > _position(waiting, context):
        return f"jobs of other owners are before it, {position}"
    if waiting.position > 1:
        return f"{waiting.position - 1} jobs are before it, {position}"
    return "it is about to start"


def _why_running(job: Job, context: ExplainContext) -> str:
    run = context.run
    if run is None:
        return "the next start of the dispatcher recovers its call"
    if run.outage is not None:
        return _unreachable(job, run)
    if not run.is_acknowledged:
        where = f" ({context.host.address}, port {context.host.port})" if context.host else ""
        return f"it is connecting to host {job.host}{where}, since {_format_time(job.started)}"
    return f"it has been running on host {job.host} since {_format_time(job.started)}; {job.records} records so far"


def _unreachable(job: Job, run: Run) -> str:
    assert run.outage is not None
    if run.outage.error is None:
        return f"it is reconnecting to host {job.host}, since {_format_time(run.outage.since)}"
    attempts = f"{run.outage.attempts} attempts, last error: {_quote(run.outage.error)}"
    remaining = max(0.0, run.seconds_until_lost())
    return (
        f"host {job.host} cannot be reached since {_format_time(run.outage.since)} ({attempts}); "
        f"next attempt within 5 s, declared lost in {remaining:.0f} s"
    )


def _how_ended(details: JobDetails, context: ExplainContext) -> str:
    job = details.job
    after = "" if job.started is None or job.ended is None else f" after {max(0.0, job.ended - job.started):.3f} s"
    match job.end:
        case Failed(kind, message):
            return ": ".join(filter(None, (f"it failed{after}", kind, _quote(message))))
        case Raised(kind, message):
            return ": ".join(filter(None, (f"it raised {kind}{after}", _quote(message))))
    if job.state is State.RETURNED:
        return f"it returned{after}"
    stop_request = _stop_request(details.metadata, context)
    requester = _requester(loads(stop_request)) if stop_request else None
    by = f" by {requester}" if requester else ""
    return f"it was cancelled{by} at {_format_time(job.ended)}{', before it started' if job.started is None else ''}"


def _quote(message: str) -> str:
    return message if len(message) <= _MAX_QUOTE else f"{message[:_MAX_QUOTE]}..."


def _requester(stop_request: Mapping[str, Any]) -> str | None:
    """Return who cancelled a job: the principal, as that of its owner; jobs of earlier versions have no principal."""
    principal, address = stop_request.get("principal"), stop_request.get("by")
    if principal is None:
        return None if address is None else str(address)
    return f"{principal} ({address})" if principal.startswith("anonymous@") else str(principal)


def _stop(details: JobDetails, context: ExplainContext) -> str:
    report = loads(details.metadata.stop_report) if details.metadata.stop_report else {}
    match details.job.stop:
        case StopState.PENDING:
            if context.run is not None and context.run.outage is not None:
                return f"; its stop is pending: {_unreachable(details.job, context.run)}"
            return "; its stop is pending: the host has not confirmed it yet"
        case StopState.CONFIRMED:
            count = report.get("found")
            noun = "process" if count == 1 else "processes"
            return f"; its stop is confirmed{f' ({count} {noun})' if count else ''}"
        case StopState.FAILED:
            pids = ", ".join(str(process["pid"]) for process in report.get("survivors", ()))
            reason = f"processes survive on its host: {pids}" if pids else "the host is lost"
            return f"; its stop failed: {reason}"
        case StopState.UNKNOWN:
            return "; it is unknown whether its processes have ended: the legacy harpd on its host cannot report it"
        case None:
            return ""


def _format_time(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
