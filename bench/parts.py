"""The parts: what is measured together, and which figures come of it."""

from __future__ import annotations

from bench.works import Part, Row, Work

__all__ = ["PARTS", "PICTURED"]


def _calls(key: str, title: str, clients: int) -> Work:
    rows = (
        Row(f"{key}-{clients}", f"{title}, {_clients(clients)}"),
        Row(f"{key}-{clients}-p50", f"{title}, {_clients(clients)}: p50", "p50", "ms", less=True),
    )
    return Work(f"{key}-{clients}", rows, {"clients": clients}, {"seconds": "seconds"})


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


def _submissions(key: str, title: str, clients: int, batch: int = 0) -> Work:
    row = Row(key, title, unit="jobs/s")
    return Work(key, (row,), {"clients": clients, "batch": batch}, {"seconds": "seconds"})


def _jobs(key: str, title: str) -> Work:
    return Work(key, (Row(key, title, unit="jobs/s"),), {"clients": 4}, {"jobs": "jobs"})


_DIRECT = Part(
    "direct",
    "Direct calls over TLS, without a dispatcher",
    (
        _calls("fresh", "A connection for each call", 1),
        _calls("fresh", "A connection for each call", 16),
        _calls("kept", "A kept connection, a process for each call", 1),
        _calls("kept", "A kept connection, a process for each call", 16),
        _calls("reused", "A kept connection, a process for many calls", 1),
        _calls("reused", "A kept connection, a process for many calls", 16),
    ),
)

_JOBS = Part(
    "jobs",
    "Jobs: submitted, run, results collected",
    (
        Work(
            "latency",
            (
                Row("latency-p50", "One job, submission to result, idle system: p50", "p50", "ms", less=True),
                Row("latency-p99", "One job, submission to result, idle system: p99", "p99", "ms", less=True),
            ),
            sized={"jobs": "latencies"},
        ),
        _jobs("jobs", "Jobs end to end, 4 clients"),
        _jobs("reused-jobs", "Jobs end to end, 4 clients, a process for many calls"),
        _submissions("submit-1", "Jobs accepted, 1 client", 1),
        _submissions("submit-16", "Jobs accepted, 16 clients", 16),
        _submissions("submit-many", "Jobs accepted, 1,000 in a request", 1, 1_000),
    ),
)

_STREAM = Part(
    "stream",
    "Records from a procedure to who follows it",
    (
        Work("stream", (Row("stream", "A stream, short", unit="records/s"),), sized={"records": "records"}),
        Work(
            "long-stream", (Row("long-stream", "A stream, long", unit="records/s"),), sized={"records": "long_records"}
        ),
        Work(
            "slow-stream",
            (
                Row("slow-stream-p50", "A record of a slow stream, made to arrived: p50", "p50", "ms", less=True),
                Row("slow-stream-p99", "A record of a slow stream, made to arrived: p99", "p99", "ms", less=True),
            ),
            {"pause": 0.01},
            {"records": "slow_records"},
        ),
        Work(
            "crowd",
            (Row("crowd", "100 followers of a stream, together", unit="deliveries/s"),),
            sized={"records": "crowd_records", "followers": "followers"},
        ),
    ),
)


def _query(key: str, title: str) -> Work:
    rows = (
        Row(f"stored-{key}-p50", f"{title}: p50", "p50", "ms", less=True),
        Row(f"stored-{key}-p99", f"{title}: p99", "p99", "ms", less=True),
    )
    return Work(f"stored-{key}", rows, {"kind": key}, {"queries": "queries"})


_STORE = Part(
    "store",
    "A full store: 1,000,000 ended jobs with 10,000,000 records (--quick: 50,000 with 500,000)",
    (
        Work(
            "stored-jobs",
            (
                Row("stored-jobs-empty", "Jobs end to end, 4 clients, empty store", "empty", "jobs/s"),
                Row("stored-jobs", "Jobs end to end, 4 clients, full store", unit="jobs/s"),
                Row("stored-jobs-share", "Full store to empty store", "share", "of the rate"),
                Row("stored-bytes", "What a small job takes on disk", "bytes", "bytes", less=True),
            ),
            sized={"jobs": "jobs"},
            patience=2,
        ),
        _query("status", "Status of a job"),
        _query("result", "Result of a job"),
        _query("list", "List of the newest 100 jobs"),
        _query("host", "List of a host's newest 100 jobs"),
        _query("queue", "List of a queue's newest 100 jobs"),
    ),
)

_START = Part(
    "start",
    "Start of the dispatcher with that store and 10,000 queued jobs (--quick: 500)",
    (
        Work(
            "start",
            (
                Row("stored-start", "From its start until it answers", "seconds", "s", less=True),
                Row("stored-start-rate", "The queued jobs from then on, on a simulated host", unit="jobs/s"),
            ),
            patience=2,
        ),
    ),
)

_WIDE = Part(
    "wide",
    "Many hosts and many followers (--quick: 50 hosts, 300 jobs, 1,000 followers)",
    (
        Work(
            "wide",
            (
                Row(
                    "wide-lost",
                    "Jobs all at once on many hosts: without a result",
                    "lost",
                    "jobs",
                    True,
                ),
                Row("wide-seconds", "The same, first submission to last result", "seconds", "s", less=True),
                Row("wide-memory", "The same, the dispatcher's memory at the most", "memory", "MB", less=True),
            ),
            sized={"jobs": "wide", "hosts": "hosts"},
            patience=2,
        ),
        Work(
            "idle",
            (
                Row("idle-followers", "Idle followers that get the record before, the end after", "held", "followers"),
                Row("idle-follower-memory", "What each takes of the dispatcher's memory", "memory", "kB", less=True),
            ),
            sized={"followers": "idle"},
        ),
    ),
)

_DEPTH = Part(
    "depth",
    "20,000 jobs submitted at once, at most 3 times (--quick: 500)",
    (
        Work(
            "depth",
            (
                Row("flood-lost", "Jobs without their own result", "lost", "jobs", less=True),
                Row("flood", "Jobs end to end, 4 clients", unit="jobs/s"),
            ),
            sized={"jobs": "depth"},
            patience=5,
        ),
    ),
    most_runs=3,
)


def _memory(process: str) -> tuple[Row, ...]:
    return tuple(
        Row(f"sustained-{process}-{when}", f"Memory of the {process}, {told}", f"{process}-{when}", "MB", less=True)
        for when, told in (("begin", "after a tenth of the time"), ("end", "at the end"))
    )


_SUSTAINED = Part(
    "sustained",
    "Ten minutes of jobs (--quick: 20 s), once",
    (
        Work(
            "sustained",
            (
                Row("sustained", "Jobs end to end, 4 clients, each tenth of the time", "slice", "jobs/s", series=True),
                Row("sustained-growth", "What the dispatcher's memory grows", "growth", "MB", less=True),
                *_memory("dispatcher"),
                *_memory("gate"),
                *_memory("warden"),
            ),
            sized={"seconds": "sustained"},
            lasting="sustained",
        ),
    ),
    most_runs=1,
)

#: All parts, by name.
PARTS = {part.key: part for part in (_DIRECT, _JOBS, _STREAM, _STORE, _START, _WIDE, _DEPTH, _SUSTAINED)}

#: The rows that the picture shows.
PICTURED = frozenset(
    {"fresh-1", "fresh-16", "kept-16", "reused-16", "jobs", "reused-jobs", "submit-16", "latency-p50", "long-stream"}
)
