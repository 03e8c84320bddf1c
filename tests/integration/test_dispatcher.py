"""The dispatcher as the APIs use it: jobs, queues, streams, restart and shutdown."""

from __future__ import annotations

import asyncio
import gc
import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harp.protocol.dispatcher import Continue
from harp.protocol.ends import Cancelled, End, Failed, Returned
from harp_daemon.settings import ConfigError
from harpcaller.config import Config
from harpcaller.health import Health
from harpcaller.model.jobs import State
from harpcaller.notifier import RecordBatch
from harpcaller.store import StorageError, UnknownJob
from harpcaller.store.sqlite import open_store
from support.certificates import server_files
from support.deadline import eventually
from support.dispatcher import (
    Switched,
    call,
    collected,
    decoded,
    follow,
    followed,
    host_line,
    hosts_file,
    raw,
    read,
    result,
    running,
    until,
)
from support.jobs import job_in
from support.peers import Peer, PeerConnection, Script, server_context

ACKNOWLEDGED = {"harp": 1, "stream_result": False}
STREAMING = {"harp": 1, "stream_result": True}
UNKNOWN_ID = str(uuid.UUID(int=0))


class GatedHost:
    """A host whose calls wait until the test releases them; it counts the running calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._released = threading.Semaphore(0)
        self.begun_calls: list[Any] = []
        self.running = 0
        self.max_running = 0

    def script(self, conn: PeerConnection) -> None:
        request = conn.expect()
        with self._lock:
            self.begun_calls.append(request["arguments"])
            conn.reply(ACKNOWLEDGED)  # a test that waits for the call may then stop the dispatcher
            self.running += 1
            self.max_running = max(self.max_running, self.running)
        assert self._released.acquire(timeout=60)
        with self._lock:
            self.running -= 1
        conn.reply({"result": request["arguments"]})

    def release(self, calls: int) -> None:
        self._released.release(calls)


def echo(conn: PeerConnection) -> None:
    request = conn.expect()
    conn.reply(ACKNOWLEDGED, {"result": request["arguments"]})


@contextmanager
def host(directory: Path, script: Script, first: tuple[Script, ...] = ()) -> Iterator[Peer]:
    """Run a host. Its first calls follow `first`, later calls `script`."""
    with Peer(*first, always=script, tls=server_context(server_files(directory))) as peer:
        yield peer


async def test_failed_request_whose_client_has_left_is_no_unexpected_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun, released, failed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def record(_: object) -> None:
        begun.set()
        await released.wait()
        failed.set()
        raise StorageError("no room")

    async with running(tmp_path) as dispatcher:
        request = asyncio.create_task(dispatcher.submit_many([call()], "test", record=record))
        await begun.wait()
        request.cancel()
        await asyncio.wait([request])
        released.set()
        await failed.wait()
    del request
    gc.collect()
    assert [event.message for event in caplog.records if event.levelname == "ERROR"] == []


async def test_submit_and_claim_share_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    plain = sqlite3.connect

    def traced(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = plain(*args, **options)
        connection.set_trace_callback(done.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    store = await open_store(tmp_path / "store")

    async def in_one_commit() -> bool:
        """Run a job; return False if a claim for the end of the previous job was made first."""
        done.clear()
        await result(dispatcher)
        (added,) = {statement for statement in done if statement.startswith("INSERT INTO jobs")}
        return "'running'" in added

    with host(tmp_path, echo) as peer:
        async with running(tmp_path, host_line(peer.port), store=store) as dispatcher:
            predicate: Callable[[], bool | Awaitable[bool]] = in_one_commit
            await eventually(predicate, what="a job that is stored and has its slot in one commit")
    await store.close()


async def test_submit_lowers_limits_to_the_configured_limits(tmp_path: Path) -> None:
    async with running(tmp_path, default_timeout=20.0, max_exec_time=30.0) as dispatcher:
        for asked, stored in (((None, None), (20.0, 30.0)), ((5, 6.5), (5.0, 6.5)), ((10**40, 31), (20.0, 30.0))):
            job_id = await dispatcher.submit(call(timeout=asked[0], max_exec_time=asked[1]), "test")
            job = await dispatcher.get_job(job_id)
            assert (job.timeout, job.max_exec_time) == stored


async def test_submit_stores_the_job_unchanged(tmp_path: Path) -> None:
    async with running(tmp_path) as dispatcher:
        begin = time.time()
        job_id = await dispatcher.submit(call("f", "h", {"b": 1, "a": 2}, {"q": 1}, info=raw([None])), "test")
        assert str(uuid.UUID(job_id)) == job_id
        job = await dispatcher.get_job(job_id)
        assert (job.host, job.procedure, job.arguments, job.queue) == ("h", "f", b'{"b": 1, "a": 2}', b'{"q": 1}')
        assert job.info == b"[null]"
        assert begin <= job.submitted <= time.time()
        assert (await dispatcher.get_job(await dispatcher.submit(call(), "test"))).info == b"null"


async def test_submit_with_a_failing_store_raises(tmp_path: Path) -> None:
    real = await open_store(tmp_path / "store")
    store = Switched(real, "add_job", "claim_jobs")
    with host(tmp_path, echo) as peer:
        async with running(tmp_path, host_line(peer.port), store=store) as dispatcher:
            store.off = True
            with pytest.raises(StorageError):
                await dispatcher.submit(call(), "test")
            store.off = False
            assert await result(dispatcher, arguments=[1]) == Returned(b"[1]")
    await real.close()


async def test_claim_is_retried_until_the_store_works(tmp_path: Path) -> None:
    real = await open_store(tmp_path / "store")
    store = Switched(real, "claim_jobs")
    with host(tmp_path, echo) as peer:
        async with running(tmp_path, host_line(peer.port), store=store) as dispatcher:
            store.off = True
            job_id = await dispatcher.submit(call(), "test")
            await eventually(lambda: store.refused >= 2, what="a second try")
            store.off = False
            assert await dispatcher.result(job_id) == Returned(b"[]")
    await real.close()


@pytest.mark.parametrize(
    "job_id", ["", "x", UNKNOWN_ID, UNKNOWN_ID + "\n", "E435BF10-6D80-4BF6-9B83-9398FBE1FD21", "\ud800", "0" * 36]
)
async def test_requests_with_an_unknown_id_raise(tmp_path: Path, job_id: str) -> None:
    async with running(tmp_path) as dispatcher:
        assert not await dispatcher.cancel(job_id)
        with pytest.raises(UnknownJob):
            await dispatcher.result(job_id)
        with pytest.raises(UnknownJob):
            await dispatcher.get_job(job_id)
        with pytest.raises(UnknownJob):
            await followed(dispatcher, job_id)
        with pytest.raises(UnknownJob):
            await collected(dispatcher, job_id)


async def test_jobs_of_a_queue_run_in_order_within_concurrency(tmp_path: Path) -> None:
    gated = GatedHost()
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            jobs = [
                await dispatcher.submit(call(arguments=[n], queue={"q": 1}, concurrency=2), "test") for n in range(6)
            ]
            for count in (2, 4, 6):
                await eventually(lambda count=count: len(gated.begun_calls) == count, what="the calls")  # type: ignore[misc]
                gated.release(2)
            assert [await dispatcher.result(job) for job in jobs] == [Returned(raw([n])) for n in range(6)]
    assert gated.max_running == 2
    assert [sorted(gated.begun_calls[at : at + 2]) for at in (0, 2, 4)] == [[[0], [1]], [[2], [3]], [[4], [5]]]


@pytest.mark.parametrize("limit", [{"max_calls_per_host": 3}, {"max_calls": 3}])
async def test_calls_beyond_a_limit_wait(tmp_path: Path, limit: dict[str, Any]) -> None:
    gated = GatedHost()
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port), **limit) as dispatcher:
            jobs = [await dispatcher.submit(call(arguments=[n]), "test") for n in range(9)]
            await eventually(lambda: gated.running == 3, what="three calls")
            gated.release(9)
            for n, job in enumerate(jobs):
                assert await dispatcher.result(job) == Returned(raw([n]))
    assert gated.max_running == 3


async def test_dispatcher_runs_two_hundred_calls_on_one_host(tmp_path: Path) -> None:
    gated = GatedHost()
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port), connect_timeout=60.0) as dispatcher:
            jobs = [await dispatcher.submit(call(arguments=[n]), "test") for n in range(200)]
            await eventually(lambda: gated.running == 200, 60, "all calls")
            assert dispatcher.active_calls == 200
            gated.release(200)
            for n, job in enumerate(jobs):
                assert await dispatcher.result(job) == Returned(raw([n]))


async def test_cancel_queue_cancels_queued_and_running_jobs(tmp_path: Path) -> None:
    gated = GatedHost()
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            jobs = [await dispatcher.submit(call(queue={"a": 1, "b": 2}), "test") for _ in range(5)]
            other = await dispatcher.submit(call(arguments=["other"], queue={}), "test")
            await eventually(lambda: gated.running == 2, what="one call of each queue")
            assert [(q.running, q.queued) for q in await dispatcher.store.list_queues()] == [(1, 4), (1, 0)]
            assert len([job async for job in dispatcher.list_jobs(queue=raw({"b": 2, "a": 1.0}))]) == 5
            assert await dispatcher.cancel_queue(raw({"b": 2, "a": 1})) == 5
            assert await dispatcher.cancel_queue(raw({"b": 2, "a": 1})) == 0
            for job in jobs:
                assert (await dispatcher.get_job(job)).end == Cancelled()
            gated.release(6)
            assert await dispatcher.result(other) == Returned(b'["other"]')
    assert len(gated.begun_calls) == 2


async def test_cancel_queue_does_not_block_other_writes(tmp_path: Path) -> None:
    gated = GatedHost()
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            jobs = await dispatcher.submit_many([call(queue={})] * 3000, "test")
            cancelling = asyncio.create_task(dispatcher.cancel_queue(raw({})))
            stored_at = []
            while not cancelling.done():
                await dispatcher.submit(call(queue={"other": 1}), "test")
                stored_at.append(time.time())
            assert cancelling.result() == len(jobs)
            times = [job.ended async for job in dispatcher.list_jobs(ended=True, queue=raw({}))]
        gated.release(2)  # the calls that the dispatcher has left
    cancelled_at = [ended for ended in times if ended is not None]
    assert len(cancelled_at) == len(jobs)
    assert any(min(cancelled_at) < stored < max(cancelled_at) for stored in stored_at)


async def test_cancel_of_queued_and_running_job_of_a_queue(tmp_path: Path) -> None:
    gated = GatedHost()
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            first, second, third = [await dispatcher.submit(call(arguments=[n], queue={}), "test") for n in range(3)]
            await eventually(lambda: gated.running == 1, what="the first call")
            assert await dispatcher.cancel(second)
            job = await dispatcher.get_job(second)
            assert (job.state, job.started) == (State.CANCELLED, None)
            assert job.ended is not None
            assert await dispatcher.cancel(first)
            gated.release(3)
            assert await dispatcher.result(third) == Returned(b"[2]")
    assert gated.begun_calls == [[0], [2]]


async def test_result_of_a_waiting_client_returns_on_cancel(tmp_path: Path) -> None:
    gated = GatedHost()
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            for started in (False, True):
                blocker = await dispatcher.submit(call(queue={}), "test")
                job_id = blocker if started else await dispatcher.submit(call(queue={}), "test")
                waiting = asyncio.ensure_future(dispatcher.result(job_id))
                following = asyncio.create_task(followed(dispatcher, job_id))
                await eventually(lambda: gated.running == 1, what="a call")
                assert await dispatcher.cancel(job_id)
                assert await waiting == Cancelled()
                assert await following == ([], Cancelled())
                await dispatcher.cancel(blocker)
                gated.release(1)
                await eventually(lambda: gated.running == 0, what="the call's end")


async def test_result_during_a_call_does_not_read_the_store(tmp_path: Path) -> None:
    """The notification carries the end, which stays in memory for a while; a long end is read from the store."""
    gated, opened = GatedHost(), await open_store(tmp_path / "store")
    store = Switched(opened, "get_job")
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port), store=store) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await eventually(lambda: gated.running == 1, what="a call")
            store.off = True
            waiting = [asyncio.ensure_future(dispatcher.result(job_id)) for _ in range(3)]
            with pytest.raises(StorageError):
                await dispatcher.get_job(job_id)
            gated.release(1)
            assert await asyncio.gather(*waiting) == [Returned(b"[]")] * 3
            await eventually(lambda: not dispatcher.active_calls, what="the run's end")
            assert await dispatcher.result(job_id) == Returned(b"[]")
            store.off = False
            assert (await dispatcher.get_job(job_id)).end == Returned(b"[]")
            gated.release(1)
            long = await dispatcher.submit(call(arguments=["x" * 1000]), "test")
            assert await dispatcher.result(long) == Returned(raw(["x" * 1000]))
            await eventually(lambda: not dispatcher.active_calls, what="the run's end")
            assert await dispatcher.result(long) == Returned(raw(["x" * 1000]))
            store.off = True
            with pytest.raises(StorageError):
                await dispatcher.result(long)
    await opened.close()


class Stream:
    """A host whose only call sends records at the test's command."""

    def __init__(self) -> None:
        self._conn: PeerConnection | None = None
        self._ended = threading.Event()

    def script(self, conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(STREAMING)
        self._conn = conn
        assert self._ended.wait(60)

    async def send(self, *messages: object) -> None:
        conn = await eventually(lambda: self._conn, what="the call")
        assert conn is not None
        await asyncio.to_thread(conn.reply, *messages)

    async def end(self) -> None:
        await self.send({"result": "end"})
        self._ended.set()


async def test_follow_and_read_start_at_any_number(tmp_path: Path) -> None:
    stream = Stream()
    with host(tmp_path, stream.script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await stream.send(*({"stream": n} for n in range(5)))
            await until(dispatcher, job_id, lambda job: job.records == 5, "five records")
            since = {n: asyncio.create_task(followed(dispatcher, job_id, since=n)) for n in (0, 3, 5, 7, 10, 20)}
            recent = follow(dispatcher, job_id, recent=2)
            begin = await anext(recent)
            assert isinstance(begin, RecordBatch)
            assert decoded(begin) == [(3, 3), (4, 4)]
            for first, options in (
                (0, {}),
                (3, {"since": 3}),
                (9, {"since": 9}),
                (4, {"recent": 1}),
                (0, {"recent": 9}),
            ):
                found, closing = await collected(dispatcher, job_id, **options)
                assert (found, closing) == ([(n, n) for n in range(first, 5)], Continue())

            await stream.send(*({"stream": n} for n in range(5, 10)))
            await stream.end()
            for first, task in since.items():
                assert await task == ([(n, n) for n in range(first, 10)], Returned(b'"end"'))
            rest = [item async for item in recent]
            assert [pair for item in rest[:-1] for pair in decoded(item)] == [(n, n) for n in range(5, 10)]  # type: ignore[arg-type]
            assert rest[-1] == Returned(b'"end"')
            for first, options in ((10, {}), (8, {"since": 8}), (7, {"recent": 3}), (30, {"since": 30})):
                records = [(n, n) for n in range(first, 10)]
                assert await followed(dispatcher, job_id, **options) == (records, Returned(b'"end"'))
            assert await collected(dispatcher, job_id) == ([(n, n) for n in range(10)], Returned(b'"end"'))


async def test_read_ends_at_the_records_of_its_begin(tmp_path: Path) -> None:
    stream = Stream()
    with host(tmp_path, stream.script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await stream.send({"stream": "x" * 100_000}, {"stream": 1})
            await until(dispatcher, job_id, lambda job: job.records == 2, "two records")
            reading = read(dispatcher, job_id)
            first = await anext(reading)
            assert isinstance(first, RecordBatch)
            assert decoded(first) == [(0, "x" * 100_000)]
            await stream.send({"stream": 2}, {"stream": 3})
            await until(dispatcher, job_id, lambda job: job.records == 4, "two more records")
            second, closing = [item async for item in reading]
            assert isinstance(second, RecordBatch)
            assert (decoded(second), closing) == ([(1, 1)], Continue())
            await stream.end()
            assert await dispatcher.result(job_id) == Returned(b'"end"')


async def test_thousand_followers_are_not_delayed_by_a_slow_follower(tmp_path: Path) -> None:
    stream = Stream()
    with host(tmp_path, stream.script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await stream.send({"stream": 0})
            idle = follow(dispatcher, job_id, since=0)
            first = await anext(idle)
            assert isinstance(first, RecordBatch)
            assert decoded(first) == [(0, 0)]
            tasks = [asyncio.create_task(followed(dispatcher, job_id, since=0)) for _ in range(1000)]
            for begin in range(1, 101, 10):
                await stream.send(*({"stream": n} for n in range(begin, begin + 10)))
            await stream.end()
            outcomes = await asyncio.gather(*tasks)
            assert all(outcome == ([(n, n) for n in range(101)], Returned(b'"end"')) for outcome in outcomes)
            await idle.aclose()


async def test_follow_yields_batches_of_limited_size(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(STREAMING, *({"stream": "x" * 100_000} for _ in range(50)), {"result": None})

    with host(tmp_path, script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            assert await dispatcher.result(job_id) == Returned(b"null")
            batches = [item async for item in follow(dispatcher, job_id, since=0) if isinstance(item, RecordBatch)]
            sizes = [sum(map(len, batch.records.values)) for batch in batches]
            assert sum(sizes) == 50 * 100_002
            assert max(sizes) < 1_000_000


async def test_list_jobs_is_in_order_of_submission(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "store")
    ended = [await job_in(store, State.RETURNED, now=time.time()) for _ in range(3)]
    waiting = [await job_in(store, State.QUEUED, queue={}) for _ in range(450)]
    async with running(
        tmp_path, store=store, max_calls=1, hosts_file=None, host_db_script=Path("/bin/sleep")
    ) as dispatcher:
        # The registry is not loaded, because the first run of the script has not ended: no job starts.
        jobs = [job.id async for job in dispatcher.list_jobs(ended=True)]
        assert jobs == ended + waiting
    await store.close()


async def test_reload_applies_to_later_calls(tmp_path: Path) -> None:
    with host(tmp_path, echo) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            other = hosts_file(tmp_path, host_line(peer.port, "web02"))
            config = Config(
                hosts_file=other,
                default_timeout=5.0,
                ca_file=server_files(tmp_path).ca_file,
                host_db=tmp_path / "hosts.db",
                stream_directory=tmp_path / "store",
                resumable_calls=False,
            )
            await dispatcher.reload(config)
            assert dispatcher.config is config
            assert [found.hostname for found in dispatcher.registry.list_hosts()] == ["web02"]
            job_id = await dispatcher.submit(call(host="web02"), "test")
            assert await dispatcher.result(job_id) == Returned(b"[]")
            assert (await dispatcher.get_job(job_id)).timeout == 5.0
            for broken in ({"ca_file": tmp_path / "none"}, {"hosts_file": tmp_path / "none"}):
                with pytest.raises(ConfigError, match=next(iter(broken))):
                    await dispatcher.reload(Config(**broken))  # type: ignore[arg-type]
                assert dispatcher.config is config


def legacy_harpd(conn: PeerConnection) -> None:
    """Answer the request for the call list as a legacy harpd does, with an error."""
    assert "calls" in conn.expect()
    conn.reply({"harp": 1, "error": {"type": "no_such_procedure", "message": "-"}})


def is_missing(end: End | None) -> bool:
    return isinstance(end, Failed) and end.type == "missing_result"


async def test_restart_ends_bound_calls_and_runs_queued_jobs(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "store")
    interrupted = await job_in(store, State.RUNNING, queue={"q": 1})
    queued = [await job_in(store, State.QUEUED, queue={"q": 1}, arguments=raw([n])) for n in range(3)]
    begun_calls: list[object] = []

    def script(conn: PeerConnection) -> None:
        begun_calls.append(json.loads(conn.line())["arguments"])
        conn.reply(ACKNOWLEDGED, {"result": None})

    with host(tmp_path, script, (legacy_harpd,)) as peer:
        async with running(tmp_path, host_line(peer.port), store=store) as dispatcher:
            assert is_missing(await dispatcher.result(interrupted))
            for job in queued:
                assert await dispatcher.result(job) == Returned(b"null")
    assert begun_calls == [[0], [1], [2]]
    await store.close()


async def test_claim_waits_until_interrupted_jobs_are_recovered(tmp_path: Path) -> None:
    real = await open_store(tmp_path / "store")
    interrupted = await job_in(real, State.RUNNING, queue={})
    store = Switched(real, "list_slot_holders")
    store.off = True
    with host(tmp_path, echo, (legacy_harpd,)) as peer:
        async with running(tmp_path, host_line(peer.port), store=store) as dispatcher:
            job_id = await dispatcher.submit(call(queue={}), "test")
            waiting = asyncio.ensure_future(dispatcher.result(interrupted))
            await eventually(lambda: store.refused >= 2, what="a second try")
            assert (await dispatcher.get_job(job_id)).state is State.QUEUED
            store.off = False
            assert await dispatcher.result(job_id) == Returned(b"[]")
            assert is_missing(await waiting)
    await real.close()


async def test_shutdown_ends_bound_calls_and_keeps_queued_jobs(tmp_path: Path) -> None:
    gated = GatedHost()
    store = await open_store(tmp_path / "store")
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port), store=store) as dispatcher:
            jobs = [await dispatcher.submit(call(queue={}), "test") for _ in range(3)]
            await eventually(lambda: gated.running == 1, what="the first call")
            follower = asyncio.create_task(followed(dispatcher, jobs[0]))
            await asyncio.sleep(0)
        records, end = await follower
        assert isinstance(end, Failed)
        assert (records, end.type) == ([], "missing_result")
        assert "stopped" in end.message
        found = [await store.get_job(job) for job in jobs]
        assert [(job.state, job.end) for job in found[1:]] == [(State.QUEUED, None)] * 2
        assert found[0].end == end
        gated.release(1)
    await store.close()


async def test_shutdown_leaves_no_task_or_connection(tmp_path: Path) -> None:
    gated = GatedHost()
    before = asyncio.all_tasks()
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            for _ in range(20):
                await dispatcher.submit(call(), "test")
            await eventually(lambda: gated.running == 20, what="the calls")
        gated.release(20)
        assert asyncio.all_tasks() == before


async def test_job_is_refused_while_the_store_is_moved_away(tmp_path: Path) -> None:
    """It could be written to the file that is open, but the next start would not find it."""
    async with running(tmp_path, host_line(1)) as dispatcher:
        path = dispatcher.store.path
        path.rename(path.with_name("moved"))
        for submit in (dispatcher.submit(call(), "test"), dispatcher.submit_many([call()], "test")):
            with pytest.raises(StorageError, match=f"no job is accepted: {path}: the file .* was removed or moved"):
                await submit
        store, *_ = await Health(dispatcher).check()
        assert (store.name, store.ok, "was removed or moved" in store.detail) == ("store", False, True)
        path.with_name("moved").rename(path)
        await dispatcher.submit(call(), "test")


async def test_job_below_the_disk_reserve_is_refused(tmp_path: Path) -> None:
    """A job that runs meanwhile stores its end; new ones are accepted again when space is free."""
    gated = GatedHost()
    with host(tmp_path, gated.script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            config = dispatcher.config
            await dispatcher.reload(msgspec.structs.replace(config, disk_reserve=2**62))
            with pytest.raises(StorageError, match=r"no job is accepted: .* MiB are free, and disk_reserve is"):
                await dispatcher.submit(call(), "test")
            with pytest.raises(StorageError, match="no job is accepted"):
                await dispatcher.submit_many([call()], "test")
            gated.release(1)
            assert await dispatcher.result(job_id) == Returned(b"[]")
            await dispatcher.reload(config)
            gated.release(1)
            assert await dispatcher.result(await dispatcher.submit(call(), "test")) == Returned(b"[]")
