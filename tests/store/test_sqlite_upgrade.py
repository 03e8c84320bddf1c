"""Upgrade of a store of an earlier schema."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Cancelled, Failed, Raised, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.job_filters import BAD, JobFilter, Span
from harpcaller.model.jobs import ENDED, NO_METADATA, Job, JobMetadata, Records, State, StopState
from harpcaller.model.lanes import canonical
from harpcaller.store import QueueStatus
from harpcaller.store.sqlite import FILE_NAME, Store, open_store
from harpcaller.store.sqlite.file import MIGRATIONS, QUERIES, connect
from support.jobs import added, claimed, new_job, records

VERSION_1 = Path(__file__).with_name("version1.sql")

QUEUE = Raw(b'{"db":"prod"}')

# The facts of jobs in schemas 2 and 3: call, contact, stopped, receipt, evidence. The last job has only a contact.
OLD_FACTS: dict[int, tuple[bytes | None, ...]] = {
    1: (
        b'{"address":"\\"kept\\":","attempts":1,"connecting":0.25,"kept":true,"warden":"ab\\ud800"}',
        b'{"since":1.5}',
        None,
        None,
        b'{"exit":0,"memory":100000000000000000000,"stderr":["\\"lost\\": 1"]}',
    ),
    3: (None, None, b'{"why":"limit","by":"dispatcher","at":1.50}', b'{"lost":{"since":1.5,"boot":"x"}}', None),
    6: (b"null", None, b'{"why":"cancelled"}', b'{"held":false}', None),
    7: (None, b'{"since":1.5}', None, None, None),
}
METADATA = {
    1: JobMetadata(
        call=Raw(
            b'{"address":"\\"kept\\":","attempts":1,"connect_seconds":0.25,"resumable":true,"instance":"ab\\ud800"}'
        ),
        exit_info=Raw(b'{"exit":0,"memory":100000000000000000000,"stderr":["\\"lost\\": 1"]}'),
    ),
    3: JobMetadata(
        stop_request=Raw(b'{"why":"limit","by":"dispatcher","at":1.50}'),
        stop_report=Raw(b'{"host_lost":{"since":1.5,"boot":"x"}}'),
    ),
    6: JobMetadata(call=Raw(b"null"), stop_request=Raw(b'{"why":"cancelled"}'), stop_report=Raw(b'{"known":false}')),
}


def number(job: Job) -> int:
    return int(job.id[-12:])


def job_id(n: int) -> str:
    return f"00000000-0000-4000-8000-{n:012}"


def write_version(version: int, directory: Path) -> None:
    """Write a store of this schema: the jobs of schema 1, upgraded, with facts from schema 2 on."""
    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute(f"PRAGMA application_id = {int.from_bytes(b'HARP', 'big')}")
        connection.executescript(VERSION_1.read_text())
        for step in [each for each in MIGRATIONS if 1 < each <= version]:
            connection.executescript(f"BEGIN; {MIGRATIONS[step]} INSERT INTO schema_version VALUES ({step}); COMMIT;")
            if step == 2:
                rows = [(job, *facts) for job, facts in OLD_FACTS.items()]
                connection.executemany("INSERT INTO facts VALUES (?, ?, ?, ?, ?, ?)", rows)
        connection.commit()


@pytest.fixture(params=[*MIGRATIONS][:-1])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    write_version(request.param, tmp_path)
    opened = await open_store(tmp_path)
    yield opened
    await opened.close()


async def test_upgrade_keeps_every_job_unchanged(store: Store) -> None:
    jobs = {number(job): job for _, job in await store.list_jobs(ended=True)}
    assert list(jobs) == list(range(1, 13))
    assert {n: job.state.value for n, job in jobs.items()} == {
        1: "returned", 2: "raised", 3: "failed", 4: "failed", 5: "cancelled", 6: "cancelled",
        7: "running", 8: "running", 9: "queued", 10: "running", 11: "queued", 12: "queued",
    }  # fmt: skip
    assert jobs[1].end == Returned(Raw(b'{"b": 1.10, "a": 2}'))
    assert jobs[2].end == Raised("Trouble\ud800", "line\nline", Raw(b'{"class": "T"}'))
    assert jobs[3].end == Failed("timeout", "max_exec_time: 3 s are over")
    assert jobs[4].end == Failed("unknown_host", "no such host")
    assert jobs[5].end == jobs[6].end == Cancelled()
    assert (jobs[2].host, jobs[2].procedure, jobs[3].info) == ("web\ud800", "d\ud83d", b'" \\ud800"')
    assert (jobs[1].submitted, jobs[1].started, jobs[1].ended, jobs[1].records) == (100.25, 100.75, 101.0, 4)
    assert (jobs[8].queue, jobs[8].arguments) == (b'{ "db": "prod" }', b'["8"]')


async def test_upgrade_gives_slots_to_running_jobs_only(store: Store) -> None:
    assert [number(job) for job in await store.list_slot_holders()] == [7, 8, 10]
    assert {(job.holds_slot, job.stop) for job in await store.list_slot_holders()} == {(True, None)}
    assert await store.list_queues() == [QueueStatus(QUEUE, 2, running=2, queued=1)]
    assert await claimed(store, max_calls_per_host=2) == [job_id(12)], "the queue and web01 are full"
    assert await store.cancel_job(job_id(7), 300.0) is State.RUNNING
    assert await claimed(store) == [job_id(11)]
    assert await store.finalize_stop(job_id(7), StopState.CONFIRMED)
    assert await claimed(store) == [job_id(9)]


async def test_upgrade_makes_old_jobs_appear_in_every_list(store: Store) -> None:
    async def listed(**options: Any) -> list[int]:
        return [number(job) for _, job in await store.list_jobs(**options)]

    jobs = {number(job): job for _, job in await store.list_jobs(ended=True)}
    of_queue = [n for n, job in jobs.items() if job.queue is not None and canonical(job.queue) == canonical(QUEUE)]
    lists: list[tuple[dict[str, Any], list[int]]] = [
        *(({"host": host}, [n for n, job in jobs.items() if job.host == host]) for host in ("web01", "web\ud800")),
        ({"queue": QUEUE}, of_queue),
        ({}, list(jobs)),
    ]
    for of, found in lists:
        assert found
        there = [n for n in found if jobs[n].state not in ENDED]
        assert await listed(**of) == there
        assert await listed(ended=True, **of) == found
        assert await listed(newest_first=True, **of) == there[::-1]
        assert await listed(ended=True, newest_first=True, **of) == found[::-1]


async def test_upgrade_makes_old_jobs_appear_in_every_search(store: Store) -> None:
    found = (await store.find_jobs(JobFilter(), newest_first=False)).summaries
    assert {int(each.id[-12:]): (each.end_type, each.end_message) for each in found if each.end_type} == {
        2: ("Trouble\ud800", "line\nline"),
        3: ("timeout", "max_exec_time: 3 s are over"),
        4: ("unknown_host", "no such host"),
    }

    async def searched(**parts: Any) -> list[int]:
        return [int(each.id[-12:]) for each in (await store.find_jobs(JobFilter(**parts))).summaries]

    assert await searched(states=BAD) == [4, 3, 2]
    assert await searched(states=BAD, end_types=("timeout",)) == [3]
    assert await searched(text=("OVER",)) == [3]
    assert await searched(submitted=Span(100.0, 101.0)) == [
        number(job) for _, job in reversed(await store.list_jobs(ended=True)) if 100.0 <= job.submitted < 101.0
    ]
    counts = await store.count_jobs(JobFilter(), ["state", "procedure"])
    assert counts.exact
    assert sum(each.count for each in counts.by["state"]) == sum(each.count for each in counts.by["procedure"]) == 12


async def test_upgrade_measures_how_far_the_clock_was_set_back(tmp_path: Path) -> None:
    write_version(11, tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("UPDATE jobs SET submitted = 5000 WHERE seq = 4")
        connection.commit()
    store = await open_store(tmp_path)
    found = (await store.find_jobs(JobFilter(submitted=Span(None, 4000.0)))).summaries
    assert [int(each.id[-12:]) for each in found] == [*range(12, 4, -1), 3, 2, 1]
    await store.add_job(new_job(id=job_id(99)), 10.0)
    found = (await store.find_jobs(JobFilter(submitted=Span(5.0, 20.0)))).summaries
    assert [each.id for each in found] == [job_id(99)]
    await store.close()


async def test_upgrade_gives_old_records_the_start_of_their_job(store: Store) -> None:
    lines = [b'"line 0"', b'"line 1"', b'"line 2"', b'{"b":1.10,"a":"\\ud800"}']
    assert await store.read_records(job_id(1), 0, 10**6) == records(lines, made=100.75)
    assert await store.read_records(job_id(1), 2, 1) == records(lines[2:3], made=100.75)
    assert (await store.get_details(job_id(1))).record_bytes == sum(map(len, lines))


async def test_upgraded_stream_continues(store: Store) -> None:
    assert await store.append_records(job_id(7), 2, Records([Raw(b"2")], [200.5]))
    assert await store.append_records(job_id(7), 3, Records([Raw(b"3")], [200.75]))
    made = (160.75, 160.75, 200.5, 200.75)
    assert await store.read_records(job_id(7), 0, 200) == Records(records([b"0", b"1", b"2", b"3"]).values, made)
    assert await store.finish_job(job_id(7), Returned(Raw(b"1")), 201.0)


@pytest.mark.parametrize("version", [*MIGRATIONS][:-1])
async def test_upgrade_renames_the_keys_of_stored_metadata(tmp_path: Path, version: int) -> None:
    write_version(version, tmp_path)
    store = await open_store(tmp_path)
    for n in range(1, 13):
        expected = METADATA.get(n, NO_METADATA) if version > 1 else NO_METADATA
        assert (await store.get_details(job_id(n))).metadata == expected
    metadata = JobMetadata(exit_info=Raw(b"{}"))
    assert await store.update_metadata(job_id(2), metadata)
    assert (await store.get_details(job_id(2))).metadata == metadata
    await store.close()


async def test_upgraded_store_works_like_a_new_store(tmp_path: Path, store: Store) -> None:
    [new] = await added(store, host="new")
    with pytest.raises(ValueError, match="already"):
        await store.add_job(new_job(id=job_id(5)), 300.0)
    assert new in await claimed(store)
    identity = await store.get_identity()
    assert await store.prune_jobs(1e9, 100) == 6
    await store.close()
    again = await open_store(tmp_path)
    assert await again.get_identity() == identity
    assert len(await again.list_jobs(ended=True)) == 7
    await again.close()


async def test_upgrade_keeps_the_secrets_of_calls_that_may_run(tmp_path: Path) -> None:
    write_version(7, tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute(QUERIES["add_identity"], {"owner": "me", "key": b"key"})
        connection.commit()
    store = await open_store(tmp_path)
    identity, jobs = await store.get_identity(), [job for _, job in await store.list_jobs(ended=True)]
    for job in jobs:
        assert identity.secret(job.id, "web01", job.submitted) == identity.secret(job.id, "web02", job.submitted)
    later = max(job.submitted for job in jobs) + 0.1
    assert identity.secret(job_id(99), "web01", later) != identity.secret(job_id(99), "web02", later)
    await store.close()


async def test_upgraded_schema_equals_a_new_schema(tmp_path: Path, store: Store) -> None:
    await store.close()
    (tmp_path / "new").mkdir()
    await (await open_store(tmp_path / "new")).close()
    found = []
    for path in (tmp_path / FILE_NAME, tmp_path / "new" / FILE_NAME):
        with closing(connect(path)) as connection:
            found.append(connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2").fetchall())
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            [(version,)] = connection.execute("SELECT max(version) FROM schema_version").fetchall()
            assert version == max(MIGRATIONS)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("version", "written"),
    [(2, 3), (3, 0), (4, len(METADATA)), (5, 1 + 5), (12, 3 + 1)],
    ids=["2: the running ones", "3: none", "4: their metadata", "5: their ends and a queue", "12: three errors"],
)
def test_upgrade_writes_no_old_job_again(tmp_path: Path, version: int, written: int) -> None:
    write_version(version - 1, tmp_path)
    with closing(connect(tmp_path / FILE_NAME)) as connection:
        before = connection.total_changes
        connection.executescript(f"BEGIN; {MIGRATIONS[version]} COMMIT;")
        assert connection.total_changes - before == written
