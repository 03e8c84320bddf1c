"""The audit of a dispatcher: what is recorded of the requests of clients, and of the ends of jobs.

Without `audit_file`, nothing is recorded, and each future is done. Spec: docs/audit.md.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from harp.protocol.ends import End, Failed, Raised
from harp_daemon.audit import AuditError, AuditLog, Recorded
from harp_daemon.audit_file import parse_time
from harpcaller.access.client import Client
from harpcaller.model.jobs import Job, NewJob, Subject, state_of
from harpcaller.store import StorageError
from harpcaller.store.sqlite import Store

_LATEST_CALL, _LATEST_END = 10.0, 60.0  #: Seconds before the last entry: calls and ends of that time may lack one.
_MAX_DELAY = 1.0  #: Most seconds between the entry of a call and its submission.
_MAX_MISSING, _PAGE = 10_000, 1000
_REFUSED = ("access_denied", "rate_limited")  #: The errors of jobs whose calls were denied.


class Audit:
    """The entries of a dispatcher. `log` is closed by its creator."""

    def __init__(self, log: AuditLog | None = None) -> None:
        self.log = log

    def check_room(self) -> None:
        """Raise `StorageError` if no new job can be accepted, because no entries about it could be written."""
        if self.log is not None and self.log.problem is not None:
            raise StorageError(f"the audit file cannot be written: {self.log.problem}")

    # Requests.

    def record_call(self, client: Client, decision: str, rule: int | None, job: NewJob) -> Recorded | None:
        """Record a call; the commit that stores its job writes the entry before. Refused ones of a client are bounded.

        None: there is no audit file.
        """
        if self.log is None:
            return None
        is_allowed = decision == ALLOWED
        repeats = None if is_allowed else _source(client)
        entry = _describe_call(client, decision, rule, job)
        return self.log.record_before_commit(entry, must=is_allowed, repeats=repeats)

    def write_calls(self) -> None:
        """Write the recorded calls, because no commit did. Blocks for a write, but not for the disk."""
        assert self.log is not None
        self.log.write_before_commit()

    async def record_calls(self, client: Client, rules: Sequence[int | None], jobs: Sequence[NewJob]) -> None:
        """Record allowed calls, before their jobs are stored. Raises `StorageError`."""
        if self.log is None:
            return

        def describe() -> list[dict[str, Any]]:
            return [_describe_call(client, ALLOWED, rule, job) for rule, job in zip(rules, jobs, strict=True)]

        entries = await asyncio.to_thread(describe)  # many entries would delay the event loop
        try:
            await self.log.record_all(entries)
        except AuditError as error:
            raise StorageError(f"the audit file cannot be written: {error}") from error

    def record_denial(self, client: Client, action: str, **fields: Any) -> asyncio.Future[None] | None:
        """Record an action that is denied or refused. Many of one client share an entry.

        The future is done when the entry is on stable storage, or has an `AuditError`.
        """
        if self.log is None:
            return None
        return self.log.record(action, DENIED, repeats=_source(client), **describe_client(client), **fields)

    async def record(self, client: Client, action: str, decision: str, **fields: Any) -> None:
        """Record an action that has happened, or whose entry is needed first. Raises `StorageError`."""
        if self.log is not None:
            try:
                await self.log.record(action, decision, must=True, **describe_client(client), **fields)
            except AuditError as error:
                raise StorageError(f"the audit file cannot be written: {error}") from error

    # Events.

    def reopen(self) -> None:
        """Continue in another file if the file was renamed."""
        if self.log is not None:
            self.log.reopen()

    def report(self, action: str, **fields: Any) -> None:
        """Record something that has happened, without a wait for the disk."""
        if self.log is not None:
            self.log.report(action, **fields)

    def report_call(self, job: Job, **fields: Any) -> None:
        """Record the call of a stored job, as far as its row tells it."""
        if self.log is not None:
            is_refused = isinstance(job.end, Failed) and job.end.type in _REFUSED and job.started is None
            decision = DENIED if is_refused else ALLOWED
            self.log.report("call", decision=decision, principal=job.owner, **_describe_job(job), **fields)

    def report_end(self, job_id: str, job: Job | Subject | None, end: End, by: str | None, **fields: Any) -> None:
        """Record the end of a job, and who has caused it; None: the call itself."""
        if self.log is None:
            return
        error = end.type if isinstance(end, (Failed, Raised)) else None
        names = {} if job is None else {"host": job.host, "procedure": job.procedure, "owner": job.owner}
        self.log.report("end", job=job_id, end=state_of(end), error=error, by=by, **names, **fields)


async def report_missing(audit: Audit, store: Store) -> None:
    """Report calls and ends that were stored, and not recorded: of a dispatcher that was killed, or lost its power."""
    if audit.log is None:
        return
    try:
        recent = await asyncio.to_thread(audit.log.read_recent)
        first, last = (parse_time(str(recent[index].get("time"))) for index in (0, -1))
    except (OSError, IndexError, ValueError):
        return  # the file was changed
    recorded = {(entry.get("action"), entry.get("job")) for entry in recent}
    # If the first of the entries is not the first of all, that of a job may be just before it.
    delay = 0.0 if recent[0]["entry"] == 1 else _MAX_DELAY
    for job in await _list_submitted_since(store, max(first + delay, last - _LATEST_CALL)):
        if ("call", job.id) not in recorded:
            audit.report_call(job, recovered=True)
    for job in await store.list_ended_since(max(first, last - _LATEST_END), _MAX_MISSING):
        if ("end", job.id) not in recorded and job.end is not None:
            audit.report_end(job.id, job, job.end, None, recovered=True)


async def _list_submitted_since(store: Store, since: float) -> list[Job]:
    """Return the jobs that were submitted at a time or later, in the order of submission; the last ones of many."""
    found: list[Job] = []
    after: int | None = None
    while len(found) < _MAX_MISSING:
        page = await store.list_jobs(ended=True, newest_first=True, after=after, limit=_PAGE)
        later = [job for _, job in page if job.submitted >= since]
        found += later
        if not page or len(later) < len(page):
            break
        after = page[-1][0]
    return found[::-1]


ALLOWED, DENIED, FAILED = "allowed", "denied", "failed"  #: The decisions.


def describe_client(client: Client) -> dict[str, Any]:
    """Return the fields of an entry that name a client."""
    return {"principal": client.owner, "listener": client.listener, "peer": client.peer}


def _describe_call(client: Client, decision: str, rule: int | None, job: NewJob) -> dict[str, Any]:
    return {  # without the help of other functions, which take as long as this: it is done for each job
        "time": time.time(),
        "action": "call",
        "decision": decision,
        "principal": client.owner,
        "listener": client.listener,
        "peer": client.peer,
        "rule": rule,
        "job": job.id,
        "host": job.host,
        "procedure": job.procedure,
        "queue": None if job.queue is None else job.queue.decode("utf-8", "replace"),
        "arguments": job.arguments,
    }


def _describe_job(job: Job | NewJob) -> dict[str, Any]:
    return {
        "job": job.id,
        "host": job.host,
        "procedure": job.procedure,
        "queue": None if job.queue is None else job.queue.decode("utf-8", "replace"),
        "arguments": job.arguments,
    }


def _source(client: Client) -> tuple[str, str]:
    """Return what the requests of one client have in common: not its port, which changes."""
    return client.owner, client.peer.rpartition(":")[0]
