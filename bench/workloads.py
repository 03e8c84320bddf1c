"""What is measured: workloads, the rows that come of them, and the parts in which they are measured together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """How much is done: seconds, and counts."""

    seconds: float = 3.0  # of calls and of submissions, for each workload
    jobs: int = 2_000
    latencies: int = 200  # jobs that are measured one by one
    records: int = 100_000
    slow_records: int = 200
    followers: int = 10_000  # idle ones
    viewers: int = 300  # clients of the HTTP API that follow events
    streams: int = 1_000  # idle ones of the HTTP API
    stored: int = 1_000_000  # ended jobs of the full store
    queries: int = 1_000  # of each kind, on the full store
    hosts: int = 200  # simulated ones
    at_once: int = 2_000  # jobs that run on them at the same time
    flood: int = 20_000  # jobs that are submitted before the first result is read
    soak: float = 600.0  # seconds of the long load
    traced: int = 9  # jobs whose function entries are counted
    neighbours: float = 16.0  # seconds in which others make jobs and calls, half of it beside each kind of peer

    def scaled(self, factor: float) -> Sizes:
        """Return sizes that are this many times as large; no count becomes less than 1."""
        scaled = {name: value * factor for name, value in asdict(self).items()}
        counts = {name: max(1, round(value)) for name, value in scaled.items() if isinstance(getattr(self, name), int)}
        return Sizes(**{**scaled, **counts})


#: What --quick does in each round. Counts are as small as a rate can be that two rounds agree on within some percent.
QUICK = Sizes(
    seconds=0.7, jobs=400, latencies=60, records=30_000, slow_records=80, followers=2_000, traced=3, neighbours=4.0
)


@dataclass(frozen=True)
class Row:
    """A row of the table: one figure of a workload."""

    key: str
    title: str
    unit: str
    figure: str = "rate"  # its name among the figures of the workload

    @property
    def less(self) -> bool:
        """Whether less is better: of everything that is not a rate."""
        return not self.unit.endswith("/s")


#: The arguments of a workload's function.
Arguments = Callable[[Sizes], Mapping[str, Any]]


@dataclass(frozen=True)
class Workload:
    """Work that every contender of a part is asked to do in the same way."""

    key: str  # contenders map it to a function of their client
    arguments: Arguments
    rows: tuple[Row, ...]
    deadline: float = 120.0  # seconds after which it is given up
    once: bool = False  # measured in the first round only: it takes long, or needs servers that have done nothing


@dataclass(frozen=True)
class Part:
    """Workloads that are measured together: in each round, each contender does all of them."""

    key: str
    title: str
    workloads: tuple[Workload, ...]
    stored: bool = False  # whether jobs and records can be synced before they are acknowledged
    large: bool = False  # measured once, on servers of its own, and not by --quick

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows."""
        return tuple(row for workload in self.workloads for row in workload.rows)


def _four_clients(sizes: Sizes) -> dict[str, Any]:
    return {"clients": 4, "jobs": sizes.jobs}


def _calls(key: str, title: str, clients: int, *more: Row) -> Workload:
    told = "1 client" if clients == 1 else f"{clients} clients"
    row = Row(f"{key}-{clients}", f"{title}, {told}", "calls/s")
    return Workload(row.key, lambda sizes: {"clients": clients, "seconds": sizes.seconds}, (row, *more))


def _jobs(key: str, title: str) -> Workload:
    return Workload(key, _four_clients, (Row(key, title, "jobs/s"),))


def _submissions(key: str, title: str, clients: int, batch: int = 0) -> Workload:
    def arguments(sizes: Sizes) -> dict[str, Any]:
        return {"clients": clients, "batch": batch, "seconds": sizes.seconds}

    return Workload(key, arguments, (Row(key, title, "jobs/s"),))


def _quantiles(key: str, title: str) -> tuple[Row, ...]:
    return tuple(Row(f"{key}-{share}", f"{title}: {share}", "ms", share) for share in ("p50", "p99"))


_KEPT_CPU = Row("kept-cpu", "CPU of harpd for a call with a process of its own, 4 clients", "ms", "harpd")

_DIRECT = (
    _calls("fresh", "A connection for each call", 1),
    _calls("fresh", "A connection for each call", 16),
    _calls("kept", "Keep-alive, a process for each call", 1),
    _calls("kept", "Keep-alive, a process for each call", 4, _KEPT_CPU),
    _calls("kept", "Keep-alive, a process for each call", 16),
    _calls("reused", "Keep-alive, a process for many calls", 1),
    _calls("reused", "Keep-alive, a process for many calls", 16),
)

_JOBS = (
    Workload("latency", lambda sizes: {"jobs": sizes.latencies}, _quantiles("latency", "One job on an idle system")),
    _jobs("jobs", "Jobs end to end, 4 clients"),
    _jobs("reused-jobs", "Jobs end to end, a process for many jobs"),
    _submissions("submit-1", "Jobs accepted, 1 client", 1),
    _submissions("submit-16", "Jobs accepted, 16 clients", 16),
    _submissions("submit-many", "Jobs accepted, 10,000 in a request", 1, 10_000),
)

_STREAM = (
    Workload(
        "long-stream",
        lambda sizes: {"records": sizes.records},
        (Row("long-stream", "A stream, one follower", "records/s"),),
    ),
    Workload(
        "slow-stream",
        lambda sizes: {"records": sizes.slow_records, "pause": 0.01},
        _quantiles("slow-stream", "A record of a slow stream, creation to arrival"),
    ),
)

_COST = (
    Workload(
        "memory",
        lambda sizes: {},
        (
            Row("memory-harpd", "Memory (PSS) of an idle harpd, all its processes", "MB", "harpd"),
            Row("memory-dispatcher", "Memory (PSS) of an idle dispatcher", "MB", "dispatcher"),
        ),
        once=True,
    ),
    Workload(
        "simulated-cpu",
        _four_clients,
        (Row("simulated-cpu", "CPU of the dispatcher for a job on a simulated host", "ms", "dispatcher"),),
    ),
    Workload(
        "idle",
        lambda sizes: {"followers": sizes.followers},
        (Row("idle-follower-memory", "Memory of the dispatcher for an idle follower", "kB", "memory"),),
        once=True,
    ),
    Workload(
        "trace",
        lambda sizes: {"runs": sizes.traced},
        (Row("entries", "Functions of HARP that add(1, 2).get() enters", "entries", "entries"),),
        once=True,
    ),
)

_ACCESS = Workload(
    "access",
    # Many short turns: a machine has periods of seconds. With few jobs, one turn is only to show that it works.
    lambda sizes: {"clients": 4, "count": max(100, sizes.jobs // 5), "turns": 8 if sizes.jobs >= 100 else 1},
    (
        Row("access-plain", "CPU of dispatcher and harpd for a job, without rules and audit", "ms", "plain"),
        Row("access-rules", "The same with rules, compared with that", "x", "rules"),
        Row("access-audit", "The same with rules and audit, compared with that", "x", "audit"),
        Row("access-audit-dispatcher", "The same of the dispatcher alone", "x", "audit-dispatcher"),
    ),
    deadline=600.0,
)

_STORE = Workload(
    "store",
    lambda sizes: {name: getattr(sizes, name) for name in ("stored", "queries", "jobs")},
    (
        Row("stored-jobs-empty", "Jobs end to end, empty store", "jobs/s", "empty"),
        Row("stored-jobs", "Jobs end to end, full store", "jobs/s", "full"),
        Row("stored-bytes", "Disk space of a small job", "bytes", "bytes"),
        Row("stored-status-p99", "Status of a job: p99", "ms", "status"),
        Row("stored-result-p99", "Result of a job: p99", "ms", "result"),
        Row("stored-list-p99", "List of the newest 100 jobs: p99", "ms", "list"),
        Row("stored-host-p99", "List of a host's newest 100 jobs: p99", "ms", "host"),
        Row("stored-queue-p99", "List of a queue's newest 100 jobs: p99", "ms", "queue"),
        Row("stored-start", "Start of the dispatcher to its first answer", "s", "start"),
    ),
    deadline=7_200,
)

_SCALE = (
    Workload(
        "wide",
        lambda sizes: {"jobs": sizes.at_once, "hosts": sizes.hosts},
        (
            Row("wide-seconds", "2,000 jobs at once on 200 hosts", "s", "seconds"),
            Row("wide-memory", "Peak memory of the dispatcher with them", "MB", "memory"),
        ),
        deadline=300,
    ),
    Workload(
        "flood",
        lambda sizes: {"clients": 4, "jobs": sizes.flood},
        (Row("flood", "20,000 jobs submitted before the first result is read", "jobs/s"),),
        deadline=600,
    ),
    Workload(
        "soak",
        lambda sizes: {"seconds": sizes.soak},
        (
            Row("sustained", "Jobs for ten minutes", "jobs/s"),
            Row("sustained-slowest", "The slowest of them", "jobs/s", "slowest"),
            Row("sustained-growth-dispatcher", "Growth of the dispatcher's memory", "MB", "dispatcher"),
            Row("sustained-growth-frontend", "Growth of the frontend's memory", "MB", "frontend"),
            Row("sustained-growth-supervisor", "Growth of the supervisor's memory", "MB", "supervisor"),
        ),
        deadline=1_800,
    ),
)


def _http_rows(key: str, title: str) -> tuple[Row, ...]:
    """Return the rows of a request that is compared with a bare answer of the server."""
    return (
        Row(key, f"{title}, kept connections", "requests/s"),
        Row(f"{key}-floor", "The same, compared with a bare answer of the server", "x/s", "floor"),
        Row(f"{key}-cpu", "CPU of the dispatcher for it", "us", "cpu"),
        Row(f"{key}-cpu-floor", "The same, compared with a bare answer of the server", "x", "cpu_floor"),
    )


_HTTP = (
    Workload(
        "http-get",
        lambda sizes: {"seconds": sizes.seconds},
        (
            *_http_rows("http-get", "GET of a job, 4 clients"),
            Row("http-get-lines", "The same, compared with the client protocol", "x/s", "lines"),
        ),
    ),
    Workload(
        "http-list",
        lambda sizes: {"stored": sizes.stored, "seconds": sizes.seconds},
        (
            *_http_rows("http-list", "GET of the newest 50 jobs of 1,000,000, 8 clients"),
            Row("http-list-p99", "The same, 1 client: p99", "ms", "p99"),
            Row("http-list-same", "The same, 8 clients that all ask for the same", "requests/s", "same"),
        ),
        deadline=900,
        once=True,
    ),
    Workload(
        "http-post",
        lambda sizes: {"seconds": sizes.seconds},
        (
            *_http_rows("http-post", "POST of a job, 16 clients"),
            Row("http-post-many", "Jobs accepted over HTTP, 10,000 in a request", "jobs/s", "many"),
        ),
        deadline=300,
    ),
    Workload(
        "http-probes",
        lambda sizes: {"seconds": sizes.seconds},
        (
            Row("http-health-p99", "/healthz beside 4 clients that get jobs and lists: p99", "ms", "health"),
            Row("http-metrics-p50", "/metrics: p50", "ms", "metrics"),
        ),
    ),
    Workload(
        "http-follow",
        lambda sizes: {"records": sizes.records},
        (
            Row("http-follow", "Stored records over HTTP, one reader", "records/s"),
            Row("http-follow-lines", "The same, compared with the client protocol", "x/s", "lines"),
            Row("http-follow-many", "Stored records over HTTP, 100 followers of one job", "records/s", "many"),
        ),
        deadline=600,
    ),
    Workload(
        "http-events",
        lambda sizes: {"viewers": sizes.viewers, "records": sizes.slow_records},
        (
            Row("http-event-cpu", "CPU of the dispatcher for an event, 300 browsers, 20 events/s each", "us", "cpu"),
            Row("http-event-cpu-floor", "The same, compared with fixed events of the bare server", "x", "cpu_floor"),
            Row("http-event-p99", "The same, from the record to the browser: p99", "ms", "p99"),
        ),
    ),
    Workload(
        "http-idle",
        lambda sizes: {"streams": sizes.streams},
        (Row("http-idle-memory", "Memory of the dispatcher for an idle stream over HTTP", "kB", "memory"),),
        once=True,
    ),
    Workload(
        "http-viewers",
        lambda sizes: {"viewers": sizes.viewers, "clients": 4, "count": sizes.jobs},
        (
            Row("http-viewers", "Jobs beside 300 viewers of a live list, compared with none", "x/s", "ratio"),
            Row("http-viewers-cpu", "CPU of the dispatcher for these jobs, compared with none", "x", "cpu"),
        ),
        deadline=300,
    ),
)

#: Peers that misbehave, see `bench.neighbours`.
_NEIGHBOURS = {
    "spin": "calls that use the processor all the time",
    "stop": "calls that are stopped again and again",
    "command": "unusual commands without end",
    "stream": "a fast stream of tiny records",
    "password": "requests of 2.7 MB with a wrong password",
    "line": "lines of 15 MiB of empty arrays to harpd, without a password",
    "client-line": "the same lines to the dispatcher",
    "long-job": "jobs with arguments of 2.7 MB",
    "long-call": "direct calls with arguments of 2.7 MB",
    "many-jobs": "10,000 jobs in a request, again and again",
    "cancel": "5,000 jobs cancelled at once, again and again",
    "followers": "1,000 clients that follow a job with 5 records a second",
    "host": "a host that sends records without end",
    "host-long": "a host that sends records of 1 MB without end",
    "host-line": "a host that acknowledges each start with such a line",
}


def _neighbour(peer: str, title: str) -> Workload:
    def arguments(sizes: Sizes) -> dict[str, Any]:
        return {"peer": peer, "seconds": sizes.neighbours}

    rows = (
        Row(f"neighbour-{peer}-{kind}", f"p99 of others' {kind} beside {title}", "x quiet", kind)
        for kind in ("jobs", "calls")
    )
    return Workload(f"neighbour-{peer}", arguments, tuple(rows))


_ALL = (
    Part("cost", "Memory, CPU of the dispatcher, function entries", _COST),
    Part("access", "Access rules and audit: the CPU that they add to a job", (_ACCESS,)),
    Part("direct", "Direct calls over TLS, without a dispatcher", _DIRECT),
    Part("jobs", "Jobs: submitted, run, results collected", _JOBS, stored=True),
    Part("stream", "Records from a procedure to its follower", _STREAM, stored=True),
    Part("http", "The HTTP API: requests, records, events, viewers", _HTTP, large=True),
    Part(
        "neighbours",
        "Jobs and calls while a peer misbehaves, compared with quiet periods",
        tuple(_neighbour(peer, title) for peer, title in _NEIGHBOURS.items()),
        large=True,
    ),
    Part("store", "A store of 1,000,000 ended jobs with 10,000,000 records", (_STORE,), large=True),
    Part("scale", "Many jobs at once, and for a long time", _SCALE, large=True),
)

#: All parts by key, in the order in which they are measured: memory before anything else has run.
PARTS = {part.key: part for part in _ALL}
