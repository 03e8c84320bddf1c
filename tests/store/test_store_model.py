"""Random sequences of verbs: each store has the outcomes of the model in memory."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from harp.protocol.ends import End, Failed
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import NO_METADATA, JobMetadata, NewJob, Records, StopState
from harpcaller.model.lanes import canonical
from harpcaller.store import LimitReached, RequestIDReused
from support.backends import BACKENDS, Opener
from support.jobs import ENDS, new_id, new_job
from support.store_model import ModelStore

HOSTS = st.sampled_from(["one", "two", "three"])
# Two of these names are equal as JSON values.
QUEUES = st.sampled_from([Raw(b"{}"), Raw(b'{"a":1,"b":2}'), Raw(b'{ "b": 2.0, "a": 1 }'), Raw(b'{"a":true}')])
SMALL = st.integers(0, 4)
#: Owners, and how many of their jobs may run; the first one has jobs of both kinds.
OWNERS = st.sampled_from([(None, None), ("a", None), ("a", 2), ("b", 1), ("c\ud800", 1)])
#: Request ids and digests of calls; some are submitted again, some are reused for another call.
REQUESTED = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([b"1", b"1", b"1", b"2"])), max_size=5)
END_VALUES = st.sampled_from(list(ENDS.values()))
STOPS = st.sampled_from(list(StopState))
METADATA_VALUES = st.sampled_from([None, Raw(b'{"a": 1.10}'), Raw(b"{}")])
NOT_STARTED = Failed("network_error", "refused")
METADATA = st.just(NO_METADATA) | st.builds(
    JobMetadata, METADATA_VALUES, METADATA_VALUES, METADATA_VALUES, METADATA_VALUES
)


class Comparison(RuleBasedStateMachine):
    """Calls the same verbs of the store and of the model."""

    opener: Opener
    jobs: Bundle[str] = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        self.store = self.runner.run(self.opened())
        self.model = ModelStore()
        self.now = 100.0

    async def opened(self) -> Any:
        return await type(self).opener(self.directory)

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()
        shutil.rmtree(self.directory)

    def both(self, verb: str, *args: object, **options: object) -> Any:
        """Return the outcome of both, a value or the type of an exception; they must be equal."""
        expected = self.outcome(lambda: getattr(self.model, verb)(*args, **options))
        outcome = self.outcome(lambda: self.runner.run(self.called(verb, *args, **options)))
        assert outcome == expected
        return outcome

    async def called(self, verb: str, *args: object, **options: object) -> Any:
        return await getattr(self.store, verb)(*args, **options)

    def outcome(self, asked: Any) -> Any:
        try:
            return asked()
        except (ValueError, LookupError, RequestIDReused, LimitReached) as error:
            return type(error)

    @rule(
        target=jobs,
        host=HOSTS,
        queue=st.none() | QUEUES,
        concurrency=st.integers(1, 3),
        start_within=SMALL,
        owner=OWNERS,
        end=st.none() | st.just(NOT_STARTED),
    )
    def add(
        self,
        host: str,
        queue: Raw | None,
        concurrency: int,
        start_within: int,
        owner: tuple[str | None, int | None],
        end: Failed | None,
    ) -> str:
        submitter: dict[str, Any] = {"owner": owner[0], "max_running": owner[1], "end": end}
        job = new_job(host, queue, concurrency, start_within=float(start_within), **submitter)
        self.both("add_job", job, self.now)
        return job.id

    @rule(
        target=jobs,
        count=st.integers(0, 4),
        owner=OWNERS,
        max_queued=st.none() | st.integers(1, 5),
    )
    def add_limited(self, count: int, owner: tuple[str | None, int | None], max_queued: int | None) -> Any:
        limits: dict[str, Any] = {"owner": owner[0], "max_running": owner[1], "max_queued": max_queued}
        jobs = [new_job("one", **limits) for _ in range(count)]
        outcome = self.both("add_jobs", jobs, self.now)
        return multiple(*(outcome if isinstance(outcome, list) else ()))

    @rule(target=jobs, hosts=st.lists(HOSTS, min_size=5, max_size=20), queue=st.none() | QUEUES)
    def add_at_once(self, hosts: list[str], queue: Raw | None) -> Any:
        jobs = [new_job(host, queue, 2) for host in hosts]
        for job in jobs:
            self.model.add_job(job, self.now)
        assert self.runner.run(self.all_at_once(jobs)) == [job.id for job in jobs]
        return multiple(*(job.id for job in jobs))

    async def all_at_once(self, jobs: list[NewJob]) -> list[Any]:
        return await asyncio.gather(*(self.store.add_job(job, self.now) for job in jobs), return_exceptions=True)

    @rule(target=jobs, requested=REQUESTED, queue=st.none() | QUEUES, owner=st.sampled_from(["", "a", "b"]))
    def add_requested(self, requested: list[tuple[str, bytes]], queue: Raw | None, owner: str) -> Any:
        jobs = [
            new_job("one", queue, request_id=request_id, call_digest=digest, request_ids_of=owner)
            for request_id, digest in requested
        ]
        outcome = self.both("add_jobs", jobs, self.now)
        return multiple(*(outcome if isinstance(outcome, list) else ()))

    @rule(target=jobs, requested=REQUESTED)
    def add_requested_at_once(self, requested: list[tuple[str, bytes]]) -> Any:
        jobs = [new_job("one", request_id=request_id, call_digest=digest) for request_id, digest in requested]
        expected = [self.outcome(lambda job=job: self.model.add_job(job, self.now)) for job in jobs]
        outcomes = self.runner.run(self.all_at_once(jobs))
        assert [outcome if isinstance(outcome, str) else type(outcome) for outcome in outcomes] == expected
        return multiple(*(outcome for outcome in expected if isinstance(outcome, str)))

    @rule(age=SMALL)
    def forget(self, age: int) -> None:
        self.both("forget_request_ids", self.now - age)

    @rule(job_id=jobs)
    def add_again(self, job_id: str) -> None:
        if job_id in self.model.jobs:
            assert self.both("add_job", new_job(id=job_id), self.now) is ValueError

    @rule(limit=SMALL, max_calls_per_host=SMALL)
    def claim(self, limit: int, max_calls_per_host: int) -> None:
        used = Counter(job.host for job in self.model.list_slot_holders())
        for job in self.both("claim_jobs", self.now, limit, max_calls_per_host):
            used[job.host] += 1
            assert used[job.host] <= max_calls_per_host

    @rule(job_id=jobs)
    def requeue(self, job_id: str) -> None:
        self.both("requeue_job", job_id, self.now)

    @rule()
    def requeue_the_first_that_holds(self) -> None:
        self.both("requeue_job", self.first_that_holds(), self.now)

    @rule(host=HOSTS, since=SMALL, failed=SMALL)
    def fail_waiting(self, host: str, since: int, failed: int) -> None:
        self.both("claim_jobs", self.now, 1000, 0)  # finds no host with room
        self.both("fail_waiting", host, NOT_STARTED, self.now, self.now - since, self.now - failed)

    @rule(job_id=jobs, off=st.sampled_from([0, 0, 0, 1, -1]), count=SMALL)
    def append(self, job_id: str, off: int, count: int) -> None:
        first = len(self.model.records.get(job_id, [])) + off
        values = [Raw(b"%d" % n) for n in range(count)]
        self.both("append_records", job_id, first, Records(values, [self.now + n // 2 for n in range(count)]))

    @rule(job_id=jobs, end=END_VALUES, stop=st.none() | STOPS, keep_slot=st.booleans(), metadata=METADATA)
    def finish(self, job_id: str, end: End, stop: StopState | None, keep_slot: bool, metadata: JobMetadata) -> None:
        self.both("finish_job", job_id, end, self.now, stop=stop, keep_slot=keep_slot, metadata=metadata)

    @rule(end=END_VALUES, keep_slot=st.booleans(), metadata=METADATA)
    def finish_the_first_that_holds(self, end: End, keep_slot: bool, metadata: JobMetadata) -> None:
        self.both("finish_job", self.first_that_holds(), end, self.now, keep_slot=keep_slot, metadata=metadata)

    def first_that_holds(self) -> str:
        holders = self.model.list_slot_holders()
        return holders[0].id if holders else new_id()

    @rule(job_id=jobs, stop_request=METADATA_VALUES)
    def cancel(self, job_id: str, stop_request: Raw | None) -> None:
        self.both("cancel_job", job_id, self.now, stop_request)

    @rule(queue=QUEUES, stop_request=METADATA_VALUES, limit=SMALL)
    def cancel_queue(self, queue: Raw, stop_request: Raw | None, limit: int) -> None:
        self.both("cancel_queue", queue, self.now, stop_request, limit=limit)

    @rule(job_id=jobs, first=st.booleans(), stop=STOPS, keep_slot=st.booleans(), metadata=METADATA)
    def finalize_stop(self, job_id: str, first: bool, stop: StopState, keep_slot: bool, metadata: JobMetadata) -> None:
        stopped_job = self.first_that_holds() if first else job_id
        self.both("finalize_stop", stopped_job, stop, keep_slot=keep_slot, metadata=metadata)

    @rule(job_id=jobs, metadata=METADATA)
    def update_metadata(self, job_id: str, metadata: JobMetadata) -> None:
        self.both("update_metadata", job_id, metadata)

    @rule(age=SMALL, limit=SMALL)
    def prune(self, age: int, limit: int) -> None:
        self.both("prune_jobs", self.now - age, limit)

    @rule(step=st.floats(-3, 3))  # the clock may be set back
    def time_passes(self, step: float) -> None:
        self.now += step

    @precondition(lambda self: self.model.jobs)
    @rule()
    def reopen(self) -> None:
        self.runner.run(self.store.close())
        self.store = self.runner.run(self.opened())

    @rule(job_id=jobs, first=SMALL)
    def read(self, job_id: str, first: int) -> None:
        found = self.runner.run(self.called("read_records", job_id, first, 10**6))
        assert found == self.model.read_records(job_id, first)
        self.both("get_job", job_id)
        self.both("get_details", job_id)
        self.both("find_subjects", [job_id, new_id()], 1000)

    @rule(
        ended=st.booleans(),
        newest_first=st.booleans(),
        of=st.just({}) | st.builds(dict, host=HOSTS) | st.builds(dict, queue=QUEUES),
        limit=st.integers(1, 3),
    )
    def list_jobs(self, ended: bool, newest_first: bool, of: dict[str, Any], limit: int) -> None:
        options = {"ended": ended, "newest_first": newest_first, **of}
        found: list[Any] = []
        after = None
        while page := self.runner.run(self.called("list_jobs", **options, after=after, limit=limit)):
            assert len(page) <= limit
            found += [job for _, job in page]
            after = page[-1][0]
        assert found == [job for _, job in self.model.list_jobs(**options)]

    @invariant()
    def lists_are_the_same(self) -> None:
        self.both("list_queues")
        self.both("list_slot_holders")
        listed = self.runner.run(self.called("list_jobs", ended=True))
        expected = self.model.list_jobs(ended=True)
        assert [job for _, job in listed] == [job for _, job in expected]

    @invariant()
    def no_queue_has_more_slots_than_it_may(self) -> None:
        used = Counter(canonical(job.queue) for job in self.model.list_slot_holders() if job.queue is not None)
        for name, count in used.items():
            assert count <= self.model.limits[name][1]


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_random_verbs_have_the_outcome_of_the_model(backend: str) -> None:
    machine = type("ComparisonOf" + backend, (Comparison,), {"opener": staticmethod(BACKENDS[backend])})
    limits = settings(
        max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    run_state_machine_as_test(machine, settings=limits)
