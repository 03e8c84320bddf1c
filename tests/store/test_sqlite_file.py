"""The file of the SQLite store: ownership, mode, schema, size, and the cost of its statements."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import TRANSITIONS, JobMetadata, Records, State, StopState
from harpcaller.store import StorageError
from harpcaller.store.sqlite import FILE_NAME, Store, file, open_store, reads
from harpcaller.store.sqlite.file import MIGRATIONS, QUERIES, connect
from harpcaller.store.sqlite.reserve import RESERVE_NAME
from harpcaller.store.sqlite.writes import Writes
from support.jobs import ENDS, claimed, job_in, new_id, new_job, records


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(tmp_path)
    yield opened
    await opened.close()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[sqlite3.Connection]:
    """Return a connection to the file of a closed store."""
    await (await open_store(tmp_path)).close()
    with closing(connect(tmp_path / FILE_NAME)) as connection:
        yield connection


# Ownership


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
async def test_store_file_new_is_private_to_its_user(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = await open_store(tmp_path / "made" / "store")
        await store.add_job(new_job(), 1.0)
        files = {path.name: mode(path) for path in (tmp_path / "made" / "store").iterdir()}
        await store.close()
    finally:
        os.umask(before)
    assert mode(tmp_path / "made" / "store") == 0o700
    assert files == dict.fromkeys((FILE_NAME, FILE_NAME + "-wal", FILE_NAME + "-shm", RESERVE_NAME), 0o600)


async def test_existing_directory_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    await (await open_store(tmp_path)).close()
    (tmp_path / FILE_NAME).chmod(0o644)
    await (await open_store(tmp_path)).close()
    assert (mode(tmp_path), mode(tmp_path / FILE_NAME)) == (0o755, 0o600)


async def test_open_store_twice_raises(tmp_path: Path, store: Store) -> None:
    with pytest.raises(StorageError, match=rf"{FILE_NAME}: another dispatcher uses it"):
        await open_store(tmp_path)
    await store.add_job(new_job(), 1.0)
    await store.close()
    await (await open_store(tmp_path)).close()


async def test_close_leaves_a_file_no_thread_no_descriptor(tmp_path: Path) -> None:
    await (await open_store(tmp_path)).close()  # starts the loop's own threads
    before = set(os.listdir("/proc/self/fd"))
    store = await open_store(tmp_path)
    await store.add_job(new_job(), 1.0)
    await asyncio.gather(*(store.list_jobs() for _ in range(20)))
    await store.close()
    assert set(os.listdir("/proc/self/fd")) <= before
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("store")] == []
    assert {path.name for path in tmp_path.iterdir()} == {FILE_NAME, RESERVE_NAME}


FOREIGN = {
    "text": b"hosts: none\n" * 20,
    "short": b"x",
    "an Erlang table": b"\x00\x00\x10\x00" + bytes(5000),
}


@pytest.mark.parametrize("name", FOREIGN)
async def test_foreign_file_is_not_touched(tmp_path: Path, name: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(FOREIGN[name])
    path.chmod(0o644)
    with pytest.raises(StorageError, match=rf"{FILE_NAME}: not a store of harpcallerd; move it away"):
        await open_store(tmp_path)
    assert (path.read_bytes(), mode(path)) == (FOREIGN[name], 0o644)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


async def test_foreign_database_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE jobs (id); INSERT INTO jobs VALUES (1);")
    before = path.read_bytes()
    with pytest.raises(StorageError, match="not a store of harpcallerd"):
        await open_store(tmp_path)
    assert path.read_bytes() == before


async def test_newer_schema_is_not_touched(tmp_path: Path, database: sqlite3.Connection) -> None:
    newest = max(MIGRATIONS)
    database.execute("INSERT INTO schema_version VALUES (?)", (newest + 1,))
    database.close()
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(StorageError, match=rf"schema version {newest + 1} is newer than {newest}.*newer harpcallerd"):
        await open_store(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


async def test_empty_file_and_files_of_a_crash_are_replaced(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    (tmp_path / (FILE_NAME + ".new")).write_bytes(b"half a file")
    (tmp_path / (FILE_NAME + ".new-journal")).write_bytes(b"half a journal")
    store = await open_store(tmp_path)
    await store.add_job(new_job(), 1.0)
    await store.close()
    assert {path.name for path in tmp_path.iterdir()} == {FILE_NAME, RESERVE_NAME}


async def test_unusable_directory_raises_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"/file: "):
        await open_store(tmp_path / "file")
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(StorageError, match=rf"{FILE_NAME}: Is a directory"):
        await open_store(tmp_path)


async def test_copy_made_by_sqlite_opens_as_a_store(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "store")
    job_id = await job_in(store, State.RUNNING, queue={})
    with closing(connect(tmp_path / "store" / FILE_NAME)) as connection:
        (tmp_path / "copy").mkdir()
        connection.execute("VACUUM INTO ?", (str(tmp_path / "copy" / FILE_NAME),))
    await store.close()
    store = await open_store(tmp_path / "copy")
    assert (await store.get_job(job_id)).state is State.RUNNING
    with closing(connect(tmp_path / "copy" / FILE_NAME)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
        assert connection.execute("PRAGMA auto_vacuum").fetchall() == [(2,)], "incremental"
    await store.close()


# The schema


async def test_migrations_are_applied_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(MIGRATIONS) == list(range(1, len(MIGRATIONS) + 1))
    store = await open_store(tmp_path)
    job_id = await job_in(store, State.RETURNED)
    await store.close()
    number = max(MIGRATIONS) + 1
    later = {number: "CREATE TABLE a (x); CREATE TRIGGER t AFTER INSERT ON a BEGIN SELECT 1; END;"}
    monkeypatch.setattr(file, "MIGRATIONS", {**MIGRATIONS, **later, number + 1: "ALTER TABLE a ADD COLUMN y;"})
    store = await open_store(tmp_path)
    assert (await store.get_job(job_id)).state is State.RETURNED
    await store.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        assert [row[1] for row in connection.execute("PRAGMA table_info(a)")] == ["x", "y"]
        versions = connection.execute("SELECT version FROM schema_version ORDER BY version").fetchall()
    assert versions == [(version,) for version in range(1, number + 2)]


async def test_failed_migration_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await (await open_store(tmp_path)).close()
    with monkeypatch.context() as patch:
        number = max(MIGRATIONS) + 1
        patch.setattr(file, "MIGRATIONS", {**MIGRATIONS, number: "CREATE TABLE a (x); INSERT INTO nowhere VALUES (1);"})
        with pytest.raises(StorageError, match="nowhere"):
            await open_store(tmp_path)
    store = await open_store(tmp_path)
    await store.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'a'").fetchall() == []


def insert(database: sqlite3.Connection, state: State) -> str:
    """Insert a job in this state that passes the checks of the table; return its id."""
    job_id = new_id()
    started = None if state in (State.QUEUED, State.CANCELLED) else 2.0
    ended = 3.0 if not TRANSITIONS[state] else None
    database.execute(
        "INSERT INTO jobs (id, lane, host, state, submitted, started, ended, holds_slot) "
        "VALUES (?, 'lane', x'', ?, 1.0, ?, ?, ?)",
        (job_id, state, started, ended, state is State.RUNNING),
    )
    return job_id


@pytest.mark.parametrize(("before", "after"), list(product(State, State)))
def test_schema_allows_exactly_the_transitions(database: sqlite3.Connection, before: State, after: State) -> None:
    job_id = insert(database, before)
    ended = 4.0 if not TRANSITIONS[after] else None
    started = 2.0 if after is State.RUNNING else None
    kept = "NULL" if after is State.QUEUED else "started"
    change = f"UPDATE jobs SET state = ?, started = coalesce(?, {kept}), ended = ?, holds_slot = ? WHERE id = ?"
    changed = (after, started, ended, after is State.RUNNING, job_id)
    if after in TRANSITIONS[before]:
        database.execute(change, changed)
    else:
        with pytest.raises(sqlite3.IntegrityError, match="no such transition"):
            database.execute(change, changed)


@pytest.mark.parametrize(
    ("state", "started", "ended"),
    [
        ("lost", None, None),
        *((state, 2.0, None) for state in State if not TRANSITIONS[state]),
        *((state, 2.0, 3.0) for state in State if TRANSITIONS[state]),
        ("queued", 2.0, None),
        ("running", None, None),
        ("returned", None, 3.0),
        ("raised", None, 3.0),
    ],
)
def test_schema_rejects_inconsistent_rows(
    database: sqlite3.Connection, state: str, started: float | None, ended: float | None
) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        database.execute(
            "INSERT INTO jobs (id, lane, host, state, submitted, started, ended, holds_slot) "
            "VALUES ('x', 'l', x'', ?, 1.0, ?, ?, ?)",
            (state, started, ended, state == "running"),
        )


@pytest.mark.parametrize(
    ("state", "change"),
    [
        (State.QUEUED, "holds_slot = 1"),
        (State.CANCELLED, "holds_slot = 1"),  # without having started
        (State.RUNNING, "holds_slot = 0"),
        (State.RUNNING, "holds_slot = 2"),
        (State.RETURNED, "holds_slot = NULL"),
        (State.QUEUED, "stop = 'pending'"),
        (State.CANCELLED, "stop = 'pending'"),
        (State.RUNNING, "stop = 'pending'"),
        (State.FAILED, "stop = 'perhaps'"),
        (State.FAILED, "stop = ''"),
    ],
)
def test_schema_rejects_inconsistent_slots_and_stops(database: sqlite3.Connection, state: State, change: str) -> None:
    job_id = insert(database, state)
    with pytest.raises(sqlite3.IntegrityError, match=r"CHECK|NOT NULL|holds a slot"):
        database.execute(f"UPDATE jobs SET {change} WHERE id = ?", (job_id,))


def test_schema_rejects_a_running_job_without_a_slot(database: sqlite3.Connection) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="holds a slot"):
        database.execute(
            "INSERT INTO jobs (id, lane, host, state, submitted, started) VALUES ('x', 'l', x'', 'running', 1.0, 2.0)"
        )
    job_id = insert(database, State.QUEUED)
    with pytest.raises(sqlite3.IntegrityError, match="holds a slot"):
        database.execute("UPDATE jobs SET state = 'running', started = 2.0 WHERE id = ?", (job_id,))


@pytest.mark.parametrize("stop", list(StopState))
def test_schema_accepts_every_stop_state(database: sqlite3.Connection, stop: StopState) -> None:
    job_id = insert(database, State.FAILED)
    database.execute("UPDATE jobs SET stop = ?, holds_slot = 1 WHERE id = ?", (stop, job_id))


def test_schema_rejects_a_second_identity(database: sqlite3.Connection) -> None:
    for singleton in (1, 2):
        with pytest.raises(sqlite3.IntegrityError):
            database.execute("INSERT INTO identity (singleton, owner, key) VALUES (?, 'another', x'00')", (singleton,))


async def test_missing_identity_is_created_at_opening(tmp_path: Path, database: sqlite3.Connection) -> None:
    database.execute("DELETE FROM identity")
    database.close()
    store = await open_store(tmp_path)
    assert len((await store.get_identity()).key) == 32
    await store.close()


#: The statements of lists, whose names reads.py builds.
LISTS = {
    f"{way}{which}{of}"
    for way in ("list_jobs", "list_newest")
    for which in ("", "_not_ended")
    for of in ("", "_of_host", "_of_lane")
}


def test_queries_sql_every_statement_is_used() -> None:
    package = Path(file.__file__).parent
    code = "".join(module.read_text() for module in package.glob("*.py"))
    assert {name for name in QUERIES if f'QUERIES["{name}"]' not in code} == LISTS


# Cost


class Anything(dict[str, int]):
    """A mapping with a value for every parameter."""

    def __missing__(self, key: str) -> int:
        return 1


def test_new_job_needs_no_list_and_no_trigger(database: sqlite3.Connection) -> None:
    steps = [row[1] for row in database.execute("EXPLAIN " + QUERIES["add_job"], (1,) * 9)]
    assert "Insert" in steps
    assert steps.count("OpenEphemeral") == 1  # for `stop`, which no new job has
    assert "Program" not in steps


@pytest.mark.parametrize(
    ("state", "started", "ended", "holds_slot"),
    [("bad", None, None, 0), ("queued", 1.0, None, 0), ("running", 1.0, None, 0), ("returned", None, 2.0, 0)],
)
def test_file_rejects_job_in_impossible_state(
    database: sqlite3.Connection, state: str, started: float | None, ended: float | None, holds_slot: int
) -> None:
    columns = "id, lane, host, state, submitted, started, ended, holds_slot"
    insert = f"INSERT INTO jobs ({columns}) VALUES (?, 'l', 'h', ?, 0, ?, ?, ?)"
    database.execute(insert, ("a", "running", 1.0, None, 1))
    with pytest.raises(sqlite3.IntegrityError, match="CHECK constraint failed"):
        database.execute(insert, ("b", state, started, ended, holds_slot))
    with pytest.raises(sqlite3.IntegrityError, match="CHECK constraint failed"):
        database.execute("UPDATE jobs SET holds_slot = 0")
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("name", QUERIES)
def test_statement_plan_does_not_scan_ended_jobs(database: sqlite3.Connection, name: str) -> None:
    given = (1,) * QUERIES[name].count("?") or Anything()
    plan = [row[3] for row in database.execute("EXPLAIN QUERY PLAN " + QUERIES[name], given)]
    of_few = (
        "jobs_queued",
        "jobs_queued_of_lane",
        "jobs_holding",
        "queues",
        "identity",
        "staged_jobs",
        "calls_with_secrets",
        "submission_times",
        "sqlite_autoindex_queues_1",
        "holding",
        "others",
        "own",
        "own_queues",
        "counted",
        "ends",
    )
    # These count the entries of an index, of which many are on a page; the answers are kept for some time.
    of_all = ("jobs_of_owner",) if name in ("count_states", "count_stored") else ()
    for step in plan:
        if step.startswith("SCAN"):
            assert step.split()[-1] in (*of_few, *of_all) or "CONSTANT ROW" in step, plan


@pytest.mark.parametrize("name", sorted(LISTS))
def test_list_statement_reads_an_index_in_order(database: sqlite3.Connection, name: str) -> None:
    plan = [row[3] for row in database.execute("EXPLAIN QUERY PLAN " + QUERIES[name], Anything())]
    assert not [step for step in plan if "TEMP B-TREE" in step or "SCAN" in step], plan
    indexes = {
        "": {"PRIMARY KEY (rowid"},
        "_of_host": {"INDEX jobs_of_host (host=? AND rowid"},
        "_of_lane": {"INDEX jobs_of_queue (lane=? AND rowid"},
        "_not_ended": {"COVERING INDEX jobs_queued (seq", "COVERING INDEX jobs_holding (seq"},
        "_not_ended_of_host": {"COVERING INDEX jobs_queued (seq", "COVERING INDEX jobs_holding (seq"},
        "_not_ended_of_lane": {
            "COVERING INDEX jobs_queued_of_lane (lane=? AND state=? AND seq",
            "COVERING INDEX jobs_holding (seq",
        },
    }
    beyond = "<" if name.startswith("list_newest") else ">"
    for index in indexes[name.removeprefix("list_newest").removeprefix("list_jobs")]:
        assert any(f"{index}{beyond}?)" in step for step in plan), plan


async def instructions_of_lists(directory: Path, old: int) -> dict[str, int]:
    """Return the number of SQLite instructions of each list, with this number of ended jobs of one host and queue."""
    store = await open_store(directory)
    options: list[dict[str, Any]] = [{}]
    for name in ("first", "many", "last", "none"):
        queue = Raw(b'{"q":"%s"}' % name.encode())
        await store.add_jobs([new_job(name, queue) for _ in range({"many": old, "none": 0}.get(name, 30))], 1.0)
        await store.cancel_queue(queue, 2.0, limit=old)
        options += [{"host": name}, {"queue": queue}]
    await store.add_jobs([new_job("first", {"q": "first"}) for _ in range(5)], 3.0)
    await store.close()
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    found = {}
    with closing(connect(directory / FILE_NAME)) as connection:
        connection.set_progress_handler(step, 1)
        for of in options:
            for ended, newest_first in product((False, True), repeat=2):
                count = 0
                wanted = {"host": None, "queue": None, **of}
                reads.list_jobs(connection, ended=ended, newest_first=newest_first, after=None, limit=10, **wanted)
                found[f"{of} {ended=} {newest_first=}"] = count
        connection.set_progress_handler(None, 0)
    return found


async def test_list_cost_does_not_depend_on_ended_jobs(tmp_path: Path) -> None:
    few = await instructions_of_lists(tmp_path / "few", 30)
    many = await instructions_of_lists(tmp_path / "many", 3_000)
    assert many == few


async def instructions_of_a_claim(directory: Path, waiting: int) -> int:
    """Return the number of SQLite instructions of a claim of one job, with this number of queued jobs in ten lanes."""
    store = await open_store(directory)
    hosts = [f"host{n}" for n in range(5)]
    queues = [None] * 5 + [{"q": n} for n in range(5)]
    jobs = [new_job(hosts[n % 5], queues[n % 10]) for n in range(waiting)]
    await asyncio.gather(*(store.add_job(job, 1.0) for job in jobs))
    await store.claim_jobs(1.0, 20, 2)
    await store.close()
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    with closing(connect(directory / FILE_NAME)) as connection:
        writes = Writes(connection)
        writes.begin_transaction()  # reads the queued jobs
        connection.set_progress_handler(step, 1)
        assert len(writes.claim_jobs(1.0, 1, 3)) == 1
        connection.set_progress_handler(None, 0)
    return count


async def test_claim_cost_does_not_depend_on_queued_jobs(tmp_path: Path) -> None:
    few = await instructions_of_a_claim(tmp_path / "few", 50)
    many = await instructions_of_a_claim(tmp_path / "many", 20_000)
    assert many < few * 1.5


def test_queue_position_is_counted_in_covering_indexes(database: sqlite3.Connection) -> None:
    plan = [row[3] for row in database.execute("EXPLAIN QUERY PLAN " + QUERIES["queue_position"], Anything())]
    for index in ("jobs_queued_of_lane", "jobs_holding"):
        assert any(f"COVERING INDEX {index}" in step for step in plan), plan


async def test_append_records_with_small_records_shares_rows(tmp_path: Path, store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    for n in range(500):
        await store.append_records(job_id, n, records([b'"x"'], made=float(n)))
    await store.append_records(job_id, 500, records([b'"xxxxxxxxx"'] * 50_000))
    with closing(connect(tmp_path / FILE_NAME, query_only=True)) as connection:
        [(rows,)] = connection.execute("SELECT count(*) FROM records").fetchall()
    assert rows < 15


async def test_record_timestamps_take_little_space(tmp_path: Path, store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    values = [Raw(b'"x"')] * 50_000
    await store.append_records(job_id, 0, Records(values, [float(n // 1000) for n in range(50_000)]))
    await store.append_records(job_id, 50_000, Records(values, [float(n) for n in range(50_000)]))
    with closing(connect(tmp_path / FILE_NAME, query_only=True)) as connection:
        few = "SELECT sum(length(timestamps)) FROM records WHERE first < 50000"
        assert connection.execute(few).fetchone()[0] <= (50 + 4) * 12
        [(longest,)] = connection.execute("SELECT max(length(bytes) + length(timestamps)) FROM records").fetchall()
        assert longest < 2 * 65536, "the timestamps count for the size of a chunk"


async def test_small_job_takes_less_than_1000_bytes(tmp_path: Path) -> None:
    metadata = JobMetadata(call=Raw(b'{"x":"' + b"c" * 100 + b'"}'), exit_info=Raw(b'{"x":"' + b"e" * 140 + b'"}'))
    store = await open_store(tmp_path)
    jobs = [new_job(f"host{n % 8}.example.org", {"q": n % 8} if n % 2 else None, 2000) for n in range(2000)]
    await asyncio.gather(*(store.add_job(job, 1.0) for job in jobs))
    for job_id in await claimed(store, limit=2000):
        await store.finish_job(job_id, Returned(Raw(b'{"changed":true}')), 2.0, metadata=metadata)
    await store.close()
    assert (tmp_path / FILE_NAME).stat().st_size / len(jobs) < 1000


async def test_state_change_does_not_rewrite_payloads(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    text = Raw(b'["' + b"x" * 3_000_000 + b'"]')
    job = new_job(arguments=text)
    await store.add_job(job, 1.0)
    log = tmp_path / (FILE_NAME + "-wal")
    before = log.stat().st_size
    await store.claim_jobs(1.0, 1, 1)
    for n in range(20):
        await store.append_records(job.id, n, records([b"1"]))
    await store.finish_job(job.id, ENDS[State.RETURNED], 1.0)
    assert 0 < log.stat().st_size - before < len(text) / 2
    await store.close()


async def test_write_ahead_log_after_a_burst_is_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "LOG_BYTES", 8 * 1024 * 1024)
    store = await open_store(tmp_path)
    log = tmp_path / (FILE_NAME + "-wal")
    text = Raw(b'["' + b"x" * 2_000_000 + b'"]')
    await asyncio.gather(*(store.add_job(new_job(arguments=text), 1.0) for _ in range(10)))
    assert log.stat().st_size > 2 * file.LOG_BYTES
    await store.add_job(new_job(), 1.0)
    assert log.stat().st_size == file.LOG_BYTES
    await store.close()


async def test_prune_jobs_makes_the_file_shorter(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    path = tmp_path / FILE_NAME
    for _ in range(100):
        job_id = await job_in(store, State.RUNNING)
        await store.append_records(job_id, 0, records([b'"' + b"r" * 50_000 + b'"']))
        await store.finish_job(job_id, Returned(Raw(b'"' + b"x" * 50_000 + b'"')), 1.0)
    recent = await job_in(store, State.RETURNED, now=50.0)
    full = path.stat().st_size
    assert await store.prune_jobs(10.0, 1000) == 100
    assert path.stat().st_size < full / 10
    assert (await store.get_job(recent)).state is State.RETURNED
    await store.close()


async def test_prune_jobs_deletes_records_orphaned_by_a_crash(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    job_id = await job_in(store, State.RUNNING)
    await store.append_records(job_id, 0, records([b"1"]))
    await store.finish_job(job_id, ENDS[State.RETURNED], 1.0, metadata=JobMetadata(call=Raw(b"{}")))
    await store.close()
    with closing(connect(tmp_path / FILE_NAME)) as connection:
        assert Writes(connection).delete_jobs(10.0, 10) == 1
    store = await open_store(tmp_path)
    assert await store.prune_jobs(0.0, 10) == 0
    await store.close()
    with closing(connect(tmp_path / FILE_NAME)) as connection:
        for table in ("jobs", "calls", "outcomes", "records", "orphaned_records", "queues"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchall() == [(0,)], table
