"""What is measured: pieces of work, each asked of all contenders that do it in the same words, and their figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FULL", "PARTS", "PICTURED", "QUICK", "TINY", "Part", "Row", "Sizes", "Work"]


@dataclass(frozen=True)
class Sizes:
    """How much of each work is done.

    Attributes:
        runs: how often each contender is measured.
        seconds: for calls and for submissions, each time.
        jobs: through the dispatcher, together.
        latencies: jobs that are measured one by one.
        records: of the stream that every contender can give in reasonable time.
        long_records: of the longer one.
        slow_records: of the slow stream.
        crowd_records: of the stream with many followers.
        followers: how many these are.
        deadline: seconds after which a work is given up.
    """

    runs: int
    seconds: float
    jobs: int
    latencies: int
    records: int
    long_records: int
    slow_records: int
    crowd_records: int
    followers: int = 100
    deadline: float = 120.0


FULL = Sizes(5, 3.0, 2_000, 200, 20_000, 100_000, 200, 5_000)
QUICK = Sizes(1, 0.7, 300, 30, 4_000, 20_000, 30, 1_000, deadline=60.0)
#: For the tests of the measurements themselves.
TINY = Sizes(1, 0.1, 8, 3, 50, 100, 3, 50, followers=5, deadline=60.0)


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        key: names it in files.
        title: names it for people.
        figure: which of the work's figures it is.
        unit: what it counts.
        less: whether less is better.
    """

    key: str
    title: str
    figure: str = "rate"
    unit: str = "calls/s"
    less: bool = False


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        key: names it; contenders say by it whether they do it.
        rows: what comes of it.
        arguments: what its client is given beside the names of sizes below.
        sized: arguments that are taken from the sizes: name, and attribute of `Sizes`.
    """

    key: str
    rows: tuple[Row, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sized: Mapping[str, str] = field(default_factory=dict)

    def request(self, sizes: Sizes) -> dict[str, Any]:
        """The arguments for a client."""
        return {**self.arguments, **{name: getattr(sizes, attribute) for name, attribute in self.sized.items()}}


@dataclass(frozen=True)
class Part:
    """Works that are measured together: the same contenders, each started once a run.

    Attributes:
        key: names it on the command line.
        title: a line of explanation.
        works: in the order in which they are done.
        usual: whether it is measured when no part is named.
    """

    key: str
    title: str
    works: tuple[Work, ...]
    usual: bool = True

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows of it."""
        return tuple(row for work in self.works for row in work.rows)


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

#: All parts, by name.
PARTS = {part.key: part for part in (_DIRECT, _JOBS, _STREAM)}

#: The rows that the picture shows.
PICTURED = frozenset(
    {"fresh-1", "fresh-16", "kept-16", "reused-16", "jobs", "reused-jobs", "submit-16", "latency-p50", "long-stream"}
)
