"""Conformance of every store: the order and limits of claims, and the release of slots."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from msgspec.structs import replace

from harp.protocol.ends import Failed
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import QueuePosition, State, StopState
from harpcaller.store import QueueStatus
from harpcaller.store.sqlite import Store
from support.jobs import ENDS, added, claimed, job_in, new_id, new_job

Reopen = Callable[[], Awaitable[Store]]

MANY = 1000


async def test_claim_jobs_without_queue_respects_the_host_limit(store: Store) -> None:
    one = await added(store, count=3, host="one")
    two = await added(store, count=3, host="two")
    assert await claimed(store, max_calls_per_host=2) == [*one[:2], *two[:2]]
    assert await claimed(store, max_calls_per_host=2) == []
    await store.finish_job(two[0], ENDS[State.RETURNED], 6.0)
    assert await claimed(store, max_calls_per_host=2) == [two[2]]
    assert await claimed(store, max_calls_per_host=3) == [one[2]]


async def test_claim_jobs_with_a_limit_takes_the_first_submitted(store: Store) -> None:
    ids = []
    for n in range(12):
        ids += await added(store, host=f"host{n % 3}", queue={"n": n % 4} if n % 2 else None, concurrency=MANY)
    assert await claimed(store, limit=0) == []
    assert await claimed(store, limit=5) == ids[:5]
    assert await claimed(store, limit=5) == ids[5:10]
    assert await claimed(store, limit=5) == ids[10:]


async def test_claim_jobs_of_a_queue_respects_its_concurrency(store: Store) -> None:
    ids = await added(store, count=5, queue={"q": 1}, concurrency=2)
    assert await claimed(store) == ids[:2]
    await store.finish_job(ids[1], ENDS[State.RAISED], 6.0)
    assert await claimed(store) == [ids[2]]
    await store.cancel_job(ids[3], 6.0)
    await store.finish_job(ids[0], ENDS[State.FAILED], 6.0)
    assert await claimed(store) == [ids[4]]


async def test_queue_names_equal_as_values_are_one_queue(store: Store) -> None:
    names = [b'{"a":1,"b":[2]}', b'{ "b": [2.0], "a": 1e0 }', b'{"b":[2],"\\u0061":1}']
    ids = [(await added(store, queue=Raw(name)))[0] for name in names]
    other = await added(store, queue=Raw(b'{"a":true,"b":[2]}'))
    empty = await added(store, queue={})
    assert await claimed(store) == [ids[0], *other, *empty]
    assert [queue.name for queue in await store.list_queues()] == [names[0], b'{"a":true,"b":[2]}', b"{}"]
    assert [job.queue for _, job in await store.list_jobs(queue=Raw(names[2]))] == names


async def test_queue_concurrency_is_that_of_its_first_job(store: Store) -> None:
    ids = await added(store, queue={}, concurrency=2)
    ids += await added(store, count=3, queue={}, concurrency=9)
    assert await claimed(store) == ids[:2]
    assert await store.list_queues() == [QueueStatus(Raw(b"{}"), 2, running=2, queued=2)]
    for job_id in ids:
        await store.cancel_job(job_id, 6.0)
    assert await store.list_queues() == [QueueStatus(Raw(b"{}"), 2, running=2, queued=0)]
    ids += await added(store, queue={}, concurrency=9)
    assert await claimed(store) == []
    await store.cancel_job(ids[-1], 6.0)
    for job_id in ids[:2]:
        await store.finalize_stop(job_id, StopState.CONFIRMED)
    assert await store.list_queues() == []
    ids = await added(store, count=4, queue={}, concurrency=3)
    assert await claimed(store) == ids[:3]


@pytest.mark.parametrize("last", ["finish", "cancel", "cancel_queue", "finalize"])
async def test_queue_without_jobs_is_removed(store: Store, last: str) -> None:
    job_id = await job_in(store, State.QUEUED, queue={}, concurrency=7)
    if last in ("finish", "finalize"):
        assert await claimed(store) == [job_id]
    match last:
        case "finish":
            await store.finish_job(job_id, ENDS[State.RETURNED], 6.0)
        case "cancel":
            await store.cancel_job(job_id, 6.0)
        case "cancel_queue":
            await store.cancel_queue(Raw(b"{}"), 6.0)
        case "finalize":
            await store.cancel_queue(Raw(b"{}"), 6.0)
            await store.finalize_stop(job_id, StopState.CONFIRMED)
    assert await store.list_queues() == []
    ids = await added(store, count=2, queue={}, concurrency=1)
    assert await claimed(store) == ids[:1]


async def test_queue_with_a_huge_concurrency_is_accepted(store: Store) -> None:
    ids = await added(store, count=2, queue={}, concurrency=10**40)
    assert await claimed(store) == ids


async def test_queue_behind_a_full_host_waits(store: Store) -> None:
    busy = await added(store, host="full")
    assert await claimed(store, max_calls_per_host=1) == busy
    queue = await added(store, host="full", queue={}, concurrency=5)
    queue += await added(store, host="free", queue={}, concurrency=5)
    free = await added(store, host="free")
    assert await claimed(store, max_calls_per_host=1) == free
    await store.finish_job(free[0], ENDS[State.RETURNED], 6.0)
    assert await claimed(store, max_calls_per_host=1) == []
    await store.finish_job(busy[0], ENDS[State.RETURNED], 6.0)
    assert await claimed(store, max_calls_per_host=1) == queue


async def test_jobs_of_a_queue_count_for_their_host(store: Store) -> None:
    queued = await added(store, host="one", queue={"q": 1})
    queued += await added(store, host="one", queue={"q": 2})
    await added(store, host="one", queue={"q": 3})
    await added(store, host="one")
    assert await claimed(store, max_calls_per_host=2) == queued


async def test_queued_job_that_fails_is_followed_by_the_next(store: Store) -> None:
    ids = await added(store, count=2, queue={})
    assert await store.finish_job(ids[0], Failed("unknown_host", "no such host"), 6.0)
    assert await claimed(store) == ids[1:]


async def test_claim_order_does_not_depend_on_the_clock(store: Store) -> None:
    ids = []
    for now in (500.0, 300.0, 400.0, 100.0):
        job = new_job(queue={})
        await store.add_job(job, now)
        ids.append(job.id)
    started = []
    for now in (90.0, 80.0, 70.0, 60.0):
        started += await claimed(store, now=now)
        await store.finish_job(started[-1], ENDS[State.RETURNED], now - 5)
    assert started == ids
    assert [job.id for _, job in await store.list_jobs(ended=True)] == ids


async def test_reopened_store_keeps_limits_and_order(reopen: Reopen) -> None:
    store = await reopen()
    ids = await added(store, count=5, queue={}, concurrency=2)
    assert await claimed(store) == ids[:2]
    await store.cancel_job(ids[0], 6.0)
    store = await reopen()
    assert await claimed(store) == []
    assert [job.id for job in await store.list_slot_holders()] == ids[:2]
    await store.finalize_stop(ids[0], StopState.CONFIRMED)
    await store.finish_job(ids[1], ENDS[State.FAILED], 6.0)
    assert await claimed(store) == ids[2:4]


async def test_cancel_queue_does_not_affect_other_queues(store: Store) -> None:
    ids = await added(store, count=3, queue={"q": 1})
    others = await added(store, count=2, queue={"q": 2}) + await added(store)
    await claimed(store)
    assert await store.cancel_queue(Raw(b'{"q": 1}'), 6.0) == [
        (ids[1], State.QUEUED), (ids[2], State.QUEUED), (ids[0], State.RUNNING),
    ]  # fmt: skip
    assert [job.id for _, job in await store.list_jobs()] == others
    assert await claimed(store) == []


async def test_cancel_queue_with_a_limit_begins_with_queued_jobs(store: Store) -> None:
    ids = await added(store, count=5, queue={}, concurrency=2)
    assert await claimed(store) == ids[:2]
    queue = Raw(b"{}")
    assert await store.cancel_queue(queue, 6.0, limit=2) == [(ids[2], State.QUEUED), (ids[3], State.QUEUED)]
    assert await store.cancel_queue(queue, 7.0, limit=2) == [(ids[4], State.QUEUED), (ids[0], State.RUNNING)]
    assert await store.cancel_queue(queue, 8.0, limit=2) == [(ids[1], State.RUNNING)]
    assert await store.cancel_queue(queue, 9.0, limit=2) == []
    assert [(await store.get_job(job_id)).ended for job_id in ids] == [7.0, 8.0, 6.0, 6.0, 7.0]


# Slots of jobs that have ended


async def test_slot_of_an_ended_job_stays_until_released(store: Store) -> None:
    ids = await added(store, count=3, queue={}, concurrency=1)
    assert await claimed(store) == ids[:1]
    await store.cancel_job(ids[0], 6.0)
    assert await claimed(store) == []
    await store.finalize_stop(ids[0], StopState.FAILED, keep_slot=True)
    assert await claimed(store) == []
    assert await store.finalize_stop(ids[0], StopState.CONFIRMED)
    assert await claimed(store) == ids[1:2]


async def test_slot_of_an_ended_job_counts_for_its_host(store: Store) -> None:
    first = await added(store, queue={"q": 1}, concurrency=9)
    second = await added(store)
    assert await claimed(store, max_calls_per_host=1) == first
    await store.finish_job(first[0], ENDS[State.FAILED], 6.0, keep_slot=True)
    assert await claimed(store, max_calls_per_host=1) == []
    assert await store.finalize_stop(first[0], StopState.FAILED)
    assert await claimed(store, max_calls_per_host=1) == second


async def test_list_slot_holders_is_in_order_of_submission(store: Store) -> None:
    ids = [(await added(store, host=f"host{9 - n}", queue={"q": n} if n % 2 else None))[0] for n in range(8)]
    assert await claimed(store, limit=6) == ids[:6]
    await store.finish_job(ids[1], ENDS[State.RETURNED], 6.0)
    await store.cancel_job(ids[4], 6.0)
    await store.cancel_job(ids[7], 6.0)
    holders = await store.list_slot_holders()
    assert [job.id for job in holders] == [ids[0], *ids[2:6]]
    assert holders == [await store.get_job(job.id) for job in holders]


# Queue positions


async def waiting_of(store: Store, job_id: str) -> QueuePosition:
    waiting = (await store.get_permitted_details(job_id, lambda job: True, 100)).queue_position
    assert waiting is not None
    return waiting


async def test_queue_position_of_a_job_with_a_queue(store: Store) -> None:
    ids = await added(store, count=20, queue={}, concurrency=12)
    assert await claimed(store) == ids[:12]
    await store.cancel_job(ids[3], 6.0)
    await store.finish_job(ids[0], ENDS[State.RETURNED], 6.0)
    await store.cancel_job(ids[15], 6.0)
    others = await added(store) + await added(store, host="other", queue={"q": 1})
    assert await claimed(store) == [ids[12], *others]
    first = QueuePosition(
        1, 12, slots_held=12, slot_holders=tuple(ids[1:11]), slots_held_on_host=13, position_of_owner=1
    )
    assert await waiting_of(store, ids[13]) == first
    assert await waiting_of(store, ids[14]) == replace(first, position=2, position_of_owner=2)
    assert await waiting_of(store, ids[19]) == replace(first, position=6, position_of_owner=6)


async def test_queue_position_of_a_job_without_a_queue(store: Store) -> None:
    queued = await added(store, queue={"q": 1})
    ids = await added(store, count=4)
    assert await claimed(store, max_calls_per_host=3) == [*queued, *ids[:2]]
    assert await waiting_of(store, ids[2]) == QueuePosition(
        1, None, slots_held=2, slot_holders=tuple(ids[:2]), slots_held_on_host=3, position_of_owner=1
    )
    assert (await waiting_of(store, ids[3])).position == 2


async def test_head_of_a_full_host_starts_first_when_released(store: Store) -> None:
    busy = await added(store)
    waits = await added(store, queue={}, concurrency=5)
    assert await claimed(store, max_calls_per_host=1) == busy
    expected = QueuePosition(1, 5, slots_held=0, slot_holders=(), slots_held_on_host=1, position_of_owner=1)
    assert await waiting_of(store, waits[0]) == expected


async def test_details_of_a_new_job_are_those_that_a_thread_reads(store: Store) -> None:
    ids = await added(store, count=3, queue={})
    assert await claimed(store) == ids[:1]
    for job_id in ids:
        assert store.get_new_details(job_id) == await store.get_details(job_id)
    assert store.get_new_details(new_id()) is None


async def test_details_of_a_new_job_count_limited_numbers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long queue is counted by a thread."""
    monkeypatch.setattr("harpcaller.store.sqlite._COUNTED_AT_ONCE", 3)
    ids = await added(store, count=3, queue={})
    assert [store.get_new_details(job_id) is None for job_id in ids] == [False, False, True]
    waiting = (await store.get_details(ids[2])).queue_position
    assert waiting is not None
    assert waiting.position == 3
