"""The verbs that count jobs: by facets under a filter, and over time. Each reads one snapshot."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from msgspec.structs import replace

from harpcaller.model.job_filters import BAD, JobFilter, Span
from harpcaller.model.jobs import Bucket, JobCounts, JobStatistics, State, ValueCount
from harpcaller.store.sqlite.file import QUERIES, snapshot
from harpcaller.store.sqlite.finding import conditions_of
from harpcaller.store.sqlite.rows import decode_name
from harpcaller.store.sqlite.searches import (
    EXAMINED,
    Permits,
    Walk,
    count_values_of,
    find_bounds,
    find_permitted,
)

MAX_VALUES = 50  #: Maximum number of values of a facet.
MAX_BUCKETS = 10_000  #: Maximum number of buckets of statistics.

#: The facets of counts: their columns, and the parts of the filter that each is counted without.
FACETS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "state": ("jobs.state", {"states": frozenset()}),
    "host": ("jobs.host", {"hosts": (), "host_pattern": None}),
    "procedure": ("calls.procedure", {"procedures": ()}),
    "queue": ("CASE WHEN jobs.lane >= 'queue:' THEN substr(jobs.lane, 7) ELSE '-' END", {"queue": None}),
    "owner": ("jobs.owner", {"owners": ()}),
    "end_type": ("jobs.end_type", {"end_types": ()}),
}
#: The facets that have an index of all jobs.
_INDEXES = {
    "host": "jobs INDEXED BY jobs_of_host",
    "procedure": "calls INDEXED BY calls_of_procedure",
    "owner": "jobs INDEXED BY jobs_of_owner",
}


def count_jobs(
    db: sqlite3.Connection,
    wanted: JobFilter,
    by: Sequence[str],
    *,
    owners: Sequence[str] | None = None,
    permits: Permits | None = None,
    subject_bytes: int = 0,
    most: int = EXAMINED,
    at: float = 0.0,
) -> JobCounts:
    """Return how many jobs have each value of the facets `by`, each counted under all other parts of the filter.

    The newest jobs are counted, about `most` of them; `more` says that there may be others. Without another part, the
    states are exact, and up to `most` jobs of each host, procedure and owner are counted. `owners` and `permits` are as
    for `find_jobs`.
    """
    facets: dict[str, list[ValueCount]] = {}
    is_exact = True
    with snapshot(db):
        for name in by:
            rest = replace(wanted, **FACETS[name][1])
            counts: list[ValueCount] | None = None
            if rest == JobFilter() and owners is None and permits is None:
                counts = _count_all(db, name, most)
            if counts is None:
                counts = _count_facet(db, rest, name, owners, permits, subject_bytes, most)
            is_exact = is_exact and not any(each.more for each in counts) and len(counts) <= MAX_VALUES
            facets[name] = counts[:MAX_VALUES]
    return JobCounts(facets, is_exact, at)


def _count_facet(
    db: sqlite3.Connection,
    wanted: JobFilter,
    name: str,
    owners: Sequence[str] | None,
    permits: Permits | None,
    subject_bytes: int,
    most: int,
) -> list[ValueCount]:
    """Return how many of the jobs that fit a filter have each value of a facet."""
    if name == "end_type":  # other jobs have none
        states = (wanted.states or frozenset(State)) & BAD
        if not states:
            return []
        wanted = replace(wanted, states=states)
    walk = Walk(db, wanted, owners, True, None, most)
    return _count_found(db, walk, FACETS[name][0], permits, subject_bytes, most)


def _count_found(
    db: sqlite3.Connection, walk: Walk, column: str, permits: Permits | None, subject_bytes: int, most: int
) -> list[ValueCount]:
    """Return how many of the jobs that a search finds have each value."""
    if permits is None:
        values, more = walk.count_values(column)
    else:
        seqs, place = find_permitted(db, walk, most, permits, subject_bytes)
        values, more = count_values_of(db, seqs, column), place is not None
    return _sort([ValueCount(_decode(value), jobs, more) for value, jobs in values.items() if value is not None])


def _count_all(db: sqlite3.Connection, name: str, most: int) -> list[ValueCount] | None:
    """Return how many of all jobs have each value of a facet; None: too many values, or there is no index of them."""
    if name == "state":
        return _sort([ValueCount(state, jobs) for state, jobs in db.execute(QUERIES["count_states"]) if jobs])
    if name not in _INDEXES:
        return None
    values: list[bytes] = []
    for value in _distinct(db, name):
        values.append(value)
        if len(values) > MAX_VALUES:
            return None
    counts = []
    for value in values:
        source = f"{_INDEXES[name]} WHERE {FACETS[name][0]} = ? LIMIT ?"
        [(jobs,)] = db.execute(f"SELECT count(*) FROM (SELECT 1 FROM {source})", (value, most + 1))
        counts.append(ValueCount(_decode(value), min(jobs, most), jobs > most))
    return _sort(counts)


def _distinct(db: sqlite3.Connection, name: str) -> Iterator[bytes]:
    """Yield the values of a facet, each by one look into its index."""
    column = FACETS[name][0]
    statement = f"SELECT {column} FROM {_INDEXES[name]} WHERE {column} > ? ORDER BY {column} LIMIT 1"
    value = b""
    while row := db.execute(statement, (value,)).fetchone():
        value = row[0]
        yield value


def _decode(value: str | bytes) -> str:
    return decode_name(value) if isinstance(value, bytes) else value


def _sort(counts: list[ValueCount]) -> list[ValueCount]:
    """Return the most frequent values first."""
    return sorted(counts, key=lambda each: (-each.count, each.value))


def job_statistics(
    db: sqlite3.Connection,
    since: float,
    until: float,
    step: float,
    states: frozenset[State] = frozenset(),
    *,
    owners: Sequence[str] | None = None,
    permits: Permits | None = None,
    subject_bytes: int = 0,
) -> JobStatistics:
    """Return how many jobs were submitted, and ended in each way, in each step of a time.

    With `states`, only ends of these states are counted. `owners` and `permits` are as for `find_jobs`; with `permits`,
    a limited number of jobs is looked at. Raises `ValueError` for too many steps.
    """
    count = max(0, -int(-(until - since) // step))
    if count > MAX_BUCKETS:
        raise ValueError(f"expected at most {MAX_BUCKETS} steps, got {count}")
    numbers: list[Counter[str]] = [Counter() for _ in range(count)]
    is_complete = True
    with snapshot(db):
        for column, what in (("submitted", "'submitted'"), ("ended", "state")):
            bucket = f"CAST(({column} - {float(since)!r}) / {float(step)!r} AS INTEGER) || ' ' || {what}"
            counted: Mapping[str, int]
            if permits is not None or owners is not None:
                span = Span(since, until)
                wanted = JobFilter(submitted=span) if column == "submitted" else JobFilter(ended=span)
                if permits is None:
                    counted = _count_own(db, wanted, bucket, owners or ())
                else:
                    walk = Walk(db, wanted, owners, True, None, EXAMINED)
                    seqs, place = find_permitted(db, walk, EXAMINED, permits, subject_bytes)
                    is_complete = is_complete and place is None
                    counted = count_values_of(db, seqs, bucket)
            else:
                times = [since + index * step for index in range(count)] + [until]
                counted = _count_submitted(db, times) if column == "submitted" else _count_ended(db, times)
            for key, jobs in counted.items():
                index, _, name = key.partition(" ")
                if name == "submitted" or not states or name in states:
                    numbers[min(int(index), count - 1)][name] += jobs
    buckets = [Bucket(since + index * step, **dict(of_bucket)) for index, of_bucket in enumerate(numbers)]
    return JobStatistics(step, buckets, is_complete)


def _count_own(db: sqlite3.Connection, wanted: JobFilter, bucket: str, owners: Sequence[str]) -> dict[str, int]:
    """Return how many jobs of some owners have each value of `bucket`."""
    conditions = conditions_of(wanted, owners=owners)
    source = f"jobs INDEXED BY jobs_of_owner WHERE {conditions}"
    return dict(db.execute(f"SELECT {bucket}, count(*) FROM {source} GROUP BY 1", conditions.values))


def _count_submitted(db: sqlite3.Connection, times: Sequence[float]) -> dict[str, int]:
    """Return how many jobs were submitted between each two times, by their index."""
    counted = {}
    for index, (since, until) in enumerate(pairwise(times)):
        low, high = find_bounds(db, JobFilter(submitted=Span(since, until)))
        values = {"since": since, "until": until, "low": low, "high": high}
        [(counted[f"{index} submitted"],)] = db.execute(QUERIES["count_submitted"], values)
    return counted


def _count_ended(db: sqlite3.Connection, times: Sequence[float]) -> dict[str, int]:
    """Return how many jobs ended in each state between each two times, by their index."""
    counted = {}
    for index, (since, until) in enumerate(pairwise(times)):
        [numbers] = db.execute(QUERIES["count_ended"], {"since": since, "until": until})
        for state, number in zip(("returned", "raised", "failed", "cancelled"), numbers, strict=True):
            counted[f"{index} {state}"] = number
    return counted
