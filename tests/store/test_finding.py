"""Conformance of every store: lists, counts and statistics by a filter equal a plain look at all jobs."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from harp.protocol.ends import End, Failed, Raised, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.job_filters import BAD, NO_QUEUE, OPEN, JobFilter, Span
from harpcaller.model.jobs import ENDED, Job, JobSummary, State, StopState, Subject
from harpcaller.model.lanes import queue_lane
from harpcaller.store.sqlite import Store
from harpcaller.store.sqlite.searches import Found
from support.backends import BACKENDS
from support.jobs import new_job

HOSTS = ["web01", "web02", "db01", "w\ud800", "a\x00b"]
PROCEDURES = ["deploy", "Backup", "b\u00e4ckup"]
QUEUES: list[Any] = [None, None, {"q": 1}, {"q": 2}]
OWNERS = [None, "token:alice", "token:bob"]
INFOS = [b"null", b'"k\\u00e4se"', b'"K\\u00E4se"', '"k\u00e4se"'.encode(), b'{"order": "A\\"7"}', b'"\\ud83d\\ude00"']
ENDS: list[End] = [
    Returned(Raw(b"1")),
    Raised("ValueError", "Kein K\u00e4se", Raw(b"null")),
    Raised("KeyError\ud800", "x" * 300),
    Failed("timeout", "3 s are OVER"),
]
JOBS = 160
STOPS = [None, None, *StopState]


class World:
    """A store with jobs of every kind, and the jobs in the order of submission."""

    def __init__(self, store: Store, jobs: list[tuple[int, Job]], reruns: Mapping[str, str]) -> None:
        self.store, self.jobs, self.reruns = store, jobs, reruns


async def populate(store: Store, count: int, seed: int = 1) -> World:
    """Store jobs in all states. The clock is set back a few times."""
    random, now, reruns = Random(seed), 1000.0, dict[str, str]()
    ids: list[str] = []
    for number in range(count):
        now += random.choice([0.0, 1.0, 2.5, -30.0 if number % 20 == 7 else 3.0])
        rerun_of = random.choice([None, None, None, *ids[-1:]])
        job = new_job(
            random.choice(HOSTS),
            random.choice(QUEUES),
            concurrency=1000,
            procedure=random.choice(PROCEDURES),
            owner=random.choice(OWNERS),
            info=Raw(random.choice(INFOS)),
            arguments=Raw(random.choice([b"[]", b'["a,b"]', b'{"x": 1.50}', b"[" + b"1," * 3000 + b"1]"])),
            rerun_of=rerun_of,
        )
        await store.add_job(job, now)
        ids.append(job.id)
        if rerun_of is not None:
            reruns[job.id] = rerun_of
    claimed = await store.claim_jobs(now, count * 3 // 4, 100_000)
    for running in claimed[: count // 2]:
        end, stop, at = random.choice(ENDS), random.choice(STOPS), now + random.randrange(100)
        await store.finish_job(running.id, end, at, stop=stop, keep_slot=stop is StopState.PENDING)
    for running in claimed[count // 2 : count * 5 // 8]:
        await store.cancel_job(running.id, now + random.randrange(100))
    waiting = [job.id for _, job in await store.list_jobs() if job.state is State.QUEUED]
    for job_id in waiting[: len(waiting) // 2]:
        await store.cancel_job(job_id, now + random.randrange(100))
    return World(store, await store.list_jobs(ended=True), reruns)


def plain(text: str) -> str:
    """Return a JSON text without escape sequences of characters beyond ASCII."""
    return re.sub(r"(\\u[0-9a-fA-F]{4})+", lambda match: json.loads(f'"{match[0]}"'), text)


def lower(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass").lower()  # ASCII only


def fits(job: Job, wanted: JobFilter, reruns: Mapping[str, str]) -> bool:
    """Return whether a job fits a filter, part by part."""
    is_bad = isinstance(job.end, Raised | Failed)
    end_type = job.end.type if isinstance(job.end, Raised | Failed) else None
    message = job.end.message[:200] if isinstance(job.end, Raised | Failed) else ""
    info, arguments = job.info.decode(), job.arguments.decode()
    texts = [job.host, job.procedure, message, plain(info)]

    def has_word(word: str) -> bool:
        return any(lower(word) in lower(text) for text in texts) or lower(json.dumps(word)[1:-1]) in lower(info)

    def match_pattern(pattern: str) -> bool:
        start, _, end = pattern.partition("*")
        return len(job.host) >= len(start + end) and job.host.startswith(start) and job.host.endswith(end)

    return all(
        (
            not wanted.states or job.state in wanted.states,
            not wanted.hosts or job.host in wanted.hosts,
            wanted.host_pattern is None or match_pattern(wanted.host_pattern),
            not wanted.procedures or job.procedure in wanted.procedures,
            not wanted.owners or job.owner in wanted.owners,
            wanted.queue is None or queue_id(job) == wanted.queue,
            wanted.submitted.match(job.submitted),
            wanted.started.match(job.started),
            wanted.ended.match(job.ended),
            not wanted.end_types or (is_bad and end_type in wanted.end_types),
            not wanted.stops or job.stop in wanted.stops,
            wanted.holds_slot is None or job.holds_slot is wanted.holds_slot,
            wanted.info is None or wanted.info in plain(info),
            wanted.arguments is None or wanted.arguments in plain(arguments),
            wanted.rerun_of is None or reruns.get(job.id) == wanted.rerun_of,
            wanted.id_start is None or job.id.startswith(wanted.id_start),
            all(map(has_word, wanted.text)),
        )
    )


def subset(values: list[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(values), max_size=3, unique=True).map(tuple)


TIMES = st.one_of(st.none(), st.floats(900, 1500))
SPANS = st.builds(Span, TIMES, TIMES)
STATES = st.one_of(st.sampled_from([ENDED, OPEN, BAD]), subset(list(State)).map(frozenset))


INDEXES = st.integers(0, JOBS - 1)
PARTS: dict[str, st.SearchStrategy[Any]] = {
    "states": STATES,
    "hosts": subset([*HOSTS[:3], HOSTS[4]]),
    "host_pattern": st.sampled_from(["web*", "*01", "*", "w*1", "web0*01", "nothing*"]),
    "procedures": subset([*PROCEDURES, "unknown"]),
    "owners": subset(["token:alice", "token:bob", "token:eve"]),
    "queue": st.sampled_from([NO_QUEUE, *(queue_lane(Raw(b'{"q":%d}' % n)).removeprefix("queue:") for n in (1, 3))]),
    "submitted": SPANS,
    "started": SPANS,
    "ended": SPANS,
    "end_types": subset(["timeout", "ValueError", "host_lost"]),
    "stops": subset(list(StopState)).map(frozenset),
    "holds_slot": st.booleans(),
    "info": st.sampled_from(["k\u00e4se", "\u00e4", "\U0001f600", '": "A', "null"]),
    "arguments": st.sampled_from(["a,b", "1.50", "1,1,1"]),
    "rerun_of": INDEXES,
    "id_start": st.tuples(INDEXES, st.integers(8, 36)),
    "text": subset(["BACKUP", "k\u00e4se", "over", 'a"7', "web", "none of these"]),
}


#: The parts of a filter: any, mostly few.
DRAWN = st.lists(st.sampled_from(sorted(PARTS)), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: PARTS[name] for name in names})
)
OWN = st.sampled_from([None, ("token:alice",), ("token:alice", "token:bob", "token:alice")])
SIZES = st.sampled_from([20, 10_000])


def filter_of(drawn: dict[str, Any], world: World) -> JobFilter:
    parts = dict(drawn)
    if "rerun_of" in parts:
        parts["rerun_of"] = world.jobs[parts["rerun_of"]][1].id
    if "id_start" in parts:
        index, size = parts["id_start"]
        parts["id_start"] = world.jobs[index][1].id[:size]
    return JobFilter(**parts)


async def find_all(store: Store, wanted: JobFilter, **options: Any) -> tuple[list[JobSummary], list[Found]]:
    """Return the jobs of all pages, and the pages."""
    pages: list[Found] = []
    while not pages or pages[-1].next is not None:
        after = pages[-1].next if pages else None
        pages.append(await store.find_jobs(wanted, after=after, **options))
        assert pages[-1].complete is (pages[-1].next is None)
        assert len(pages) < 1000
    return [summary for page in pages for summary in page.summaries], pages


Run = Callable[..., Any]  # calls a verb, and returns what its awaitable returns


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:

        def call(verb: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
            async def await_it() -> Any:
                return await verb(*args, **options)

            return runner.run(await_it())

        yield call


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run: Run) -> Iterator[World]:
    store = run(BACKENDS[request.param], tmp_path_factory.mktemp("store") / "store")
    run(use_all_readers, store)  # they start their threads when they are needed, but no test may leave a thread
    yield run(populate, store, JOBS)
    run(store.close)


async def use_all_readers(store: Store) -> None:
    await asyncio.gather(*(store.find_jobs(JobFilter(), permits=lambda _: True) for _ in range(50)))
    await store.find_jobs(JobFilter())  # of which one is read at a time


def test_jobs_are_of_every_kind(world: World) -> None:
    jobs = [job for _, job in world.jobs]
    assert {job.state for job in jobs} == set(State)
    assert {job.stop for job in jobs} >= {None, *StopState}
    assert any(before.submitted > after.submitted + 20 for before, after in pairwise(jobs)), "the clock was set back"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=DRAWN, newest_first=st.booleans(), limit=st.sampled_from([7, 500]), examine=SIZES, owners=OWN)
def test_find_jobs_equals_a_look_at_all_jobs(
    world: World,
    run: Run,
    drawn: dict[str, Any],
    newest_first: bool,
    limit: int,
    examine: int,
    owners: tuple[str, ...] | None,
) -> None:
    wanted = filter_of(drawn, world)
    options = {"newest_first": newest_first, "limit": limit, "examine": examine, "owners": owners}
    found, pages = run(find_all, world.store, wanted, **options)
    expected = [
        job.id for _, job in world.jobs if fits(job, wanted, world.reruns) and (owners is None or job.owner in owners)
    ]
    assert [summary.id for summary in found] == (expected[::-1] if newest_first else expected)
    assert all(len(page.summaries) <= limit and page.examined <= examine for page in pages)
    most = sum(owners is None or job.owner in owners for _, job in world.jobs)
    assert len(expected) <= sum(page.examined for page in pages) <= most


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=DRAWN, examine=SIZES)
def test_find_jobs_with_permits_leaves_out_other_jobs(
    world: World, run: Run, drawn: dict[str, Any], examine: int
) -> None:
    wanted = filter_of(drawn, world)
    permits = lambda subject: subject.host == "web01" and subject.owner != "token:bob"  # noqa: E731
    found, pages = run(find_all, world.store, wanted, examine=examine, permits=permits, subject_bytes=100)
    expected = [
        job
        for _, job in world.jobs
        if fits(job, wanted, world.reruns) and job.host == "web01" and job.owner != "token:bob"
    ]
    assert [summary.id for summary in found] == [job.id for job in reversed(expected)]
    assert sum(page.examined for page in pages) == len(expected), "other jobs are not counted"
    times = {job.submitted for job in expected}
    assert {page.searched_to for page in pages} <= {None, *times}, "nor do they show in a time"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=DRAWN, owners=OWN)
def test_count_jobs_equals_a_look_at_all_jobs(
    world: World, run: Run, drawn: dict[str, Any], owners: tuple[str, ...] | None
) -> None:
    wanted = filter_of(drawn, world)
    counts = run(world.store.count_jobs, wanted, list(WITHOUT), owners=owners)
    assert counts.exact
    for facet, (without, value_of) in WITHOUT.items():
        rest = replace(wanted, **without)
        jobs = [job for _, job in world.jobs if fits(job, rest, world.reruns) and (not owners or job.owner in owners)]
        expected = Counter(value_of(job) for job in jobs)
        del expected[None]
        assert {each.value: each.count for each in counts.by[facet]} == expected, facet
        assert not any(each.more for each in counts.by[facet])


#: The parts of a filter that each facet is counted without, and the facet of a job.
WITHOUT: Mapping[str, tuple[dict[str, Any], Callable[[Job], str | None]]] = {
    "state": ({"states": frozenset()}, lambda job: job.state.value),
    "host": ({"hosts": (), "host_pattern": None}, lambda job: job.host),
    "procedure": ({"procedures": ()}, lambda job: job.procedure),
    "queue": ({"queue": None}, lambda job: queue_id(job)),
    "owner": ({"owners": ()}, lambda job: job.owner),
    "end_type": ({"end_types": ()}, lambda job: job.end.type if isinstance(job.end, Raised | Failed) else None),
}


def queue_id(job: Job) -> str:
    return NO_QUEUE if job.queue is None else lane_id(job.queue)


def lane_id(name: bytes) -> str:
    return queue_lane(Raw(name)).removeprefix("queue:")


@settings(max_examples=25, deadline=None)
@given(since=st.integers(900, 1300).map(float), steps=st.integers(1, 30), step=st.sampled_from([0.5, 10.0, 60.0]))
def test_statistics_equal_a_look_at_all_jobs(world: World, run: Run, since: float, steps: int, step: float) -> None:
    until = since + steps * step
    for owners in (None, ("token:alice", "token:bob")):
        statistics = run(world.store.job_statistics, since, until, step, owners=owners)
        jobs = [job for _, job in world.jobs if owners is None or job.owner in owners]
        assert [bucket.at for bucket in statistics.buckets] == [since + number * step for number in range(steps)]
        for name in ("submitted", "returned", "raised", "failed", "cancelled"):
            times = [job.submitted for job in jobs if name == "submitted"]
            times += [job.ended for job in jobs if job.state.value == name and job.ended is not None]
            expected = Counter(int((time - since) / step) for time in times if since <= time < until)
            assert {
                number: getattr(bucket, name)
                for number, bucket in enumerate(statistics.buckets)
                if getattr(bucket, name)
            } == expected, name


def test_summaries_have_the_attributes_of_the_jobs(world: World, run: Run) -> None:
    found = run(world.store.find_jobs, JobFilter(), newest_first=False, limit=500, subject_bytes=100).summaries
    assert run(world.store.get_summaries, [job.id for _, job in world.jobs], subject_bytes=100) == found
    assert run(world.store.get_summaries, ["unknown", new_job().id]) == []
    for summary, (seq, job) in zip(found, world.jobs, strict=True):
        bad = job.end if isinstance(job.end, Raised | Failed) else None
        assert summary == JobSummary(
            seq=seq,
            id=job.id,
            state=job.state,
            host=job.host,
            procedure=job.procedure,
            queue_id=None if job.queue is None else queue_id(job),
            queue=job.queue,
            owner=job.owner,
            submitted=job.submitted,
            started=job.started,
            ended=job.ended,
            records=job.records,
            end_type=None if bad is None else bad.type,
            end_message=None if bad is None else bad.message[:200],
            stop=job.stop,
            holds_slot=job.holds_slot,
            arguments_preview=job.arguments.decode()[:200],
            info_preview=job.info.decode()[:200],
            rerun_of=world.reruns.get(job.id),
            subject=Subject(job.owner, job.host, job.procedure, Raw(job.arguments[:100]), job.queue, False),
        )
