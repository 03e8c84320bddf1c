"""What HARP is to reach: figures of rows, and their ratios to floors and peers in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.contenders import Contender
from bench.results import F1, F2, F3, OURS, Entry, Results, figure
from bench.workloads import PARTS, Workload

_ROWS = {row.key: row for part in PARTS.values() for row in part.rows}
_RPYC = "RPyC, forking"
#: What costs are called.
_COSTS = {"cpu": "CPU ms", "faults": "page faults"}
#: What is listed with costs, but has no sum.
_TIMES = {"quiet": "quiet, ms", "meanwhile": "meanwhile, ms"}


@dataclass(frozen=True)
class Goal:
    """A figure to reach: at most, if less is better, else at least.

    Attributes:
        number: of the group of goals.
        row: of HARP's figure.
        wanted: the figure; or its ratio to the other one.
        other: contender and row of the other figure.
        quick: whether --quick measures it, too.
    """

    number: int
    row: str
    wanted: float
    other: tuple[str, str] | None = None
    quick: bool = True


#: All goals. A figure without another one is that of a quiet machine with 2 cores, on which F1 is 0.5 ms.
GOALS = (
    Goal(1, "kept-cpu", 3.0, (F1, "kept-cpu")),
    Goal(2, "kept-1", 0.61, (F2, "kept-4")),
    Goal(2, "kept-4", 0.75, (F2, "kept-4")),
    Goal(2, "kept-16", 0.75, (F2, "kept-4")),
    Goal(3, "fresh-16", 600.0),
    Goal(3, "fresh-16", 25.0, (_RPYC, "fresh-16")),
    Goal(3, "fresh-16", 80.0, ("ssh", "fresh-16")),
    Goal(3, "fresh-1", 25.0, (_RPYC, "fresh-1")),
    Goal(3, "fresh-1", 80.0, ("ssh", "fresh-1")),
    Goal(4, "reused-16", 0.3, (F3, "reused-16")),
    Goal(4, "reused-16", 1.0, (_RPYC, "reused-16")),
    Goal(5, "jobs", 0.5, (F2, "kept-4")),
    Goal(5, "reused-jobs", 2_000.0),
    Goal(5, "reused-jobs", 2.0, ("Celery, durable", "reused-jobs")),
    Goal(5, "reused-jobs", 12.0, ("RQ, durable", "jobs")),
    Goal(5, "reused-jobs", 1.0, ("Dramatiq", "reused-jobs")),
    Goal(6, "simulated-cpu", 0.45),
    Goal(7, "submit-16", 8_000.0),
    Goal(7, "submit-16", 1.0, ("Dramatiq, durable", "submit-16")),
    Goal(7, "submit-many", 50_000.0),
    Goal(8, "latency-p50", 4.0),
    Goal(8, "latency-p50", 1.0, ("Celery", "latency-p50")),
    Goal(8, "latency-p99", 10.0),
    Goal(9, "long-stream", 250_000.0),
    Goal(9, "slow-stream-p50", 1.5),
    Goal(10, "memory-harpd", 45.0),
    Goal(10, "memory-dispatcher", 30.0),
    Goal(10, "idle-follower-memory", 6.9),
    Goal(11, "entries", 600.0),
    *(Goal(12, row.key, 2.0) for row in PARTS["neighbours"].rows),
    Goal(13, "access-audit", 1.03, quick=False),  # six daemons need a third of the time that --quick has
)


def needed(contender: Contender, workload: Workload) -> bool:
    """Return whether a goal of --quick needs this workload of this contender."""
    rows, goals = {row.key for row in workload.rows}, [goal for goal in GOALS if goal.quick]
    figures = [(OURS, goal.row) for goal in goals] + [goal.other for goal in goals if goal.other is not None]
    return any(name == contender.name and row in rows for name, row in figures)


def compare(results: Results) -> list[Entry]:
    """Return each goal whose figure was measured: number, row, other, wanted, reached, and spread.

    ``reached`` is None if the other figure was not measured.
    """
    entries = []
    for goal in GOALS:
        found = results.spread(OURS, goal.row, goal.other)
        if found is None:
            continue
        value = found["median"] if goal.other is None else found.get("ratio")
        reached = None if value is None else (value <= goal.wanted if _ROWS[goal.row].less else value >= goal.wanted)
        other = {"other": list(goal.other)} if goal.other else {}
        entries.append(
            {"goal": goal.number, "row": goal.row, **other, "wanted": goal.wanted, "reached": reached, **found}
        )
    return entries


def report(goals: Sequence[Entry], entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the lines that show the goals, and what each figure costs each process.

    Args:
        goals: as `compare` returns them.
        entries: the summary of all rows.
    """
    costs = {(entry["contender"], entry["row"]): entry.get("cost", {}) for entry in entries}
    shown = None
    for goal in goals:
        row = _ROWS[goal["row"]]
        if goal["row"] != shown:
            shown = goal["row"]
            yield f"{goal['goal']:2}  {row.title}: {_spread(goal)} {row.unit}"
            yield from (f"      {text}" for text in _costs(costs.get((OURS, shown), {})))
        verdict = {True: "reached", False: "SHORT", None: "?"}[goal["reached"]]
        bound = "at most" if row.less else "at least"
        if "other" not in goal:
            yield f"      {verdict:8} to reach: {bound} {figure(goal['wanted'])} {row.unit}"
            continue
        ratio = f"{_spread(goal, 'ratio', 'ratio_min', 'ratio_max')} x" if "ratio" in goal else "not measured:"
        name, other = goal["other"]
        yield f"      {verdict:8} {ratio} {name}; to reach: {bound} {goal['wanted']:g} x"
        yield from (f"               its {text}" for text in _costs(costs.get((name, other), {})))
    short = ", ".join(str(number) for number in sorted({goal["goal"] for goal in goals if goal["reached"] is False}))
    yield f"reached: {sum(goal['reached'] is True for goal in goals)} of {len(goals)}; short in {short or 'none'}"


def _spread(entry: Entry, median: str = "median", least: str = "min", most: str = "max") -> str:
    return f"{figure(entry[median])} ({figure(entry[least])} to {figure(entry[most])})"


def _costs(costs: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield the parts of each kind of cost as text, the least ones left out.

    A part is below zero if a server lets the kernel reap its children (RPyC): their costs are lost.
    """
    for what, parts in costs.items():
        total = sum(parts.values())
        if total <= 0:
            continue
        if what in _TIMES:
            yield f"{_TIMES[what]}: " + ", ".join(f"{name} {_short(value)}" for name, value in parts.items())
            continue
        shown = [f"{name} {_short(value)}" for name, value in parts.items() if value > total / 200]
        yield ", ".join([f"{_COSTS.get(what, what)}: {_short(total)}", *shown])


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
