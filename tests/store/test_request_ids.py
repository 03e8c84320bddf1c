"""Request ids: a job that is submitted again is the stored one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from harp.protocol.json_text import Raw
from harpcaller.model.jobs import NewJob, State
from harpcaller.store import RequestIDReused
from harpcaller.store.sqlite import Store
from store.conftest import Reopen
from support.jobs import ENDS, claimed, new_job


def requested(request_id: str, digest: bytes = b"call", **attributes: Any) -> NewJob:
    return new_job(request_id=request_id, call_digest=digest, **attributes)


async def stored_ids(store: Store) -> list[str]:
    return [job.id for _, job in await store.list_jobs(ended=True)]


@pytest.mark.parametrize("request_id", ["deploy 7", "\ud800\x00", "x" * 200])
async def test_job_submitted_again_is_the_stored_job(reopen: Reopen, request_id: str) -> None:
    store = await reopen()
    job = requested(request_id, queue={"q": 1})
    assert await store.add_job(job, 1.0) == job.id
    assert await store.add_job(requested(request_id, queue={"q": 1}), 2.0) == job.id
    assert await claimed(store) == [job.id]
    store = await reopen()
    assert await store.add_job(requested(request_id), 3.0) == job.id
    assert await store.finish_job(job.id, ENDS[State.RETURNED], 4.0)
    assert await store.add_job(requested(request_id), 5.0) == job.id
    assert (await store.get_job(job.id)).submitted == 1.0
    assert await stored_ids(store) == [job.id]
    assert await store.list_queues() == []


async def test_same_request_ids_in_one_transaction_are_one_job(store: Store) -> None:
    jobs = [requested(f"r{n % 3}", arguments=Raw(b"[%d]" % (n % 3))) for n in range(60)]
    adding = asyncio.gather(*(store.add_job(job, 1.0) for job in jobs))
    claimed_jobs = await store.claim_jobs(1.0, 1000, 1000)
    first = [job.id for job in jobs[:3]]
    assert await adding == first * 20
    assert [job.id for job in claimed_jobs] == first == await stored_ids(store)


async def test_many_jobs_submitted_again_keep_their_order(store: Store) -> None:
    known, other = requested("a"), new_job()
    await store.add_job(known, 1.0)
    jobs = [requested("b"), requested("a"), other, requested("b"), requested("c")]
    ids = await store.add_jobs(jobs, 2.0)
    assert ids == [jobs[0].id, known.id, other.id, jobs[0].id, jobs[4].id]
    assert await stored_ids(store) == [known.id, jobs[0].id, other.id, jobs[4].id]
    again = [requested("c"), requested("a"), requested("b"), new_job()]
    assert await store.add_jobs(again, 3.0) == [jobs[4].id, known.id, jobs[0].id, again[3].id]


async def test_request_id_of_another_call_stores_no_job(store: Store) -> None:
    job = requested("a")
    await store.add_job(job, 1.0)
    with pytest.raises(RequestIDReused, match=f"request_id 'a' was used for another call: job {job.id}"):
        await store.add_job(requested("a", b"other", queue={"q": 1}), 2.0)
    with pytest.raises(RequestIDReused, match="'a'"):
        await store.add_jobs([new_job(queue={"q": 1}), requested("b"), requested("a", b"other")], 2.0)
    with pytest.raises(RequestIDReused, match="'b'"):
        await store.add_jobs([requested("b"), requested("b", b"other")], 2.0)
    assert await stored_ids(store) == [job.id]
    assert await store.list_queues() == []
    b = requested("b", b"other")
    assert await store.add_job(b, 3.0) == b.id, "the refused request has not used the id"


async def test_refusal_leaves_the_other_jobs_of_its_transaction(store: Store) -> None:
    jobs = [requested("a"), new_job(), requested("a", b"other"), new_job(), requested("a")]
    outcomes = await asyncio.gather(*(store.add_job(job, 1.0) for job in jobs), return_exceptions=True)
    assert isinstance(outcomes.pop(2), RequestIDReused)
    assert outcomes == [jobs[0].id, jobs[1].id, jobs[3].id, jobs[0].id]
    assert await stored_ids(store) == [jobs[0].id, jobs[1].id, jobs[3].id]


async def test_request_id_is_free_after_its_job_is_pruned(store: Store) -> None:
    first, second = requested("a"), requested("a", b"other")
    await store.add_job(first, 1.0)
    await store.cancel_job(first.id, 2.0)
    assert await store.prune_jobs(10.0, 100) == 1
    assert await store.add_job(second, 20.0) == second.id
    assert await store.add_job(requested("a", b"other"), 21.0) == second.id


async def test_old_request_ids_are_forgotten(store: Store) -> None:
    old = [requested(f"old {n}") for n in range(2500)]
    await store.add_jobs(old, 1.0)
    young = requested("young")
    await store.add_job(young, 10.0)
    await store.forget_request_ids(1.0)
    assert await store.add_job(requested("old 0"), 11.0) == old[0].id
    await store.forget_request_ids(10.0)
    assert await store.add_job(requested("young"), 11.0) == young.id
    again = [requested(f"old {n}") for n in range(2500)]
    assert await store.add_jobs(again, 11.0) == [job.id for job in again]
