"""The deletion of old jobs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Failed, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import State
from harpcaller.notifier import RecordBatch
from harpcaller.pruner import prune, prune_regularly
from harpcaller.store import StorageError, UnknownJob
from harpcaller.store.sqlite import open_store
from support.deadline import eventually
from support.dispatcher import Switched, call, follow, followed, read, running, until
from support.jobs import job_in, records


async def test_prune_deletes_only_old_ended_jobs(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "store")
    long_ago = time.time() - 100_000
    old = [await job_in(store, State.RETURNED, now=long_ago) for _ in range(450)]
    waiting = await job_in(store, State.QUEUED, now=long_ago, queue={})
    young = await job_in(store, State.CANCELLED, now=time.time() - 1000)
    assert await prune(store, time.time() - 2000) == 450
    for job_id in old:
        with pytest.raises(UnknownJob):
            await store.get_job(job_id)
    assert (await store.get_job(waiting)).state is State.QUEUED
    assert (await store.get_job(young)).state is State.CANCELLED
    await store.close()


async def test_prune_regularly_retries_and_follows_max_age(tmp_path: Path) -> None:
    real = await open_store(tmp_path / "store")
    store: Any = Switched(real, "prune_jobs")
    store.off = True
    job_id = await job_in(real, State.RETURNED, now=time.time() - 1000)
    max_age = 2000.0
    task = asyncio.create_task(prune_regularly(store, time.time, lambda: max_age, every=0.05))
    await eventually(lambda: store.refused >= 2, what="a second try")
    with pytest.raises(StorageError):
        await prune(store, 0)
    store.off = False
    assert (await real.get_job(job_id)).state is State.RETURNED
    max_age = 500.0

    async def pruned() -> bool:
        return not await real.list_jobs(ended=True)

    while not await pruned():
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    await real.close()


async def test_dispatcher_prunes_at_start_and_on_demand(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "store")
    old = await job_in(store, State.RETURNED, now=time.time() - 8000)
    young = await job_in(store, State.RETURNED, now=time.time() - 1000)
    async with running(tmp_path, store=store, max_age=2.0) as dispatcher:
        with pytest.raises(UnknownJob):
            await until(dispatcher, old, lambda job: False, "the pruning")
        assert await dispatcher.prune(500) == 1
        with pytest.raises(UnknownJob):
            await followed(dispatcher, young)
        unknown = await dispatcher.submit(call(), "test")
        end = await dispatcher.result(unknown)
        assert isinstance(end, Failed)
        assert await dispatcher.prune(0) == 1
    await store.close()


@pytest.mark.parametrize("stream", [read, follow])
async def test_job_pruned_during_a_read_raises_unknown_job(tmp_path: Path, stream: Any) -> None:
    """Otherwise the reader would take a part of the records for all of them."""
    store = await open_store(tmp_path / "store")
    job_id = await job_in(store, State.RUNNING, now=time.time() - 100)
    assert await store.append_records(job_id, 0, records([b'"%b"' % (b"x" * 30_000)] * 10))
    assert await store.finish_job(job_id, Returned(Raw(b"1")), time.time() - 50)
    async with running(tmp_path, store=store) as dispatcher:
        items = stream(dispatcher, job_id, since=0)
        first = await anext(items)
        assert isinstance(first, RecordBatch)
        assert 0 < first.next < 10
        assert await dispatcher.prune(0) == 1
        with pytest.raises(UnknownJob):
            await anext(items)
    await store.close()
