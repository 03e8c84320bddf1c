"""The measurements of a full store and of many hosts: the store is as a real one, and so are the simulated hosts."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import harp
from bench import filling
from bench.ours import PROCEDURES
from bench.simulated import address_of
from bench.simulation import HOST, dispatcher_on_simulated_hosts, host_name, simulated_hosts
from bench.works import Row
from harpcaller.model.ids import new_job_id
from harpcaller.store.sqlite.file import FILE_NAME
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd

COPIES = 3
JOBS = COPIES * filling.TEMPLATES


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with some jobs that really ran, and copies of them."""
    return filling.full_store(tmp_path_factory.mktemp("stores"), PROCEDURES.read_text(), JOBS)


@pytest.fixture
def database(store: Path) -> Iterator[sqlite3.Connection]:
    """The store's file."""
    with closing(sqlite3.connect(f"file:{store / FILE_NAME}?mode=ro", uri=True)) as db:
        yield db


def rows_of(db: sqlite3.Connection, place: int) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables that belong to the job at this place, by column."""
    found = {}
    for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})").fetchall()]
        key = "seq" if table == "jobs" else "job"
        if key in columns:
            rows = db.execute(f"SELECT * FROM {table} WHERE {key} = ?", (place,)).fetchall()
            found[table] = [dict(zip(columns, row, strict=True)) for row in rows]
    return found


def test_copies_are_as_the_jobs_that_ran(database: sqlite3.Connection) -> None:
    own = {"seq", "job", "id", "submitted", "started", "ended"}
    for place in range(1, filling.TEMPLATES + 1):
        ran = rows_of(database, place)
        assert {"jobs", "calls", "ends", "records", "job_metadata"} <= {table for table, rows in ran.items() if rows}
        for number in range(1, COPIES):
            copy = rows_of(database, place + number * filling.TEMPLATES)
            assert copy.keys() == ran.keys()
            for table, rows in ran.items():
                assert len(copy[table]) == len(rows)
                for theirs, mine in zip(rows, copy[table], strict=True):
                    assert {name: type(value) for name, value in mine.items()} == {
                        name: type(value) for name, value in theirs.items()
                    }
                    assert {name: mine[name] for name in mine.keys() - own} == {
                        name: theirs[name] for name in theirs.keys() - own
                    }
            [job], [original] = copy["jobs"], ran["jobs"]
            assert len(job["id"]) == len(original["id"])
            assert str(uuid.UUID(job["id"])) == job["id"]
            assert job["id"][:19] == new_job_id(job["submitted"])[:19], "in the order of their times"
            assert job["ended"] - job["started"] == pytest.approx(original["ended"] - original["started"], abs=0.001)
            assert job["ended"] > original["ended"]


def test_every_row_of_the_store_belongs_to_a_job_that_there_is(database: sqlite3.Connection) -> None:
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    assert database.execute("SELECT count(*), count(DISTINCT id) FROM jobs").fetchall() == [(JOBS, JOBS)]
    assert database.execute("SELECT sum(records) FROM jobs").fetchall() == [(JOBS * filling.RECORDS,)]
    # A table that is new to the schema and knows jobs by another name would be left out: then this has to be told.
    known = {"schema_version", "sqlite_sequence", "lanes", "orphaned_records", "identity"}
    tables = {table for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()}
    per_job = {table for table, rows in rows_of(database, 1).items() if rows}
    assert tables - known == per_job


def test_a_dispatcher_answers_for_copies_as_for_the_jobs_that_ran(store: Path, tmp_path: Path) -> None:
    filling.copied(store, tmp_path / "jobs")
    with Harpcallerd(tmp_path) as dispatcher:
        listed = dispatcher.listed("list", "--all", "--queue")
        assert len(listed) == JOBS
        assert {job["call"]["host"] for job in listed} == set(filling.HOSTS)
        queues = Counter(json.dumps(job["queue"]) for job in listed)
        assert queues.keys() == {"null", *map(json.dumps, filling.QUEUES)}
        for job in (listed[0], listed[-filling.TEMPLATES]):
            assert dispatcher.ask(get_result=job["job"], wait=False) == [{"result": None}]
            *records, end = dispatcher.ask(read_stream=job["job"])
            assert [record["data"]["number"] for record in records] == list(range(filling.RECORDS))
            assert end == {"result": None}
        details = [dispatcher.ask(get_details=job["job"])[0]["details"] for job in (listed[0], listed[-50])]
        assert details[0].keys() == details[1].keys()
        assert details[0]["state"] == details[1]["state"] == "returned"


def test_a_store_is_made_once_and_a_part_of_one_counts_for_nothing(store: Path) -> None:
    made = (store / FILE_NAME).stat().st_mtime_ns
    left = store.parent.with_name(f"{store.parent.name}.new")
    left.mkdir()
    assert filling.full_store(store.parents[1], "no procedures", JOBS) == store
    assert (store / FILE_NAME).stat().st_mtime_ns == made
    left.rmdir()


def test_a_store_whose_jobs_are_not_the_first_is_not_multiplied(store: Path, tmp_path: Path) -> None:
    filling.copied(store, tmp_path / "jobs")
    file = tmp_path / "jobs" / FILE_NAME
    with closing(sqlite3.connect(file)) as db:
        db.execute("DELETE FROM jobs WHERE seq = 7")
        db.commit()
    with pytest.raises(ValueError, match="without a gap"):
        filling.multiply(file, 2)


def test_queued_jobs_wait_until_their_dispatcher_starts(store: Path, tmp_path: Path) -> None:
    queued = filling.queued_store(tmp_path, store, HOST, 12)
    with closing(sqlite3.connect(f"file:{queued / FILE_NAME}?mode=ro", uri=True)) as db:
        states = dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
    assert states == {"returned": JOBS, "queued": 12}
    filling.copied(queued, tmp_path / "jobs")
    with simulated_hosts(tmp_path, 1) as simulated:
        with dispatcher_on_simulated_hosts(tmp_path, simulated, [HOST]) as dispatcher:
            wait_until(lambda: not dispatcher.listed("list"), 30, "the queued jobs' ends")
            listed = dispatcher.listed("list", "--all")[-12:]
            assert [dispatcher.ask(get_result=job["job"]) for job in listed] == [[{"result": at}] for at in range(12)]


@pytest.mark.parametrize("kept", [True, False])
def test_simulated_hosts_are_as_real_ones_to_a_dispatcher(tmp_path: Path, kept: bool) -> None:
    with simulated_hosts(tmp_path, 3) as simulated:
        assert [address for address, _ in simulated["places"]] == [address_of(number) for number in range(3)]
        names = [host_name(number) for number in range(3)]
        with dispatcher_on_simulated_hosts(tmp_path, simulated, names, kept_calls=kept) as dispatcher:
            rpc = harp.HarpCaller("127.0.0.1", dispatcher.port)
            assert [rpc.host(name).echo(name).get() for name in names] == names
            together = [rpc.host(name).gather(6) for name in names * 2]
            assert [job.get() for job in together] == [None] * 6
            watched = rpc.host(names[0]).watch()
            assert next(iter(watched.follow(since=0))) == "about to wait"
            assert watched.cancel(wait=kept)
            with pytest.raises(harp.RemoteError, match="fly"):
                rpc.host(names[0]).fly().get()
            stop = dispatcher.ask(get_details=watched.id())[0]["details"]
            if kept:
                assert (stop["stop"], stop["stop_report"]["complete"]) == ("confirmed", True)


def test_addresses_of_many_hosts_differ() -> None:
    addresses = [address_of(number) for number in range(1000)]
    assert len(set(addresses)) == 1000
    assert all(address.startswith("127.0.") and not address.endswith((".0", ".255")) for address in addresses)


def test_a_series_has_all_its_values_in_order() -> None:
    row = Row("row", "A row", "slice", series=True)
    assert row.values({"slice-1": 2.0, "slice-0": 1.0, "slice-2": 3.0, "rate": 9.0}) == [1.0, 2.0, 3.0]
    assert Row("row", "A row").values({"rate": 9.0}) == [9.0]
