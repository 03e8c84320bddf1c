"""What every store must do: each verb from each start state, unknown jobs, order and limits, races, reopening."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from harp.protocol.ends import Cancelled, Failed, Returned
from harp.protocol.jsontext import Raw
from harpcaller.jobs import ENDED, MISSING_RESULT, TRANSITIONS, Job, State
from harpcaller.store import QueueStatus, Store, UnknownJob
from support.jobs import ENDS, job_in, new_id, new_job

Reopen = Callable[[], Awaitable[Store]]

STATES = pytest.mark.parametrize("state", list(State))
HOUR = 3600.0
MANY = 1000


async def claimed(store: Store, limit: int = MANY, host_concurrency: int = MANY, now: float = 5.0) -> list[str]:
    return [job.id for job in await store.claim_jobs(now, limit, host_concurrency)]


async def added(store: Store, *jobs: object, count: int = 1, **attributes: object) -> list[str]:
    ids = []
    for _ in range(count):
        job = new_job(**attributes)  # type: ignore[arg-type]
        await store.add_job(job, 1.0)
        ids.append(job.id)
    return ids


# A job as it is kept


async def test_a_new_job_is_queued_and_kept_to_the_byte(store: Store) -> None:
    job = new_job(
        "web\ud800\x00",
        Raw(b'{"b":1,  "a":"\\ud800"}'),
        concurrency=3,
        procedure="\ud83d restart",
        arguments=Raw(b'{"z": 1.10, "a": [ ], "n": 10000000000000000000000000000000000000000}'),
        info=Raw(b'" \\ud800 "'),
        timeout=0.25,
        max_exec_time=7,
    )
    await store.add_job(job, 12.75)
    assert await store.get_job(job.id) == Job(
        id=job.id,
        state=State.QUEUED,
        host=job.host,
        procedure=job.procedure,
        arguments=job.arguments,
        timeout=0.25,
        max_exec_time=7.0,
        queue=job.queue,
        info=job.info,
        submitted=12.75,
        started=None,
        ended=None,
        end=None,
        records=0,
    )


async def test_payloads_come_back_as_raw_text(store: Store) -> None:
    job = await store.get_job(await job_in(store, State.RETURNED, queue={}))
    assert isinstance(job.end, Returned)
    assert {type(payload) for payload in (job.arguments, job.info, job.queue, job.end.result)} == {Raw}


async def test_a_large_job_is_kept_whole(store: Store) -> None:
    text = Raw(b'["' + b"x" * 5_000_000 + b'"]')
    job_id = await job_in(store, State.RUNNING, arguments=text, info=text)
    await store.finish_job(job_id, Returned(text), 2.0)
    job = await store.get_job(job_id)
    assert (job.arguments, job.info, job.end) == (text, text, Returned(text))


async def test_an_id_is_used_once(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    with pytest.raises(ValueError, match=job_id):
        await store.add_job(new_job("other", id=job_id), 2.0)
    assert (await store.get_job(job_id)).host == "web01"


@pytest.mark.parametrize("state", [State.RETURNED, State.RAISED, State.FAILED, State.CANCELLED])
async def test_an_end_is_kept_to_the_byte(store: Store, state: State) -> None:
    job_id = await job_in(store, State.RUNNING)
    assert await store.finish_job(job_id, ENDS[state], 9.5)
    job = await store.get_job(job_id)
    assert (job.state, job.end, job.started, job.ended) == (state, ENDS[state], 1.0, 9.5)


# Each verb from each start state


@STATES
@pytest.mark.parametrize("end", list(ENDS))
async def test_finish(store: Store, state: State, end: State) -> None:
    job_id = await job_in(store, state)
    before = await store.get_job(job_id)
    if state in ENDED:
        assert await store.finish_job(job_id, ENDS[end], 9.0) is False
    elif end in TRANSITIONS[state]:
        assert await store.finish_job(job_id, ENDS[end], 9.0) is True
        after = await store.get_job(job_id)
        assert (after.state, after.end, after.started, after.ended) == (end, ENDS[end], before.started, 9.0)
        return
    else:
        with pytest.raises(ValueError, match=state):
            await store.finish_job(job_id, ENDS[end], 9.0)
    assert await store.get_job(job_id) == before


@STATES
async def test_cancel(store: Store, state: State) -> None:
    job_id = await job_in(store, state)
    before = await store.get_job(job_id)
    if State.CANCELLED in TRANSITIONS[state]:
        assert await store.cancel_job(job_id, 9.0) is state
        after = await store.get_job(job_id)
        assert (after.state, after.end, after.ended) == (State.CANCELLED, Cancelled(), 9.0)
        assert after.started == before.started
    else:
        assert await store.cancel_job(job_id, 9.0) is None
        assert await store.get_job(job_id) == before


@STATES
async def test_claim(store: Store, state: State) -> None:
    job_id = await job_in(store, state)
    before = await store.get_job(job_id)
    jobs = await store.claim_jobs(9.0, MANY, MANY)
    if State.RUNNING in TRANSITIONS[state]:
        assert [(job.id, job.state, job.started) for job in jobs] == [(job_id, State.RUNNING, 9.0)]
        assert await store.get_job(job_id) == jobs[0]
    else:
        assert jobs == []
        assert await store.get_job(job_id) == before


@STATES
async def test_append(store: Store, state: State) -> None:
    job_id = await job_in(store, state)
    appended = await store.append_records(job_id, 0, [Raw(b"1"), Raw(b"2")])
    assert appended is (state is State.RUNNING)
    assert (await store.get_job(job_id)).records == (2 if appended else 0)
    assert await store.read_records(job_id, 0, MANY) == ([b"1", b"2"] if appended else [])


@STATES
async def test_cancel_queue(store: Store, state: State) -> None:
    job_id = await job_in(store, state, queue={"a": 1})
    before = await store.get_job(job_id)
    cancelled = await store.cancel_queue(Raw(b'{ "a": 1.0 }'), 9.0)
    after = await store.get_job(job_id)
    if State.CANCELLED in TRANSITIONS[state]:
        assert cancelled == [(job_id, state)]
        assert (after.state, after.ended) == (State.CANCELLED, 9.0)
    else:
        assert cancelled == []
        assert after == before


@STATES
async def test_settle(store: Store, state: State) -> None:
    job_id = await job_in(store, state)
    before = await store.get_job(job_id)
    assert await store.settle_interrupted(MISSING_RESULT, 9.0) == (state is State.RUNNING)
    after = await store.get_job(job_id)
    if state is State.RUNNING:
        assert (after.state, after.end, after.ended) == (State.FAILED, MISSING_RESULT, 9.0)
    else:
        assert after == before


@STATES
async def test_prune(store: Store, state: State) -> None:
    job_id = await job_in(store, state, now=100.0)
    assert await store.prune_jobs(100.0, MANY) == 0, "ended at that time is not before it"
    assert await store.prune_jobs(1e12, MANY) == (state in ENDED)
    if state in ENDED:
        with pytest.raises(UnknownJob):
            await store.get_job(job_id)
    else:
        assert (await store.get_job(job_id)).state is state


@STATES
async def test_list(store: Store, state: State) -> None:
    job_id = await job_in(store, state, queue={"q": 1})
    job = await store.get_job(job_id)
    for queue in (None, Raw(b'{"q": 1}')):
        assert [job for _, job in await store.list_jobs(ended=True, queue=queue)] == [job]
        assert [job for _, job in await store.list_jobs(queue=queue)] == ([] if state in ENDED else [job])
    assert await store.list_jobs(ended=True, queue=Raw(b'{"q": 2}')) == []


@STATES
async def test_reopen(reopen: Reopen, state: State) -> None:
    store = await reopen()
    job_id = await job_in(store, state, queue={"q": 1})
    job, listed, queues = await store.get_job(job_id), await store.list_jobs(ended=True), await store.list_queues()
    store = await reopen()
    assert await store.get_job(job_id) == job
    assert await store.list_jobs(ended=True) == listed
    assert await store.list_queues() == queues


async def test_an_unknown_job(store: Store) -> None:
    await job_in(store, State.RUNNING)
    with pytest.raises(UnknownJob):
        await store.get_job(new_id())
    assert await store.finish_job(new_id(), Cancelled(), 1.0) is False
    assert await store.cancel_job(new_id(), 1.0) is None
    assert await store.append_records(new_id(), 0, [Raw(b"1")]) is False
    assert await store.read_records(new_id(), 0, MANY) == []
    assert await store.cancel_queue(Raw(b"{}"), 1.0) == []


async def test_an_empty_store(store: Store) -> None:
    assert await store.claim_jobs(1.0, MANY, MANY) == []
    assert await store.list_jobs(ended=True) == []
    assert await store.list_queues() == []
    assert await store.settle_interrupted(MISSING_RESULT, 1.0) == 0
    assert await store.prune_jobs(1e12, MANY) == 0


async def test_closing_again_does_nothing(store: Store) -> None:
    await store.close()
    await store.close()


# Order and limits


async def test_jobs_without_a_queue_start_in_order_up_to_the_hosts_limit(store: Store) -> None:
    one = await added(store, count=3, host="one")
    two = await added(store, count=3, host="two")
    assert await claimed(store, host_concurrency=2) == [*one[:2], *two[:2]]
    assert await claimed(store, host_concurrency=2) == []
    await store.finish_job(two[0], ENDS[State.RETURNED], 6.0)
    assert await claimed(store, host_concurrency=2) == [two[2]]
    assert await claimed(store, host_concurrency=3) == [one[2]]


async def test_a_claim_takes_the_first_submitted_and_no_more_than_its_limit(store: Store) -> None:
    ids = []
    for n in range(12):
        ids += await added(store, host=f"host{n % 3}", queue={"n": n % 4} if n % 2 else None, concurrency=MANY)
    assert await claimed(store, limit=0) == []
    assert await claimed(store, limit=5) == ids[:5]
    assert await claimed(store, limit=5) == ids[5:10]
    assert await claimed(store, limit=5) == ids[10:]


async def test_a_queue_starts_in_order_and_within_its_concurrency(store: Store) -> None:
    ids = await added(store, count=5, queue={"q": 1}, concurrency=2)
    assert await claimed(store) == ids[:2]
    await store.finish_job(ids[1], ENDS[State.RAISED], 6.0)
    assert await claimed(store) == [ids[2]]
    await store.cancel_job(ids[3], 6.0)
    await store.cancel_job(ids[0], 6.0)
    assert await claimed(store) == [ids[4]]


async def test_a_queue_is_its_name_as_a_value(store: Store) -> None:
    names = [b'{"a":1,"b":[2]}', b'{ "b": [2.0], "a": 1e0 }', b'{"b":[2],"\\u0061":1}']
    ids = [(await added(store, queue=Raw(name)))[0] for name in names]
    other = await added(store, queue=Raw(b'{"a":true,"b":[2]}'))
    empty = await added(store, queue={})
    assert await claimed(store) == [ids[0], *other, *empty]
    assert [queue.name for queue in await store.list_queues()] == [names[0], b'{"a":true,"b":[2]}', b"{}"]
    assert [job.queue for _, job in await store.list_jobs(queue=Raw(names[2]))] == names


async def test_the_first_job_decides_the_concurrency_until_the_last_has_ended(store: Store) -> None:
    ids = await added(store, queue={}, concurrency=2)
    ids += await added(store, count=3, queue={}, concurrency=9)
    assert await claimed(store) == ids[:2]
    assert await store.list_queues() == [QueueStatus(Raw(b"{}"), 2, running=2, queued=2)]
    for job_id in ids:
        await store.cancel_job(job_id, 6.0)
    assert await store.list_queues() == []
    ids = await added(store, count=4, queue={}, concurrency=3)
    assert await claimed(store) == ids[:3]


@pytest.mark.parametrize("last_end", ["finish", "cancel", "cancel_queue", "settle"])
async def test_a_queue_is_gone_with_its_last_job(store: Store, last_end: str) -> None:
    job_id = await job_in(store, State.RUNNING, queue={}, concurrency=7)
    match last_end:
        case "finish":
            await store.finish_job(job_id, ENDS[State.RETURNED], 6.0)
        case "cancel":
            await store.cancel_job(job_id, 6.0)
        case "cancel_queue":
            await store.cancel_queue(Raw(b"{}"), 6.0)
        case "settle":
            await store.settle_interrupted(MISSING_RESULT, 6.0)
    assert await store.list_queues() == []
    ids = await added(store, count=2, queue={}, concurrency=1)
    assert await claimed(store) == ids[:1]


async def test_a_concurrency_beyond_any_machine(store: Store) -> None:
    ids = await added(store, count=2, queue={}, concurrency=10**40)
    assert await claimed(store) == ids


async def test_behind_a_head_whose_host_is_full_the_queue_waits(store: Store) -> None:
    busy = await added(store, host="full")
    assert await claimed(store, host_concurrency=1) == busy
    queue = await added(store, host="full", queue={}, concurrency=5)
    queue += await added(store, host="free", queue={}, concurrency=5)
    free = await added(store, host="free")
    assert await claimed(store, host_concurrency=1) == free
    await store.finish_job(free[0], ENDS[State.RETURNED], 6.0)
    assert await claimed(store, host_concurrency=1) == []
    await store.finish_job(busy[0], ENDS[State.RETURNED], 6.0)
    assert await claimed(store, host_concurrency=1) == queue


async def test_jobs_of_queues_count_for_their_host(store: Store) -> None:
    queued = await added(store, host="one", queue={"q": 1})
    queued += await added(store, host="one", queue={"q": 2})
    await added(store, host="one", queue={"q": 3})
    await added(store, host="one")
    assert await claimed(store, host_concurrency=2) == queued


async def test_a_job_that_fails_in_the_queue_makes_way(store: Store) -> None:
    ids = await added(store, count=2, queue={})
    assert await store.finish_job(ids[0], Failed("unknown_host", "no such host"), 6.0)
    assert await claimed(store) == ids[1:]


async def test_order_does_not_depend_on_the_clock(store: Store) -> None:
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


async def test_limits_and_order_survive_reopening(reopen: Reopen) -> None:
    store = await reopen()
    ids = await added(store, count=5, queue={}, concurrency=2)
    assert await claimed(store) == ids[:2]
    store = await reopen()
    assert await claimed(store) == []
    assert await store.settle_interrupted(MISSING_RESULT, 6.0) == 2
    assert await claimed(store) == ids[2:4]


async def test_cancelling_a_queue_leaves_the_others(store: Store) -> None:
    ids = await added(store, count=3, queue={"q": 1})
    others = await added(store, count=2, queue={"q": 2}) + await added(store)
    await claimed(store)
    assert await store.cancel_queue(Raw(b'{"q": 1}'), 6.0) == [
        (ids[0], State.RUNNING), (ids[1], State.QUEUED), (ids[2], State.QUEUED),
    ]  # fmt: skip
    assert [job.id for _, job in await store.list_jobs()] == others
    assert await claimed(store) == []


# Records


async def test_records_are_numbered_without_a_gap(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    assert await store.append_records(job_id, 1, [Raw(b"1")]) is False
    assert await store.append_records(job_id, 0, [Raw(b"0")]) is True
    assert await store.append_records(job_id, 0, [Raw(b"0")]) is False, "stored already"
    assert await store.append_records(job_id, 1, []) is True
    assert await store.append_records(job_id, 1, [Raw(b"1"), Raw(b"2")]) is True
    assert (await store.get_job(job_id)).records == 3
    assert await store.read_records(job_id, 0, MANY) == [b"0", b"1", b"2"]
    assert await store.read_records(job_id, 2, MANY) == [b"2"]
    assert await store.read_records(job_id, 3, MANY) == []
    assert await store.read_records(job_id, 10**30, MANY) == []


async def test_records_are_kept_to_the_byte_and_in_order_however_they_come(reopen: Reopen) -> None:
    store = await reopen()
    job_id = await job_in(store, State.RUNNING)
    records = [Raw(b'{"n": %d, "s": "\\ud800%s"}' % (n, b"x" * (n * 37 % 3000))) for n in range(300)]
    at, size = 0, 1
    while at < len(records):
        assert await store.append_records(job_id, at, records[at : at + size])
        at, size = at + size, size * 3 % 50
    store = await reopen()
    assert await store.read_records(job_id, 0, 10**9) == records
    for first in (0, 1, 17, 150, 299):
        assert await store.read_records(job_id, first, 10**9) == records[first:]


async def test_reading_is_bounded_in_bytes(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    await store.append_records(job_id, 0, [Raw(b'"%06d"' % n) for n in range(10_000)])
    await store.append_records(job_id, 10_000, [Raw(b'"' + b"x" * 100_000 + b'"'), Raw(b"1")])
    assert await store.read_records(job_id, 3, 80) == [b'"%06d"' % n for n in range(3, 13)]
    assert [len(record) for record in await store.read_records(job_id, 10_000, 80)] == [100_002]
    found: list[Raw] = []
    while more := await store.read_records(job_id, len(found), 5000):
        assert len(more) == 1 or sum(map(len, more)) <= 5000
        found += more
    assert len(found) == 10_002


async def test_a_record_with_a_line_feed_is_refused(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    with pytest.raises(ValueError, match="line feed"):
        await store.append_records(job_id, 0, [Raw(b"1"), Raw(b"[\n]")])
    assert (await store.get_job(job_id)).records == 0


async def test_records_stay_when_the_job_has_ended_and_go_when_it_is_pruned(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    await store.append_records(job_id, 0, [Raw(b"1")])
    await store.finish_job(job_id, ENDS[State.RETURNED], 6.0)
    assert await store.append_records(job_id, 1, [Raw(b"2")]) is False
    assert await store.read_records(job_id, 0, MANY) == [b"1"]
    assert await store.prune_jobs(7.0, MANY) == 1
    assert await store.read_records(job_id, 0, MANY) == []


# Lists


async def test_a_list_comes_in_pages(store: Store) -> None:
    ids = await added(store, count=7)
    listed, after = [], 0
    while page := await store.list_jobs(after=after, limit=3):
        listed += [job.id for _, job in page]
        after = page[-1][0]
    assert listed == ids
    assert await store.list_jobs(after=10**30) == []


async def test_a_page_is_bounded_in_bytes(store: Store) -> None:
    ids = await added(store, count=20, arguments=Raw(b'["' + b"x" * 1_000_000 + b'"]'))
    page = await store.list_jobs()
    assert 0 < len(page) < 20
    listed = [job.id for _, job in page]
    while page := await store.list_jobs(after=page[-1][0]):
        listed += [job.id for _, job in page]
    assert listed == ids


async def test_pruning_takes_the_oldest_ends_first_up_to_its_limit(store: Store) -> None:
    ids = [await job_in(store, State.RETURNED, now=now) for now in (30.0, 10.0, 20.0)]
    assert await store.prune_jobs(1e12, 2) == 2
    assert [job.id for _, job in await store.list_jobs(ended=True)] == [ids[0]]


async def test_pruning_many_and_much(store: Store) -> None:
    for n in range(150):
        text = Raw(b'"' + b"x" * 100_000 + b'"')
        job_id = await job_in(store, State.RUNNING)
        await store.append_records(job_id, 0, [text] * (3 if n % 50 else 200))
        await store.finish_job(job_id, Returned(text), 2.0)
    running = await job_in(store, State.RUNNING)
    await store.append_records(running, 0, [Raw(b"1")])
    assert await store.prune_jobs(HOUR, MANY) == 150
    assert [job.id for _, job in await store.list_jobs(ended=True)] == [running]
    assert await store.read_records(running, 0, MANY) == [b"1"]


# Races


async def test_of_many_ends_at_once_the_first_wins(store: Store) -> None:
    ids = [await job_in(store, State.RUNNING) for _ in range(20)]
    for job_id in ids:
        finishes = [store.finish_job(job_id, Returned(Raw(b"%d" % n)), 6.0) for n in range(3)]
        *finished, cancelled = await asyncio.gather(*finishes, store.cancel_job(job_id, 6.0))
        outcomes = [*finished, cancelled is not None]
        assert outcomes.count(True) == 1
        won = outcomes.index(True)
        assert (await store.get_job(job_id)).end == (Cancelled() if won == 3 else Returned(Raw(b"%d" % won)))


async def test_a_job_cancelled_before_it_started_never_starts(store: Store) -> None:
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


async def test_many_claims_at_once_stay_within_the_limits(store: Store) -> None:
    ids = await added(store, count=40, queue={}, concurrency=8)
    claims = await asyncio.gather(*(claimed(store, limit=3) for _ in range(10)))
    assert [job_id for ids in claims for job_id in ids] == ids[:8]


async def test_everyone_reads_while_others_write(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    total = 300

    async def follow() -> list[Raw]:
        found: list[Raw] = []
        while len(found) < total:
            found += await store.read_records(job_id, len(found), 200)
            await asyncio.sleep(0)
        return found

    followers = [asyncio.create_task(follow()) for _ in range(20)]
    for n in range(total):
        assert await store.append_records(job_id, n, [Raw(b"%d" % n)])
    for found in await asyncio.gather(*followers):
        assert found == [b"%d" % n for n in range(total)]


async def test_a_cancelled_awaiter_harms_nobody(store: Store) -> None:
    jobs = [new_job() for _ in range(50)]
    tasks = [asyncio.create_task(store.add_job(job, 1.0)) for job in jobs]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is None for result in results[1::2])
    for job in jobs[1::2]:
        assert (await store.get_job(job.id)).state is State.QUEUED
