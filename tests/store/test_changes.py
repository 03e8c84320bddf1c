"""Changes that a store tells its observers: every committed change once, after the commit, in order."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence

import pytest

from harp.protocol.json_text import Raw
from harpcaller.model.changes import Change, ChangeKind
from harpcaller.model.jobs import State, StopState
from harpcaller.store import RequestIDReused
from harpcaller.store.sqlite import Store
from support.jobs import ENDS, new_job, records


class Observer:
    """Collects changes."""

    def __init__(self, store: Store) -> None:
        self.changes: list[Change] = []
        self.end = store.observe(self.add)

    def add(self, changes: Sequence[Change]) -> None:
        self.changes += changes

    def take(self) -> list[tuple[str, str]]:
        """Return the kinds and jobs of the changes since the last call."""
        taken, self.changes = [(change.kind.value, change.job_id) for change in self.changes], []
        return taken


async def test_each_kind_of_change(store: Store) -> None:
    observer = Observer(store)
    job = new_job(arguments=Raw(b"[1]"))
    await store.add_job(job, 1.0)
    [submitted] = observer.changes
    assert (submitted.kind, submitted.job_id, submitted.at) == (ChangeKind.SUBMITTED, job.id, 1.0)
    assert submitted.job is not None
    assert submitted.job.procedure == "deploy"
    assert observer.take()
    await store.claim_jobs(2.0, 1, 10)
    [started] = observer.changes
    assert (started.kind, started.at, started.seq) == (ChangeKind.STARTED, 2.0, submitted.seq)
    assert started.job is not None
    assert (started.job.submitted, started.job.state) == (1.0, State.RUNNING)
    assert observer.take()
    assert await store.requeue_job(job.id, 2.0)
    assert observer.take() == [("requeued", job.id)]
    await store.claim_jobs(3.0, 1, 10)
    assert await store.append_records(job.id, 0, records([b"1", b'"two"']))
    assert [(each.kind, each.records, each.record_bytes) for each in observer.changes[1:]] == [("records", 2, 6)]
    assert observer.take() == [("started", job.id), ("records", job.id)]
    end = ENDS[State.RETURNED]
    assert await store.finish_job(job.id, end, 4.0, stop=StopState.PENDING, keep_slot=True)
    [ended] = observer.changes
    assert (ended.kind, ended.at, ended.end, ended.stop) == (ChangeKind.ENDED, 4.0, end, StopState.PENDING)
    assert observer.take()
    assert await store.finalize_stop(job.id, StopState.CONFIRMED)
    assert [each.stop for each in observer.changes] == [StopState.CONFIRMED]
    assert observer.take() == [("stop", job.id)]
    assert await store.prune_jobs(5.0, 10) == 1
    assert observer.take() == [("deleted", job.id)]


async def test_many_jobs_of_one_request(store: Store) -> None:
    observer = Observer(store)
    jobs = [new_job() for _ in range(1200)]  # more than one step of staged jobs
    await store.add_jobs(jobs, 1.0)
    assert observer.take() == [("submitted", job.id) for job in jobs]


async def test_verbs_without_effect_change_nothing(store: Store) -> None:
    first = new_job(request_id="r", call_digest=b"1")
    await store.add_job(first, 1.0)
    observer = Observer(store)
    again, other = (new_job(request_id="r", call_digest=digest) for digest in (b"1", b"2"))
    assert await store.add_job(again, 1.0) == first.id
    with pytest.raises(RequestIDReused):
        await store.add_job(other, 1.0)
    assert not await store.finish_job(again.id, ENDS[State.FAILED], 2.0)
    assert not await store.finalize_stop(first.id, StopState.FAILED)
    assert await store.cancel_job(first.id, 2.0) is State.QUEUED
    assert await store.cancel_job(first.id, 2.0) is None
    assert observer.take() == [("ended", first.id)]


async def test_only_the_failed_verb_of_a_batch_has_no_changes(store: Store) -> None:
    stored = new_job()
    await store.add_job(stored, 1.0)
    observer = Observer(store)
    jobs = [new_job(), stored, new_job()]  # the second one exists already: the batch is rolled back and repeated
    outcomes = await asyncio.gather(*(store.add_job(job, 2.0) for job in jobs), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [str, ValueError, str]
    assert observer.take() == [("submitted", jobs[0].id), ("submitted", jobs[2].id)]


async def test_change_of_a_verb_that_nobody_awaits_is_observed(store: Store) -> None:
    observer, cancelled, later = Observer(store), new_job(), new_job()
    store.add_job(cancelled, 1.0).cancel()
    await store.add_job(later, 1.0)
    assert Counter(observer.take()) == {("submitted", cancelled.id): 1, ("submitted", later.id): 1}


async def test_changes_come_before_the_outcome_of_their_verb(store: Store) -> None:
    order: list[str] = []
    store.observe(lambda changes: order.append("change"))
    adding = store.add_job(new_job(), 1.0)
    adding.add_done_callback(lambda _: order.append("outcome"))
    await adding
    assert order == ["change", "outcome"]


async def test_observer_that_fails_disturbs_nobody(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def fail(changes: Sequence[Change]) -> None:
        raise RuntimeError("trouble")

    store.observe(fail)
    observer = Observer(store)
    with caplog.at_level(logging.ERROR):
        await store.add_job(new_job(), 1.0)
    assert len(observer.take()) == 1
    assert "an observer of jobs failed" in caplog.text


async def test_an_ended_observer_gets_no_further_change(store: Store) -> None:
    observer, other = Observer(store), Observer(store)
    observer.end()
    await store.add_job(new_job(), 1.0)
    assert (len(observer.take()), len(other.take())) == (0, 1)
