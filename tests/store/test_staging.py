"""Many jobs of one request: stored all or none, without a transaction that others wait for."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Failed
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import Job, NewJob, State
from harpcaller.store import LimitReached, RequestIDReused, StorageError
from harpcaller.store.sqlite import Store, backup
from harpcaller.store.sqlite.staging import STEP_JOBS, decode_jobs, encode_jobs
from store.conftest import Reopen
from support.deadline import eventually
from support.jobs import claimed, new_job

MANY = 3 * STEP_JOBS + 10


def many(**attributes: Any) -> list[NewJob]:
    return [new_job(f"host{n % 3}", [None, {"q": n % 7}][n % 2], **attributes) for n in range(MANY)]


async def stored_ids(store: Store) -> list[str]:
    return [job.id for _, job in await store.list_jobs(ended=True, limit=10_000)]


def test_staged_jobs_are_decoded_unchanged() -> None:
    jobs = [
        new_job(
            "\ud800ho\x00st", {"q": "é"}, 7, arguments=Raw('["\U0001f600", 1e400]'.encode()), info=Raw(b'{"a": 1}')
        ),
        new_job(request_id="\udfff", call_digest=bytes(range(256)), start_within=2.5, timeout=0.1),
        new_job(owner="token:\udfff", request_ids_of="token:a", max_running=3, max_record_bytes=9),
        new_job(end=Failed("access_denied", "no rule", Raw(b'{"rule": null}'))),
        new_job(end=Failed("access_denied", "no rule")),
        new_job(
            "hé\x00\x7f", {"q": "\n"}, arguments=Raw('["é\\\\", 1e400]'.encode()), owner="a", rerun_of="b", timeout=0.1
        ),
        new_job(secrets=bytes(range(256))),
    ]
    assert decode_jobs(encode_jobs(jobs)) == jobs
    for job in jobs:
        assert decode_jobs(encode_jobs([job])) == [job]
    assert decode_jobs(encode_jobs([new_job(max_queued=3)]))[0].max_queued is None


async def test_many_jobs_are_stored_in_order(reopen: Reopen) -> None:
    store = await reopen()
    jobs = many()
    assert await store.add_jobs(jobs, 2.5) == [job.id for job in jobs]
    listed = [job for _, job in await store.list_jobs()]
    assert [(job.id, job.host, job.queue, job.arguments) for job in listed] == [
        (job.id, job.host, job.queue, job.arguments) for job in jobs
    ]
    assert {job.submitted for job in listed} == {2.5}
    store = await reopen()
    assert await stored_ids(store) == [job.id for job in jobs]


async def test_other_verbs_run_between_the_steps(store: Store) -> None:
    jobs, other = many(), new_job("other")
    ended: list[str] = []
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            adding = asyncio.ensure_future(store.add_job(other, 3.0))
            adding.add_done_callback(lambda _: ended.append("other"))

    ids = await store.add_jobs(jobs, 2.5, after_step)
    ended.append("many")
    assert ended == ["other", "many"]
    assert ids == [job.id for job in jobs]
    assert (await stored_ids(store)).index(other.id) < MANY, "it did not wait for all steps"
    assert steps == 4


async def test_first_jobs_start_before_the_last_is_inserted(store: Store) -> None:
    jobs = many()
    claims: list[Awaitable[list[Job]]] = []
    await store.add_jobs(jobs, 2.5, lambda: claims.append(store.claim_jobs(3.0, 1, 1000)))
    claimed_jobs = [job for claim in claims for job in await claim]
    assert claimed_jobs[0].id == jobs[0].id
    assert len(claimed_jobs) == 4
    assert await claimed(store)  # the others can start, too


async def test_request_id_of_another_call_stages_nothing(store: Store) -> None:
    known = new_job(request_id="known", call_digest=b"one")
    await store.add_job(known, 1.0)
    jobs = many()
    conflict = new_job(request_id="known", call_digest=b"other")
    with pytest.raises(RequestIDReused, match=known.id):
        await store.add_jobs([*jobs, conflict], 2.0)
    first = new_job(request_id="twice", call_digest=b"one")
    with pytest.raises(RequestIDReused, match=first.id):
        await store.add_jobs([first, *jobs, new_job(request_id="twice", call_digest=b"other")], 2.0)
    assert await stored_ids(store) == [known.id]
    assert await store.list_queues() == []


async def test_limit_of_queued_jobs_counts_all_steps(store: Store) -> None:
    jobs = [new_job(owner="token:a", max_queued=MANY - 1) for _ in range(MANY)]
    with pytest.raises(LimitReached, match=f"the limit is {MANY - 1}"):
        await store.add_jobs(jobs, 2.0)
    assert await stored_ids(store) == []
    fitting = [new_job(owner="token:a", max_queued=MANY) for _ in range(MANY)]
    assert await store.add_jobs(fitting, 3.0) == [job.id for job in fitting]
    with pytest.raises(LimitReached):
        await store.add_job(new_job(owner="token:a", max_queued=MANY), 4.0)


async def test_submission_meanwhile_gets_the_staged_job(store: Store) -> None:
    jobs = [new_job(request_id=f"r{n}", call_digest=b"%d" % n) for n in range(MANY)]
    again = new_job(request_id=f"r{MANY - 1}", call_digest=b"%d" % (MANY - 1))
    other = new_job(request_id=f"r{MANY - 2}", call_digest=b"other")
    repeated: list[Awaitable[str]] = []

    def after_step() -> None:
        if not repeated:
            repeated.extend(store.add_job(job, 3.0) for job in (again, other))

    ids = await store.add_jobs(jobs, 2.0, after_step)
    assert ids == [job.id for job in jobs]
    assert await repeated[0] == jobs[-1].id
    with pytest.raises(RequestIDReused, match=jobs[-2].id):
        await repeated[1]
    submitted_again = [new_job(request_id=job.request_id, call_digest=job.call_digest) for job in [again, *jobs]]
    assert await store.add_jobs(submitted_again, 4.0) == [jobs[-1].id, *ids]
    assert len(await stored_ids(store)) == MANY


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from harpcaller.store.sqlite import open_store
from support.deadline import eventually
from support.jobs import new_job

async def main(directory, count, killed_at):
    store = await open_store(Path(directory))
    steps = 0
    def after_step():
        nonlocal steps
        steps += 1
        if steps == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
    jobs = [new_job(request_id=f"r{n}", call_digest=b"c", info=b"%d" % n) for n in range(count)]
    await store.add_jobs(jobs, 2.0, after_step)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.mark.parametrize("killed_at", [1, 3])
async def test_crash_between_the_steps_loses_no_job(reopen: Reopen, tmp_path: Path, killed_at: int) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(MANY), str(killed_at)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = await asyncio.to_thread(subprocess.run, command, check=False, env=environment, timeout=60)
    assert killed.returncode == -9
    copy = tmp_path / "copy"
    await asyncio.to_thread(backup.back_up, tmp_path / "store" / "harpcaller.sqlite", copy)
    (tmp_path / "restored").mkdir()
    assert backup.restore(copy, tmp_path / "restored", "cancel", time.time()) == MANY
    store = await reopen()
    listed = [job for _, job in await store.list_jobs()]
    assert [job.info for job in listed] == [b"%d" % n for n in range(MANY)]
    assert {job.state for job in listed} == {State.QUEUED}
    again = [new_job(request_id=f"r{n}", call_digest=b"c") for n in range(MANY)]
    assert await store.add_jobs(again, 3.0) == [job.id for job in listed]
    store = await reopen()
    assert len(await stored_ids(store)) == MANY


async def test_failed_step_is_repeated(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    jobs, steps = many(), 0
    other = sqlite3.connect(store.path, isolation_level=None)

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            other.execute("BEGIN IMMEDIATE")  # another program locks the file for longer than the writer waits

    adding = asyncio.create_task(store.add_jobs(jobs, 2.0, after_step))
    await eventually(lambda: "cannot insert staged jobs; retrying" in caplog.messages)
    other.execute("ROLLBACK")
    other.close()
    assert await adding == [job.id for job in jobs]
    assert await stored_ids(store) == [job.id for job in jobs]
    assert steps == 4


async def test_closing_ends_the_repetition(reopen: Reopen) -> None:
    store = await reopen()
    adding = asyncio.create_task(store.add_jobs(many(), 2.0))
    await asyncio.sleep(0)
    await store.close()
    with pytest.raises(StorageError, match="closed"):
        await adding
    store = await reopen()
    assert len(await stored_ids(store)) in (0, MANY), "all or none"


LARGE = 25 * STEP_JOBS
KILLED_WHILE_STAGING = """
import asyncio, os, signal, sys
from pathlib import Path
from harpcaller.store.sqlite import open_store
from support.jobs import new_job

async def main(directory, count, commits):
    store = await open_store(Path(directory))
    def before_commit():
        nonlocal commits
        commits -= 1
        if commits < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    store.call_before_commits(before_commit)
    await store.add_jobs([new_job(arguments=b"[%d]" % n) for n in range(count)], 2.0)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.mark.parametrize("commits", range(6))
async def test_crash_between_the_parts_stores_all_jobs_or_none(reopen: Reopen, tmp_path: Path, commits: int) -> None:
    """All are stored as soon as the last of four parts is committed."""
    command = [sys.executable, "-c", KILLED_WHILE_STAGING, str(tmp_path / "store"), str(LARGE), str(commits)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = await asyncio.to_thread(subprocess.run, command, check=False, env=environment, timeout=60)
    assert killed.returncode == -9
    expected = LARGE if commits >= 4 else 0
    copy = tmp_path / "copy"
    await asyncio.to_thread(backup.back_up, tmp_path / "store" / "harpcaller.sqlite", copy)
    (tmp_path / "restored").mkdir()
    assert backup.restore(copy, tmp_path / "restored", "cancel", time.time()) == expected
    store = await reopen()
    assert len(await stored_ids(store)) == expected
    assert staged_rows(store) == 0


async def test_parts_are_committed_between_the_writes_of_others(store: Store) -> None:
    commits: list[int] = []
    store.call_before_commits(lambda: commits.append(staged_rows(store)))
    await store.add_jobs([new_job() for _ in range(LARGE)], 2.0)
    assert 0 == commits[0] < commits[1] < commits[2] < commits[3] < commits[4] == LARGE / STEP_JOBS


async def test_failed_part_stores_nothing(store: Store) -> None:
    """Another program locks the file for longer than the writer waits, after the first part."""
    transactions = 0

    def before_commit() -> None:
        nonlocal transactions
        transactions += 1
        if transactions == 2:
            other.execute("BEGIN IMMEDIATE")
        elif transactions == 3:
            other.execute("ROLLBACK")

    other = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    store.call_before_commits(before_commit)
    with pytest.raises(StorageError, match="locked"):
        await store.add_jobs([new_job() for _ in range(LARGE)], 2.0)
    other.close()
    assert staged_rows(store) == 0
    assert await stored_ids(store) == []
    assert len(await store.add_jobs([new_job() for _ in range(LARGE)], 3.0)) == LARGE


async def test_limit_is_checked_when_all_parts_are_written(store: Store) -> None:
    with pytest.raises(LimitReached):
        await store.add_jobs([new_job(owner="token:a", max_queued=LARGE - 1) for _ in range(LARGE)], 2.0)
    assert staged_rows(store) == 0
    assert await stored_ids(store) == []


def staged_rows(store: Store) -> int:
    with closing(sqlite3.connect(store.path)) as file:
        return int(file.execute("SELECT count(*) FROM staged_jobs").fetchone()[0])
