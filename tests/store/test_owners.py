"""Owners of jobs: the limits of an owner, its request ids, and who may do something with a job."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Failed
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import NewJob, State, StopState, Subject
from harpcaller.store import LimitReached, QueueStatus, RequestIDReused
from harpcaller.store.sqlite import FILE_NAME, Store, open_store
from store.conftest import Reopen
from store.test_sqlite_upgrade import job_id, write_version
from support.jobs import ENDS, added, claimed, new_id, new_job

DENIED = Failed("access_denied", "no rule allows it")
NOT_STARTED = Failed("network_error", "no route")


@pytest.mark.parametrize("owner", ["token:shop", "cert:*.ops\ud800", None])
async def test_owner_of_a_job_is_stored(reopen: Reopen, owner: str | None) -> None:
    store = await reopen()
    [job] = await added(store, owner=owner, max_running=3, max_record_bytes=2048)
    for _ in range(2):
        stored = await store.get_job(job)
        assert (stored.owner, stored.max_running, stored.max_record_bytes) == (owner, 3, 2048)
        assert [found.owner for _, found in await store.list_jobs()] == [owner]
        store = await reopen()
    assert await claimed(store) == [job]
    assert [found.owner for found in await store.list_slot_holders()] == [owner]


async def test_subjects_of_jobs(store: Store) -> None:
    job = new_job("web\ud800", {"q": 1}, owner="a", arguments=Raw(b'{"x": 1.10}'))
    await store.add_job(job, 1.0)
    [plain] = await added(store)
    found = await store.find_subjects([plain, new_id(), "null", job.id], 9)
    assert found == {
        job.id: Subject("a", "web\ud800", "deploy", Raw(b'{"x": 1.1'), Raw(b'{"q": 1}')),
        plain: Subject(None, "web01", "deploy", Raw(b"[]"), None),
    }


# The limit of running jobs.


async def test_owner_at_its_limit_waits_and_delays_nobody_else(reopen: Reopen) -> None:
    store = await reopen()
    full = await added(store, count=5, owner="a", max_running=2)
    other = await added(store, count=2, owner="b", max_running=2)
    free = await added(store, owner="c")
    assert await claimed(store) == [*full[:2], *other, *free]
    assert await claimed(store) == []
    store = await reopen()
    assert await claimed(store) == [], "slots are counted from the stored jobs"
    assert await store.finish_job(full[0], ENDS[State.RETURNED], 6.0)
    assert await claimed(store) == [full[2]]
    assert await store.cancel_job(full[3], 6.0) is State.QUEUED
    assert await store.cancel_job(full[1], 6.0) is State.RUNNING
    assert await claimed(store) == [], "a job that is being stopped holds its slot"
    assert await store.finalize_stop(full[1], StopState.CONFIRMED)
    assert await claimed(store) == [full[4]]


async def test_slots_of_an_owner_are_those_of_all_its_jobs(store: Store) -> None:
    [unlimited] = await added(store, owner="a")
    [limited] = await added(store, owner="a", max_running=1)
    [on_other_host] = await added(store, host="web02", owner="a", max_running=1)
    assert await claimed(store) == [unlimited]
    assert await store.finish_job(unlimited, ENDS[State.RETURNED], 6.0)
    assert await claimed(store) == [limited]
    assert await store.finish_job(limited, ENDS[State.RETURNED], 6.0)
    assert await claimed(store) == [on_other_host]


async def test_queue_keeps_its_order_while_an_owner_is_at_its_limit(store: Store) -> None:
    [running] = await added(store, owner="a", max_running=1)
    queue: dict[str, Any] = {"queue": {"q": 1}, "concurrency": 2}
    [first] = await added(store, owner="a", max_running=1, **queue)
    [second] = await added(store, owner="b", max_running=1, **queue)
    assert await claimed(store) == [running]
    assert await store.finish_job(running, ENDS[State.RETURNED], 6.0)
    assert await claimed(store) == [first, second]


async def test_waiting_job_knows_how_many_of_its_owner_run(store: Store) -> None:
    await added(store, count=2, owner="a", max_running=1)
    [waiting] = (await added(store, count=1, owner="a", max_running=1))[-1:]
    assert len(await claimed(store)) == 1
    found = (await store.get_details(waiting)).queue_position
    assert found is not None
    assert (found.position, found.slots_held, found.slots_held_by_owner) == (2, 1, 1)
    [other] = await added(store, host="web02", queue={"q": 1}, owner="b")
    found = (await store.get_details(other)).queue_position
    assert found is not None
    assert found.slots_held_by_owner == 0


async def test_slot_of_host_passes_owner_at_its_limit(store: Store) -> None:
    """Two jobs wait for a full host; when it has room, the owner of the first one is full."""
    [on_host] = await added(store, host="web01", owner="x")
    [elsewhere] = await added(store, host="web02", owner="x")
    assert await claimed(store, max_calls_per_host=1) == [on_host, elsewhere]
    [first] = await added(store, host="web01", owner="a", max_running=1)
    [second] = await added(store, host="web01", owner="b", max_running=1)
    assert await claimed(store, max_calls_per_host=1) == [], "both wait for the host"
    [filler] = await added(store, host="web03", owner="a", max_running=1)
    assert await claimed(store, max_calls_per_host=1) == [filler]
    assert await store.finish_job(on_host, ENDS[State.RETURNED], 6.0)
    assert await claimed(store, max_calls_per_host=1) == [second]
    assert await store.finish_job(second, ENDS[State.RETURNED], 6.0)
    assert await store.finish_job(filler, ENDS[State.RETURNED], 6.0)
    assert await claimed(store, max_calls_per_host=1) == [first]


async def test_slot_of_owner_passes_full_host(store: Store) -> None:
    """Two jobs wait for their owner; when it has room, the host of the first one is full."""
    [filler] = await added(store, host="web03", owner="a", max_running=1)
    [first] = await added(store, host="web01", owner="a", max_running=1)
    [second] = await added(store, host="web02", owner="a", max_running=1)
    assert await claimed(store, max_calls_per_host=1) == [filler]
    [on_host] = await added(store, host="web01", owner="x")
    assert await claimed(store, max_calls_per_host=1) == [on_host]
    assert await store.finish_job(filler, ENDS[State.RETURNED], 6.0)
    assert await claimed(store, max_calls_per_host=1) == [second]
    assert await store.finish_job(second, ENDS[State.RETURNED], 6.0)
    assert await store.finish_job(on_host, ENDS[State.RETURNED], 6.0)
    assert await claimed(store, max_calls_per_host=1) == [first]


async def test_jobs_that_wait_for_their_owner_wait_for_no_host(store: Store) -> None:
    limited: dict[str, Any] = {"owner": "a", "max_running": 1, "start_within": 5.0}
    [running] = await added(store, host="web02", **limited)
    waiting = await added(store, count=2, **limited)
    [other] = await added(store, owner="b", max_running=1, start_within=5.0)
    assert await claimed(store, max_calls_per_host=0) == []
    assert [job.id for job in await store.claim_jobs(5.0, 1, 9)] == [running]
    ended = await store.fail_waiting("web01", NOT_STARTED, 100.0, 10.0, 100.0)
    assert ended == ([other], None)
    assert await store.finish_job(running, ENDS[State.RETURNED], 6.0)
    assert await store.fail_waiting("web01", NOT_STARTED, 100.0, 10.0, 100.0, limit=1) == (waiting[:1], 0.0)
    assert await store.fail_waiting("web01", NOT_STARTED, 100.0, 10.0, 100.0) == (waiting[1:], None)


# The limits of queued jobs.


async def test_owner_has_no_more_queued_jobs_than_it_may(reopen: Reopen) -> None:
    store = await reopen()
    limited: dict[str, Any] = {"owner": "a", "max_queued": 3}
    jobs = await added(store, count=2, **limited)
    await added(store, count=5, owner="b")
    with pytest.raises(LimitReached, match="2 jobs of a are queued; the limit is 3") as refused:
        await store.add_jobs([new_job(**limited), new_job(**limited)], 2.0)
    assert refused.value.may_pass
    jobs += await added(store, **limited)
    for _ in range(2):
        with pytest.raises(LimitReached, match="3 jobs of a are queued"):
            await store.add_job(new_job(**limited), 2.0)
        store = await reopen()
    assert (await claimed(store, limit=1)) == jobs[:1]
    jobs += await added(store, **limited)
    assert await store.requeue_job(jobs[0], 2.0)
    await store.cancel_job(jobs[1], 2.0)
    with pytest.raises(LimitReached, match="3 jobs of a are queued"):
        await store.add_job(new_job(**limited), 2.0)
    with pytest.raises(LimitReached, match="0 jobs of c are queued; the limit is 1") as refused:
        await store.add_jobs([new_job(owner="c", max_queued=1), new_job(owner="c", max_queued=1)], 2.0)
    assert not refused.value.may_pass


async def test_refusal_leaves_the_other_jobs_of_its_transaction(store: Store) -> None:
    jobs = [new_job(owner="a", max_queued=2) for _ in range(4)]
    outcomes = await asyncio.gather(*(store.add_job(job, 1.0) for job in jobs), return_exceptions=True)
    assert outcomes[:2] == [job.id for job in jobs[:2]]
    assert [type(outcome) for outcome in outcomes[2:]] == [LimitReached] * 2
    assert [job.id for _, job in await store.list_jobs()] == outcomes[:2]


# Jobs that have ended before they were queued.


async def test_job_with_an_end_never_starts(reopen: Reopen) -> None:
    store = await reopen()
    [before] = await added(store, queue={"q": 1})
    denied = new_job(queue={"q": 1}, end=DENIED, owner="a")
    alone = new_job(queue={"q": 2}, end=DENIED, owner="a", request_id="r")
    assert await store.add_jobs([denied, alone], 2.0) == [denied.id, alone.id]
    [after] = await added(store, queue={"q": 1})
    for _ in range(2):
        for job in (denied, alone):
            stored = await store.get_job(job.id)
            assert (stored.state, stored.end, stored.started, stored.ended) == (State.FAILED, DENIED, None, 2.0)
        assert await store.list_queues() == [QueueStatus(Raw(b'{"q": 1}'), 1, running=0, queued=2)]
        store = await reopen()
    assert await claimed(store) == [before]
    assert await store.finish_job(before, ENDS[State.RETURNED], 6.0)
    assert await claimed(store) == [after]


# Request ids.


def requested(owner: str, digest: bytes = b"call", **attributes: Any) -> NewJob:
    return new_job(request_id="r", call_digest=digest, request_ids_of=owner, **attributes)


async def test_request_ids_of_two_owners_do_not_meet(reopen: Reopen) -> None:
    store = await reopen()
    jobs = [requested("a"), requested("b", b"other"), requested("c")]
    assert await store.add_jobs(jobs, 1.0) == [job.id for job in jobs]
    for _ in range(2):
        again = [requested("c"), requested("a"), requested("b", b"other")]
        assert await store.add_jobs(again, 2.0) == [jobs[2].id, jobs[0].id, jobs[1].id]
        with pytest.raises(RequestIDReused, match=jobs[1].id):
            await store.add_job(requested("b"), 2.0)
        store = await reopen()
    await store.forget_request_ids(10.0)
    assert len(set(await store.add_jobs([requested("a"), requested("a")], 11.0))) == 1


async def test_request_id_of_all_clients_counts_for_each_owner(store: Store) -> None:
    first = requested("")
    await store.add_job(first, 1.0)
    assert await store.add_job(requested("a"), 2.0) == first.id
    with pytest.raises(RequestIDReused) as refused:
        await store.add_job(requested("a", b"other"), 2.0)
    assert first.id not in str(refused.value), "the job may be of another owner"
    with pytest.raises(RequestIDReused, match=first.id):
        await store.add_job(requested("", b"other"), 2.0)


async def test_upgrade_keeps_request_ids_for_all_clients(tmp_path: Path) -> None:
    write_version(7, tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("INSERT INTO request_ids VALUES (CAST('r' AS BLOB), 9, CAST('call' AS BLOB), 250.0)")
        connection.commit()
    store = await open_store(tmp_path)
    assert (await store.get_job(job_id(9))).owner is None
    assert (await store.get_job(job_id(9))).max_running is None
    assert (await store.get_job(job_id(9))).max_record_bytes is None
    assert await store.add_job(requested("a"), 300.0) == job_id(9)
    assert await store.add_job(requested(""), 300.0) == job_id(9)
    with pytest.raises(RequestIDReused):
        await store.add_job(requested("a", b"other"), 300.0)
    await store.forget_request_ids(260.0)
    job = requested("a", b"other")
    assert await store.add_job(job, 300.0) == job.id
    await store.close()


async def test_limit_of_queued_jobs_counts_those_that_are_being_staged(store: Store) -> None:
    many = [new_job(owner="a", max_queued=1000) for _ in range(1000)]
    single = new_job(owner="a", max_queued=1000)
    results: list[BaseException | str] = []

    def submit_one() -> None:
        """Submit a job of the same owner between two steps; the first step has been inserted."""
        if not tasks and steps:
            tasks.append(asyncio.ensure_future(store.add_job(single, 1.0)))
        steps.append(1)

    steps: list[int] = []
    tasks: list[asyncio.Future[str]] = []
    await store.add_jobs(many, 1.0, submit_one)
    results += await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], LimitReached)
    assert len(await store.list_jobs()) == 1000


async def test_many_jobs_that_are_submitted_again_do_not_count_twice(store: Store) -> None:
    def jobs() -> list[NewJob]:
        return [new_job(owner="a", max_queued=300, request_id=str(number), request_ids_of="a") for number in range(300)]

    stored = await store.add_jobs(jobs(), 1.0)
    assert await store.add_jobs(jobs(), 2.0) == stored
