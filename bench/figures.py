"""What was measured, and what follows from it: medians, spreads, ratios of ours to theirs. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bench.works import Row

__all__ = ["Line", "Ratio", "Results", "Spread"]


@dataclass(frozen=True)
class Spread:
    """Values of several runs.

    Attributes:
        median: of all.
        least: the smallest.
        most: the largest.
        runs: how many there are.
    """

    median: float
    least: float
    most: float
    runs: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of values, at least one."""
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Ratio:
    """Ours divided by theirs.

    Attributes:
        ratio: of the two medians.
        least: the smallest of the runs in which both were measured.
        most: the largest of these.
    """

    ratio: float
    least: float
    most: float


@dataclass(frozen=True)
class Line:
    """A row's figures for a contender.

    Attributes:
        row: the row.
        contender: the contender's name.
        spread: its values.
        ratio: ours to this one; None: it is ours, or ours was not measured.
    """

    row: Row
    contender: str
    spread: Spread
    ratio: Ratio | None


@dataclass
class Results:
    """All that was measured.

    Attributes:
        values: by row's key, contender and number of the run.
        left_out: rows that are not there: part, contender, what is missing of it, and why.
    """

    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    left_out: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, row: str, contender: str, run: int, value: float) -> None:
        """Take down a value."""
        self.values.setdefault(row, {}).setdefault(contender, {})[run] = value

    def leave_out(self, part: str, contender: str, what: str, why: str) -> None:
        """Note once that something of a contender could not be measured."""
        if (part, contender, what) not in {noted[:3] for noted in self.left_out}:
            self.left_out.append((part, contender, what, why))

    def spread(self, row: str, contender: str) -> Spread | None:
        """A contender's values in a row; None: there are none."""
        values = self.values.get(row, {}).get(contender)
        return Spread.of(list(values.values())) if values else None

    def ratio(self, row: str, ours: str, theirs: str) -> Ratio | None:
        """One contender's values to another's in the same runs; None: they have no run in common."""
        return ratio_of(self.values.get(row, {}).get(ours, {}), self.values.get(row, {}).get(theirs, {}))

    def lines(self, row: Row, ours: str) -> Iterator[Line]:
        """A row's lines: ours first, then the others, the best first."""
        found = {contender: self.spread(row.key, contender) for contender in self.values.get(row.key, {})}
        known = [(contender, spread) for contender, spread in found.items() if spread is not None]
        known.sort(key=lambda one: (one[0] != ours, one[1].median if row.less else -one[1].median))
        for contender, spread in known:
            yield Line(row, contender, spread, None if contender == ours else self.ratio(row.key, ours, contender))


def ratio_of(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Ratio | None:
    """The ratio of two sets of values by run."""
    paired = [ours[run] / theirs[run] for run in ours.keys() & theirs.keys() if theirs[run] > 0]
    if not paired:
        return None
    whole = statistics.median(ours.values()) / statistics.median(theirs.values())
    return Ratio(whole, min(paired), max(paired))
