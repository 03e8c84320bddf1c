"""The nine targets, and what a run says to each.

Absolute figures are of a machine with 2 cores; between machines the ratios count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.figures import Results
from bench.table import figure

__all__ = ["TARGETS", "Finding", "Target", "Verdict", "judge"]

#: Who is compared with others.
OURS = "HARP"


@dataclass(frozen=True)
class Bound:
    """A figure of ours, or its ratio to a peer's, and where it has to lie.

    Attributes:
        row: the row's key.
        bound: the figure or the ratio.
        most: whether it is the most that is allowed; else the least.
        peer: the contender that ours is divided by; None: it is the figure itself.
        unit: of a figure.
    """

    row: str
    bound: float
    most: bool = False
    peer: str | None = None
    unit: str = ""

    def __str__(self) -> str:
        what = f"{self.bound:g} x {self.peer}" if self.peer else f"{self.bound:,g} {self.unit}".rstrip()
        return f"{self.row}: at {'most' if self.most else 'least'} {what}"

    def found(self, results: Results) -> float | None:
        """What was measured; None: it was not."""
        if self.peer is not None:
            ratio = results.ratio(self.row, OURS, self.peer)
            return None if ratio is None else ratio.ratio
        spread = results.spread(self.row, OURS)
        return None if spread is None else spread.median


@dataclass(frozen=True)
class Target:
    """What we want to reach.

    Attributes:
        number: as the project counts them.
        title: in short.
        bounds: all have to hold.
    """

    number: int
    title: str
    bounds: tuple[Bound, ...]


@dataclass(frozen=True)
class Finding:
    """A bound, and what was measured: None, it was not."""

    bound: Bound
    found: float | None

    @property
    def holds(self) -> bool | None:
        """Whether it holds; None: that is not known."""
        if self.found is None:
            return None
        return self.found <= self.bound.bound if self.bound.most else self.found >= self.bound.bound

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.bound}: not measured"
        times = " x" if self.bound.peer else ""
        return f"{self.bound}: {'holds' if self.holds else 'SHORT'}, {figure(self.found)}{times}"


@dataclass(frozen=True)
class Verdict:
    """What a run says to a target."""

    target: Target
    findings: tuple[Finding, ...]

    @property
    def reached(self) -> bool | None:
        """Whether all bounds hold; None: some were not measured, and none is short."""
        holding = [finding.holds for finding in self.findings]
        if False in holding:
            return False
        return None if None in holding else True

    def lines(self) -> Iterator[str]:
        """As text."""
        word = {True: "reached", False: "SHORT", None: "not all measured"}[self.reached]
        yield f"{self.target.number}. {self.target.title}: {word}"
        yield from (f"     {finding}" for finding in self.findings)


def judge(results: Results, targets: tuple[Target, ...]) -> list[Verdict]:
    """The verdicts on targets of which something was measured."""
    found = [
        Verdict(target, tuple(Finding(bound, bound.found(results)) for bound in target.bounds)) for target in targets
    ]
    return [verdict for verdict in found if any(finding.found is not None for finding in verdict.findings)]


TARGETS = (
    Target(
        1,
        "Direct calls",
        (
            Bound("fresh-1", 14, peer="RPyC, forking"),
            Bound("fresh-1", 40, peer="ssh"),
            Bound("fresh-1", 380, unit="calls/s"),
            Bound("fresh-16", 750, unit="calls/s"),
            Bound("kept-1", 750, unit="calls/s"),
            Bound("kept-16", 1_400, unit="calls/s"),
        ),
    ),
    Target(
        2,
        "Jobs end to end",
        (
            Bound("jobs", 8, peer="RQ, durable Redis"),
            Bound("jobs", 4.5, peer="RQ"),
            Bound("jobs", 1.9, peer="Celery, durable"),
            Bound("jobs", 1, peer="Celery"),
            Bound("jobs", 700, unit="jobs/s"),
            Bound("flood-lost", 0, most=True, unit="jobs lost of those submitted at once"),
            Bound("sustained-growth", 10, most=True, unit="MB that the dispatcher grows in 10 minutes"),
        ),
    ),
    Target(
        3,
        "Jobs accepted",
        (
            Bound("submit-16", 2.4, peer="Dramatiq, durable Redis"),
            Bound("submit-16", 4, peer="Celery, durable"),
            Bound("submit-16", 3_000, unit="jobs/s"),
            Bound("submit-1", 1_000, unit="jobs/s"),
            Bound("submit-many", 20_000, unit="jobs/s"),
        ),
    ),
    Target(
        4,
        "One job, idle system",
        (
            Bound("latency-p50", 1.5, most=True, peer="Celery"),
            Bound("latency-p50", 4, most=True, unit="ms"),
            Bound("latency-p99", 10, most=True, unit="ms"),
        ),
    ),
    Target(
        5,
        "Streams",
        (
            Bound("long-stream", 5, peer="gRPC, protobuf"),
            Bound("long-stream", 1.5, peer="Redis streams, pipelined, durable"),
            Bound("long-stream", 100_000, unit="records/s"),
            Bound("slow-stream-p50", 5, most=True, unit="ms"),
            Bound("crowd", 300_000, unit="deliveries/s"),
        ),
    ),
    Target(
        6,
        "A million jobs stored",
        (
            Bound("stored-status-p99", 10, most=True, unit="ms"),
            Bound("stored-result-p99", 10, most=True, unit="ms"),
            Bound("stored-list-p99", 10, most=True, unit="ms"),
            Bound("stored-host-p99", 10, most=True, unit="ms"),
            Bound("stored-queue-p99", 10, most=True, unit="ms"),
            Bound("stored-jobs-share", 0.9, unit="of the rate on an empty store"),
            Bound("stored-bytes", 1_000, most=True, unit="bytes a job"),
        ),
    ),
    Target(
        7,
        "Many hosts, many followers",
        (
            Bound("wide-lost", 0, most=True, unit="of 2,000 jobs on 200 hosts"),
            Bound("wide-memory", 300, most=True, unit="MB"),
            Bound("idle-followers", 10_000, unit="followers"),
            Bound("idle-follower-memory", 20, most=True, unit="kB"),
        ),
    ),
    Target(8, "Start with a million jobs", (Bound("stored-start", 2, most=True, unit="s"),)),
    Target(
        9,
        "Processes that are used again",
        (
            Bound("reused-16", 1, peer="RPyC, forking"),
            Bound("reused-16", 12_000, unit="calls/s"),
            Bound("reused-jobs", 1, peer="Dramatiq"),
            Bound("reused-jobs", 2_500, unit="jobs/s"),
        ),
    ),
)
