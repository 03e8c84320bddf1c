"""A run of a resumable call: start, outage, reattaching, stop and recovery."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Cancelled, Failed, Returned
from harpcaller.hosts.connecting import open_connection
from harpcaller.hosts.connection import HarpdConnection
from harpcaller.model.jobs import State, StopState
from harpcaller.notifier import RecordBatch
from harpcaller.store import UnknownJob
from harpcaller.store.sqlite import open_store
from support.daemonlog import DEADLINE
from support.deadline import eventually
from support.dispatcher import CREDENTIALS, Switched, call, followed, host_line, read, running, until
from support.harpd import Harpd
from support.jobs import job_in
from support.peers import PeerConnection
from support.resumable_host import (
    EXIT_INFO,
    NO_SUCH_CALL,
    acknowledged,
    acknowledgement,
    attached,
    call_list,
    commands,
    ends,
    lost,
    playing,
    result_of,
    settled,
    started,
    stop_report,
)


async def test_resumable_run_sends_id_and_acks_the_end(tmp_path: Path) -> None:
    requests: list[Any] = []

    def script(conn: PeerConnection) -> None:
        requests.append(started(conn))
        ends(conn, EXIT_INFO, {"result": [1]})

    with playing(tmp_path, call_list(), script, script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True, disconnect_timeout=50.0) as dispatcher:
            for _ in range(2):  # queried once, not for each call
                job_id, end = await result_of(dispatcher, timeout=3, max_exec_time=4)
                assert end == Returned(b"[1]")
            assert (await dispatcher.details(job_id))["exit_info"] == b'{"exit": 0, "by": "itself"}'
    first, second = (request["call"] for request in requests)
    assert "caller" not in requests[0], "the host has not announced that it knows this key"
    assert first.keys() == {
        "id", "owner", "secret", "instance", "disconnect_timeout", "result_ttl", "timeout", "max_exec_time",
    }  # fmt: skip
    assert second["id"] == job_id
    assert (first["instance"], first["disconnect_timeout"], first["timeout"], first["max_exec_time"]) == (
        "w1",
        50.0,
        3.0,
        4.0,
    )
    assert first["owner"] == second["owner"]
    assert first["secret"] != second["secret"]
    assert requests[0]["auth"] == CREDENTIALS


async def test_start_with_wrong_instance_is_retried(tmp_path: Path) -> None:
    def other(conn: PeerConnection) -> None:
        assert conn.expect()["call"]["instance"] == "w1"
        conn.reply({"harp": 1, "error": {"type": "wrong_instance", "message": "no", "data": {"instance": "w2"}}})

    def right(conn: PeerConnection) -> None:
        assert started(conn, instance="w2")["call"]["instance"] == "w2"
        ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, call_list(), other, call_list(instance="w2"), right) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher))[1] == Returned(b"1")


async def test_start_with_always_new_instance_is_network_error(tmp_path: Path) -> None:
    def other(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "error": {"type": "wrong_instance", "message": "no", "data": {"instance": "w2"}}})

    with playing(tmp_path, *(call_list(), other) * 3) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            _, end = await result_of(dispatcher)
            assert isinstance(end, Failed)
            assert end.type == "network_error"


DELAYED = {"harp": 1, "error": {"type": "call_refused", "message": "late", "data": {"reason": "delayed"}}}


def delayed(conn: PeerConnection) -> None:
    """Refuse a start as a host does that was suspended while the start was on its way."""
    conn.expect()
    conn.reply(DELAYED)


async def test_start_refused_as_delayed_is_sent_again(tmp_path: Path) -> None:
    ids = []

    def held(conn: PeerConnection) -> None:
        ids.append(started(conn)["call"]["id"])
        ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, call_list(), *[delayed, call_list()] * 3, held) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True, start_within=60) as dispatcher:
            assert await result_of(dispatcher) == (*ids, Returned(b"1"))


async def test_start_refused_for_its_id_is_not_sent_again(tmp_path: Path) -> None:
    def used(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "error": {"type": "call_refused", "message": "a call with this id was started"}})

    with playing(tmp_path, call_list(), delayed, call_list(), used) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True, start_within=60) as dispatcher:
            _, end = await result_of(dispatcher)
            assert isinstance(end, Failed)
            assert end.type == "call_refused"


def always_delayed(conn: PeerConnection) -> None:
    if "calls" in conn.expect():
        conn.reply({"harp": 1, "calls": [], "instance": "w1"})
    else:
        conn.reply(DELAYED)


async def test_start_always_delayed_ends_after_start_within(tmp_path: Path) -> None:
    with playing(tmp_path, always=always_delayed) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id, end = await result_of(dispatcher, start_within=1)
            assert isinstance(end, Failed)
            assert (end.type, end.message) == ("call_refused", "late")
            assert not (await dispatcher.get_job(job_id)).holds_slot
    assert sum("call" in request for request in peer.requests) > 1


async def test_start_delayed_and_cancelled_is_not_sent_again(tmp_path: Path) -> None:
    with playing(tmp_path, always=always_delayed) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True, start_within=60) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await until(dispatcher, job_id, lambda job: job.tried is not None, "the delayed start")
            assert await dispatcher.cancel(job_id)
            assert (await settled(dispatcher, job_id)).end == Cancelled()
            sent = len(peer.requests)
            await dispatcher.result(await dispatcher.submit(call(start_within=0), "test"))
    assert job_id not in [request["call"]["id"] for request in peer.requests[sent:] if "call" in request]


async def test_cancel_of_a_refused_start_sends_no_other(tmp_path: Path) -> None:
    go_on = threading.Event()

    def refuse(conn: PeerConnection) -> None:
        conn.expect()
        assert go_on.wait(30)
        conn.reply(DELAYED)

    with playing(tmp_path, call_list(), refuse) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await eventually(lambda: len(peer.requests) == 2, what="the start")
            cancel = asyncio.create_task(dispatcher.cancel(job_id))
            await until(dispatcher, job_id, lambda job: job.state is State.CANCELLED, "the cancel's commit")
            go_on.set()
            assert await cancel
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED
    assert len(peer.requests) == 2


async def test_start_during_suspension_runs_once(tmp_path: Path) -> None:
    """The frontend receives the start on an idle connection, and is suspended for longer than `disconnect_timeout`."""
    procedures = """
from pathlib import Path
from harpd.proc import procedure

@procedure
def mark(file):
    with Path(file).open("a") as marks:
        marks.write("started ")
    return Path(file).read_text()
"""
    with Harpd(tmp_path / "harpd", procedures, services=True) as harpd:
        line = json.loads(host_line(harpd.port)) | {"credentials": {"user": harpd.user, "password": harpd.password}}
        async with running(
            tmp_path, json.dumps(line) + "\n", resumable_calls=True, disconnect_timeout=2.0, start_within=60
        ) as dispatcher:
            assert (await result_of(dispatcher, procedure="mark", arguments=["/dev/null"]))[1] == Returned(b'""')
            os.kill(harpd.pid, signal.SIGSTOP)
            try:
                job_id = await dispatcher.submit(call("mark", arguments=[str(tmp_path / "marks")]), "test")
                await asyncio.sleep(4)  # longer than `disconnect_timeout`
            finally:
                os.kill(harpd.pid, signal.SIGCONT)
            assert await dispatcher.result(job_id) == Returned(b'"started "')
            assert (await dispatcher.get_job(job_id)).tried is not None, "the first start was refused"


async def test_start_without_reply_is_never_repeated(tmp_path: Path) -> None:
    """The connection breaks after the request; the host replies to the attach that it will never start the call."""

    def cut(conn: PeerConnection) -> None:
        conn.expect()
        conn.reset()

    def no_such_call(conn: PeerConnection) -> None:
        assert "attach" in conn.expect()
        conn.reply(NO_SUCH_CALL)

    with playing(tmp_path, call_list(), cut, call_list(), no_such_call) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id, end = await result_of(dispatcher)
            assert isinstance(end, Failed)
            assert end.type == "missing_result"
            assert "does not have the job's call" in end.message
            assert not (await dispatcher.get_job(job_id)).holds_slot


async def test_start_without_reply_that_happened_continues(tmp_path: Path) -> None:
    def cut(conn: PeerConnection) -> None:
        conn.expect()
        conn.reset()

    def held(conn: PeerConnection) -> None:
        assert attached(conn, stream=True)["since"] == 0
        ends(conn, {"at": 5.5}, {"stream": "a"}, EXIT_INFO, {"result": 1})

    with playing(tmp_path, call_list(), cut, call_list(), held) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            assert await followed(dispatcher, job_id, since=0) == ([(0, "a")], Returned(b"1"))


async def test_start_cancelled_while_connecting_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is ready in the very moment in which the cancel interrupts the wait for it."""
    opened = await open_store(tmp_path / "store")
    connected, cancelled = asyncio.Event(), asyncio.Event()

    class Cancelling(Switched):
        """A store that reports each cancel."""

        async def cancel_job(self, *arguments: Any) -> Any:
            before = await opened.cancel_job(*arguments)
            cancelled.set()
            return before

    async def connect(*arguments: Any) -> HarpdConnection:
        conn = await open_connection(*arguments)
        connected.set()
        with contextlib.suppress(asyncio.CancelledError):
            await cancelled.wait()
        return conn

    def script(conn: PeerConnection) -> None:
        with pytest.raises(AssertionError, match="closed after b''"):
            conn.line()

    monkeypatch.setattr("harpcaller.runs.run.open_connection", connect)
    with playing(tmp_path, call_list(), script) as peer:
        store: Any = Cancelling(opened)
        async with running(tmp_path, host_line(peer.port), store=store, resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            async with asyncio.timeout(30):
                await connected.wait()
                assert await dispatcher.cancel(job_id)
                details = await dispatcher.wait_stopped(job_id)
            assert (details.job.state, details.job.stop) == (State.CANCELLED, StopState.CONFIRMED)
            await eventually(peer.connections[1].closed.is_set, what="the connection closed")
    await opened.close()


async def test_reattach_continues_at_the_next_record(tmp_path: Path) -> None:
    requests: list[tuple[int, str]] = []

    def begin(conn: PeerConnection) -> None:
        started(conn, stream=True)
        conn.reply({"at": 10.0}, {"stream": 0}, {"stream": 1}, {"at": 11.5})
        conn.send(b'{"stream": "cut in the mid')

    def middle(conn: PeerConnection) -> None:
        request = attached(conn, stream=True, records=4)
        requests.append((request["since"], request["attach"]))
        conn.reply({"at": 12.0}, {"stream": 2})
        conn.reset()

    def rest(conn: PeerConnection) -> None:
        request = attached(conn, stream=True, records=4)
        requests.append((request["since"], request["attach"]))
        conn.reply(*({"stream": number} for number in range(request["since"], 4)))
        ends(conn, EXIT_INFO, {"result": "end"})

    with playing(tmp_path, call_list(), begin, call_list(), middle, call_list(), rest) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            records, end = await followed(dispatcher, job_id, since=0)
            assert records == [(number, number) for number in range(4)]
            assert end == Returned(b'"end"')
            times = [
                made
                async for item in read(dispatcher, job_id, since=0)
                if isinstance(item, RecordBatch)
                for made in item.records.timestamps
            ]
            assert times[:2] == [10.0, 10.0]
    assert requests[0] == (2, job_id)
    assert requests[1][0] in (2, 3)  # a reset may discard data in transit


async def test_reattach_acknowledges_the_records_again(tmp_path: Path) -> None:
    """Acknowledgements may be lost with a connection, and the call waits while its spool is full."""
    stored = threading.Event()

    def begin(conn: PeerConnection) -> None:
        started(conn, stream=True)
        conn.reply({"at": 10.0}, {"stream": 0}, {"stream": 1})

    def rest(conn: PeerConnection) -> None:
        assert conn.expect()["since"] == 2
        assert stored.wait(DEADLINE)  # an acknowledgement of records that are stored later would be sent anyway
        conn.reply(acknowledgement(stream=True, records=2))
        assert next(commands(conn)) == {"ack": 2}
        conn.reply({"at": 11.0}, {"stream": 2})
        ends(conn, EXIT_INFO, {"result": "end"})

    with playing(tmp_path, call_list(), begin, call_list(), rest) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await until(dispatcher, job_id, lambda job: job.records == 2, "the stored records")
            stored.set()
            records, _ = await followed(dispatcher, job_id, since=0)
            assert records == [(number, number) for number in range(3)]


async def test_outage_is_a_change_of_the_job_when_it_begins_and_ends(tmp_path: Path) -> None:
    back = threading.Event()

    def begin(conn: PeerConnection) -> None:
        started(conn)
        conn.reset()

    def refusing(conn: PeerConnection) -> None:
        assert back.wait(30)
        conn.reset()

    def again(conn: PeerConnection) -> None:
        attached(conn)
        ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, call_list(), begin, refusing, call_list(), again) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            changes = dispatcher.changes  # nothing else is recorded without an API that shows changes
            job_id = await dispatcher.submit(call(), "test")
            await lost(dispatcher, job_id)
            assert changes.changed_since(0) == [(job_id, 1)]
            [summary] = await dispatcher.get_summaries([job_id])
            assert summary.unreachable_since is not None
            back.set()
            await settled(dispatcher, job_id)
            assert changes.changed_since(0) == [(job_id, 2)]


async def test_outage_lasts_until_the_host_has_stopped_the_call(tmp_path: Path) -> None:
    """The host's `kill_grace` is longer than `host_timeout`: the slot stays until its processes must have ended."""

    def begin(conn: PeerConnection) -> None:
        started(conn, disconnect_timeout=1.0, kill_grace=1000.0)
        conn.reset()

    settings: dict[str, Any] = {"resumable_calls": True, "disconnect_timeout": 1.0, "host_timeout": 11.0}
    with playing(tmp_path, call_list(), begin, always=PeerConnection.reset) as peer:
        async with running(tmp_path, host_line(peer.port), **settings) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await lost(dispatcher, job_id)
            why = str((await dispatcher.details(job_id))["why"])
    found = re.search(r"declared lost in (\d+) s", why)
    assert found is not None
    assert 1900 < int(found[1]) <= 1.0 + 2 * 1000.0 + 5.0


async def test_stop_after_outage_frees_the_slot_with_the_report(tmp_path: Path) -> None:
    broken, back = threading.Event(), threading.Event()

    def begin(conn: PeerConnection) -> None:
        started(conn)
        assert broken.wait(30)

    def refusing(conn: PeerConnection) -> None:
        assert back.wait(30)
        conn.reset()

    def again(conn: PeerConnection) -> None:
        attached(conn)
        command = next(commands(conn))
        assert command == {"stop": {"why": "cancelled", "by": "192.0.2.1:5"}}
        ends(conn, stop_report(), EXIT_INFO, {"harp": 1, "error": {"type": "cancelled", "message": "stopped"}})

    with playing(tmp_path, call_list(), begin, refusing, call_list(), again) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await acknowledged(dispatcher, job_id)
            broken.set()
            await lost(dispatcher, job_id)
            assert await dispatcher.cancel(job_id, "192.0.2.1:5")
            job = await dispatcher.get_job(job_id)
            assert (job.state, job.stop, job.holds_slot) == (State.CANCELLED, StopState.PENDING, True)
            assert "its stop is pending" in (await dispatcher.details(job_id))["why"]
            waiting = asyncio.create_task(dispatcher.wait_stopped(job_id))
            back.set()
            details = await waiting
            assert (details.job.stop, details.job.holds_slot, details.job.end) == (
                StopState.CONFIRMED,
                False,
                Cancelled(),
            )
            assert details.metadata.stop_report is not None


async def test_surviving_processes_keep_the_slot(tmp_path: Path) -> None:
    released = threading.Event()

    def script(conn: PeerConnection) -> None:
        started(conn)
        assert next(commands(conn)).keys() == {"stop"}
        conn.reply(stop_report(7), EXIT_INFO, {"harp": 1, "error": {"type": "cancelled", "message": "stopped"}})
        assert released.wait(30)
        ends(conn, stop_report())

    with playing(tmp_path, call_list(), script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await acknowledged(dispatcher, job_id)
            await dispatcher.cancel(job_id)
            details = await dispatcher.wait_stopped(job_id)
            assert (details.job.stop, details.job.holds_slot) == (StopState.FAILED, True)
            assert "processes survive on its host: 7" in (await dispatcher.details(job_id))["why"]
            released.set()
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED


async def test_release_frees_the_slot(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        started(conn)
        conn.until_closed()

    with playing(tmp_path, call_list(), script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await acknowledged(dispatcher, job_id)
            assert not await dispatcher.release_slot(job_id)  # the job is running
            await dispatcher.cancel(job_id)
            waiting = asyncio.create_task(dispatcher.wait_stopped(job_id))
            assert await dispatcher.release_slot(job_id)
            assert (await waiting).job.stop is StopState.FAILED
            assert not (await dispatcher.get_job(job_id)).holds_slot
            assert not await dispatcher.release_slot(job_id)
            assert not await dispatcher.release_slot("nothing")


async def test_host_limit_ends_the_job_with_a_stop_report(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        started(conn)
        ends(conn, stop_report(), EXIT_INFO, {"harp": 1, "error": {"type": "timeout", "message": "too long"}})

    with playing(tmp_path, call_list(), script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id, end = await result_of(dispatcher)
            assert end == Failed("timeout", "too long")
            assert (await dispatcher.get_job(job_id)).stop is StopState.CONFIRMED


async def test_records_gone_ends_the_job_and_stops_the_call(tmp_path: Path) -> None:
    def begin(conn: PeerConnection) -> None:
        started(conn, stream=True)
        conn.reset()

    def lacking(conn: PeerConnection) -> None:
        assert conn.expect()["since"] == 0
        data = {"first": 5, "end": 9}
        conn.reply({"harp": 1, "error": {"type": "records_gone", "message": "gone", "data": data}})

    def rest(conn: PeerConnection) -> None:
        assert attached(conn, stream=True)["since"] == 9
        assert next(commands(conn)) == {"stop": {"why": "records_gone", "by": "dispatcher"}}
        ends(conn, stop_report(), EXIT_INFO, {"harp": 1, "error": {"type": "cancelled", "message": "stopped"}})

    with playing(tmp_path, call_list(), begin, call_list(), lacking, rest) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id, end = await result_of(dispatcher)
            assert isinstance(end, Failed)
            assert end.type == "missing_result"
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED


async def test_host_downgraded_to_legacy_has_bound_calls(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "stream_result": False}, {"result": 1})

    with playing(tmp_path, call_list(), script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id, end = await result_of(dispatcher)
            assert end == Returned(b"1")
            assert json.loads((await dispatcher.details(job_id))["call"])["resumable"] is False


async def test_orphaned_calls_are_stopped_and_released(tmp_path: Path) -> None:
    """A call of a job that has ended, and a call of an unknown job."""
    unknown = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
    ids: list[str] = []
    stopped: list[str] = []

    def list_both(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "calls": [*ids, unknown], "instance": "w1"})

    def orphaned(conn: PeerConnection) -> None:
        request = conn.expect()
        if "attach" not in request:
            conn.reply(acknowledgement())
            ends(conn, EXIT_INFO, {"result": 1})
            return
        conn.reply(acknowledgement())
        assert next(commands(conn)) == {"stop": {"why": "orphaned"}}
        ends(conn, stop_report(), {"exit_info": {"late": 1}}, {"result": 1})
        stopped.append(request["attach"])

    store = await open_store(tmp_path / "store")
    with playing(tmp_path, always=orphaned) as peer:
        async with running(tmp_path, host_line(1, "elsewhere"), store=store) as dispatcher:
            job_id, _ = await result_of(dispatcher)  # its host is unknown
            ids.append(job_id)
        peer.play_next(list_both)
        async with running(tmp_path, host_line(peer.port), store=store, resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher))[1] == Returned(b"1")
            await eventually(lambda: len(stopped) == 2, what="both ended")
            assert (await dispatcher.details(job_id))["exit_info"] == b'{"late": 1}'
            end = (await dispatcher.get_job(job_id)).end
            assert isinstance(end, Failed)  # the first end wins
    assert sorted(stopped) == sorted([job_id, unknown])
    await store.close()


async def test_listed_call_that_is_running_is_not_stopped(tmp_path: Path) -> None:
    """A host lists a running job's call before an orphan. The clean-up does not even read the running job."""
    unknown = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
    opened = await open_store(tmp_path / "store")
    ids: list[str] = []
    attaches: list[str] = []
    checked: list[str] = []
    stopped = threading.Event()

    class Observed(Switched):
        """A store that records which jobs were read one by one."""

        async def get_job(self, job_id: str) -> Any:
            checked.append(job_id)
            return await opened.get_job(job_id)

    def begin(conn: PeerConnection) -> None:
        ids.append(started(conn)["call"]["id"])
        assert stopped.wait(30)
        ends(conn, EXIT_INFO, {"result": 1})

    def refused(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "error": {"type": "wrong_instance", "message": "no", "data": {"instance": "w2"}}})

    def list_both(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "calls": [*ids, unknown], "instance": "w2"})

    def script(conn: PeerConnection) -> None:
        request = conn.expect()
        conn.reply(acknowledgement())
        if "attach" not in request:
            ends(conn, EXIT_INFO, {"result": 2})
            return
        attaches.append(request["attach"])
        assert next(commands(conn)) == {"stop": {"why": "orphaned"}}
        ends(conn, stop_report(), EXIT_INFO, {"harp": 1, "error": {"type": "cancelled", "message": "stopped"}})
        stopped.set()

    with playing(tmp_path, call_list(), begin, refused, list_both, always=script) as peer:
        store: Any = Observed(opened)
        async with running(tmp_path, host_line(peer.port), store=store, resumable_calls=True) as dispatcher:
            first = await dispatcher.submit(call(), "test")
            await acknowledged(dispatcher, first)
            second = await dispatcher.submit(call(), "test")
            await eventually(stopped.is_set, what="the orphan stopped")
            assert (attaches, checked) == ([unknown], [unknown])
            assert await dispatcher.result(first) == Returned(b"1")
            assert await dispatcher.result(second) == Returned(b"2")
    await opened.close()


async def test_restarted_dispatcher_recovers_its_calls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    requests: list[dict[str, Any]] = []

    def begin(conn: PeerConnection) -> None:
        started(conn, stream=True)
        conn.reply({"at": 1.0}, {"stream": 0})
        assert next(commands(conn)) == {"ack": 1}
        conn.until_closed()

    def again(conn: PeerConnection) -> None:
        requests.append(attached(conn, stream=True, elapsed=100.0, records=1))
        ends(conn, {"at": 2.0}, {"stream": 1}, EXIT_INFO, {"result": 1})

    store = await open_store(tmp_path / "store")
    with playing(tmp_path, call_list(), begin, call_list(), again) as peer:
        async with running(tmp_path, host_line(peer.port), store=store, resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await until(dispatcher, job_id, lambda job: job.records == 1, "the first record")
        job = await store.get_job(job_id)
        assert (job.state, job.holds_slot) == (State.RUNNING, True)
        async with running(tmp_path, host_line(peer.port), store=store, resumable_calls=True) as dispatcher:
            assert await followed(dispatcher, job_id, since=0) == ([(0, 0), (1, 1)], Returned(b"1"))
    assert requests[0]["since"] == 1
    await store.close()
    [seconds] = (vars(record)["seconds"] for record in caplog.records if record.msg == "call ended")
    assert seconds >= 100.0  # the job's time, by the host's clock; not the time since the restart


@pytest.mark.parametrize("type_", ["authentication_timeout", "access_denied", "auth_error"])
async def test_recovered_call_of_a_host_that_refuses_its_list_is_not_given_up(tmp_path: Path, type_: str) -> None:
    """The refusal does not prove a legacy harpd, whose calls end with their connections."""

    def begin(conn: PeerConnection) -> None:
        started(conn)
        conn.until_closed()

    def refuse(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "error": {"type": type_, "message": "not now"}})

    def again(conn: PeerConnection) -> None:
        attached(conn)
        ends(conn, EXIT_INFO, {"result": 1})

    store = await open_store(tmp_path / "store")
    with playing(tmp_path, call_list(), begin, refuse, call_list(), again) as peer:
        async with running(tmp_path, host_line(peer.port), store=store, resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await acknowledged(dispatcher, job_id)
        async with running(tmp_path, host_line(peer.port), store=store, resumable_calls=True) as dispatcher:
            assert await dispatcher.result(job_id) == Returned(b"1")
    await store.close()


async def test_call_without_its_host_logs_the_job_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    store = await open_store(tmp_path / "store")
    await job_in(store, State.RUNNING, now=time.time() - 500, host="web01")
    async with running(tmp_path, host_line(1), store=store, resumable_calls=True):
        pass
    await store.close()
    [seconds] = (vars(record)["seconds"] for record in caplog.records if record.msg == "call detached")
    assert seconds >= 500.0


async def test_details_explain_why_a_job_waits(tmp_path: Path) -> None:
    go_on = threading.Event()

    def script(conn: PeerConnection) -> None:
        started(conn)
        assert go_on.wait(30)
        ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, call_list(), always=script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True, max_calls_per_host=2) as dispatcher:
            first, second, third = [await dispatcher.submit(call(queue={"db": "prod"}), "test") for _ in range(3)]
            await acknowledged(dispatcher, first)
            other = await dispatcher.submit(call(), "test")
            await acknowledged(dispatcher, other)
            waiting = await dispatcher.submit(call(), "test")

            async def why(job_id: str) -> str:
                return str((await dispatcher.details(job_id))["why"])

            assert await why(third) == f'queue {{"db": "prod"}} is full (1 of 1: {first}), position 2'
            assert await why(second) == f'queue {{"db": "prod"}} is full (1 of 1: {first}), position 1'
            assert await why(waiting) == "host web01 is full (2 of 2 calls), position 1"
            assert (await why(first)).startswith("it has been running on host web01 since 20")
            go_on.set()
            for job_id in (first, second, third, other, waiting):
                assert await dispatcher.result(job_id) == Returned(b"1")
                assert (await why(job_id)).startswith("it returned after ")
            with pytest.raises(UnknownJob):
                await dispatcher.details("3f22e0d4-c8ed-11e5-8d66-001e8c140268")
