"""Conformance of every store: verbs that run at the same time."""

from __future__ import annotations

import asyncio

from harp.protocol.ends import Cancelled, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import JobMetadata, State, StopState
from harpcaller.store.sqlite import Store
from support.jobs import ENDS, added, claimed, job_in, new_job, records

MANY = 1000


async def test_finish_job_with_concurrent_ends_stores_the_first(store: Store) -> None:
    ids = [await job_in(store, State.RUNNING) for _ in range(20)]
    for job_id in ids:
        numbers = [Raw(b"%d" % n) for n in range(3)]
        finishes = [store.finish_job(job_id, Returned(n), 6.0, metadata=JobMetadata(exit_info=n)) for n in numbers]
        *finished, cancelled = await asyncio.gather(*finishes, store.cancel_job(job_id, 6.0, Raw(b"3")))
        outcomes = [*finished, cancelled is not None]
        assert outcomes.count(True) == 1
        won = outcomes.index(True)
        details = await store.get_details(job_id)
        if won == 3:
            assert (details.job.end, details.job.holds_slot) == (Cancelled(), True)
            assert details.metadata == JobMetadata(stop_request=Raw(b"3"))
        else:
            assert (details.job.end, details.job.holds_slot) == (Returned(numbers[won]), False)
            assert details.metadata == JobMetadata(exit_info=numbers[won])


async def test_finalize_stop_called_concurrently_succeeds_once(store: Store) -> None:
    job_id = await job_in(store, State.CANCELLED, keep_slot=True)
    finalized = await asyncio.gather(
        *(
            store.finalize_stop(job_id, stop, metadata=JobMetadata(stop_report=Raw(b'"%s"' % stop.encode())))
            for stop in StopState
        ),
    )
    assert finalized.count(True) == 1
    details = await store.get_details(job_id)
    assert details.job.holds_slot is False
    stop = list(StopState)[finalized.index(True)]
    assert (details.job.stop, details.metadata.stop_report) == (stop, b'"%s"' % stop.encode())


async def test_claim_jobs_after_a_cancel_never_starts_the_job(store: Store) -> None:
    ids = await added(store, count=200, queue={}, concurrency=MANY)
    started: list[str] = []

    async def claim() -> None:
        for _ in range(20):
            started.extend(await claimed(store, limit=10))

    async def cancel(job_id: str) -> tuple[str, State]:
        before = await store.cancel_job(job_id, 6.0)
        assert before is not None
        return job_id, before

    claiming = asyncio.create_task(claim())
    cancelled = await asyncio.gather(*map(cancel, ids))
    await claiming
    for job_id, before in cancelled:
        assert (job_id in started) == (before is State.RUNNING)


async def test_claim_jobs_called_concurrently_respects_limits(store: Store) -> None:
    ids = await added(store, count=40, queue={}, concurrency=8)
    claims = await asyncio.gather(*(claimed(store, limit=3) for _ in range(10)))
    assert [job_id for ids in claims for job_id in ids] == ids[:8]


async def test_reads_during_writes_are_consistent(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    total = 300

    async def follow() -> list[bytes]:
        found: list[bytes] = []
        while len(found) < total:
            found += (await store.read_records(job_id, len(found), 200)).values
            await asyncio.sleep(0)
        return found

    followers = [asyncio.create_task(follow()) for _ in range(20)]
    for n in range(total):
        assert await store.append_records(job_id, n, records([b"%d" % n]))
    for found in await asyncio.gather(*followers):
        assert found == [b"%d" % n for n in range(total)]


async def test_get_details_during_writes_is_a_snapshot(store: Store) -> None:
    ids = await added(store, count=100, queue={}, concurrency=1)
    total = 40

    async def work() -> None:
        for job_id in ids[:-1]:
            assert await claimed(store) == [job_id]
            for n in range(0, total, 10):
                assert await store.append_records(job_id, n, records([b"1"] * 10))
            metadata = JobMetadata(exit_info=Raw(b"{}"))
            assert await store.finish_job(job_id, ENDS[State.RETURNED], 6.0, keep_slot=True, metadata=metadata)
            assert await store.finalize_stop(job_id, StopState.FAILED)

    async def look() -> None:
        while not working.done():
            for job_id in ids:
                details = await store.get_details(job_id)
                assert details.record_bytes == details.job.records
                assert (details.metadata.exit_info is not None) is (details.job.state is State.RETURNED)
                if details.queue_position is not None and details.queue_position.slot_holders:
                    # The jobs between the slot holder and this job are queued before it.
                    [holder] = details.queue_position.slot_holders
                    assert details.queue_position.position == ids.index(job_id) - ids.index(holder)

    working = asyncio.create_task(work())
    await asyncio.gather(*(look() for _ in range(3)))
    await working


async def test_cancelled_awaiter_does_not_affect_other_verbs(store: Store) -> None:
    jobs = [new_job() for _ in range(50)]
    tasks = [asyncio.ensure_future(store.add_job(job, 1.0)) for job in jobs]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[1::2] == [job.id for job in jobs[1::2]]
    for job in jobs[1::2]:
        assert (await store.get_job(job.id)).state is State.QUEUED
