"""The table that a run prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from bench.figures import Line, Ratio, Results
from bench.works import Part

__all__ = ["figure", "left_out", "lines", "times"]

_HEAD = ("", "median", "least", "most", "ours/theirs", "(least to most)")


def figure(value: float) -> str:
    """A figure with as many digits as mean something."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(ratio: Ratio | None) -> str:
    """A ratio."""
    return "" if ratio is None else f"{figure(ratio.ratio)} x"


def lines(part: Part, results: Results, ours: str, durability: Mapping[str, str]) -> Iterator[str]:
    """A part's rows as text.

    Args:
        part: the part.
        results: what was measured.
        ours: the contender that others are compared with.
        durability: what each contender syncs when.
    """
    rows: list[tuple[str, ...] | str] = []
    for row in part.rows:
        found = list(results.lines(row, ours))
        if found:
            rows.append(f"{row.title}, {row.unit}{' (less is better)' if row.less else ''}")
            rows.extend(_cells(line) for line in found)
    if not rows:
        return
    table = [_HEAD, *(row for row in rows if not isinstance(row, str))]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD))]
    yield part.title
    yield ""
    yield _laid_out(_HEAD, widths)
    for cells in rows:
        if isinstance(cells, str):
            yield ""
            yield cells
        else:
            yield _laid_out(cells, widths)
    yield ""
    measured = {line.contender for row in part.rows for line in results.lines(row, ours)}
    for contender, synced in durability.items():
        if contender in measured:
            yield f"  {contender}: {synced}."
    yield ""


def _cells(line: Line) -> tuple[str, ...]:
    spread, ratio = line.spread, line.ratio
    paired = "" if ratio is None else f"({figure(ratio.least)} to {figure(ratio.most)})"
    values = (figure(spread.median), figure(spread.least), figure(spread.most))
    return (line.contender, *values, times(ratio), paired)


def _laid_out(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join((f"  {first}", *others)).rstrip()


def left_out(noted: Iterable[tuple[str, str, str, str]]) -> Iterator[str]:
    """What was not measured, and why."""
    for part, contender, what, why in noted:
        first, *others = why.splitlines() or [""]
        yield f"left out: {part}: {contender}: {what}: {first}"
        yield from (f"    {line}" for line in others)
