"""Invalid replies of hosts, failures of the store and unlucky timing: the dispatcher continues."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Cancelled, Failed, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import NewJob, StopState
from harpcaller.store.sqlite import open_store
from support.deadline import eventually
from support.dispatcher import Switched, call, host_line, running
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
    playing,
    result_of,
    settled,
    started,
    stop_report,
)

UNKNOWN = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"


async def claimed_job(store: Any) -> str:
    """Return a job that an earlier dispatcher has claimed."""
    job = NewJob(str(uuid.uuid4()), "web01", "p", Raw(b"[]"), 600.0, 600.0)
    await store.add_job(job, 1.0)
    [claimed] = await store.claim_jobs(1.0, 1, 1000)
    assert claimed.id == job.id
    return job.id


@pytest.mark.parametrize("data", [{}, {"end": "x"}, [1], None, {"end": 10**30}])
async def test_orphan_with_invalid_reply_affects_no_other(tmp_path: Path, data: Any) -> None:
    refused = threading.Event()

    def script(conn: PeerConnection) -> None:
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": [UNKNOWN], "instance": "w1"})
        elif "attach" in request:
            conn.reply({"harp": 1, "error": {"type": "records_gone", "message": "gone", "data": data}})
            refused.set()
            conn.until_closed()
        else:
            conn.reply(acknowledgement())
            assert refused.wait(30)
            ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, always=script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            for _ in range(2):
                assert (await result_of(dispatcher))[1] == Returned(b"1")


async def test_orphans_of_a_silent_host_delay_no_other_host(tmp_path: Path) -> None:
    """A host lists many orphans and does not reply to attaches."""
    waiting = threading.Semaphore(0)
    stopped = threading.Event()

    def silent_host(conn: PeerConnection) -> None:
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": [str(uuid.uuid4()) for _ in range(20)], "instance": "w1"})
        elif "attach" in request:
            waiting.release()
            conn.until_closed()
        else:
            conn.reply(acknowledgement())
            ends(conn, EXIT_INFO, {"result": 1})

    def good_host(conn: PeerConnection) -> None:
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": [UNKNOWN], "instance": "w1"})
            return
        conn.reply(acknowledgement())
        if "attach" in request:
            assert next(commands(conn)) == {"stop": {"why": "orphaned"}}
            ends(conn, stop_report(), EXIT_INFO, {"result": 1})
            stopped.set()
        else:
            ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, always=silent_host) as one, playing(tmp_path, always=good_host) as two:
        lines = host_line(one.port, "web01"), host_line(two.port, "web02")
        async with running(tmp_path, *lines, resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher, host="web01"))[1] == Returned(b"1")
            await eventually(lambda: waiting.acquire(blocking=False), what="the first of the silent ones")
            assert (await result_of(dispatcher, host="web02"))[1] == Returned(b"1")
            await eventually(stopped.is_set, what="the other host's call stopped")


async def test_orphan_of_another_host_stores_no_exit_info(tmp_path: Path) -> None:
    ids: list[str] = []
    forged = threading.Event()

    def script(conn: PeerConnection) -> None:
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": ids, "instance": "w1"})
            return
        conn.reply(acknowledgement())
        if "attach" in request:
            assert "stop" in next(commands(conn))
            ends(conn, stop_report(), {"exit_info": {"forged": 1}}, {"result": 1})
            forged.set()
        else:
            ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, always=script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id, end = await result_of(dispatcher, host="elsewhere")
            assert isinstance(end, Failed)
            ids.append(job_id)
            assert (await result_of(dispatcher))[1] == Returned(b"1")
            await eventually(forged.is_set, what="the forged end")
            details = await dispatcher.details(job_id)
            assert (details["exit_info"], details["stop_report"]) == (None, None)


async def test_call_list_that_is_too_long_is_ignored(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        # The dispatcher may close the connection before the end.
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            conn.send(b'{"harp": 1, "calls": [' + b'"3f22e0d4-c8ed-11e5-8d66-001e8c140268", ' * 250_000)
        conn.until_closed()

    with playing(tmp_path, script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            _, end = await result_of(dispatcher)
            assert isinstance(end, Failed)
            assert end.type == "protocol_error"


async def test_slow_query_does_not_make_a_host_legacy(tmp_path: Path) -> None:
    def late(conn: PeerConnection) -> None:
        conn.expect()
        fault = {"type": "invalid_request", "message": "no complete request line within 30 s"}
        conn.reply({"harp": 1, "error": fault})

    def script(conn: PeerConnection) -> None:
        assert "call" in started(conn)
        ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, late, call_list(), script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher))[1] == Returned(b"1")


async def test_cancel_during_recovery_stops_the_call(tmp_path: Path) -> None:
    """The store fails at the start and works when the APIs are open."""
    opened = await open_store(tmp_path / "store")
    job_id = await claimed_job(opened)
    requests, go_on = asyncio.Event(), asyncio.Event()

    class Late(Switched):
        """A store that fails to list the running jobs once, then lists them slowly."""

        async def list_slot_holders(self) -> Any:
            if not self.refused:
                self.off = True
                return await self.__getattr__("list_slot_holders")()
            self.off = False
            holding = await opened.list_slot_holders()
            requests.set()
            await go_on.wait()
            return holding

    def holding(conn: PeerConnection) -> None:
        attached(conn)
        assert next(commands(conn)) == {"stop": {"why": "cancelled"}}
        ends(conn, stop_report(), EXIT_INFO, {"harp": 1, "error": {"type": "cancelled", "message": "stopped"}})

    with playing(tmp_path, call_list(), holding) as peer:
        store: Any = Late(opened, "list_slot_holders")
        async with running(tmp_path, host_line(peer.port), store=store, resumable_calls=True) as dispatcher:
            await requests.wait()
            assert await dispatcher.cancel(job_id, "somebody")
            go_on.set()
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED
            assert await dispatcher.result(job_id) == Cancelled()
    await opened.close()


async def test_failed_run_leaves_no_pending_stop(tmp_path: Path) -> None:
    """A client that waits for the stop is notified; the job keeps its slot until the next start."""
    opened = await open_store(tmp_path / "store")

    class Faulty(Switched):
        """A store that fails once when the end of the call is stored."""

        async def finalize_stop(self, *arguments: Any, **options: Any) -> Any:
            if not self.refused:
                self.refused += 1
                raise ValueError("a fault")
            return await opened.finalize_stop(*arguments, **options)

    def script(conn: PeerConnection) -> None:
        started(conn)
        assert "stop" in next(commands(conn))
        conn.reply(stop_report(), EXIT_INFO, {"harp": 1, "error": {"type": "cancelled", "message": "stopped"}})
        conn.until_closed()

    with playing(tmp_path, call_list(), script) as peer:
        store: Any = Faulty(opened)
        async with running(tmp_path, host_line(peer.port), store=store, resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await acknowledged(dispatcher, job_id)
            assert await dispatcher.cancel(job_id)
            async with asyncio.timeout(30):
                details = await dispatcher.wait_stopped(job_id)
            assert (details.job.stop, details.job.holds_slot) == (StopState.FAILED, True)
    await opened.close()


async def test_recovered_job_of_unknown_host_ends_with_unknown_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call may run until `host_timeout`: the host may have been removed from the registry after the start."""
    monkeypatch.setattr("harpcaller.config._STOP_MARGIN", 0.0)
    opened = await open_store(tmp_path / "store")
    job_id, ended_before = await claimed_job(opened), await claimed_job(opened)
    assert await opened.cancel_job(ended_before, 2.0, None)
    times: dict[str, Any] = {"disconnect_timeout": 0.5, "host_timeout": 1.0}
    async with running(tmp_path, store=opened, resumable_calls=True, **times) as dispatcher:
        began = time.monotonic()
        end = await dispatcher.result(job_id)
        assert end == Failed("unknown_host", "the hosts registry has no host web01")
        assert time.monotonic() - began > 0.9
        assert (await settled(dispatcher, job_id)).stop is StopState.FAILED
        assert (await settled(dispatcher, ended_before)).stop is StopState.FAILED
        report = json.loads((await dispatcher.details(ended_before))["stop_report"])
        assert report["host_lost"]["error"] == "the hosts registry has no host web01"
    await opened.close()


async def test_host_does_not_learn_the_secret_of_another_hosts_call(tmp_path: Path) -> None:
    """A host lists the call of another host as its own; the dispatcher attaches to it, to stop an orphan."""
    owned: list[Any] = []
    learned: list[Any] = []

    def good(conn: PeerConnection) -> None:
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": [], "instance": "w1"})
            return
        owned.append(request["call"])
        conn.reply(acknowledgement())
        ends(conn, EXIT_INFO, {"result": 1})

    def hostile(conn: PeerConnection) -> None:
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": [owned[0]["id"]], "instance": "w1"})
        elif "attach" in request:
            learned.append(request)
            conn.reply(NO_SUCH_CALL)
        else:
            conn.reply(acknowledgement())
            ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, always=good) as one, playing(tmp_path, always=hostile) as two:
        lines = host_line(one.port, "web01"), host_line(two.port, "web02")
        async with running(tmp_path, *lines, resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher, host="web01"))[1] == Returned(b"1")
            assert (await result_of(dispatcher, host="web02"))[1] == Returned(b"1")
            await eventually(lambda: bool(learned), what="the attach to the other host's call")
    assert learned[0]["attach"] == owned[0]["id"]
    assert learned[0]["secret"] != owned[0]["secret"]
    assert learned[0]["owner"] != owned[0]["owner"]
