"""The metrics of a dispatcher as text for Prometheus. Spec: docs/monitoring.md.

Counters and histograms are kept by `Metrics`, by the store and by others. Gauges are read when a scraper asks: those of
the store in one short read, which counts for `_GAUGES_AGE` seconds. The text is made in a thread, because it has
thousands of lines for many hosts. Scrapers that ask at the same time get the same text.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harp import __version__
from harp.protocol.json_text import Raw
from harp_daemon import logs
from harp_daemon.expiry import Validity
from harp_daemon.exposition import (
    Family,
    counter,
    escape,
    gauge,
    histogram,
    histograms,
    labelled,
    read_process,
    render,
)
from harpcaller.dispatcher import Dispatcher
from harpcaller.metrics import Metrics
from harpcaller.record_stream import RecordStream
from harpcaller.store import StorageError, StoreGauges

_GAUGES_AGE = 5.0  #: Seconds for which the numbers of jobs count.
_VALIDITIES_AGE = 60.0  #: Seconds for which the ends of the dispatcher's own certificates count.
_STUCK_AFTER = 60.0  #: Seconds after its end from which a job is stuck if it holds a slot.
_MAX_QUEUED_OF_HOSTS = 20_000  #: Number of queued jobs above which they are not counted for each host.


@dataclass(frozen=True, slots=True)
class Limits:
    """The present value of something, and its limit."""

    value: int
    limit: int


@dataclass(frozen=True, slots=True)
class MonitorSettings:
    """What is shown in detail."""

    max_hosts: int = 500  #: Number of hosts above which no metric has the label `host`.
    queues: Sequence[str] = ()  #: The names of queues with metrics of their own, each a JSON object as text.
    gauges_age: float = _GAUGES_AGE  #: Seconds for which the numbers of jobs count.


class _Hosts(NamedTuple):
    """What the loop knows of the hosts."""

    names: list[str]
    running: Counter[str]  # active calls
    are_open: frozenset[str]
    are_failing: frozenset[str]
    certificate_ends: dict[str, float]
    round_trips: dict[str, float]
    clock_skews: dict[str, float]


class Monitor:
    """The source of the metrics.

    `connections` returns the connections of each API and their limit, `request_memory` the bytes that long requests
    use. `validities` returns the certificates of the dispatcher itself, with the file that each is in; it may block.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: Metrics,
        connections: Callable[[], Mapping[str, Limits]] = dict,
        request_memory: Callable[[], Limits] = lambda: Limits(0, 0),
        validities: Callable[[], Iterable[Validity]] = tuple,
        settings: Callable[[], MonitorSettings] = MonitorSettings,
    ) -> None:
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._connections = connections
        self._request_memory = request_memory
        self._read_validities = validities
        self._settings = settings
        self._measurements = dispatcher.store.measurements or dispatcher.store.measure()
        self._log_events = logs.count_events()
        self._began_at = time.time()
        # The last ones, when they were read, and of which queues.
        self._gauges: tuple[float, Sequence[str], StoreGauges | None] = float("-inf"), (), None
        self._certificate_ends: tuple[float, dict[tuple[str, ...], float]] = float("-inf"), {}
        self._scrapes: dict[bool, asyncio.Task[bytes]] = {}

    async def scrape(self, openmetrics: bool = False) -> bytes:
        """Return the text of all metrics."""
        scrape = self._scrapes.get(openmetrics)
        if scrape is None:
            scrape = self._scrapes[openmetrics] = asyncio.create_task(self._scrape(openmetrics))
            scrape.add_done_callback(lambda _: self._scrapes.pop(openmetrics))
        return await asyncio.shield(scrape)

    async def _scrape(self, openmetrics: bool) -> bytes:
        settings = self._settings()
        gauges = await self._read_gauges(settings)
        families = [
            *self._job_families(gauges),
            *self._access_families(),
            *self._queue_families(gauges, settings),
            *self._registry_families(),
            *self._store_families(),
            *self._program_families(),
        ]
        hosts = self._list_hosts()
        return await asyncio.to_thread(self._render, families, hosts, gauges, settings, openmetrics)

    def _render(
        self,
        families: list[Family],
        hosts: _Hosts,
        gauges: StoreGauges | None,
        settings: MonitorSettings,
        openmetrics: bool,
    ) -> bytes:
        """Add what takes long, and return the text; in a thread."""
        families += self._host_families(hosts, gauges, settings)
        families += self._file_families()
        return render([*families, *read_process()], openmetrics)

    async def _read_gauges(self, settings: MonitorSettings) -> StoreGauges | None:
        read_at, queues_read, gauges = self._gauges
        now = time.monotonic()
        if now - read_at >= settings.gauges_age or queues_read != settings.queues:
            queues = [Raw(queue.encode()) for queue in settings.queues]
            stuck_before = time.time() - _STUCK_AFTER
            try:
                gauges = await self._dispatcher.store.read_gauges(stuck_before, queues, _MAX_QUEUED_OF_HOSTS)
            except StorageError:
                gauges = None  # it is counted as an error of the store
            self._gauges = now, settings.queues, gauges
        return gauges

    # The families, in the order of docs/monitoring.md.

    def _job_families(self, gauges: StoreGauges | None) -> list[Family]:
        metrics, dispatcher = self._metrics, self._dispatcher
        oldest = None
        if gauges is not None:
            oldest = 0.0 if gauges.oldest_queued is None else max(0.0, time.time() - gauges.oldest_queued)
        states = {} if gauges is None else {("queued",): gauges.queued, ("running",): gauges.running}
        calls, limit = dispatcher.active_calls, dispatcher.config.max_calls
        held, stuck = (None, None) if gauges is None else (gauges.slots_held, gauges.stuck)
        return [
            counter("harp_jobs_submitted_total", "Jobs that were stored.", metrics.submitted),
            counter("harp_jobs_started_total", "Jobs that got a slot.", metrics.started),
            counter("harp_jobs_requeued_total", "Jobs that were queued again: no call was started.", metrics.requeued),
            labelled("harp_jobs_ended_total", "counter", "Jobs that have ended.", ("state", "type"), metrics.ended),
            labelled("harp_job_stops_total", "counter", "Outcomes of stops.", ("stop",), metrics.stops),
            labelled("harp_jobs", "gauge", "Jobs that have not ended.", ("state",), states),
            gauge("harp_jobs_stored", "Stored jobs, also those that have ended.", metrics.stored_now),
            gauge("harp_oldest_queued_seconds", "Age of the first queued job; 0: none is queued.", oldest),
            gauge("harp_slots_held", "Jobs that hold a slot.", held),
            gauge("harp_slots_stuck", "Jobs that hold a slot more than 60 s after their end.", stuck),
            gauge("harp_calls", "Active calls.", calls),
            gauge("harp_calls_limit", "Limit of active calls, max_calls.", limit),
            histogram("harp_job_wait_seconds", "From submission to start.", metrics.wait_seconds),
            histograms("harp_job_run_seconds", "From start to end.", "procedure", metrics.run_seconds),
            histograms("harp_job_phase_seconds", "Phases of jobs.", "phase", metrics.phase_seconds),
            counter("harp_records_total", "Stored records.", metrics.records),
            counter("harp_record_bytes_total", "Bytes of stored records.", metrics.record_bytes),
            counter("harp_pruned_jobs_total", "Jobs that were deleted.", metrics.deleted),
            counter("harp_feed_changes_total", "Changes of jobs for live lists.", dispatcher.changes.number),
            gauge("harp_feed_subscribers", "Live lists that follow these changes.", dispatcher.live.subscribers),
        ]

    def _access_families(self) -> list[Family]:
        metrics = self._metrics
        connections = {(api,): found for api, found in self._connections().items()}
        open_connections = {key: found.value for key, found in connections.items()}
        limits = {key: found.limit for key, found in connections.items()}
        memory, live = self._request_memory(), self._dispatcher.live
        return [
            labelled(
                "harp_requests_total",
                "counter",
                "Answered requests of the client API and the control socket.",
                ("api", "request", "outcome"),
                metrics.requests,
            ),
            labelled(
                "harp_http_requests_total",
                "counter",
                "HTTP requests.",
                ("route", "method", "code"),
                metrics.http_requests,
            ),
            histograms(
                "harp_http_request_seconds",
                "Until the response to an HTTP request begins; without those that wait for a job.",
                "route",
                metrics.http_seconds,
            ),
            labelled("harp_connections", "gauge", "Open connections.", ("api",), open_connections),
            labelled("harp_connections_limit", "gauge", "Limit of connections.", ("api",), limits),
            labelled("harp_streams", "gauge", "Clients that wait.", ("kind",), self._count_streams()),
            labelled(
                "harp_stream_resets_total",
                "counter",
                "Live lists that had to begin again.",
                ("reason",),
                {(reason.value,): number for reason, number in live.resets.items()},
            ),
            labelled(
                "harp_auth_failures_total",
                "counter",
                "Requests whose client could not be authenticated.",
                ("api",),
                metrics.auth_failures,
            ),
            labelled("harp_access_denied_total", "counter", "Denied actions.", ("action",), metrics.denied),
            gauge("harp_request_memory_bytes", "Bytes of long requests.", memory.value),
            gauge("harp_request_memory_limit_bytes", "Limit of these, request_memory.", memory.limit),
        ]

    def _count_streams(self) -> dict[tuple[str, ...], float]:
        live = self._dispatcher.live.subscribers
        counts: dict[tuple[str, ...], float] = {("records",): 0, ("wait",): 0, ("events",): live}
        for subscriber in self._dispatcher.notifier.subscribers:
            is_stream = isinstance(getattr(subscriber, "__self__", None), RecordStream)
            counts[("records" if is_stream else "wait",)] += 1
        return counts

    def _queue_families(self, gauges: StoreGauges | None, settings: MonitorSettings) -> list[Family]:
        jobs: dict[tuple[str, ...], float] = {}
        if gauges is not None:
            for queue, (queued, held) in zip(settings.queues, gauges.of_queues, strict=True):
                jobs[queue, "queued"], jobs[queue, "running"] = queued, held
        count, full = (None, None) if gauges is None else (gauges.queues, gauges.full_queues)
        return [
            gauge("harp_queues", "Queues with jobs.", count),
            gauge("harp_queues_paused", "Paused queues; always 0, as queues cannot be paused yet.", 0),
            gauge("harp_queues_full", "Queues without a free slot.", full),
            labelled("harp_queue_jobs", "gauge", "Jobs of the queues in metrics_queues.", ("queue", "state"), jobs),
        ]

    def _registry_families(self) -> list[Family]:
        registry, connects = self._dispatcher.registry, self._dispatcher.connects
        refreshes = {(outcome,): number for outcome, number in registry.refreshes.items()}
        return [
            labelled("harp_host_connects_total", "counter", "Connections to hosts.", ("outcome",), connects.outcomes),
            gauge(
                "harp_hosts_refresh_timestamp_seconds",
                "Last successful run of host_db_script, Unix time.",
                registry.refreshed_at,
            ),
            labelled("harp_hosts_refreshes_total", "counter", "Refreshes of the registry.", ("outcome",), refreshes),
            gauge("harp_hosts_lines_rejected", "Rejected lines of the registry.", registry.rejected_lines),
        ]

    def _store_families(self) -> list[Family]:
        measured = self._measurements
        return [
            counter("harp_store_commits_total", "Commits.", measured.commit_seconds.count),
            histogram("harp_store_commit_seconds", "Duration of a commit on the disk.", measured.commit_seconds),
            histogram("harp_store_commit_jobs", "Changes of jobs in a commit.", self._metrics.commit_jobs),
            histograms("harp_store_read_seconds", "Duration of reads.", "verb", measured.read_seconds),
            labelled("harp_store_errors_total", "counter", "Failed operations.", ("verb",), measured.errors),
            gauge(
                "harp_store_waiting",
                "Writes of running jobs that have failed and are repeated.",
                self._dispatcher.waiting_writes,
            ),
        ]

    def _program_families(self) -> list[Family]:
        metrics, audit = self._metrics, self._dispatcher.audit.log
        entries, write_errors = (0, 0) if audit is None else (audit.entries, audit.write_errors)
        versions = (("version", __version__), ("python", platform.python_version()), ("sqlite", self._sqlite_version))
        build = labelled(
            "harp_build_info",
            "gauge",
            "Versions.",
            tuple(name for name, _ in versions),
            {tuple(value for _, value in versions): 1},
        )
        return [
            build,
            gauge("harp_start_time_seconds", "Start of the dispatcher, Unix time.", round(self._began_at, 3)),
            histogram("harp_loop_lag_seconds", "Delay of a timer of the event loop.", metrics.loop_lag),
            gauge(
                "harp_config_reload_success",
                "Whether the last reload succeeded; 1 before the first one.",
                int(metrics.reload_succeeded),
            ),
            gauge(
                "harp_config_reload_timestamp_seconds",
                "Last successful reload, or the start, Unix time.",
                round(metrics.reloaded_at, 3),
            ),
            labelled(
                "harp_log_messages_total",
                "counter",
                "Log events.",
                ("level",),
                {(level,): number for level, number in self._log_events.items()},
            ),
            counter("harp_audit_entries_total", "Written audit entries.", entries),
            counter("harp_audit_write_errors_total", "Failed writes of the audit file.", write_errors),
        ]

    @property
    def _sqlite_version(self) -> str:
        return self._dispatcher.store.sqlite_version

    # Hosts and files, in a thread.

    def _list_hosts(self) -> _Hosts:
        """Copy what the thread needs."""
        dispatcher = self._dispatcher
        running = Counter(job.host for job in dispatcher.list_active_jobs())
        names = [host.hostname for host in dispatcher.registry.list_hosts()]
        connects = dispatcher.connects
        connects.forget_others(names)
        known = connects.certificate_ends.copy(), connects.round_trips.copy(), connects.clock_skews.copy()
        return _Hosts(names, running, *dispatcher.list_host_states(), *known)

    def _host_families(self, hosts: _Hosts, gauges: StoreGauges | None, settings: MonitorSettings) -> list[Family]:
        up = hosts.are_open.intersection(hosts.names)
        down = hosts.are_failing.intersection(hosts.names) - up
        states = {"up": len(up), "down": len(down), "unknown": len(hosts.names) - len(up) - len(down)}
        shown = hosts.names if len(hosts.names) <= settings.max_hosts else []
        named = [(name, f'{{host="{escape(name)}"}} ') for name in shown]
        known = [(name, label) for name, label in named if name in up or name in down]
        queued = None if gauges is None else gauges.queued_of_hosts
        running, ends, trips, skews = hosts.running, hosts.certificate_ends, hosts.round_trips, hosts.clock_skews
        expiry = "harp_host_certificate_expiry_timestamp_seconds"
        return [
            labelled("harp_hosts", "gauge", "Hosts.", ("state",), {(state,): count for state, count in states.items()}),
            Family(
                "harp_host_up",
                "gauge",
                "Whether the host accepts starts; no sample: unknown.",
                [f"harp_host_up{label}{int(name in up)}" for name, label in known],
            ),
            Family(
                "harp_host_running",
                "gauge",
                "Active calls of the host.",
                [f"harp_host_running{label}{running.get(name, 0)}" for name, label in named],
            ),
            Family(
                "harp_host_queued",
                "gauge",
                "Queued jobs of the host.",
                [] if queued is None else [f"harp_host_queued{label}{queued.get(name, 0)}" for name, label in named],
            ),
            Family(
                expiry,
                "gauge",
                "End of the certificate that the host has shown last, Unix time.",
                [f"{expiry}{label}{ends[name]}" for name, label in named if name in ends],
            ),
            Family(
                "harp_host_rtt_seconds",
                "gauge",
                "From the latest heartbeat for a call of the host to its reply.",
                [f"harp_host_rtt_seconds{label}{trips[name]}" for name, label in named if name in trips],
            ),
            Family(
                "harp_host_clock_skew_seconds",
                "gauge",
                "By how much the clock of the host is ahead, at least; negative: behind.",
                [f"harp_host_clock_skew_seconds{label}{skews[name]}" for name, label in named if name in skews],
            ),
        ]

    def _file_families(self) -> list[Family]:
        path = self._dispatcher.store.path
        sizes: dict[tuple[str, ...], float] = {}
        for file, suffix in (("db", ""), ("log", "-wal")):
            with suppress(OSError):
                sizes[(file,)] = os.stat(f"{path}{suffix}").st_size
        free = None
        with suppress(OSError):
            found = os.statvfs(path.parent)
            free = found.f_bavail * found.f_frsize
        read_at, ends = self._certificate_ends
        if time.monotonic() - read_at >= _VALIDITIES_AGE:
            ends = self._find_certificate_ends()
            self._certificate_ends = time.monotonic(), ends
        return [
            labelled("harp_store_bytes", "gauge", "Size of the store's files.", ("file",), sizes),
            gauge("harp_store_free_bytes", "Free bytes of the store's file system.", free),
            labelled(
                "harp_certificate_expiry_timestamp_seconds",
                "gauge",
                "End of the dispatcher's own certificates and its authorities, Unix time.",
                ("file",),
                ends,
            ),
        ]

    def _find_certificate_ends(self) -> dict[tuple[str, ...], float]:
        """Return when the certificates of each file end.

        A file with a certificate and its chain ends with the first one. A file of authorities ends with the last one,
        because such files often contain old authorities, too.
        """
        tls = self._dispatcher.config.tls
        chains = set() if tls is None else {tls.certfile}
        ends: dict[Path, list[float]] = {}
        for validity in self._read_validities():
            ends.setdefault(validity.file, []).append(validity.ends.timestamp())
        return {(str(file),): (min if file in chains else max)(times) for file, times in ends.items()}
