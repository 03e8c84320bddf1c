"""Which hosts accept starts now, and the jobs that wait for a host that does not.

Theory of operation. If a start certainly did not happen, the reason concerns the host. The jobs of a host therefore
wait together, as queued jobs without a slot. The state of the host decides how many of them may start:

    open: any number, within the other limits. A connection or the reply to a start makes a host open.
    unknown: not connected yet, or contact was lost. One job at a time, so that a dead host occupies one slot.
    failing: a start certainly did not happen. No job starts until a probe connects; probes have growing pauses. Then
    the first job in the order of submission starts alone; if harpd replies to its start, the host is open.

Each failed attempt ends the jobs that have waited for `start_within` seconds. The state is in memory; waiting jobs are
queued in the store. Spec: docs/lifecycle.md, A start that did not happen.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harp.protocol.ends import Failed
from harp_daemon.timer_wheel import Backoff, Timer
from harpcaller.hosts.connecting import CONNECTION_ERRORS, open_connection, to_failed
from harpcaller.hosts.connection import get_error_detail
from harpcaller.hosts.registry import Host
from harpcaller.model.jobs import Job
from harpcaller.runs.context import RunContext
from harpcaller.store import StorageError

log = logging.getLogger(__name__)

_MIN_DELAY, _MAX_DELAY = 0.2, 5.0  #: Seconds between two attempts to start a job on a failing host.
_LIMIT = 500  #: Maximum number of jobs that are ended in one transaction.
_MAX_LOGGED = 500  #: Maximum length of a logged error in characters.

#: Errors that harpd replies to a start if it has certainly not started the call.
_NOT_STARTED = frozenset(
    {"too_many_calls", "too_many_connections", "shutdown", "procedure_loading_error", "authentication_timeout"}
)
#: Errors before the request was sent that may not occur at the next attempt.
_NOT_CONNECTED = _NOT_STARTED | {"network_error", "os_error", "system_error", "call_died"}


def is_unsent(error: Failed) -> bool:
    """Return whether an error that occurred before the start was sent is temporary."""
    return error.type in _NOT_CONNECTED


def is_refusal(error: Failed) -> bool:
    """Return whether this reply to a start means that the call was not started, for a temporary reason."""
    return error.type in _NOT_STARTED or (
        error.type == "call_refused" and get_error_detail(error, "reason") == "delayed"
    )


@dataclass(slots=True)
class FailingStarts:
    """The failed starts on a host since its last accepted start. Times are monotonic."""

    since: float  # time of the first failed attempt
    attempted_at: float  # time of the last attempt
    failed_at: float  # time of its error
    error: Failed  # its error
    attempts: int = 1
    next_at: float = 0.0  # time of the next attempt
    may_try: bool = False  # the host can be reached: one job may start
    timer: Timer | None = None
    is_ending_jobs: bool = False  # the store is ending the jobs that have waited long enough
    backoff: Backoff = field(default_factory=partial(Backoff, _MIN_DELAY, _MAX_DELAY))

    def describe(self, now: float) -> dict[str, Any]:
        """Return the failed starts as in `details`; `now` is Unix time."""
        to_wall = now - time.monotonic()
        times = {"since": self.since + to_wall, "next": max(now, self.next_at + to_wall)}
        return {**times, "attempts": self.attempts, "error": f"{self.error.type}: {self.error.message}"[:_MAX_LOGGED]}


class HostStarts:
    """The states of all hosts, by name. `get_context` returns the current environment of runs.

    `dispatcher_started_at` is Unix time. A job that was tried earlier has waited for its host since that attempt,
    unless the host has been open since the start of the dispatcher.
    """

    def __init__(self, get_context: Callable[[], RunContext], dispatcher_started_at: float) -> None:
        self._get_context = get_context
        self._dispatcher_started_at = dispatcher_started_at
        self._open: set[str] = set()
        self._ever_open: set[str] = set()
        self._failing: dict[str, FailingStarts] = {}
        # The latest contact and the latest failure of each host, for lists only: Unix times, and the error.
        self._contacts: dict[str, float] = {}
        self._failures: dict[str, tuple[float, str]] = {}
        self._trying: dict[str, str] = {}  # of each host that is not open: the job that starts alone
        self._probes: set[asyncio.Task[None]] = set()
        self._closed = False

    def get_failing(self, host: str) -> FailingStarts | None:
        """Return the failed starts of a host; None if it is open or unknown."""
        return self._failing.get(host)

    def is_open(self, host: str) -> bool:
        """Return whether the latest connection to a host succeeded."""
        return host in self._open

    def get_contact(self, host: str) -> float | None:
        """Return the Unix time of the latest connection or reply for a start; None: there was none yet."""
        return self._contacts.get(host)

    def get_failure(self, host: str) -> tuple[float, str] | None:
        """Return Unix time and error of the latest failed start or broken connection; None: there was none yet."""
        return self._failures.get(host)

    def list_states(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the hosts that are open, and those that are failing, by name."""
        return frozenset(self._open), frozenset(self._failing)

    def max_new(self, host: str) -> int | None:
        """Return how many jobs may start on a host now; None: no limit. It only reads: the writing thread calls it."""
        if host in self._open:
            return None
        failing = self._failing.get(host)
        return int(host not in self._trying and (failing is None or failing.may_try))

    # Events of runs.

    def on_start(self, job: Job) -> None:
        """Handle the start of a job that has its slot."""
        if job.host not in self._open:
            self._trying.setdefault(job.host, job.id)

    def on_connected(self, host: str) -> None:
        """Handle a connection for a start."""
        self._contacts[host] = self._get_context().wall()
        if host not in self._open and host not in self._failing:
            self._set_open(host)

    def on_reply(self, host: str, attempted_at: float) -> None:
        """Handle a reply of harpd to a start or an attach, unless it is a refusal. `attempted_at` is monotonic time."""
        failing = self._failing.get(host)
        if failing is not None:
            if attempted_at < failing.failed_at:
                return  # the request was sent before the refusal
            log.info("host accepts starts again", extra={"host": host, "attempts": failing.attempts})
            self._remove_failing(host)
        self._contacts[host] = self._get_context().wall()
        if host not in self._open:
            self._set_open(host)

    def on_contact_lost(self, job: Job, error: str, attempted_at: float) -> None:
        """Handle a broken connection of a call that may have started."""
        self._failures[job.host] = self._get_context().wall(), error[:_MAX_LOGGED]
        self._open.discard(job.host)
        self._stop_trying(job)
        if job.host in self._failing:
            self._record_failure(job.host, Failed("network_error", error), attempted_at)

    def on_closed(self, job: Job) -> None:
        """Handle the end of a run."""
        if self._trying.get(job.host) == job.id:
            self._stop_trying(job)
            self._get_context().request_claim()

    def record_failure(self, job: Job, error: Failed, attempted_at: float) -> None:
        """Handle a start of a job that certainly did not happen; `attempted_at` is monotonic time.

        The caller queues the job again, or ends it, in the same turn of the event loop.
        """
        self._stop_trying(job)
        self._record_failure(job.host, error, attempted_at)

    def has_waited(self, job: Job) -> bool:
        """Return whether a job that failed to start has waited for `start_within` seconds."""
        wall, waited = self._get_context().wall(), time.monotonic() - self._failing[job.host].since
        if job.tried is not None and job.tried < self._get_restart(job.host):
            waited = wall - job.tried
        return max(0.0, min(waited, wall - job.submitted)) >= job.start_within

    def _get_restart(self, host: str) -> float:
        """Return a Unix time: a job with an earlier first attempt has waited for this host since that attempt."""
        return 0.0 if host in self._ever_open else self._dispatcher_started_at

    def close(self) -> None:
        """Stop all probes of hosts."""
        self._closed = True
        for failing in self._failing.values():
            if failing.timer is not None:
                failing.timer.cancel()
        for probe in self._probes:
            probe.cancel()

    # The states.

    def _set_open(self, host: str) -> None:
        self._open.add(host)
        self._ever_open.add(host)
        self._trying.pop(host, None)
        self._get_context().request_claim()

    def _stop_trying(self, job: Job) -> None:
        if self._trying.get(job.host) == job.id:
            del self._trying[job.host]

    def _remove_failing(self, host: str) -> None:
        failing = self._failing.pop(host)
        if failing.timer is not None:
            failing.timer.cancel()

    def _record_failure(self, host: str, error: Failed, attempted_at: float) -> None:
        now = time.monotonic()
        failing = self._failing.get(host)
        self._failures[host] = self._get_context().wall(), f"{error.type}: {error.message}"[:_MAX_LOGGED]
        if failing is None:
            failing = self._failing[host] = FailingStarts(attempted_at, attempted_at, now, error)
            reason = {"error": error.type[:_MAX_LOGGED], "reason": error.message[:_MAX_LOGGED]}
            log.warning("host accepts no starts; jobs wait", extra={"host": host, **reason})
        elif attempted_at < failing.failed_at:  # another failure of the same attempt
            failing.error = error
            failing.attempted_at = max(failing.attempted_at, attempted_at)
            return
        else:
            failing.error, failing.attempted_at, failing.failed_at = error, attempted_at, now
            failing.attempts += 1
        self._open.discard(host)
        failing.may_try = False
        failing.backoff.record_attempt()
        self._try_at(host, failing, now + failing.backoff.next_delay())
        if not failing.is_ending_jobs and not self._closed:
            failing.is_ending_jobs = True
            asyncio.get_running_loop().call_soon(self._end_jobs, host, failing)  # after the write of the caller

    def _try_at(self, host: str, failing: FailingStarts, when: float) -> None:
        if self._closed:
            return
        if failing.timer is not None:
            failing.timer.cancel()
        failing.next_at = when
        delay = when - time.monotonic()
        failing.timer = self._get_context().timers.call_later(delay, partial(self._start_probe, host, failing))

    # The jobs that have waited long enough.

    def _end_jobs(self, host: str, failing: FailingStarts) -> None:
        """End the jobs that have waited long enough. The wall clock may step: times are passed by their age."""
        context, now = self._get_context(), time.monotonic()
        wall = context.wall()
        times = wall, wall - (now - failing.since), wall - (now - failing.attempted_at), self._get_restart(host)
        context.request_claim()  # other jobs of their queues may start
        write = asyncio.ensure_future(context.store.fail_waiting(host, failing.error, *times, limit=_LIMIT))
        write.add_done_callback(partial(self._on_jobs_ended, host, failing, failing.failed_at, failing.error, wall))

    def _on_jobs_ended(
        self,
        host: str,
        failing: FailingStarts,
        failed_at: float,
        end: Failed,
        wall: float,
        write: asyncio.Future[tuple[list[str], float | None]],
    ) -> None:
        context = self._get_context()
        failing.is_ending_jobs = False
        try:
            ended, deadline = write.result()
        except StorageError as error:  # the next attempt ends them
            log.error("cannot end waiting jobs; retrying", extra={"host": host, "error": str(error)})
            return
        for job_id in ended:
            reason = {"error": end.type[:_MAX_LOGGED], "reason": end.message[:_MAX_LOGGED]}
            log.info("job ended without a start", extra={"job": job_id, "host": host, **reason})
            context.audit.report_end(job_id, None, end, "dispatcher", host=host)
            context.notifier.publish_end(job_id, end)
        if self._failing.get(host) is not failing:
            return
        if failing.failed_at != failed_at or len(ended) >= _LIMIT:
            failing.is_ending_jobs = True
            self._end_jobs(host, failing)
        elif deadline is None and host not in self._trying:
            self._remove_failing(host)  # no job waits; the next job starts immediately
        elif deadline is not None and failing.timer is not None:
            at = time.monotonic() + max(_MIN_DELAY, deadline - wall)
            if at < failing.next_at:
                self._try_at(host, failing, at)  # the last attempt for this job

    # Whether the host can be reached.

    def _start_probe(self, host: str, failing: FailingStarts) -> None:
        failing.timer = None
        context = self._get_context()
        found = context.find_host(host)
        if found is None:  # it was removed: its jobs end when they start
            failing.may_try = True
            context.request_claim()
            return
        probe = asyncio.create_task(self._probe(found, failing, context))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, host: Host, failing: FailingStarts, context: RunContext) -> None:
        """Connect to a host; if that succeeds, let one job start."""
        attempted_at = time.monotonic()
        try:
            if context.config.resumable_calls:
                context.capabilities.invalidate(host)
                await context.capabilities.get(host, context.tls, context.config)
            else:
                resolver = context.resolver
                (await open_connection(host, context.tls, context.config, context.timers, resolver)).abort()
        except CONNECTION_ERRORS as error:
            failed = to_failed(error, host, "connecting")
            if is_unsent(failed):
                if self._failing.get(host.hostname) is failing:
                    self._record_failure(host.hostname, failed, attempted_at)
                return
        except Exception:
            log.exception("cannot try host: internal error", extra={"host": host.hostname})
        failing.may_try = True  # also after a permanent or internal error: the next job ends with it
        self._get_context().request_claim()
