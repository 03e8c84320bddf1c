"""Conformance of every store: records and their times, pages of lists, pruning."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from harp.protocol.ends import Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import Records, State, StopState
from harpcaller.store.sqlite import Store
from support.jobs import ENDS, added, claimed, job_in, records

Reopen = Callable[[], Awaitable[Store]]

HOUR = 3600.0
MANY = 1000


# Records


async def test_append_records_with_a_wrong_number_is_rejected(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    assert await store.append_records(job_id, 1, records([b"1"])) is False
    assert await store.append_records(job_id, 0, records([b"0"])) is True
    assert await store.append_records(job_id, 0, records([b"0"])) is False, "already stored"
    assert await store.append_records(job_id, 1, Records()) is True
    assert await store.append_records(job_id, 1, records([b"1", b"2"])) is True
    assert (await store.get_job(job_id)).records == 3
    assert await store.read_records(job_id, 0, MANY) == records([b"0", b"1", b"2"])
    assert await store.read_records(job_id, 2, MANY) == records([b"2"])
    assert await store.read_records(job_id, 3, MANY) == Records()
    assert await store.read_records(job_id, 10**30, MANY) == Records()


async def test_append_records_in_any_batches_keeps_bytes_and_order(reopen: Reopen) -> None:
    store = await reopen()
    job_id = await job_in(store, State.RUNNING)
    values = tuple(Raw(b'{"n": %d, "s": "\\ud800%s"}' % (n, b"x" * (n * 37 % 3000))) for n in range(300))
    made = tuple(1e9 + n // 7 / 3 for n in range(300))
    at, size = 0, 1
    while at < len(values):
        assert await store.append_records(job_id, at, Records(values[at : at + size], made[at : at + size]))
        at, size = at + size, size * 3 % 50
    store = await reopen()
    for first in (0, 1, 17, 150, 299):
        assert await store.read_records(job_id, first, 10**9) == Records(values[first:], made[first:])
    assert (await store.get_details(job_id)).record_bytes == sum(map(len, values))


@pytest.mark.parametrize(
    "made",
    [
        [5.0] * 1000,
        [float(n) for n in range(1000)],
        [float(-n) for n in range(1000)],
        [float(n % 2) for n in range(1000)],
        [1e300, 0.1 + 0.2, 1763868000.123456] * 3,
    ],
    ids=["equal", "increasing", "decreasing", "alternating", "any"],
)
@pytest.mark.parametrize("at_once", [1, 3, 1000])
async def test_append_records_stores_the_time_of_each(store: Store, made: list[float], at_once: int) -> None:
    job_id = await job_in(store, State.RUNNING)
    values = tuple(Raw(b"%d" % n) for n in range(len(made)))
    for at in range(0, len(made), at_once):
        part = slice(at, at + at_once)
        assert await store.append_records(job_id, at, Records(values[part], made[part]))
    assert await store.read_records(job_id, 0, 10**9) == Records(values, tuple(made))
    assert await store.read_records(job_id, 7, 3 * 31) == Records(values[7:10], tuple(made[7:10]))


@pytest.mark.parametrize("times", [0, 1, 3])
async def test_append_records_without_a_time_raises(store: Store, times: int) -> None:
    job_id = await job_in(store, State.RUNNING)
    with pytest.raises(ValueError, match=f"2 records and {times} times"):
        await store.append_records(job_id, 0, Records([Raw(b"1"), Raw(b"2")], [1.0] * times))
    assert (await store.get_job(job_id)).records == 0


async def test_read_records_respects_max_bytes(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    await store.append_records(job_id, 0, records(b'"%06d"' % n for n in range(10_000)))
    await store.append_records(job_id, 10_000, records([b'"' + b"x" * 100_000 + b'"', b"1"]))
    assert await store.read_records(job_id, 3, 380) == records(b'"%06d"' % n for n in range(3, 13))
    assert [len(record) for record in (await store.read_records(job_id, 10_000, 80)).values] == [100_002]
    found: list[bytes] = []
    while more := (await store.read_records(job_id, len(found), 5000)).values:
        assert len(more) == 1 or sum(30 + len(record) for record in more) <= 5000
        found += more
    assert len(found) == 10_002


async def test_append_records_with_a_line_feed_raises(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    with pytest.raises(ValueError, match="line feed"):
        await store.append_records(job_id, 0, records([b"1", b"[\n]"]))
    assert (await store.get_job(job_id)).records == 0


async def test_records_of_an_ended_job_stay_until_pruned(store: Store) -> None:
    job_id = await job_in(store, State.RUNNING)
    await store.append_records(job_id, 0, records([b"1"]))
    await store.finish_job(job_id, ENDS[State.RETURNED], 6.0)
    assert await store.append_records(job_id, 1, records([b"2"])) is False
    assert await store.read_records(job_id, 0, MANY) == records([b"1"])
    assert await store.prune_jobs(7.0, MANY) == 1
    assert await store.read_records(job_id, 0, MANY) == Records()


# Lists


async def test_list_jobs_with_a_limit_returns_pages(store: Store) -> None:
    ids = await added(store, count=7)
    listed, after = [], 0
    while page := await store.list_jobs(after=after, limit=3):
        listed += [job.id for _, job in page]
        after = page[-1][0]
    assert listed == ids
    assert await store.list_jobs(after=10**30) == []


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("of", [{}, {"host": "web01"}, {"queue": Raw(b'{"q": 1}')}], ids=["all", "host", "queue"])
async def test_list_jobs_newest_first_reverses_the_order(store: Store, ended: bool, of: dict[str, Any]) -> None:
    ids = []
    for number in range(10):
        [job_id] = await added(store, host="web01", queue={"q": 1}, concurrency=2)
        await added(store, host="web02", queue={"q": 2})
        await added(store, host="web02")
        ids.append(job_id)
        if number % 3 == 0:  # one in three has ended, the next runs
            assert await store.cancel_job(job_id, 6.0)
            ids = ids if ended else ids[:-1]
        elif number % 3 == 1:
            await claimed(store)
    if not of:
        ids = [job.id for _, job in await store.list_jobs(ended=ended)]
    for newest_first, expected in ((False, ids), (True, ids[::-1])):
        listed, after = [], None
        while page := await store.list_jobs(ended=ended, newest_first=newest_first, after=after, limit=3, **of):
            listed += [job.id for _, job in page]
            after = page[-1][0]
        assert listed == expected
    assert await store.list_jobs(ended=True, newest_first=True, after=1, **of) == []
    assert len(await store.list_jobs(ended=ended, newest_first=True, after=10**30, limit=1, **of)) == 1


async def test_list_jobs_with_host_and_queue_raises(store: Store) -> None:
    with pytest.raises(ValueError, match="expected one of them"):
        await store.list_jobs(host="web01", queue=Raw(b"{}"))


async def test_list_jobs_of_a_host_matches_the_whole_name(store: Store) -> None:
    for host in ("web", "web01", "web01.example", "web\ud800", ""):
        ids = await added(store, host=host, count=2)
        assert [job.id for _, job in await store.list_jobs(host=host)] == ids


async def test_list_jobs_with_long_payloads_returns_short_pages(store: Store) -> None:
    ids = await added(store, count=20, arguments=Raw(b'["' + b"x" * 1_000_000 + b'"]'))
    page = await store.list_jobs()
    assert 0 < len(page) < 20
    listed = [job.id for _, job in page]
    while page := await store.list_jobs(after=page[-1][0]):
        listed += [job.id for _, job in page]
    assert listed == ids


async def test_prune_jobs_with_a_limit_deletes_the_oldest_ends(store: Store) -> None:
    ids = [await job_in(store, State.RETURNED, now=now) for now in (30.0, 10.0, 20.0)]
    assert await store.prune_jobs(1e12, 2) == 2
    assert [job.id for _, job in await store.list_jobs(ended=True)] == [ids[0]]


async def test_prune_jobs_skips_jobs_with_a_slot(store: Store) -> None:
    holders = [await job_in(store, State.RETURNED, 1.0, keep_slot=True) for _ in range(3)]
    await job_in(store, State.RETURNED, 2.0)
    assert await store.prune_jobs(1e12, 1) == 1
    assert [job.id for _, job in await store.list_jobs(ended=True)] == holders
    assert await store.finalize_stop(holders[1], StopState.FAILED)
    assert await store.prune_jobs(1e12, MANY) == 1
    assert [job.id for _, job in await store.list_jobs(ended=True)] == [holders[0], holders[2]]


async def test_prune_jobs_with_many_large_jobs_deletes_all(store: Store) -> None:
    for n in range(150):
        text = Raw(b'"' + b"x" * 100_000 + b'"')
        job_id = await job_in(store, State.RUNNING)
        await store.append_records(job_id, 0, records([text] * (3 if n % 50 else 200)))
        await store.finish_job(job_id, Returned(text), 2.0)
    running = await job_in(store, State.RUNNING)
    await store.append_records(running, 0, records([b"1"]))
    assert await store.prune_jobs(HOUR, MANY) == 150
    assert [job.id for _, job in await store.list_jobs(ended=True)] == [running]
    assert await store.read_records(running, 0, MANY) == records([b"1"])
