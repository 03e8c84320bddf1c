"""Starts that certainly did not happen: tried again within `start_within`, without other hosts' capacity."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Cancelled, Failed, Returned
from harp.protocol.json_text import Raw
from harpcaller.dispatcher import Dispatcher
from harpcaller.model.ids import new_job_id
from harpcaller.model.jobs import NewJob, State
from harpcaller.store.sqlite import open_store
from support.certificates import server_files
from support.daemonlog import DEADLINE
from support.deadline import eventually, wait_until
from support.dispatcher import call, host_line, running, until
from support.harpcallerd import Harpcallerd
from support.peers import Peer, PeerConnection, Script, answering, reserved_port, server_context, silent
from support.resumable_host import EXIT_INFO, NO_SUCH_CALL, call_list, ends, playing, started

LONG = 3600.0


@pytest.fixture
def port() -> Iterator[int]:
    """A port that refuses connections until a host listens on it."""
    with reserved_port() as reserved:
        yield reserved


def refusing(type_: str, data: Any = None) -> Script:
    """Reply to a start that no call was started."""

    def script(conn: PeerConnection) -> None:
        assert "procedure" in conn.expect()
        error = {"type": type_, "message": "not now"}
        conn.reply({"harp": 1, "error": error if data is None else {**error, "data": data}})

    return script


def returning(value: Any) -> Script:
    def script(conn: PeerConnection) -> None:
        started(conn)
        ends(conn, EXIT_INFO, {"result": value})

    return script


async def submitted(dispatcher: Dispatcher, **options: Any) -> str:
    return await dispatcher.submit(call(**options), "test")


async def waiting(dispatcher: Dispatcher, job_id: str, attempts: int = 1) -> dict[str, Any]:
    """Wait until a job waits for its host after this many failed attempts; return its details."""
    found: dict[str, Any] = {}

    async def looked() -> bool:
        found.update(await dispatcher.details(job_id))
        failed = found["failed_starts"]
        return found["state"] == "queued" and failed is not None and failed["attempts"] >= attempts

    predicate: Callable[[], bool | Awaitable[bool]] = looked
    await eventually(predicate, what="a failed start")
    return found


REFUSALS = [
    ("too_many_calls", None),
    ("too_many_connections", None),
    ("shutdown", None),
    ("procedure_loading_error", None),
    ("call_refused", {"reason": "delayed"}),
]


@pytest.mark.parametrize(("type_", "data"), REFUSALS)
async def test_refused_start_is_retried(tmp_path: Path, type_: str, data: Any) -> None:
    scripts = call_list(), refusing(type_, data), call_list(), refusing(type_, data), call_list(), returning(5)
    with playing(tmp_path, *scripts) as host:
        async with running(tmp_path, host_line(host.port), resumable_calls=True, start_within=LONG) as dispatcher:
            job_id = await submitted(dispatcher)
            assert await dispatcher.result(job_id) == Returned(b"5")
            assert (await dispatcher.details(job_id))["failed_starts"] is None


@pytest.mark.parametrize(("type_", "data"), REFUSALS)
async def test_refused_start_without_time_ends_the_job(tmp_path: Path, type_: str, data: Any) -> None:
    with playing(tmp_path, call_list(), refusing(type_, data)) as host:
        async with running(tmp_path, host_line(host.port), resumable_calls=True, start_within=0) as dispatcher:
            end = await dispatcher.result(await submitted(dispatcher))
            assert isinstance(end, Failed)
            assert (end.type, end.message) == (type_, "not now")


@pytest.mark.parametrize("type_", ["no_such_procedure", "auth_error", "call_refused", "system_error", "network_error"])
async def test_other_refusal_is_not_retried(tmp_path: Path, type_: str) -> None:
    with playing(tmp_path, call_list(), refusing(type_)) as host:
        async with running(tmp_path, host_line(host.port), resumable_calls=True, start_within=LONG) as dispatcher:
            end = await dispatcher.result(await submitted(dispatcher))
            assert isinstance(end, Failed)
            assert end.type == type_


async def test_unreachable_host_is_tried_until_it_is_up(tmp_path: Path, port: int) -> None:
    async with running(tmp_path, host_line(port), resumable_calls=True, start_within=LONG) as dispatcher:
        job_id = await submitted(dispatcher)
        details = await waiting(dispatcher, job_id, attempts=2)
        failed = details["failed_starts"]
        assert failed["error"].startswith("network_error: host web01")
        assert failed["since"] <= failed["next"]
        assert details["limits"]["start_within"] == LONG
        assert details["why"].startswith("host web01 accepts no starts since ")
        assert "attempts, last error: network_error: " in details["why"]
        assert "next attempt in " in details["why"]
        assert details["holds_slot"] is False
        with playing(tmp_path, call_list(), returning(7), port=port):
            assert await dispatcher.result(job_id) == Returned(b"7")


async def test_unreachable_host_ends_the_job_after_start_within(tmp_path: Path, port: int) -> None:
    async with running(tmp_path, host_line(port)) as dispatcher:
        began = time.monotonic()
        end = await dispatcher.result(await submitted(dispatcher, start_within=1.5))
        assert isinstance(end, Failed)
        assert end.type == "network_error"
        assert time.monotonic() - began >= 1.5


async def test_short_time_ends_a_job_behind_a_longer_wait(tmp_path: Path, port: int) -> None:
    async with running(tmp_path, host_line(port), start_within=LONG) as dispatcher:
        long = await submitted(dispatcher)
        await waiting(dispatcher, long)
        queued = await submitted(dispatcher, queue={"q": 1})
        behind = await submitted(dispatcher, queue={"q": 1}, start_within=0)
        short = [await submitted(dispatcher, start_within=limit) for limit in (0, 0.5)]
        for job_id in short:
            end = await dispatcher.result(job_id)
            assert isinstance(end, Failed)
            assert end.type == "network_error"
        for job_id in (long, queued, behind):  # the last one waits for its queue
            assert (await dispatcher.get_job(job_id)).state is State.QUEUED
        assert await dispatcher.cancel(queued)
        assert isinstance(await dispatcher.result(behind), Failed)


async def test_cancel_of_a_waiting_job_ends_it_immediately(tmp_path: Path, port: int) -> None:
    async with running(tmp_path, host_line(port), start_within=LONG) as dispatcher:
        job_id = await submitted(dispatcher)
        result = dispatcher.result(job_id)
        await waiting(dispatcher, job_id)
        assert await dispatcher.cancel(job_id)
        assert await result == Cancelled()
        job = await dispatcher.get_job(job_id)
        assert (job.started, job.holds_slot, job.stop) == (None, False, None)


async def test_waiting_jobs_start_in_the_order_of_submission(tmp_path: Path, port: int) -> None:
    async with running(tmp_path, host_line(port), resumable_calls=True, start_within=LONG) as dispatcher:
        first = await submitted(dispatcher, queue={"q": 1})
        await waiting(dispatcher, first)
        others = [await submitted(dispatcher, queue={"q": 1}) for _ in range(3)]
        with playing(tmp_path, call_list(), *map(returning, range(4)), port=port):
            for number, job_id in enumerate((first, *others)):
                assert await dispatcher.result(job_id) == Returned(b"%d" % number)


async def test_job_waits_over_a_restart_of_the_dispatcher(tmp_path: Path, port: int) -> None:
    async with running(tmp_path, host_line(port), resumable_calls=True) as dispatcher:
        job_id = await submitted(dispatcher, start_within=LONG)
        await waiting(dispatcher, job_id)
        tried = (await dispatcher.get_job(job_id)).tried
    async with running(tmp_path, host_line(port), resumable_calls=True) as dispatcher:
        await waiting(dispatcher, job_id)
        assert (await dispatcher.get_job(job_id)).tried == tried, "its time continues"
        with playing(tmp_path, call_list(), returning(7), port=port):
            assert await dispatcher.result(job_id) == Returned(b"7")


async def test_only_tried_jobs_count_the_time_before_a_restart(tmp_path: Path, port: int) -> None:
    now = time.time()
    tried, expired, untried = (
        NewJob(new_job_id(now), "web01", "p", Raw(b"[]"), 60.0, 60.0, start_within=seconds)
        for seconds in (3600.0, 900.0, 300.0)
    )
    store = await open_store(tmp_path / "store")
    await store.add_jobs([tried, expired, untried], now - 2000)
    for job in await store.claim_jobs(now - 2000, 2, 2):
        assert await store.requeue_job(job.id, now - 1000)
    await store.close()
    async with running(tmp_path, host_line(port)) as dispatcher:
        assert isinstance(await dispatcher.result(expired.id), Failed)
        assert (await waiting(dispatcher, untried.id, attempts=2))["failed_starts"]["since"] >= now
        assert (await dispatcher.get_job(tried.id)).state is State.QUEUED


async def test_time_behind_others_of_the_queue_does_not_count(tmp_path: Path, port: int) -> None:
    queue = {"q": 1}
    with reserved_port() as other:
        lines = host_line(port), host_line(other, "web02")
        async with running(tmp_path, *lines, resumable_calls=True, connect_timeout=5) as dispatcher:
            # In one request, so that both get a slot before the first start fails.
            long = call(host="web02", start_within=LONG, concurrency=2, queue=queue)
            first, behind = await dispatcher.submit_many([long, call(start_within=2, queue=queue)], "test")
            await until(dispatcher, behind, lambda job: job.tried is not None, "the first attempt")
            await waiting(dispatcher, first)
            await asyncio.sleep(2.0)  # longer than it may wait for its host
            began = time.time()
            with playing(tmp_path, call_list(), returning(7), port=other):
                assert await dispatcher.result(first) == Returned(b"7")
            assert isinstance(await dispatcher.result(behind), Failed)
            ended = (await dispatcher.get_job(behind)).ended
            assert ended is not None
            assert ended - began >= 2.0


@contextmanager
def black_hole() -> Iterator[int]:
    """Yield the port of a listener that accepts no connection, and whose backlog is full."""
    with socket.socket() as listener, socket.socket() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting.connect(listener.getsockname())
        yield listener.getsockname()[1]


async def test_dead_hosts_take_no_capacity_of_others(tmp_path: Path) -> None:
    quick = answering({"harp": 1, "stream_result": False}, {"result": 5})
    tls = server_context(server_files(tmp_path))
    with black_hole() as dead, black_hole() as dead_too, Peer(quick, tls=tls) as host:
        lines = host_line(dead, "dead1"), host_line(dead_too, "dead2"), host_line(host.port)
        async with running(tmp_path, *lines, max_calls=3, connect_timeout=60) as dispatcher:
            stuck = [await submitted(dispatcher, host=f"dead{n}") for n in (1, 2) for _ in range(10)]
            assert isinstance(await dispatcher.result(await submitted(dispatcher)), Returned)
            states = [(await dispatcher.get_job(job_id)).state for job_id in stuck]
            assert states.count(State.RUNNING) <= 2
            assert set(states) == {State.RUNNING, State.QUEUED}


def cutting(conn: PeerConnection) -> None:
    """Read a start and close: perhaps the procedure has started."""
    conn.expect()


async def test_start_possibly_accepted_is_not_retried(tmp_path: Path) -> None:
    tls = server_context(server_files(tmp_path))
    with Peer(cutting, tls=tls) as host:
        async with running(tmp_path, host_line(host.port), start_within=LONG) as dispatcher:
            end = await dispatcher.result(await submitted(dispatcher))
            assert isinstance(end, Failed)
            assert end.type == "network_error"
    assert len(host.requests) == 1


async def test_resumable_start_possibly_accepted_is_not_retried(tmp_path: Path) -> None:
    def absent(conn: PeerConnection) -> None:
        assert "attach" in conn.expect()
        conn.reply(NO_SUCH_CALL)

    with playing(tmp_path, call_list(), cutting, call_list(), absent) as host:
        async with running(tmp_path, host_line(host.port), resumable_calls=True, start_within=LONG) as dispatcher:
            end = await dispatcher.result(await submitted(dispatcher))
            assert isinstance(end, Failed)
            assert end.type == "missing_result"
    assert sum("call" in request for request in host.requests) == 1


@pytest.mark.parametrize("type_", ["too_many_calls", "shutdown", "procedure_loading_error"])
async def test_error_after_the_acknowledgement_is_not_retried(tmp_path: Path, type_: str) -> None:
    error = {"harp": 1, "error": {"type": type_, "message": "m"}}
    with Peer(
        answering({"harp": 1, "stream_result": False}, error), tls=server_context(server_files(tmp_path))
    ) as host:
        async with running(tmp_path, host_line(host.port), start_within=LONG) as dispatcher:
            assert await dispatcher.result(await submitted(dispatcher)) == Failed(type_, "m")
    assert len(host.requests) == 1


async def test_connection_bound_start_is_retried(tmp_path: Path, port: int) -> None:
    async with running(tmp_path, host_line(port)) as dispatcher:
        job_id = await submitted(dispatcher, start_within=LONG)
        await waiting(dispatcher, job_id)
        tls = server_context(server_files(tmp_path))
        busy = answering({"harp": 1, "error": {"type": "too_many_calls", "message": "m"}})
        quick = answering({"harp": 1, "stream_result": False}, {"result": 5})
        with Peer(silent, busy, silent, quick, tls=tls, port=port):  # each start follows a connection that asks nothing
            assert await dispatcher.result(job_id) == Returned(b"5")


async def test_stop_while_connecting_queues_the_job_again(tmp_path: Path) -> None:
    with black_hole() as dead:
        async with running(tmp_path, host_line(dead), connect_timeout=600) as dispatcher:
            job_id = await submitted(dispatcher)
            await until(dispatcher, job_id, lambda job: job.state is State.RUNNING, "the start")
    with playing(tmp_path, call_list(), returning(7)) as host:
        async with running(tmp_path, host_line(host.port), resumable_calls=True) as dispatcher:
            assert await dispatcher.result(job_id) == Returned(b"7")


@pytest.mark.parametrize("type_", ["too_many_calls", "shutdown"])
async def test_start_refused_during_the_stop_queues_the_job_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, type_: str
) -> None:
    sent, stopping = threading.Event(), threading.Event()

    def refusing_late(conn: PeerConnection) -> None:
        assert "procedure" in conn.expect()
        sent.set()
        assert stopping.wait(DEADLINE)
        conn.reply({"harp": 1, "error": {"type": type_, "message": "not now"}})

    def on_log(record: logging.LogRecord) -> bool:
        if record.getMessage() == "dispatcher stops":  # the calls are detached in the same turn of the event loop
            stopping.set()
        return True

    log = logging.getLogger("harpcaller.dispatcher")
    monkeypatch.setattr(log, "filters", [on_log])
    caplog.set_level(logging.INFO, log.name)
    with playing(tmp_path, call_list(), refusing_late, call_list(), returning(7)) as host:
        async with running(tmp_path, host_line(host.port), resumable_calls=True, start_within=LONG) as dispatcher:
            job_id = await submitted(dispatcher)
            await eventually(sent.is_set, what="the start")
        async with running(tmp_path, host_line(host.port), resumable_calls=True) as dispatcher:
            assert await dispatcher.result(job_id) == Returned(b"7")


def test_job_waits_over_a_killed_dispatcher(tmp_path: Path, port: int) -> None:
    with Harpcallerd(tmp_path / "dispatcher", {"web01": port}) as dispatcher:
        job_id = dispatcher.submit("web01", "p", start_within=LONG)

        def waits() -> bool:
            details = dispatcher.ask(get_details=job_id)[0]["details"]
            return details["state"] == "queued" and details["failed_starts"] is not None

        wait_until(waits, DEADLINE, "a failed start")
        for _ in range(2):
            dispatcher.restart(kill=True)
            wait_until(waits, DEADLINE, "a failed start")
        with playing(tmp_path, call_list(), returning(7), port=port):
            assert dispatcher.ask(get_result=job_id) == [{"result": 7}]


async def test_failing_host_is_tried_without_slots(tmp_path: Path, port: int) -> None:
    async with running(tmp_path, host_line(port), start_within=LONG, max_calls=1) as dispatcher:
        stuck = [await submitted(dispatcher) for _ in range(20)]
        await waiting(dispatcher, stuck[0], attempts=3)
        states = [await dispatcher.get_job(job_id) for job_id in stuck]
        assert {(job.state, job.holds_slot) for job in states} == {(State.QUEUED, False)}
        assert [job.id for job in states if job.tried is not None] == stuck[:1], "one job was started, then none"
        for job_id in stuck:
            assert await dispatcher.cancel(job_id)


async def test_job_with_slot_starts_before_later_jobs_of_its_queue(tmp_path: Path, port: int) -> None:
    quick = answering({"harp": 1, "stream_result": False}, {"result": 5})
    with Peer(quick, tls=server_context(server_files(tmp_path))) as healthy:
        lines = host_line(port), host_line(healthy.port, "web02")
        async with running(tmp_path, *lines, start_within=LONG) as dispatcher:
            first = await submitted(dispatcher, queue={"q": 1})
            await waiting(dispatcher, first)
            second = await submitted(dispatcher, host="web02", queue={"q": 1})
            await waiting(dispatcher, first, attempts=3)
            assert (await dispatcher.details(first))["failed_starts"]["attempts"] < 10, "with pauses"
            assert (await dispatcher.get_job(second)).state is State.QUEUED, "the queue is first in, first out"
            assert await dispatcher.cancel(first)
            assert await dispatcher.result(second) == Returned(b"5")
