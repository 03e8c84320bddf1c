"""The deletion of old jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Failed, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import State
from harpcaller.notifier import RecordBatch
from harpcaller.pruner import Pruner, PruneRefused, prune
from harpcaller.store import StorageError, UnknownJob
from harpcaller.store.sqlite import Store, open_store
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
    await real.set_prune_time(time.time())
    max_age = 2000.0
    task = asyncio.create_task(Pruner(store, time.time, lambda: max_age).run_regularly(0.05))
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
    young = await job_in(store, State.RETURNED, now=time.time() - 700)  # a leap is longer than a tenth of max_age
    async with running(tmp_path, store=store, max_age=2.0) as dispatcher:
        with pytest.raises(UnknownJob):
            await until(dispatcher, old, lambda job: False, "the pruning")
        assert await dispatcher.prune(500) == 1
        with pytest.raises(UnknownJob):
            await followed(dispatcher, young)
        unknown = await dispatcher.submit(call(), "test")
        end = await dispatcher.result(unknown)
        assert isinstance(end, Failed)
        assert await dispatcher.prune(1e-9) == 1
        with pytest.raises(UnknownJob):
            await dispatcher.result(unknown)
    await store.close()


class Clocks:
    """A wall clock and a monotonic clock, which tests set."""

    def __init__(self) -> None:
        self.wall = 1_700_000_000.0
        self.monotonic = 0.0

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


DAY = 86_400.0


async def remaining(store: Store, clocks: Clocks, max_age: float | None = 30 * DAY) -> int:
    """Delete old jobs once, by a new pruner as after a restart; return how many remain."""
    await restarted(store, clocks, max_age)
    return len(await store.list_jobs(ended=True))


async def restarted(store: Store, clocks: Clocks, max_age: float | None = 30 * DAY) -> Pruner:
    pruner = Pruner(store, lambda: clocks.wall, lambda: max_age, lambda: clocks.monotonic)
    await pruner.run_once()
    return pruner


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(tmp_path / "store")
    yield opened
    await opened.close()


@pytest.mark.parametrize("known", [True, False])
async def test_start_with_clock_40_days_ahead_deletes_no_job(store: Store, known: bool) -> None:
    clocks = Clocks()
    await job_in(store, State.RETURNED, now=clocks.wall - 60)
    if known:
        assert await remaining(store, clocks) == 1
    clocks.wall += 40 * DAY
    assert await remaining(store, clocks) == 1
    await job_in(store, State.RETURNED, now=clocks.wall)  # a job that runs under the wrong clock is no proof of it
    assert await remaining(store, clocks) == 2
    clocks.wall -= 40 * DAY
    assert await remaining(store, clocks) == 2


async def test_leap_of_a_running_dispatcher_is_caught_up(store: Store) -> None:
    clocks = Clocks()
    await job_in(store, State.RETURNED, now=clocks.wall)
    pruner = await restarted(store, clocks)
    clocks.wall += 40 * DAY
    for _ in range(7):  # at four times the speed of the clock: 28 days
        clocks.pass_time(DAY)
        await pruner.run_once()
    assert len(await store.list_jobs(ended=True)) == 1
    clocks.pass_time(DAY)
    await pruner.run_once()
    assert await store.list_jobs(ended=True) == []


async def test_prune_on_demand_after_a_leap_is_refused(store: Store) -> None:
    clocks = Clocks()
    await job_in(store, State.RETURNED, now=clocks.wall)
    pruner = await restarted(store, clocks)
    clocks.wall += 40 * DAY
    for age in (None, 1.0):
        with pytest.raises(PruneRefused, match=r"clock is 40\.0 days ahead of the last deletion"):
            await pruner.prune(age)
    assert await pruner.prune(50 * DAY, trust_clock=True) == 0
    assert await pruner.prune() == 1


async def test_clock_set_back_deletes_less(store: Store) -> None:
    clocks = Clocks()
    await job_in(store, State.RETURNED, now=clocks.wall - 40 * DAY)
    pruner = Pruner(store, lambda: clocks.wall, lambda: 30 * DAY, lambda: clocks.monotonic)
    await store.set_prune_time(clocks.wall)
    clocks.wall -= 20 * DAY
    await pruner.run_once()
    assert len(await store.list_jobs(ended=True)) == 1
    clocks.wall += 20 * DAY  # as it was: no leap
    await pruner.run_once()
    assert await store.list_jobs(ended=True) == []


async def test_without_max_age_no_job_is_deleted(store: Store) -> None:
    clocks = Clocks()
    await job_in(store, State.RETURNED, now=1.0)
    await store.set_prune_time(clocks.wall)
    pruner = await restarted(store, clocks, max_age=None)
    with pytest.raises(PruneRefused, match="max_age is not set"):
        await pruner.prune()
    assert len(await store.list_jobs(ended=True)) == 1
    assert await pruner.prune(DAY) == 1


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
        assert await dispatcher.prune(1e-9) == 1
        with pytest.raises(UnknownJob):
            await anext(items)
    await store.close()
