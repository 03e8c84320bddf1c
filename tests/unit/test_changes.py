"""The change feed without a store: its numbers, resume, and readers that are late, slow or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from typing import Any

import pytest
from msgspec.structs import replace

from harp.protocol.json_text import Raw, dumps
from harpcaller.changes import ChangeFeed, Event, LiveJobs, Position, Reset, Subscription, View
from harpcaller.model.changes import Change, ChangeKind
from harpcaller.model.jobs import JobSummary, State
from support.deadline import eventually


def changes(*job_ids: str) -> list[Change]:
    return [Change(ChangeKind.STARTED, job_id, 1) for job_id in job_ids]


def summary(job_id: str, state: State = State.RUNNING) -> JobSummary:
    return JobSummary(
        seq=1,
        id=job_id,
        state=state,
        host="web01",
        procedure="p",
        queue_id=None,
        queue=None,
        owner=None,
        submitted=1.0,
        started=None,
        ended=None,
        records=0,
        end_type=None,
        end_message=None,
        stop=None,
        holds_slot=False,
        arguments_preview="[]",
        info_preview="null",
        rerun_of=None,
    )


class Jobs:
    """Jobs in memory, and subscriptions to them."""

    def __init__(self) -> None:
        self.stored: dict[str, JobSummary] = {}
        self.reads: list[list[str]] = []
        self.encoded = 0
        self.is_failing = False
        self.write = self._write  # one function, so that views share the text
        self.feed = ChangeFeed()
        self.live = LiveJobs(self.feed, self.read)

    async def read(self, job_ids: Sequence[str], with_subjects: bool) -> list[JobSummary]:
        await asyncio.sleep(0)
        if self.is_failing:
            raise OSError("no disk")
        self.reads.append(list(job_ids))
        return [self.stored[job_id] for job_id in job_ids if job_id in self.stored]

    def _write(self, job: JobSummary, rights: tuple[str, ...]) -> Raw:
        self.encoded += 1
        return dumps({"job": job.id, "state": job.state.value, "can": list(rights), "preview": job.arguments_preview})

    def put(self, *jobs: JobSummary) -> None:
        self.stored |= {job.id: job for job in jobs}
        self.feed.record(changes(*(job.id for job in jobs)))

    def view(
        self, key: str = "all", hidden: AbstractSet[str] = frozenset(), states: AbstractSet[State] = frozenset()
    ) -> View:
        async def select(jobs: Sequence[JobSummary]) -> frozenset[str]:
            return frozenset(job.id for job in jobs if not states or job.state in states)

        def rights(job: JobSummary) -> tuple[str, ...] | None:
            return None if job.id in hidden else ("read",)

        return View(
            (key, frozenset(hidden), frozenset(states)),
            rights,
            select,
            lambda job: bool(states),
            not hidden,
            not hidden and not states,
            self.write,
        )


class Reader:
    """A reader of a subscription."""

    def __init__(self, jobs: Jobs, view: View | None = None, after: Position | None = None) -> None:
        self._ready = asyncio.Event()
        self.subscription: Subscription = jobs.live.subscribe(view or jobs.view(), after, self._ready.set)

    async def event(self) -> Event:
        async with asyncio.timeout(10):
            while (event := self.subscription.next_event()) is None:
                await self._ready.wait()
                self._ready.clear()
        return event

    async def data(self) -> dict[str, Any]:
        return dict(json.loads((await self.event()).data))


def test_the_feed_keeps_the_latest_change_of_each_job() -> None:
    feed = ChangeFeed()
    feed.record(changes("a", "b", "a"))
    assert feed.position == (feed.boot, 3)
    assert feed.changed_since(0) == [("a", 3), ("b", 2)]
    assert feed.changed_since(2) == [("a", 3)]
    assert feed.changed_since(3) == []
    assert feed.changed_since(4) is None


def test_the_feed_forgets_the_oldest_changes() -> None:
    feed = ChangeFeed()
    for number in range(10_000):
        feed.record(changes(str(number), "often"))
    assert len(feed.changed_since(2) or ()) == 10_000
    assert feed.changed_since(0) is None
    assert feed.changed_since(1) is not None


@pytest.mark.parametrize("text", ["", "x", "-", "a-", "a-1.5", "g-1", "0a", "0a-\n"])
def test_other_texts_are_no_position(text: str) -> None:
    assert ChangeFeed().decode_position(text) is None


def test_a_position_is_read_from_its_id_by_its_feed_only() -> None:
    feed = ChangeFeed()
    position = Position(feed.boot, 12)
    event_id = feed.encode_position(position)
    assert feed.decode_position(event_id) == position
    assert ChangeFeed().decode_position(event_id) == (feed.boot, 0), "a reader of another feed gets a reset"
    for changed in (event_id[:-8] + event_id[-7:], f"{event_id}A", f"{feed.boot}-12", f"{feed.boot}-"):
        assert feed.decode_position(changed) is None
    others = {feed.encode_position(Position(feed.boot, 12)) for _ in range(10)}
    assert len(others) == 10, "an id does not show whether another job has changed"


def test_a_tag_of_a_list_differs_after_a_change() -> None:
    feed = ChangeFeed()
    before = feed.sign("newest")
    assert feed.sign("newest") == before != feed.sign("oldest")
    feed.record(changes("a"))
    assert feed.sign("newest") != before


async def test_readers_share_reads_and_texts() -> None:
    jobs = Jobs()
    readers = [Reader(jobs) for _ in range(100)]
    other = Reader(jobs, jobs.view("other"))
    jobs.put(summary("a"), summary("b"))
    events = [await reader.event() for reader in readers]
    assert len(set(map(id, events))) == 1
    assert [row["job"] for row in json.loads(events[0].data)["rows"]] == ["b", "a"]
    assert (await other.event()).data == events[0].data
    assert (jobs.reads, jobs.encoded) == ([["b", "a"]], 2)
    ids = jobs.feed.encode_position
    assert events[0].encode(lambda event, _: event.name.encode(), ids) == b"jobs"
    encode = lambda _, event_id: event_id.encode()  # noqa: E731
    shared = events[0].encode(encode, ids)
    assert events[0].encode(encode, ids) is shared
    assert jobs.feed.decode_position(shared.decode()) == events[0].position


async def test_changes_come_at_most_four_times_a_second() -> None:
    jobs = Jobs()
    reader = Reader(jobs)
    loop = asyncio.get_running_loop()
    times = []
    for _ in range(4):
        jobs.put(summary("a"))
        await reader.event()
        times.append(loop.time())
    assert all(later - earlier >= 0.24 for earlier, later in pairwise(times))


async def test_long_events_to_many_readers_come_less_often() -> None:
    jobs = Jobs()
    readers = [Reader(jobs) for _ in range(400)]
    times = []
    for _ in range(2):
        jobs.put(*(replace(summary(str(each)), arguments_preview="x" * 1000) for each in range(100)))
        assert len((await readers[0].data())["rows"]) == 100
        times.append(asyncio.get_running_loop().time())
    assert times[1] - times[0] > 1.9
    for reader in readers[1:]:
        reader.subscription.close()
    for _ in range(2):  # the first one still comes late
        jobs.put(summary("a"))
        await readers[0].event()
        times.append(asyncio.get_running_loop().time())
    assert times[3] - times[2] < 1.5


async def test_a_reader_gets_what_it_may_see_and_what_fits() -> None:
    jobs = Jobs()
    running = Reader(jobs, jobs.view(states={State.RUNNING}, hidden={"secret"}))
    jobs.put(summary("a"), summary("b", State.FAILED), summary("secret"))
    data = await running.data()
    assert [row["job"] for row in data["rows"]] == ["a"]
    assert (data["left"], data["more"]) == (["b"], 0)
    jobs.put(summary("secret"))  # not even an empty event tells that something has changed
    jobs.put(summary("c"))
    await asyncio.sleep(0.3)
    assert [row["job"] for row in (await running.data())["rows"]] == ["c"]
    assert running.subscription.next_event() is None


async def test_deleted_jobs_are_named_only_to_those_who_see_all() -> None:
    jobs = Jobs()
    everything, some = Reader(jobs), Reader(jobs, jobs.view(hidden={"secret"}))
    jobs.feed.record(changes("gone", "secret"))
    assert await everything.data() == {"rows": [], "left": ["secret", "gone"], "more": 0}
    jobs.put(summary("a"))
    data = await some.data()  # the first event: not even the number of deleted jobs is told
    assert ([row["job"] for row in data["rows"]], data["left"], data["more"]) == (["a"], [], 0)


async def test_an_event_has_a_limited_number_of_rows() -> None:
    jobs = Jobs()
    reader = Reader(jobs)
    jobs.put(*(summary(f"{number:04}") for number in range(1250)))
    data = await reader.data()
    assert [row["job"] for row in data["rows"]] == [f"{number:04}" for number in range(1249, 1049, -1)]
    assert data["more"] == 1050
    assert list(map(len, jobs.reads)) == [500], "later changes are counted without a read"


@pytest.mark.parametrize("states", [frozenset(), {State.RUNNING}])
async def test_an_event_without_all_has_no_row_for_many_readers(states: AbstractSet[State]) -> None:
    """They ask for their lists again in any case."""
    jobs = Jobs()
    readers = [Reader(jobs, jobs.view(states=states)) for _ in range(21)]
    jobs.put(*(summary(str(number)) for number in range(200)))
    assert len((await readers[0].data())["rows"]) == 200
    jobs.reads.clear()
    jobs.put(*(summary(str(number)) for number in range(700)))
    assert await readers[0].data() == {"rows": [], "left": [], "more": 700}
    assert bool(jobs.reads) is bool(states), "without a filter, changes are counted without a read"


async def test_a_reader_goes_on_after_its_position() -> None:
    jobs = Jobs()
    first = Reader(jobs)
    jobs.put(summary("a"))
    position = (await first.event()).position
    first.subscription.close()
    jobs.put(summary("b"), summary("c"))
    again = Reader(jobs, after=position)
    fresh = Reader(jobs)
    event = await again.event()
    assert [row["job"] for row in json.loads(event.data)["rows"]] == ["c", "b"]
    jobs.put(summary("d"))
    assert [row["job"] for row in (await again.data())["rows"]] == ["d"]
    assert [row["job"] for row in (await fresh.data())["rows"]] == ["d"]
    assert fresh.subscription.next_event() is None


async def test_reader_with_an_unknown_position_gets_a_reset() -> None:
    jobs = Jobs()
    jobs.put(*(summary(str(number)) for number in range(10_001)))
    for after, reason in (
        (Position("other", 0), Reset.RESTART),
        (Position(jobs.feed.boot, 0), Reset.GAP),
        (Position(jobs.feed.boot, 99_999), Reset.GAP),
    ):
        reader = Reader(jobs, after=after)
        event = await reader.event()
        assert (event.name, json.loads(event.data)) == ("reset", {"reason": reason.value})
        assert event.position == jobs.feed.position
    assert jobs.live.resets[Reset.GAP] == 2


async def test_reader_that_does_not_read_loses_its_events() -> None:
    jobs = Jobs()
    slow, quick = Reader(jobs), Reader(jobs)
    for number in range(4):
        jobs.put(*(replace(summary(f"{number}-{each}"), arguments_preview="x" * 1000) for each in range(100)))
        assert len((await quick.data())["rows"]) == 100
    event = await slow.event()
    assert (event.name, json.loads(event.data)) == ("reset", {"reason": "slow"})
    jobs.put(summary("z"))
    assert [row["job"] for row in (await quick.data())["rows"]] == ["z"]


async def test_a_change_of_the_rules_ends_subscriptions() -> None:
    jobs = Jobs()
    reader = Reader(jobs)
    told = asyncio.Event()
    jobs.live.watch(None, told.set)
    jobs.live.expel_all()
    assert await reader.data() == {"reason": "access"}
    assert reader.subscription.is_closed
    assert jobs.live.subscribers == 0
    assert told.is_set()


async def test_watchers_are_called_for_their_job_only() -> None:
    jobs = Jobs()
    told: list[str] = []
    end = jobs.live.watch("a", lambda: told.append("a"))
    jobs.live.watch(None, lambda: told.append("any"))
    jobs.put(summary("b"))
    await eventually(lambda: told == ["any"])
    jobs.put(summary("a"))
    await eventually(lambda: told == ["any", "any", "a"])
    end()
    jobs.put(summary("a"))
    await eventually(lambda: told == ["any", "any", "a", "any"])


async def test_a_failed_read_lets_readers_ask_again() -> None:
    jobs = Jobs()

    jobs.is_failing = True
    reader = Reader(jobs)
    jobs.put(summary("a"))
    assert await reader.data() == {"reason": "gap"}
    jobs.is_failing = False
    jobs.put(summary("b"))
    assert [row["job"] for row in (await reader.data())["rows"]] == ["b"]
