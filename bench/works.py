"""What a measurement is made of: pieces of work, each asked of all contenders in the same words, and their figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FULL", "QUICK", "TINY", "Part", "Row", "Sizes", "Work"]


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
        stored: ended jobs of the full store; each has 10 records.
        queries: of each kind.
        queued: jobs that wait when the dispatcher starts.
        hosts: simulated ones.
        wide: jobs that are under way on them at once.
        idle: followers to whom nothing is said.
        depth: jobs that are submitted at once.
        sustained: seconds of the long load.
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
    stored: int = 1_000_000
    queries: int = 1_000
    queued: int = 10_000
    hosts: int = 200
    wide: int = 2_000
    idle: int = 10_000
    depth: int = 20_000
    sustained: float = 600.0
    deadline: float = 120.0


FULL = Sizes(5, 3.0, 2_000, 200, 20_000, 100_000, 200, 5_000)
QUICK = Sizes(
    runs=1,
    seconds=0.7,
    jobs=300,
    latencies=30,
    records=4_000,
    long_records=20_000,
    slow_records=30,
    crowd_records=1_000,
    stored=50_000,
    queries=100,
    queued=500,
    hosts=50,
    wide=300,
    idle=1_000,
    depth=500,
    sustained=20.0,
    deadline=60.0,
)
#: For the tests of the measurements themselves.
TINY = Sizes(
    runs=1,
    seconds=0.1,
    jobs=8,
    latencies=3,
    records=50,
    long_records=100,
    slow_records=3,
    crowd_records=50,
    followers=5,
    stored=400,
    queries=3,
    queued=20,
    hosts=3,
    wide=9,
    idle=10,
    depth=10,
    sustained=2.0,
    deadline=60.0,
)


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        key: names it in files.
        title: names it for people.
        figure: which of the work's figures it is.
        unit: what it counts.
        less: whether less is better.
        series: whether a run has several values of it: the figures ``FIGURE-0``, ``FIGURE-1`` and so on.
    """

    key: str
    title: str
    figure: str = "rate"
    unit: str = "calls/s"
    less: bool = False
    series: bool = False

    def values(self, figures: Mapping[str, float]) -> list[float]:
        """The values of a run in the figures of its work."""
        if not self.series:
            return [figures[self.figure]]
        names = itertools.takewhile(figures.__contains__, (f"{self.figure}-{number}" for number in itertools.count()))
        return [figures[name] for name in names]


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        key: names it; contenders say by it whether they do it.
        rows: what comes of it.
        arguments: what its client is given beside the names of sizes below.
        sized: arguments that are taken from the sizes: name, and attribute of `Sizes`.
        patience: how many times the usual deadline it may take.
        lasting: attribute of `Sizes`: seconds that it takes on top.
    """

    key: str
    rows: tuple[Row, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sized: Mapping[str, str] = field(default_factory=dict)
    patience: float = 1.0
    lasting: str | None = None

    def deadline(self, sizes: Sizes) -> float:
        """Seconds after which it is given up."""
        lasting: float = 0.0 if self.lasting is None else getattr(sizes, self.lasting)
        return self.patience * sizes.deadline + lasting

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
        most_runs: how often it is measured at the most; None: as often as asked for.
    """

    key: str
    title: str
    works: tuple[Work, ...]
    usual: bool = True
    most_runs: int | None = None

    def runs(self, sizes: Sizes) -> int:
        """How often it is measured."""
        return sizes.runs if self.most_runs is None else min(sizes.runs, self.most_runs)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows of it."""
        return tuple(row for work in self.works for row in work.rows)
