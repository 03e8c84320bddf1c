"""What a dispatcher counts while it runs, for `harpcaller.monitoring`. Without section `http` there is no `Metrics`.

All of it is changed in the loop's thread. Labels have values of closed sets only: a name that a client chooses is one
of at most `_MAX_PROCEDURES`, and only after a host has run a procedure of this name. Spec: docs/monitoring.md.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

from harp.protocol.ends import Failed, Raised, Returned
from harp.protocol.json_text import Raw
from harp_daemon.exposition import Histogram
from harpcaller.model.changes import Change, ChangeKind
from harpcaller.model.jobs import Job, StopState, state_of
from harpcaller.model.phases import measure_phases

#: The types of a failed job's end; each other one, which only a host can send, is counted as ``other``.
END_TYPES = frozenset(
    (
        "access_denied",
        "auth_error",
        "authentication_timeout",
        "call_died",
        "call_refused",
        "cancelled",
        "certificate_error",
        "host_lost",
        "internal_error",
        "invalid_argument_list",
        "invalid_message",
        "invalid_protocol",
        "invalid_request",
        "lost_contact",
        "missing_result",
        "network_error",
        "no_such_call",
        "no_such_procedure",
        "os_error",
        "parse_error",
        "procedure_loading_error",
        "protocol_error",
        "rate_limited",
        "record_limit",
        "records_gone",
        "secrets_unavailable",
        "shutdown",
        "storage_error",
        "system_error",
        "timeout",
        "too_many_calls",
        "too_many_connections",
        "unknown_host",
        "wrong_instance",
    )
)
OTHER = "other"  #: The value of a label for everything that has none of its own.

_WAIT_BOUNDS = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300, 1800, 3600)
_RUN_BOUNDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 30, 60, 300, 600, 3600, 14400)
_PHASE_BOUNDS = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)
_HTTP_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
_LAG_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1)
_COMMIT_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_CALL_PHASES = ("connect", "authenticate", "fork", "other")  #: The phases that host and dispatcher report of a call.
PHASES = ("accept", "store", *_CALL_PHASES, "store_end", "deliver")  #: The values of the label `phase`.
_MAX_PROCEDURES, _MAX_NAME = 200, 100  #: Maximum number of procedures with a label, and length of their names.
_MAX_DELIVERIES = 1000  #: Maximum number of ended jobs of which the delivery may be measured.
_LAG_INTERVAL = 0.25  #: Seconds between two measurements of the loop's lag.


class Metrics:
    """The counters and distributions since the start of the dispatcher."""

    def __init__(self) -> None:
        self.stored: int | None = None  #: Number of stored jobs; None: they were not counted at the start.
        self.submitted = self.started = self.requeued = self.deleted = 0
        self.ended: Counter[tuple[str, ...]] = Counter()  #: By state, and by type if it is failed.
        self.stops: Counter[tuple[str, ...]] = Counter({(stop.value,): 0 for stop in _STOPS})
        self.records = self.record_bytes = 0
        self.wait_seconds = Histogram(*_WAIT_BOUNDS)
        self.run_seconds: dict[str, Histogram] = {OTHER: Histogram(*_RUN_BOUNDS)}  #: By procedure.
        self.phase_seconds = {phase: Histogram(*_PHASE_BOUNDS) for phase in PHASES}
        self.commit_jobs = Histogram(*_COMMIT_BOUNDS)
        self.requests: Counter[tuple[str, ...]] = Counter()  #: By API, request and outcome.
        self.auth_failures: Counter[tuple[str, ...]] = Counter()  #: By API.
        self.denied: Counter[tuple[str, ...]] = Counter()  #: By action.
        self.http_requests: Counter[tuple[str, ...]] = Counter()  #: By route, method and status code.
        self.http_seconds: dict[str, Histogram] = {}  #: By route.
        self.loop_lag = Histogram(*_LAG_BOUNDS)
        self.reload_succeeded = True  #: Whether the last reload was successful; also if there was none.
        self.reloaded_at = time.time()  #: Unix time of the last successful reload, or of the start.
        self._running: dict[str, tuple[float, str]] = {}  # of the jobs that run: start and procedure
        self._ended_at: dict[str, float] = {}  # monotonic time at which the latest ends were stored; the oldest first

    def add_running(self, jobs: Sequence[Job]) -> None:
        """Note the jobs that an earlier dispatcher has started."""
        for job in jobs:
            if job.end is None and job.started is not None:
                self._running[job.id] = job.started, job.procedure

    def observe_changes(self, changes: Sequence[Change]) -> None:
        """Count the changes of a commit; an observer of the store."""
        self.commit_jobs.observe(len(changes))
        for change in changes:
            match change.kind:
                case ChangeKind.SUBMITTED:
                    self.submitted += 1
                case ChangeKind.STARTED:
                    self._on_started(change)
                case ChangeKind.RECORDS:
                    self.records += change.records
                    self.record_bytes += change.record_bytes
                case ChangeKind.ENDED:
                    self._on_ended(change)
                case ChangeKind.STOP:
                    self._count_stop(change.stop)
                case ChangeKind.REQUEUED:
                    self.requeued += 1
                    self._running.pop(change.job_id, None)
                case ChangeKind.DELETED:
                    self.deleted += 1

    def _on_started(self, change: Change) -> None:
        self.started += 1
        job, at = change.job, change.at
        if job is not None and at is not None:
            self.wait_seconds.observe(max(0.0, at - job.submitted))
            self._running[change.job_id] = at, job.procedure

    def _on_ended(self, change: Change) -> None:
        end = change.end
        started, procedure = self._running.pop(change.job_id, (None, ""))
        if end is None:
            return
        kind = ""
        if isinstance(end, Failed):
            kind = end.type if end.type in END_TYPES else OTHER
        self.ended[state_of(end).value, kind] += 1
        self._count_stop(change.stop)
        if started is not None and change.at is not None:
            histogram = self.run_seconds.get(procedure)
            if histogram is None:
                histogram = self._histogram_of(procedure, exists=isinstance(end, (Returned, Raised)))
            histogram.observe(max(0.0, change.at - started))

    def _histogram_of(self, procedure: str, exists: bool) -> Histogram:
        is_full = len(self.run_seconds) > _MAX_PROCEDURES
        # Two names that differ in what cannot be encoded would become one: a scraper refuses a text with both.
        if not exists or is_full or len(procedure) > _MAX_NAME or not procedure.isprintable():
            return self.run_seconds[OTHER]
        return self.run_seconds.setdefault(procedure, Histogram(*_RUN_BOUNDS))

    def _count_stop(self, stop: StopState | None) -> None:
        if stop is not None and stop is not StopState.PENDING:
            self.stops[(stop.value,)] += 1

    @property
    def stored_now(self) -> int | None:
        """The number of stored jobs; None: unknown."""
        return None if self.stored is None else self.stored + self.submitted - self.deleted

    # Phases of jobs.

    def record_stored(self, received_at: float | None, write_started_at: float) -> None:
        """Record that a job was stored: when its request was received (None: unknown), and when the write started."""
        if received_at is not None:
            self.phase_seconds["accept"].observe(write_started_at - received_at)
        self.phase_seconds["store"].observe(time.monotonic() - write_started_at)

    def record_end(
        self, job: Job, ended: float, write_started_at: float, connect_seconds: float | None, exit_info: Raw | None
    ) -> None:
        """Record that the end of a call was stored; `ended` is its Unix time, `write_started_at` monotonic."""
        now = time.monotonic()
        self.phase_seconds["store_end"].observe(now - write_started_at)
        phases = measure_phases(job.submitted, job.started, ended, connect_seconds, exit_info)
        for phase in _CALL_PHASES:
            if (seconds := phases[phase]) is not None:
                self.phase_seconds[phase].observe(seconds)
        if len(self._ended_at) >= _MAX_DELIVERIES:
            del self._ended_at[next(iter(self._ended_at))]
        self._ended_at[job.id] = now

    def record_delivery(self, job_id: str, received_at: float) -> None:
        """Record that the end was sent to a client. Only the first client that waited for the end counts."""
        ended_at = self._ended_at.get(job_id)
        if ended_at is not None and received_at < ended_at:
            del self._ended_at[job_id]
            self.phase_seconds["deliver"].observe(time.monotonic() - ended_at)

    # Requests.

    def count_request(self, api: str, request: str, outcome: str) -> None:
        """Count a request that was answered; `outcome` is ``ok`` or the type of its error."""
        self.requests[api, request, outcome] += 1

    def record_http(self, route: str, method: str, code: int, seconds: float | None) -> None:
        """Count an HTTP request; `route` is a template. `seconds` is None for one that waits or streams."""
        self.http_requests[route, method, str(code)] += 1
        if seconds is not None:
            histogram = self.http_seconds.get(route)
            if histogram is None:
                histogram = self.http_seconds[route] = Histogram(*_HTTP_BOUNDS)
            histogram.observe(seconds)

    # The event loop.

    async def measure_lag(self) -> None:
        """Measure regularly how late the loop calls a timer, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_INTERVAL
            await asyncio.sleep(_LAG_INTERVAL)
            self.loop_lag.observe(max(0.0, loop.time() - due))

    def record_reload(self, succeeded: bool) -> None:
        """Record a reload of the configuration."""
        self.reload_succeeded = succeeded
        if succeeded:
            self.reloaded_at = time.time()


_STOPS = (StopState.CONFIRMED, StopState.FAILED, StopState.UNKNOWN)
