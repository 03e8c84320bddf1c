"""Whether a job fits a filter, by its summary alone. Pure.

The store decides about lists. Changes of jobs are read once for all filters, and are matched here; both agree.
"""

from __future__ import annotations

from harpcaller.model.job_filters import NO_QUEUE, OPEN, JobFilter
from harpcaller.model.jobs import JobSummary


def matches(wanted: JobFilter, job: JobSummary) -> bool | None:
    """Return whether a job fits a filter; None: its payloads decide, which a summary does not have."""
    if not (_matches_fixed_parts(wanted, job) and _matches_changing_parts(wanted, job)):
        return False
    return None if wanted.info is not None or wanted.arguments is not None or wanted.text else True


def may_have_fitted(wanted: JobFilter, job: JobSummary) -> bool:
    """Return whether a job that does not fit a filter may have fitted it before a change.

    What a job is called with never changes, and an end neither. Only filters for states before the end, stops, slots or
    starts lose jobs.
    """
    loses_jobs = wanted.states & OPEN or wanted.stops or wanted.holds_slot is not None or wanted.started
    return bool(loses_jobs) and _matches_fixed_parts(wanted, job)


def _matches_fixed_parts(wanted: JobFilter, job: JobSummary) -> bool:
    if wanted.hosts and job.host not in wanted.hosts:
        return False
    if wanted.host_pattern is not None:
        start, _, end = wanted.host_pattern.partition("*")
        is_long_enough = len(job.host) >= len(start) + len(end)
        if not (is_long_enough and job.host.startswith(start) and job.host.endswith(end)):
            return False
    if wanted.procedures and job.procedure not in wanted.procedures:
        return False
    if wanted.owners and job.owner not in wanted.owners:
        return False
    if wanted.queue is not None and wanted.queue != (job.queue_id or NO_QUEUE):
        return False
    if wanted.rerun_of is not None and wanted.rerun_of != job.rerun_of:
        return False
    if wanted.id_start is not None and not job.id.startswith(wanted.id_start):
        return False
    return wanted.submitted.match(job.submitted)


def _matches_changing_parts(wanted: JobFilter, job: JobSummary) -> bool:
    if wanted.states and job.state not in wanted.states:
        return False
    if wanted.end_types and job.end_type not in wanted.end_types:
        return False
    if wanted.stops and job.stop not in wanted.stops:
        return False
    if wanted.holds_slot is not None and wanted.holds_slot != job.holds_slot:
        return False
    return wanted.started.match(job.started) and wanted.ended.match(job.ended)
