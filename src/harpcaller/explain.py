"""All that is known of a job, and one sentence why it is as it is. Pure but for what it is given.

Spec: docs/protocol.md, Details.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harp.protocol.ends import Failed, Raised
from harp.protocol.json_text import Envelope, InvalidJSON, Raw, loads
from harpcaller.hosts.inventory import Host
from harpcaller.model.jobs import Job, JobDetails, JobMetadata, QueuePosition, State, StopState
from harpcaller.runs.run import Run

__all__ = ["ExplainContext", "describe"]

#: How much of a message a sentence quotes, in characters.
_QUOTED = 300

#: What a host says of times is taken for a number of seconds below this, be they since 1970.
_MOST_SECONDS = 2.0**40


@dataclass(frozen=True, slots=True)
class ExplainContext:
    """What the dispatcher knows beside the store.

    Attributes:
        run: who looks after the job's call; None: nobody now.
        host: the job's host; None: the registry has none of this name.
        hosts_known: whether the registry is known.
        max_calls_per_host: how many jobs may hold a slot on a host.
        calls: how many calls are under way.
        most_calls: how many may be.
        store_troubled: whether the store refuses what calls bring.
        timings: how long the dispatcher's own steps took, seconds by phase, as far as that is known.
        now: Unix seconds.
    """

    run: Run | None
    host: Host | None
    registry_loaded: bool
    max_calls_per_host: int
    active_calls: int
    max_calls: int
    store_failing: bool
    timings: Mapping[str, float]
    now: float


def describe(details: JobDetails, context: ExplainContext) -> Envelope:
    """The object that `get_details` answers with; payloads are `Raw`."""
    job, metadata = details.job, details.metadata
    return Envelope(
        job=job.id,
        state=job.state.value,
        host=job.host,
        procedure=job.procedure,
        queue=job.queue,
        position=details.queue_position.position if details.queue_position else None,
        time=Envelope(submit=job.submitted, start=job.started, end=job.ended),
        limits=Envelope(timeout=job.timeout, max_exec_time=job.max_exec_time),
        call=_call(metadata.call, context),
        records=Envelope(count=job.records, bytes=details.record_bytes),
        stop=job.stop.value if job.stop else None,
        holds_slot=job.holds_slot,
        stop_request=metadata.stop_request,
        stop_report=metadata.stop_report,
        exit_info=metadata.exit_info,
        phases=_phases(job, metadata, context.timings),
        why=_why(details, context),
    )


def _phases(job: Job, metadata: JobMetadata, own: Mapping[str, float]) -> Envelope:
    """Where the job's time went, in seconds; None: not known, or not over.

    What happened on the host was measured there, so that its clock may be wrong. The rest is what is left of the time
    from the job's start to its end: on the way there and back, and until its last records were stored. What the
    dispatcher alone knows lies before and after, but for the storing of a job that got its slot with it.
    """
    call, evidence = (_object(fact) for fact in (metadata.call, metadata.exit_info))
    began, ended = (_seconds(evidence, moment) for moment in ("started", "ended"))
    fork = _seconds(evidence, "fork")
    phases = Envelope(
        wait=_between(job.submitted, job.started),
        connect=_seconds(call, "connect_seconds"),
        authenticate=_seconds(evidence, "authentication"),
        fork=fork,
        run=None if fork is None or began is None else _between(began + fork, ended),
    )
    here = sum(seconds for name, seconds in phases.items() if name != "wait" and seconds is not None)
    took = _between(job.started, job.ended)
    phases["other"] = None if took is None or phases["run"] is None else _between(here, took)
    accept, store, store_end, deliver = map(own.get, ("accept", "store", "store_end", "deliver"))
    return Envelope(_rounded(accept=accept, store=store), **phases, **_rounded(store_end=store_end, deliver=deliver))


def _rounded(**seconds: float | None) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 6) for name, value in seconds.items()}


def _object(fact: Raw | None) -> dict[str, Any]:
    try:
        found = None if fact is None else loads(fact)
    except InvalidJSON:  # a number that is too long, say: what a host says is kept as it is
        found = None
    return found if isinstance(found, dict) else {}


def _seconds(fact: dict[str, Any], key: str) -> float | None:
    """What a host has said, if that is a number which is of use."""
    found = fact.get(key)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found < _MOST_SECONDS:
        return None
    return float(found)


def _between(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else round(max(0.0, after - before), 6)


def _call(stored: Raw | None, context: ExplainContext) -> Envelope | Raw | None:
    run = context.run
    if run is None:
        return stored
    outage = None if run.outage is None else Envelope(run.outage.as_json())
    return Envelope(run.describe_call(), last_contact=run.last_contact(context.now), outage=outage)


def _why(details: JobDetails, context: ExplainContext) -> str:
    job = details.job
    if job.state is State.QUEUED:
        return _why_queued(job, details.queue_position, context)
    if job.state is State.RUNNING:
        return _why_running(job, context)
    return f"{_how_ended(job, details)}{_stop(job, details, context)}"


def _why_queued(job: Job, waiting: QueuePosition | None, context: ExplainContext) -> str:
    if waiting is None:
        return "it is about to start"
    position = f"position {waiting.position}"
    if waiting.concurrency is not None and waiting.slots_held >= waiting.concurrency:
        more = ", ..." if waiting.slots_held > len(waiting.slot_holders) else ""
        holders = f"{waiting.slots_held} of {waiting.concurrency}: {', '.join(waiting.slot_holders)}{more}"
        return f"queue {_format_payload(job.queue)} is full ({holders}), {position}"
    if waiting.slots_held_on_host >= context.max_calls_per_host:
        held = f"{waiting.slots_held_on_host} of {context.max_calls_per_host} calls"
        return f"host {job.host} is full ({held}), {position}"
    if not context.registry_loaded:
        return "the hosts registry is not known yet"
    if context.store_failing:
        return "the store does not take what running calls bring; nothing is started until it does"
    if context.active_calls >= context.max_calls:
        return f"the dispatcher is full ({context.active_calls} of {context.max_calls} calls), {position}"
    if waiting.position > 1:
        return f"{waiting.position - 1} jobs are before it, {position}"
    return "it is about to start"


def _why_running(job: Job, context: ExplainContext) -> str:
    run = context.run
    if run is None:
        return "its call is taken up again with the dispatcher's start"
    if run.outage is not None:
        return _unreachable(job, run)
    if not run.is_acknowledged:
        where = f" ({context.host.address}, port {context.host.port})" if context.host else ""
        return f"host {job.host}{where} is being connected to, since {_format_time(job.started)}"
    return f"it runs on host {job.host} since {_format_time(job.started)}; {job.records} records so far"


def _unreachable(job: Job, run: Run) -> str:
    assert run.outage is not None
    if run.outage.error is None:
        return f"host {job.host} is being reached again, since {_format_time(run.outage.since)}"
    tried = f"{run.outage.attempts} attempts, the last error: {run.outage.error[:_QUOTED]}"
    left = max(0.0, run.seconds_until_lost())
    return (
        f"host {job.host} unreachable since {_format_time(run.outage.since)} ({tried}), next try within 5 s, "
        f"given up as lost in {left:.0f} s"
    )


def _how_ended(job: Job, details: JobDetails) -> str:
    took = "" if job.started is None or job.ended is None else f" after {max(0.0, job.ended - job.started):.3f} s"
    match job.end:
        case Failed(kind, message):
            return f"it failed{took}: {kind}: {message[:_QUOTED]}"
        case Raised(kind, message):
            return f"it raised {kind}{took}: {message[:_QUOTED]}"
    if job.state is State.RETURNED:
        return f"it returned{took}"
    by = loads(details.metadata.stop_request).get("by") if details.metadata.stop_request else None
    whom = f" by {by}" if by else ""
    return f"it was cancelled{whom} at {_format_time(job.ended)}{', before it started' if job.started is None else ''}"


def _stop(job: Job, details: JobDetails, context: ExplainContext) -> str:
    receipt = loads(details.metadata.stop_report) if details.metadata.stop_report else {}
    match job.stop:
        case StopState.PENDING:
            if context.run is not None and context.run.outage is not None:
                return f"; its stop is pending: {_unreachable(job, context.run)}"
            return "; its stop is pending: the host has not confirmed it yet"
        case StopState.CONFIRMED:
            found = receipt.get("found")
            return f"; its stop is confirmed{f' ({found} processes)' if found else ''}"
        case StopState.FAILED:
            pids = ", ".join(str(one["pid"]) for one in receipt.get("survivors", ()))
            return f"; its stop failed: {f'processes survive on its host: {pids}' if pids else 'the host is lost'}"
        case StopState.UNKNOWN:
            return "; whether its processes are gone is not known: the host's harpd can't say"
        case None:
            return ""


def _format_payload(payload: Raw | None) -> str:
    return payload.decode("utf-8", "replace") if payload is not None else "null"


def _format_time(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
