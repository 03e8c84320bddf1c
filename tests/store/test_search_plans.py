"""The SQLite plans of searches: each reads an index in order, as far as it has to, and never all jobs."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from harp.protocol.ends import Returned
from harp.protocol.json_text import Raw
from harpcaller.model.job_filters import BAD, NO_QUEUE, OPEN, JobFilter, Span
from harpcaller.model.jobs import ENDED, State, StopState
from harpcaller.store.sqlite.counting import FACETS, count_jobs, job_statistics
from harpcaller.store.sqlite.file import FILE_NAME, connect, prepare
from harpcaller.store.sqlite.finding import (
    ALL_JOBS,
    Range,
    Search,
    choose,
    conditions_of,
    cost,
    count_entries,
    ranges_of,
    ranges_of_owners,
)
from harpcaller.store.sqlite.searches import EXAMINED, find_jobs
from support.backends import BACKENDS
from support.jobs import new_job

TIME = Span(1000.0, 2000.0)
PARTS: dict[str, dict[str, Any]] = {
    "failed": {"states": frozenset({State.FAILED})},
    "bad": {"states": BAD},
    "open": {"states": OPEN},
    "queued": {"states": frozenset({State.QUEUED})},
    "returned": {"states": frozenset({State.RETURNED})},
    "ended": {"states": ENDED},
    "host": {"hosts": ("a",)},
    "hosts": {"hosts": tuple(f"host{number}" for number in range(30))},
    "pattern": {"host_pattern": "a*b"},
    "procedure": {"procedures": ("a", "b")},
    "owner": {"owners": ("a",)},
    "queue": {"queue": "0" * 32},
    "no queue": {"queue": NO_QUEUE},
    "submitted": {"submitted": TIME},
    "started": {"started": TIME},
    "ended in time": {"ended": TIME},
    "end type": {"end_types": ("timeout",)},
    "stop": {"stops": frozenset({StopState.FAILED, StopState.PENDING})},
    "slot": {"holds_slot": True},
    "info": {"info": "a"},
    "arguments": {"arguments": "\u00e4"},
    "text": {"text": ("a", "b")},
    "rerun of": {"rerun_of": "0" * 36},
    "id": {"id_start": "01234567"},
}
FILTERS = {
    " + ".join(names): JobFilter(**{key: value for name in names for key, value in PARTS[name].items()})
    for count in (0, 1, 2)
    for names in combinations(PARTS, count)
    if len({key for name in names for key in PARTS[name]}) == sum(len(PARTS[name]) for name in names)
}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    path = Path(tmp_path_factory.mktemp("plans")) / FILE_NAME
    prepare(path)
    with closing(connect(path)) as connection:
        yield connection


def plan_of(database: sqlite3.Connection, statement: str, values: dict[str, Any]) -> list[str]:
    given = {**values, "low": 0, "high": 9, "limit": 1, "offset": 0}
    return [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}", given)]


def is_scan(step: str) -> bool:
    return step.startswith("SCAN") and not step.startswith(("SCAN (", "SCAN CONSTANT"))


def test_every_part_of_a_filter_is_in_the_combinations() -> None:
    assert {name for part in PARTS.values() for name in part} == set(JobFilter.__struct_fields__)


def test_searches_read_an_index_in_order_for_any_two_parts(database: sqlite3.Connection) -> None:
    assert len(FILTERS) > 200
    for name, wanted in FILTERS.items():
        for looked_at in [*ranges_of(wanted), ALL_JOBS, ranges_of_owners(["a", "b"])]:
            if looked_at.entries:
                check_plans(database, name, wanted, looked_at)


def check_plans(database: sqlite3.Connection, name: str, wanted: JobFilter, looked_at: Range) -> None:
    search = Search.of(wanted, looked_at, None)
    where = f"{name}, by {looked_at.name}"
    for newest_first in (False, True):
        entries = plan_of(database, looked_at.select("seq", newest_first), search.values)
        found = plan_of(database, search.select(newest_first), search.values)
        checked = plan_of(database, search.select_checked(newest_first), search.values)
        for plan in (entries, found, checked):
            assert not any(map(is_scan, plan)), (where, plan)
            if looked_at.is_ordered:
                assert not any("TEMP B-TREE" in step for step in plan), (where, plan)
        if looked_at is not ALL_JOBS:
            assert all("USING COVERING INDEX" in step for step in entries if "SEARCH" in step), (where, entries)
            if cost(looked_at, search.conditions) == 1:
                assert not any("SEARCH jobs USING INTEGER PRIMARY KEY" in step for step in found), (where, found)
    values = plan_of(database, search.select_values("jobs.host"), search.values)
    counted = plan_of(database, count_entries(looked_at), search.values)
    assert not any(map(is_scan, [*values, *counted])), (where, values, counted)
    assert not any("TEMP B-TREE" in step for step in counted), (where, counted)


@pytest.mark.parametrize(
    ("parts", "counts", "chosen"),
    [
        ([], {}, "jobs"),
        (["id", "host"], {"id": 3, "host": 10}, "id"),
        (["id", "host"], {"id": 99_999, "host": 99_999}, "host"),
        (["ended in time"], {"ended": 99_999}, "jobs"),
        (["ended in time"], {"ended": 9000}, "ended"),
        (["open"], {"states": 99_999}, "states"),
        (["queued", "queue"], {"states": 99_999, "open_of_queue": 9000, "queue": 99_999}, "open_of_queue"),
        (["failed", "host"], {"states": 15_000, "host": 5000}, "states"),
        (["failed", "host"], {"states": 15_000, "host": 50}, "host"),
        (["failed", "owner"], {"states": 15_000, "owner": 99_999}, "states"),
        (["returned", "host"], {"host": 5000}, "host"),
        (["host", "procedure"], {"host": 99_999, "procedure": 1000}, "procedure"),
        (["host", "owner"], {"host": 1600, "owner": 300}, "owner"),
        (["hosts", "owner"], {"owner": 99_999}, "owner"),
        (["hosts"], {}, "jobs"),
        (["end type"], {"states": 40_000}, "states"),
        (["stop", "slot"], {"holding": 10, "stop": 20}, "holding"),
        (["rerun of", "text"], {"rerun_of": 1}, "rerun_of"),
    ],
)
def test_the_index_with_the_least_cost_is_read(parts: list[str], counts: dict[str, int], chosen: str) -> None:
    wanted = JobFilter(**{key: value for name in parts for key, value in PARTS[name].items()})

    def cost_of(looked_at: Range) -> int:
        return cost(looked_at, conditions_of(wanted, looked_at.entries[0].has_calls))

    found, limit = choose(ranges_of(wanted), cost_of, lambda each, most: min(most, counts[each.name]), EXAMINED)
    assert found.name == chosen
    assert limit == EXAMINED // cost_of(found)


async def test_a_page_costs_the_same_whatever_the_number_of_jobs(tmp_path: Path) -> None:
    few, many = await instructions(tmp_path / "few", 200), await instructions(tmp_path / "many", 2000)
    assert set(few) == set(many)
    for name, count in many.items():
        # The jobs of others do not even show in the time of an owner's search.
        assert count < (few[name] + 400 if name.startswith("own: ") else few[name] * 1.5 + 5000), name


async def instructions(directory: Path, count: int) -> dict[str, int]:
    """Return the number of SQLite instructions of some verbs that may look at 100 entries."""
    store = await BACKENDS["sqlite"](directory)
    jobs = [new_job(f"host{number % 3}", procedure=f"p{number % 2}", owner="a") for number in range(count)]
    await store.add_jobs(jobs, 1000.0)
    for job in await store.claim_jobs(1000.0, count, count):
        await store.finish_job(job.id, Returned(Raw(b"1")), 1000.5)
    await store.close()
    number = 0

    def step() -> None:
        nonlocal number
        number += 1

    found: dict[str, int] = {}

    def measure(name: str, verb: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        nonlocal number
        number = 0
        connection.set_progress_handler(step, 100)
        verb(connection, *arguments, **options)
        connection.set_progress_handler(None, 0)
        found[name] = 100 * number

    with closing(connect(directory / FILE_NAME)) as connection:
        for name in ("host", "procedure", "owner", "returned", "text", "ended in time", "id"):
            for other in ("pattern", "started", "arguments"):
                wanted = replace(JobFilter(**PARTS[name]), **PARTS[other])
                measure(f"{name} + {other}", find_jobs, wanted, examine=100)
        measure("counts", count_jobs, JobFilter(hosts=("host1",)), list(FACETS), most=100)
        for name, part in PARTS.items():
            measure(f"own: {name}", find_jobs, JobFilter(**part), owners=["b"])
        measure("own: counts", count_jobs, JobFilter(), list(FACETS), owners=["b"])
        measure("own: statistics", job_statistics, 900.0, 1100.0, 10.0, owners=["b"])
        measure("statistics", job_statistics, 2000.0, 3000.0, 10.0)
    return found
