"""Lists that the change feed keeps up to date equal a new list, whatever happens to the jobs and to the reader."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from harp.protocol.json_text import Raw
from harpcaller.changes import ChangeFeed, LiveJobs, Position, Subscription, View
from harpcaller.job_rows import write_row
from harpcaller.model.job_filters import JobFilter, parse_search
from harpcaller.model.jobs import JobSummary, State, StopState
from harpcaller.model.matching import matches, may_have_fitted
from harpcaller.store.sqlite import Store
from support.jobs import ENDS, new_job, records

FILTERS = (
    "",
    "state:open",
    "state:running",
    "state:bad",
    "state:failed end_type:timeout",
    "host:web01 state:queued",
    "host:w*1",
    "stop:pending,confirmed",
    "holds_slot:1",
    "info:web01",
    "deploy state:open",
    "arguments:7",
)
STEPS = 60


class Feed:
    """The change feed of a store, as the dispatcher has it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.changes = ChangeFeed()
        self.live = LiveJobs(self.changes, self.read)
        store.observe(self.changes.record)

    async def read(self, job_ids: Sequence[str], with_subjects: bool) -> list[JobSummary]:
        return await self.store.get_summaries(job_ids)

    async def list(self, wanted: JobFilter) -> dict[str, Any]:
        found = await self.store.find_jobs(wanted, limit=1000)
        return {each.id: json.loads(write_row(each, ("read",))) for each in found.summaries}


class Viewer:
    """A reader that keeps a list up to date, and may leave and come again."""

    def __init__(self, feed: Feed, search: str) -> None:
        self.wanted = parse_search(search, 0.0)
        self.rows: dict[str, Any] = {}
        self._feed = feed
        self._position: Position | None = None
        self._subscription: Subscription | None = None
        self._is_outdated = True

    async def _select(self, jobs: Sequence[JobSummary]) -> frozenset[str]:
        found = {job.id: matches(self.wanted, job) for job in jobs}
        in_store = await self._feed.store.select_jobs(self.wanted, list(found))
        assert all(fits is None or fits == (job_id in in_store) for job_id, fits in found.items()), self.wanted
        return in_store

    def come(self) -> None:
        if self._subscription is None:
            select, may_have_fitted_filter = self._select, partial(may_have_fitted, self.wanted)
            fits_all = self.wanted == JobFilter()
            view = View(id(self), lambda job: ("read",), select, may_have_fitted_filter, True, fits_all, write_row)
            self._subscription = self._feed.live.subscribe(view, self._position, lambda: None)
            self._position = self._position or self._feed.changes.position

    def leave(self) -> None:
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    async def read(self) -> None:
        """Apply the events that wait, and ask for the list again if that is needed."""
        while self._subscription is not None:
            if self._is_outdated:
                self._is_outdated = False
                self.rows = await self._feed.list(self.wanted)
            if (event := self._subscription.next_event()) is None:
                return
            self._position = event.position
            data = json.loads(event.data)
            if event.name == "reset" or data["more"]:
                self._is_outdated = True
            else:
                self.rows |= {row["job"]: row for row in data["rows"]}
                for job_id in data["left"]:
                    self.rows.pop(job_id, None)

    @property
    def is_up_to_date(self) -> bool:
        assert self._subscription is not None
        return self._subscription.known == self._feed.changes.number and not self._is_outdated


async def step(store: Store, chance: random.Random, now: float) -> None:
    """Do something to a job."""
    jobs = [job for _, job in await store.list_jobs(ended=True)]
    job = chance.choice(jobs) if jobs else None
    match chance.randrange(9):
        case 0 | 1:
            host = chance.choice(["web01", "web02", "x1"])
            info = Raw(json.dumps({"of": host}).encode())
            await store.add_job(new_job(host, arguments=Raw(b"[%d]" % chance.randrange(9)), info=info), now)
        case 2 | 3:
            await store.claim_jobs(now, chance.randrange(1, 4), 100)
        case 4 if job and job.state is State.RUNNING:
            await store.append_records(job.id, job.records, records([b"1"] * chance.randrange(1, 5)))
        case 5 if job and job.state is State.RUNNING and not job.records:
            await store.requeue_job(job.id, now)
        case 6 if job and job.state is State.RUNNING:
            keeps = chance.random() < 0.3
            stop = StopState.PENDING if keeps else None
            state = chance.choice([State.RETURNED, State.RAISED, State.FAILED])
            await store.finish_job(job.id, ENDS[state], now, keep_slot=keeps, stop=stop)
        case 7 if job:
            await store.cancel_job(job.id, now)
        case 8 if job and chance.random() < 0.7:
            await store.finalize_stop(job.id, chance.choice(list(StopState)[1:]))
        case _:
            await store.prune_jobs(now - 20.0, 3)


@pytest.mark.parametrize("seed", range(4))
async def test_list_kept_by_events_equals_a_new_one(store: Store, seed: int) -> None:
    chance, feed = random.Random(seed), Feed(store)
    viewers = [Viewer(feed, search) for search in FILTERS]
    for number in range(STEPS):
        await step(store, chance, 1000.0 + number)
        for viewer in viewers:
            if chance.random() < 0.15:
                viewer.leave()
            elif chance.random() < 0.4:
                viewer.come()
            if chance.random() < 0.2:
                await viewer.read()
        if chance.random() < 0.1:
            await asyncio.sleep(chance.random() * 0.3)  # for a tick
    for viewer in viewers:
        viewer.come()
    async with asyncio.timeout(30):
        for viewer in viewers:
            await viewer.read()
            while not viewer.is_up_to_date:
                await asyncio.sleep(0.02)
                await viewer.read()
            await viewer.read()
            assert viewer.rows == await feed.list(viewer.wanted), viewer.wanted
    feed.live.close()
