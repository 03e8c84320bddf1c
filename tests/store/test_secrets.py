"""The encrypted values of a call: stored with its job, and erased when the job has ended and released its slot."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from harp.protocol.ends import Failed
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import State, StopState
from harpcaller.store.sqlite import Store, backup
from harpcaller.store.sqlite.staging import STEP_JOBS
from store.conftest import Reopen
from support.jobs import ENDS, new_job

SEALED = b"\x00sealed\xff"
QUEUE = Raw(b'{"q": 1}')


def stored(path: Path) -> list[bytes]:
    with closing(sqlite3.connect(path)) as db:
        return [row[0] for row in db.execute("SELECT secrets FROM calls WHERE secrets IS NOT NULL")]


async def test_claimed_job_has_its_secrets_after_a_restart(reopen: Reopen) -> None:
    store = await reopen()
    first, second = new_job(secrets=SEALED), new_job(secrets=SEALED)
    await store.add_job(first, 1.0)
    assert [job.secrets for job in await store.claim_jobs(2.0, 1, 1000)] == [SEALED]
    await store.add_job(second, 3.0)
    store = await reopen()
    assert [job.secrets for job in await store.claim_jobs(4.0, 1, 1000)] == [SEALED]
    assert (await store.get_job(first.id)).secrets == SEALED


@pytest.mark.parametrize("way", ["finish", "cancel", "cancel queue", "fail waiting"])
async def test_end_erases_the_secrets(store: Store, way: str) -> None:
    ended = new_job(queue=QUEUE if way == "cancel queue" else None, secrets=SEALED)
    await store.add_job(ended, 1.0)
    other = new_job("other", secrets=b"other")
    if way == "finish":
        await store.claim_jobs(2.0, 1, 1000)
    await store.add_job(other, 2.0)
    assert stored(store.path) == [SEALED, b"other"]
    match way:
        case "finish":
            assert await store.finish_job(ended.id, ENDS[State.RETURNED], 3.0)
        case "cancel":
            assert await store.cancel_job(ended.id, 3.0) is State.QUEUED
        case "cancel queue":
            assert len(await store.cancel_queue(QUEUE, 3.0)) == 1
        case _:
            ids, _ = await store.fail_waiting("web01", Failed("network_error", "no"), 9.0, since=3.0, failed=3.0)
            assert ids == [ended.id]
    assert stored(store.path) == [b"other"]
    assert (await store.get_job(ended.id)).secrets is None


async def test_secrets_remain_until_the_slot_is_released(reopen: Reopen) -> None:
    """What the host reports of the stop may have the secret values, too, and is masked."""
    store = await reopen()
    job = new_job(secrets=SEALED)
    await store.add_job(job, 1.0)
    await store.claim_jobs(2.0, 1, 1000)
    assert await store.cancel_job(job.id, 3.0) is State.RUNNING
    store = await reopen()
    assert stored(store.path) == [SEALED]
    assert await store.finalize_stop(job.id, StopState.CONFIRMED)
    assert stored(store.path) == []


async def test_secrets_of_many_jobs_are_staged_and_erased(store: Store) -> None:
    jobs = [new_job(queue=QUEUE, secrets=SEALED) for _ in range(STEP_JOBS + 1)]
    await store.add_jobs(jobs, 1.0)
    assert stored(store.path) == [SEALED] * len(jobs)
    assert len(await store.cancel_queue(QUEUE, 2.0)) == len(jobs)
    assert stored(store.path) == []


async def test_restore_that_cancels_jobs_erases_their_secrets(reopen: Reopen, tmp_path: Path) -> None:
    store = await reopen()
    running, queued = new_job(secrets=b"running"), new_job(secrets=SEALED)
    await store.add_job(running, 1.0)
    await store.claim_jobs(2.0, 1, 1000)
    await store.add_job(queued, 3.0)
    backup.back_up(store.path, tmp_path / "copy")
    (tmp_path / "restored").mkdir()
    assert backup.restore(tmp_path / "copy", tmp_path / "restored", "cancel", 4.0) == 1
    assert stored(tmp_path / "restored" / "harpcaller.sqlite") == [b"running"]
