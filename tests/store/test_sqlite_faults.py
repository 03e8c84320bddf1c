"""The SQLite store under faults: a full disk, a locked file, a kill during a write, a failed member."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from harp.protocol.json_text import Raw
from harpcaller.model.jobs import JobMetadata, State, StopState
from harpcaller.store import StorageError
from harpcaller.store.sqlite import FILE_NAME, file, open_store
from support import full_disk, killed_writer
from support.jobs import ENDS, added, claimed, job_in, new_job

TESTS = Path(__file__).resolve().parent.parent


def run(command: list[str], directory: Path) -> None:
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.root
def test_full_file_system_fails_writes_until_there_is_room(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs to be root, with the right to mount")
    run(["unshare", "-m", sys.executable, "-P", full_disk.__file__, "mount"], tmp_path)


@pytest.mark.root
@pytest.mark.parametrize("size", [5_000, 50_000, 2_000_000])
def test_prune_on_full_disk_frees_space_first(tmp_path: Path, size: int) -> None:
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs to be root, with the right to mount")
    run(["unshare", "-m", sys.executable, "-P", full_disk.__file__, "prune-mount", str(size)], tmp_path)


def test_file_size_limit_fails_writes_until_it_is_raised(tmp_path: Path) -> None:
    run([sys.executable, "-P", full_disk.__file__, "limit"], tmp_path)


@pytest.mark.parametrize("lines", [1, 40, 400])
async def test_confirmed_writes_survive_sigkill(tmp_path: Path, lines: int) -> None:
    program = subprocess.Popen(
        [sys.executable, killed_writer.__file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout is not None
        confirmed = [program.stdout.readline() for _ in range(lines)]
        program.kill()
        confirmed += program.stdout.readlines()
    store = await open_store(tmp_path)
    try:
        for line in confirmed:
            match line.split():
                case ["job", job_id]:
                    assert (await store.get_job(job_id)).id == job_id
                case ["records", job_id, count]:
                    records = await store.read_records(job_id, 0, 10**9)
                    assert len(records) >= int(count)
                    assert records.values == tuple(b"%d" % n for n in range(len(records)))
                    assert (await store.get_job(job_id)).records == len(records) == len(records.timestamps)
                case ["cancelled", job_id]:
                    details = await store.get_details(job_id)
                    finalized = details.job.stop is StopState.CONFIRMED
                    stop_report = Raw(b'{"survivors":[]}') if finalized else None
                    assert details.metadata == JobMetadata(
                        stop_request=Raw(b'{"why":"cancel"}'), stop_report=stop_report
                    )
                    assert (details.job.state, details.job.holds_slot) == (State.CANCELLED, not finalized)
                case ["finalized", job_id]:
                    assert (await store.get_job(job_id)).stop is StopState.CONFIRMED
        holders = await store.list_slot_holders()
        assert len([job for job in holders if job.queue]) <= 2
    finally:
        await store.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


async def test_locked_file_fails_writes_until_it_is_unlocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "BUSY_TIMEOUT", 10)
    store = await open_store(tmp_path)
    try:
        with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StorageError, match=rf"{FILE_NAME}: database is locked \(SQLITE_BUSY\)") as raised:
                await store.add_job(new_job(), 1.0)
            assert isinstance(raised.value.__cause__, sqlite3.OperationalError)
            assert await store.list_jobs() == [], "reads still work"
            other.execute("ROLLBACK")
        await store.add_job(new_job(), 1.0)
    finally:
        await store.close()


async def test_failed_member_does_not_fail_its_batch(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    try:
        queued = await job_in(store, State.QUEUED)
        jobs = [new_job() for _ in range(20)]
        members = [store.add_job(job, 1.0) for job in jobs]
        members.insert(5, store.add_job(new_job(id=queued), 1.0))
        members.insert(9, store.add_job(new_job(timeout="soon"), 1.0))
        outcomes = await asyncio.gather(*members, return_exceptions=True)
        assert [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Exception)] == [5, 9]
        assert [job.id for _, job in await store.list_jobs()] == [queued, *(job.id for job in jobs)]
    finally:
        await store.close()


async def test_failed_member_leaves_slots_as_they_are_stored(tmp_path: Path) -> None:
    """The slots in memory are those of the file after a batch of which a member was rolled back."""
    store = await open_store(tmp_path)
    try:
        ids = await added(store, count=4, queue={}, concurrency=2)
        assert await claimed(store) == ids[:2]
        again = new_job(id=ids[3], queue={"q": 1})
        outcomes = await asyncio.gather(
            store.finish_job(ids[0], ENDS[State.RETURNED], 6.0),
            store.add_job(again, 6.0),
            store.claim_jobs(6.0, 1000, 1000),
            return_exceptions=True,
        )
        assert outcomes[0] is True
        assert isinstance(outcomes[1], ValueError)
        assert isinstance(outcomes[2], list)
        assert [job.id for job in outcomes[2]] == [ids[2]]
        assert await claimed(store) == []
        assert [(queue.running, queue.queued) for queue in await store.list_queues()] == [(2, 1)]
        assert await store.finish_job(ids[1], ENDS[State.RETURNED], 7.0)
        assert await claimed(store) == [ids[3]]
    finally:
        await store.close()


async def test_unsuccessful_commit_leaves_slots_as_they_are_stored(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    try:
        ids = await added(store, count=2, queue={}, concurrency=1)
        with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
            other.execute("CREATE TRIGGER fault BEFORE UPDATE ON jobs BEGIN SELECT RAISE(ROLLBACK, 'a fault'); END")
            for _ in range(2):
                with pytest.raises(sqlite3.IntegrityError, match="a fault"):
                    await store.claim_jobs(5.0, 1000, 1000)
            other.execute("DROP TRIGGER fault")
        assert await claimed(store) == ids[:1]
        assert await claimed(store) == []
    finally:
        await store.close()


async def test_failed_verb_leaves_no_partial_change(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    try:
        with pytest.raises(Exception, match="NOT NULL"):
            await store.add_job(new_job(queue={}, info=None), 1.0)
        assert await store.list_jobs() == []
        assert await store.list_queues() == []
    finally:
        await store.close()


async def test_verbs_after_close_raise_storage_error(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    waiting = [asyncio.ensure_future(store.add_job(new_job(), 1.0)) for _ in range(5)]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*waiting)
    with pytest.raises(StorageError, match="closed"):
        await store.claim_jobs(1.0, 1, 1)
    with pytest.raises(StorageError, match="closed"):
        await store.list_jobs()
    store = await open_store(tmp_path)
    assert len(await store.list_jobs()) == 5, "verbs that were called before close are completed"
    await store.close()


async def test_damaged_file_raises_storage_error_with_its_name(tmp_path: Path) -> None:
    store = await open_store(tmp_path)
    text = Raw(b'["' + b"x" * 100_000 + b'"]')
    for _ in range(20):
        await store.add_job(new_job(arguments=text), 1.0)
    await store.close()
    path = tmp_path / FILE_NAME
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\x55" * (len(content) - 4096))
    with pytest.raises(StorageError, match=rf"{FILE_NAME}: .*malformed"):
        await open_store(tmp_path)
