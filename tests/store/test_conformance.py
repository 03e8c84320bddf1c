"""Conformance of every store: each verb in each state, exact payloads, unknown jobs, reopening."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from harp.protocol.ends import Cancelled, Failed, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import (
    ENDED,
    NO_METADATA,
    TRANSITIONS,
    Job,
    JobDetails,
    JobMetadata,
    Records,
    State,
    StopState,
)
from harpcaller.model.lanes import queue_id, queue_lane
from harpcaller.store import QueueStatus, QueueSummary, UnknownJob
from harpcaller.store.sqlite import Store
from support.backends import BACKENDS
from support.jobs import ENDS, STANDS, job_in, new_id, new_job, records

Reopen = Callable[[], Awaitable[Store]]

STARTS = pytest.mark.parametrize(("state", "has_slot"), STANDS)
MANY = 1000

METADATA = JobMetadata(
    call=Raw(b'{"address":"10.0.0.1",  "attempts":1}'),
    stop_request=Raw(b'{"why":"cancel","by":"\\ud800"}'),
    stop_report=Raw(b'{"survivors":[]}'),
    exit_info=Raw(b'{"exit":0,"memory":100000000000000000000}'),
)
STOPPED = Raw(b'{"why":"cancel"}')


async def metadata_of(store: Store, job_id: str) -> JobMetadata:
    return (await store.get_details(job_id)).metadata


# Several jobs in one verb


async def test_add_jobs_with_many_jobs_stores_them_in_order(store: Store) -> None:
    before = await job_in(store, State.QUEUED)
    names = [None, {"q": 1}, {"q": 1.0}, None, {"q": 2}]
    jobs = [new_job(f"host{n % 3}", names[n % 5], concurrency=n + 1, arguments=Raw(b"[%d]" % n)) for n in range(120)]
    await store.add_jobs(jobs, 2.5)
    listed = [job for _, job in await store.list_jobs()]
    assert [job.id for job in listed] == [before, *(job.id for job in jobs)]
    assert [job.arguments for job in listed[1:]] == [job.arguments for job in jobs]
    assert {(job.submitted, job.state) for job in listed[1:]} == {(2.5, State.QUEUED)}
    assert [(queue.name, queue.concurrency) for queue in await store.list_queues()] == [
        (Raw(b'{"q": 1}'), 2),
        (Raw(b'{"q": 2}'), 5),
    ], "the first job of a queue decides its concurrency"
    claimed = await store.claim_jobs(3.0, 3, 1000)
    assert [job.id for job in claimed] == [before, jobs[0].id, jobs[1].id]


async def test_add_jobs_with_a_stored_id_stores_no_job(store: Store) -> None:
    known = await job_in(store, State.RETURNED)
    jobs = [new_job(queue={"q": n}) for n in range(90)]
    with pytest.raises(ValueError, match="already"):
        await store.add_jobs([*jobs, new_job(id=known)], 1.0)
    with pytest.raises(ValueError, match="already"):
        await store.add_jobs([*jobs, jobs[3]], 1.0)
    assert await store.list_jobs() == []
    assert await store.list_queues() == []
    await store.add_jobs([], 1.0)
    await store.add_jobs(jobs, 1.0)
    assert len(await store.list_jobs()) == 90


# A stored job


async def test_add_job_stores_a_queued_job_unchanged(store: Store) -> None:
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


async def test_get_job_returns_payloads_as_raw(store: Store) -> None:
    job_id = await job_in(store, State.RETURNED, queue={})
    await store.update_metadata(job_id, METADATA)
    job = await store.get_job(job_id)
    assert isinstance(job.end, Returned)
    assert {type(payload) for payload in (job.arguments, job.info, job.queue, job.end.result)} == {Raw}
    metadata = await metadata_of(store, job_id)
    assert {
        type(fact) for fact in (metadata.call, metadata.stop_request, metadata.stop_report, metadata.exit_info)
    } == {Raw}


async def test_add_job_with_large_payloads_stores_all_bytes(store: Store) -> None:
    text = Raw(b'["' + b"x" * 5_000_000 + b'"]')
    job_id = await job_in(store, State.RUNNING, arguments=text, info=text)
    await store.finish_job(job_id, Returned(text), 2.0)
    job = await store.get_job(job_id)
    assert (job.arguments, job.info, job.end) == (text, text, Returned(text))


async def test_add_job_with_a_stored_id_raises(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    with pytest.raises(ValueError, match=job_id):
        await store.add_job(new_job("other", id=job_id), 2.0)
    assert (await store.get_job(job_id)).host == "web01"


@pytest.mark.parametrize("state", [State.RETURNED, State.RAISED, State.FAILED, State.CANCELLED])
async def test_finish_job_stores_the_end_unchanged(store: Store, state: State) -> None:
    job_id = await job_in(store, State.RUNNING)
    assert await store.finish_job(job_id, ENDS[state], 9.5)
    job = await store.get_job(job_id)
    assert (job.state, job.end, job.started, job.ended) == (state, ENDS[state], 1.0, 9.5)


# Each verb in each state


@STARTS
@pytest.mark.parametrize("end", list(ENDS))
@pytest.mark.parametrize("keep_slot", [False, True])
async def test_finish_job_follows_the_transitions(
    store: Store, state: State, has_slot: bool, end: State, keep_slot: bool
) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot)
    before = await store.get_job(job_id)
    if state in ENDED:
        assert await store.finish_job(job_id, ENDS[end], 9.0, keep_slot=keep_slot, metadata=METADATA) is False
    elif end in TRANSITIONS[state] and (before.holds_slot or not keep_slot):
        assert await store.finish_job(job_id, ENDS[end], 9.0, keep_slot=keep_slot, metadata=METADATA) is True
        after = await store.get_job(job_id)
        assert (after.state, after.end, after.started, after.ended) == (end, ENDS[end], before.started, 9.0)
        assert (after.holds_slot, after.stop) == (keep_slot, None)
        assert await metadata_of(store, job_id) == METADATA
        return
    else:
        with pytest.raises(ValueError, match=state):
            await store.finish_job(job_id, ENDS[end], 9.0, keep_slot=keep_slot, metadata=METADATA)
    assert await store.get_job(job_id) == before
    assert await metadata_of(store, job_id) == NO_METADATA


@pytest.mark.parametrize("stop", list(StopState))
async def test_finish_job_with_a_stop_stores_it(store: Store, stop: StopState) -> None:
    running = await job_in(store, State.RUNNING)
    assert await store.finish_job(running, ENDS[State.FAILED], 9.0, stop=stop) is True
    after = await store.get_job(running)
    assert (after.state, after.stop, after.holds_slot) == (State.FAILED, stop, False)
    queued = await job_in(store, State.QUEUED)
    with pytest.raises(ValueError, match="queued"):
        await store.finish_job(queued, ENDS[State.FAILED], 9.0, stop=stop)
    assert (await store.get_job(queued)).state is State.QUEUED


@STARTS
async def test_cancel_job_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot)
    before = await store.get_job(job_id)
    if State.CANCELLED in TRANSITIONS[state]:
        assert await store.cancel_job(job_id, 9.0, STOPPED) is state
        after = await store.get_job(job_id)
        assert (after.state, after.end, after.ended) == (State.CANCELLED, Cancelled(), 9.0)
        assert after.started == before.started
        ran = state is State.RUNNING
        assert (after.holds_slot, after.stop) == (ran, StopState.PENDING if ran else None)
        assert await metadata_of(store, job_id) == JobMetadata(stop_request=STOPPED)
    else:
        assert await store.cancel_job(job_id, 9.0, STOPPED) is None
        assert await store.get_job(job_id) == before
        assert await metadata_of(store, job_id) == NO_METADATA


@STARTS
async def test_cancel_queue_cancels_jobs_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot, queue={"a": 1})
    before = await store.get_job(job_id)
    cancelled = await store.cancel_queue(Raw(b'{ "a": 1.0 }'), 9.0, STOPPED)
    after = await store.get_job(job_id)
    if State.CANCELLED in TRANSITIONS[state]:
        assert cancelled == [(job_id, state)]
        assert (after.state, after.ended) == (State.CANCELLED, 9.0)
        ran = state is State.RUNNING
        assert (after.holds_slot, after.stop) == (ran, StopState.PENDING if ran else None)
        assert await metadata_of(store, job_id) == JobMetadata(stop_request=STOPPED)
    else:
        assert cancelled == []
        assert after == before


@STARTS
@pytest.mark.parametrize("keep_slot", [False, True])
@pytest.mark.parametrize("stop", list(StopState))
async def test_finalize_stop_in_each_state(
    store: Store, state: State, has_slot: bool, keep_slot: bool, stop: StopState
) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot)
    before = await store.get_job(job_id)
    finalized = await store.finalize_stop(job_id, stop, keep_slot=keep_slot, metadata=METADATA)
    assert finalized is (state in ENDED and has_slot)
    after = await store.get_job(job_id)
    assert after == (replace(before, stop=stop, holds_slot=keep_slot) if finalized else before)
    assert await metadata_of(store, job_id) == (METADATA if finalized else NO_METADATA)
    assert await store.finalize_stop(job_id, StopState.FAILED) is (finalized and keep_slot), (
        "finalized, and it holds no slot"
    )


@STARTS
async def test_update_metadata_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot)
    before = await store.get_job(job_id)
    assert await store.update_metadata(job_id, NO_METADATA) is True
    assert await metadata_of(store, job_id) == NO_METADATA
    assert await store.update_metadata(job_id, METADATA) is True
    assert await metadata_of(store, job_id) == METADATA
    assert await store.get_job(job_id) == before


@STARTS
async def test_list_slot_holders_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot)
    assert await store.list_slot_holders() == ([await store.get_job(job_id)] if has_slot else [])


async def test_claim_jobs_with_an_early_clock_starts_at_submission(store: Store) -> None:
    job = new_job()
    await store.add_job(job, 9.0)
    assert [claimed.started for claimed in await store.claim_jobs(8.5, MANY, MANY)] == [9.0]
    assert (await store.get_job(job.id)).started == 9.0


@STARTS
async def test_claim_jobs_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot)
    before = await store.get_job(job_id)
    jobs = await store.claim_jobs(9.0, MANY, MANY)
    if State.RUNNING in TRANSITIONS[state]:
        assert jobs == [replace(before, state=State.RUNNING, started=9.0, holds_slot=True)]
        assert await store.get_job(job_id) == jobs[0]
    else:
        assert jobs == []
        assert await store.get_job(job_id) == before


@STARTS
async def test_requeue_job_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot)
    before = await store.get_job(job_id)
    requeued = await store.requeue_job(job_id, 4.0)
    assert requeued is (State.QUEUED in TRANSITIONS[state])
    queued = replace(before, state=State.QUEUED, started=None, holds_slot=False, tried=4.0)
    assert await store.get_job(job_id) == (queued if requeued else before)


async def test_requeue_job_keeps_its_place_and_first_time(store: Store, reopen: Reopen) -> None:
    jobs = [new_job(queue={"q": 1}) for _ in range(3)]
    await store.add_jobs(jobs, 1.0)
    for at in (5.0, 6.0):
        [claimed] = await store.claim_jobs(2.0, MANY, MANY)
        assert claimed.id == jobs[0].id
        assert await store.requeue_job(claimed.id, at)
        store = await reopen()
    assert (await store.get_job(jobs[0].id)).tried == 5.0
    for job in jobs:
        assert [claimed.id for claimed in await store.claim_jobs(7.0, MANY, MANY)] == [job.id]
        assert await store.finish_job(job.id, ENDS[State.RETURNED], 8.0)


async def test_requeue_job_of_a_queue_waits_for_its_host(store: Store) -> None:
    end = ENDS[State.FAILED]
    assert isinstance(end, Failed)
    job_id = await job_in(store, State.RUNNING, queue={"q": 1}, start_within=5.0)
    assert await store.requeue_job(job_id, 2.0)
    assert await store.fail_waiting("web01", end, 3.0, 2.0, 2.0) == ([], 7.0)
    assert await store.fail_waiting("web01", end, 7.0, 2.0, 2.0) == ([job_id], None)


@pytest.mark.parametrize("queue", [None, {"q": 1}])
@pytest.mark.parametrize("restarted", [40.0, 0.0])
async def test_fail_waiting_counts_the_time_of_tried_jobs_only(store: Store, queue: Any, restarted: float) -> None:
    end = ENDS[State.FAILED]
    assert isinstance(end, Failed)
    tried, untried = new_job("a", queue, start_within=50.0), new_job("a", start_within=50.0)
    await store.add_jobs([tried, untried], 1.0)
    [claimed] = await store.claim_jobs(2.0, 1, 1)
    assert claimed.id == tried.id
    assert await store.requeue_job(tried.id, 3.0)
    assert await store.claim_jobs(60.0, MANY, 0) == []
    assert await store.fail_waiting("a", end, 50.0, 45.0, 45.0, 40.0) == ([], 53.0)
    if restarted == 40.0:
        assert await store.fail_waiting("a", end, 60.0, 45.0, 45.0, restarted) == ([tried.id], 95.0)
    else:  # the host was open meanwhile
        assert (await store.fail_waiting("a", end, 60.0, 55.0, 55.0, restarted))[0] == []


async def test_requeue_job_with_records_is_refused(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    assert await store.append_records(job_id, 0, records([b"1"]))
    with pytest.raises(ValueError, match="has started"):
        await store.requeue_job(job_id, 4.0)
    assert (await store.get_job(job_id)).state is State.RUNNING


async def test_claim_jobs_with_a_limit_of_new_jobs_on_a_host(store: Store) -> None:
    jobs = [new_job(host) for host in ("a", "a", "b", "b", "c")]
    await store.add_jobs(jobs, 1.0)
    limits: dict[str, int | None] = {"a": 1, "b": 0, "c": None}
    assert [job.id for job in await store.claim_jobs(2.0, MANY, MANY, limits.__getitem__)] == [jobs[0].id, jobs[4].id]
    assert [job.id for job in await store.claim_jobs(3.0, MANY, MANY)] == [job.id for job in jobs[1:4]]


async def test_fail_waiting_ends_jobs_that_have_waited(store: Store) -> None:
    end = ENDS[State.FAILED]
    assert isinstance(end, Failed)
    long, short, other = (new_job(host, start_within=within) for host, within in (("a", 50.0), ("a", 5.0), ("b", 5.0)))
    first, behind = (new_job("a", {"q": 1}, start_within=within) for within in (20.0, 5.0))
    await store.add_jobs([long, short, other, first, behind], 1.0)
    assert await store.claim_jobs(2.0, MANY, 0) == []
    assert await store.fail_waiting("a", end, 6.0, 3.0, 2.0) == ([], 8.0)
    assert await store.fail_waiting("a", end, 8.0, 3.0, 0.5) == ([], 8.0), "the attempt began before the submission"
    assert await store.fail_waiting("a", end, 8.0, 3.0, 2.0) == ([short.id], 23.0)
    assert (await store.get_job(short.id)).end == end
    assert await store.fail_waiting("a", end, 23.0, 3.0, 2.0) == ([first.id, behind.id], 53.0)
    assert await store.fail_waiting("c", end, 99.0, 3.0, 2.0) == ([], None)
    assert [job.id for job in await store.claim_jobs(30.0, MANY, MANY)] == [long.id, other.id]


@STARTS
async def test_append_records_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot)
    two = records([b"1", b"2"])
    appended = await store.append_records(job_id, 0, two)
    assert appended is (state is State.RUNNING)
    assert (await store.get_job(job_id)).records == (2 if appended else 0)
    assert await store.read_records(job_id, 0, MANY) == (two if appended else Records())


@STARTS
async def test_get_details_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot)
    details = await store.get_details(job_id)
    job, waiting = await store.get_job(job_id), details.queue_position
    queue = None if job.queue is None else queue_id(queue_lane(job.queue))
    assert details == JobDetails(job, NO_METADATA, 0, waiting, queue)
    assert (waiting is not None) is (state is State.QUEUED)


@pytest.mark.parametrize("cancel", [True, False])
async def test_end_is_not_before_start(store: Store, cancel: bool) -> None:
    """The clock may be set back meanwhile."""
    started = await job_in(store, State.RUNNING, now=100.0)
    queued = await job_in(store, State.QUEUED, now=100.0, queue={})
    for job_id in (started, queued):
        if cancel:
            await store.cancel_job(job_id, 50.0)
        else:
            await store.finish_job(job_id, Failed("t", "m"), 50.0)
        job = await store.get_job(job_id)
        assert (job.submitted, job.started or 100.0, job.ended) == (100.0, 100.0, 100.0)


async def test_prune_time_is_stored_in_minutes(store: Store) -> None:
    assert await store.get_prune_time() is None
    await job_in(store, State.RETURNED, now=5000.5)
    assert await store.get_prune_time() == 5000.5
    for time, stored in ((6e8 + 59, 6e8), (-5.0, 60.0), (1e15, 60.0 * (2**31 - 1))):
        await store.set_prune_time(time)
        assert await store.get_prune_time() == stored


@STARTS
async def test_prune_jobs_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    job_id = await job_in(store, state, 100.0, keep_slot=has_slot)
    is_pruned = state in ENDED and not has_slot
    assert await store.update_metadata(job_id, METADATA)
    assert await store.prune_jobs(100.0, MANY) == 0, "a job that ended at this time did not end before it"
    assert await store.prune_jobs(1e12, MANY) == is_pruned
    if is_pruned:
        with pytest.raises(UnknownJob):
            await store.get_details(job_id)
    else:
        assert (await store.get_job(job_id)).state is state
        assert await metadata_of(store, job_id) == METADATA


@STARTS
async def test_list_jobs_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    job_id = await job_in(store, state, keep_slot=has_slot, queue={"q": 1})
    job = await store.get_job(job_id)
    assert (job.state, job.holds_slot) == (state, has_slot)
    choices: list[dict[str, Any]] = [{}, {"queue": Raw(b'{"q": 1}')}, {"host": "web01"}]
    for newest_first in (False, True):
        listed = partial(store.list_jobs, newest_first=newest_first)
        for of in choices:
            assert [job for _, job in await listed(ended=True, **of)] == [job]
            assert [job for _, job in await listed(**of)] == ([] if state in ENDED else [job])
        assert await listed(ended=True, queue=Raw(b'{"q": 2}')) == []
        assert await listed(ended=True, host="web02") == []


@STARTS
async def test_list_queues_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    await job_in(store, state, keep_slot=has_slot, queue={"q": 1}, concurrency=7)
    there = [QueueStatus(Raw(b'{"q": 1}'), 7, running=int(has_slot), queued=int(state is State.QUEUED))]
    assert await store.list_queues() == (there if has_slot or state is State.QUEUED else [])


@STARTS
async def test_summaries_of_queues_and_hosts_in_each_state(store: Store, state: State, has_slot: bool) -> None:
    await job_in(store, state, keep_slot=has_slot, queue={"q": 1}, concurrency=7)
    is_queued = state is State.QUEUED
    expected = (Raw(b'{"q": 1}'), 7, int(has_slot), int(is_queued), is_queued)
    found = [
        (one.name, one.concurrency, one.running, one.queued, one.oldest is not None)
        for one in await store.find_queues(0, MANY)
    ]
    assert found == ([expected] if has_slot or is_queued else [])
    counts = (int(has_slot), int(is_queued))
    assert await store.count_open_of_hosts() == ({"web01": counts} if any(counts) else {})


async def test_queues_are_found_page_by_page_and_by_their_id(store: Store) -> None:
    for number in range(5):
        await job_in(store, State.QUEUED, queue={"q": number})
    pages, after = [], 0
    while page := await store.find_queues(after, 2):
        pages.append([queue.name for queue in page])
        after = page[-1].place
    assert pages == [[b'{"q": 0}', b'{"q": 1}'], [b'{"q": 2}', b'{"q": 3}'], [b'{"q": 4}']]
    lane = queue_lane(Raw(b'{"q":3.0}'))
    [found] = await store.find_queues(0, MANY, lane)
    assert (found.name, "queue:" + found.id) == (b'{"q": 3}', lane)
    assert await store.find_queues(0, MANY, "queue:" + "0" * 32) == []


async def test_queues_and_hosts_of_owners_count_only_their_jobs(store: Store) -> None:
    async def add(owner: str | None, number: int, state: State = State.QUEUED) -> str:
        return await job_in(store, state, owner=owner, queue={"q": number}, host=f"web{number}", concurrency=9)

    own, other = "token:sh\u00f6p", "token:other"
    await add(own, 4, State.RETURNED)
    await add(other, 5, State.RUNNING)
    await add(own, 5, State.RUNNING)
    for owner, number in ((other, 1), (own, 1), (None, 2), (own, 3), (other, 3), (own, 1)):
        await add(owner, number)

    def shown(found: Sequence[QueueSummary]) -> list[tuple[bytes, int, int]]:
        return [(queue.name, queue.running, queue.queued) for queue in found]

    of_own = [(b'{"q": 5}', 1, 0), (b'{"q": 1}', 0, 2), (b'{"q": 3}', 0, 1)]
    found = await store.find_queues(0, MANY, None, [own, "anonymous@l"])
    assert shown(found) == of_own
    assert [queue.oldest is None for queue in found] == [True, False, False]
    everything = {queue.id: queue for queue in await store.find_queues(0, MANY)}
    assert all((everything[queue.id].place, everything[queue.id].concurrency) == (queue.place, 9) for queue in found)
    assert shown(await store.find_queues(found[0].place, 1, None, [own])) == of_own[1:2]
    assert shown(await store.find_queues(0, MANY, queue_lane(Raw(b'{"q":3}')), [own])) == of_own[2:]
    assert await store.find_queues(0, MANY, queue_lane(Raw(b'{"q":2}')), [own]) == []
    assert shown(await store.find_queues(0, MANY, None, [own, other]))[1] == (b'{"q": 1}', 0, 3)
    assert await store.count_open_of_hosts([own]) == {"web1": (0, 2), "web3": (0, 1), "web5": (1, 0)}
    assert await store.count_open_of_hosts(["token:nobody"]) == {}


@STARTS
async def test_reopened_store_has_jobs_in_each_state(reopen: Reopen, state: State, has_slot: bool) -> None:
    store = await reopen()
    job_id = await job_in(store, state, keep_slot=has_slot, queue={"q": 1})
    await store.update_metadata(job_id, METADATA)
    details, listed = await store.get_details(job_id), await store.list_jobs(ended=True)
    queues, holding = await store.list_queues(), await store.list_slot_holders()
    store = await reopen()
    assert await store.get_details(job_id) == details
    assert await store.list_jobs(ended=True) == listed
    assert await store.list_queues() == queues
    assert await store.list_slot_holders() == holding


async def test_verbs_with_an_unknown_job_have_no_effect(store: Store) -> None:
    await job_in(store, State.RUNNING)
    with pytest.raises(UnknownJob):
        await store.get_job(new_id())
    with pytest.raises(UnknownJob):
        await store.get_details(new_id())
    assert await store.finish_job(new_id(), Cancelled(), 1.0, metadata=METADATA) is False
    assert await store.cancel_job(new_id(), 1.0, STOPPED) is None
    assert await store.finalize_stop(new_id(), StopState.CONFIRMED, metadata=METADATA) is False
    assert await store.update_metadata(new_id(), METADATA) is False
    assert await store.append_records(new_id(), 0, records([b"1"])) is False
    assert await store.read_records(new_id(), 0, MANY) == Records()
    assert await store.cancel_queue(Raw(b"{}"), 1.0) == []


async def test_verbs_of_an_empty_store_return_nothing(store: Store) -> None:
    assert await store.claim_jobs(1.0, MANY, MANY) == []
    assert await store.list_jobs(ended=True) == []
    assert await store.list_queues() == []
    assert await store.list_slot_holders() == []
    assert await store.prune_jobs(1e12, MANY) == 0


async def test_close_twice_has_no_effect(store: Store) -> None:
    await store.close()
    await store.close()


# Metadata


@pytest.mark.parametrize("name", ["call", "stop_request", "stop_report", "exit_info"])
async def test_update_metadata_with_one_column_keeps_the_others(store: Store, name: str) -> None:
    job_id = await job_in(store, State.RUNNING)
    one = JobMetadata(**{name: Raw(b'{ "a" : 1.10 }')})
    await store.update_metadata(job_id, one)
    assert await metadata_of(store, job_id) == one
    await store.update_metadata(job_id, METADATA)
    await store.update_metadata(job_id, one)
    assert await metadata_of(store, job_id) == replace(METADATA, **{name: Raw(b'{ "a" : 1.10 }')})


async def test_finish_job_with_metadata_keeps_earlier_metadata(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    await store.update_metadata(job_id, JobMetadata(call=METADATA.call))
    await store.cancel_job(job_id, 9.0, STOPPED)
    await store.finalize_stop(job_id, StopState.CONFIRMED, metadata=JobMetadata(stop_report=METADATA.stop_report))
    assert await metadata_of(store, job_id) == JobMetadata(
        call=METADATA.call, stop_request=STOPPED, stop_report=METADATA.stop_report
    )


async def test_large_metadata_is_stored_whole_and_pruned(store: Store) -> None:
    large = JobMetadata(exit_info=Raw(b'{"stderr":["' + b"x" * 5_000_000 + b'"]}'))
    job_id = await job_in(store, State.RUNNING)
    assert await store.finish_job(job_id, ENDS[State.RAISED], 9.0, metadata=large)
    assert await metadata_of(store, job_id) == large
    assert await store.prune_jobs(10.0, MANY) == 1


# Identity


async def test_get_identity_after_reopening_is_the_same(reopen: Reopen) -> None:
    store = await reopen()
    identity = await store.get_identity()
    assert await store.get_identity() == identity
    assert len(bytes.fromhex(identity.owner)) == 16
    assert len(identity.key) == 32
    store = await reopen()
    assert await store.get_identity() == identity


async def test_get_identity_of_two_stores_differs(tmp_path: Path, store: Store, request: pytest.FixtureRequest) -> None:
    other = await BACKENDS[request.node.callspec.params["reopen"]](tmp_path / "other")
    first, second = await store.get_identity(), await other.get_identity()
    await other.close()
    assert first.owner != second.owner
    assert first.key != second.key


async def test_list_ended_since_has_later_ends(store: Store) -> None:
    ids = []
    for number in range(4):
        ids.append(await store.add_job(new_job(), 1.0))
        await store.cancel_job(ids[-1], 100.0 + number)
    await store.add_job(new_job(), 1.0)
    assert [job.id for job in await store.list_ended_since(101.0, 10)] == ids[1:]
    assert [job.id for job in await store.list_ended_since(101.0, 2)] == ids[1:3]
