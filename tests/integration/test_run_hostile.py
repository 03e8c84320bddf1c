"""A run of a resumable call on a host that breaks the protocol, floods the dispatcher or is silent."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Failed, Returned
from harp.protocol.harpd import Ack, ListCalls, Phase, encode_request
from harp.protocol.json_text import Raw
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.config import Config
from harpcaller.hosts.connecting import open_connection
from harpcaller.hosts.connection import MessageQueue
from harpcaller.hosts.registry import Host
from harpcaller.hosts.resolving import Resolver
from harpcaller.hosts.tls import HostTLS
from harpcaller.model.jobs import StopState
from harpcaller.store.sqlite import open_store
from support.deadline import eventually
from support.dispatcher import Switched, call, followed, host_line, running
from support.harpd import Harpd
from support.peers import PeerConnection
from support.resumable_host import (
    EXIT_INFO,
    NO_SUCH_CALL,
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

#: A number that no record has.
BEHIND_ALL = 2**53

STOPPED = {"harp": 1, "error": {"type": "cancelled", "message": "stopped"}}


def records_gone(**data: Any) -> dict[str, Any]:
    return {"harp": 1, "error": {"type": "records_gone", "message": "gone", "data": data}}


def refused_behind_all(end: int) -> Any:
    """Receive the attach that queries the end of the records."""

    def script(conn: PeerConnection) -> None:
        assert conn.expect()["since"] == BEHIND_ALL
        conn.reply(records_gone(first=0, end=end))

    return script


def stopped_behind(end: int) -> Any:
    """Receive the attach past all records, and the stop command."""

    def script(conn: PeerConnection) -> None:
        assert attached(conn, stream=True, records=end)["since"] == end
        assert next(commands(conn)) == {"stop": {"why": "protocol_error", "by": "dispatcher"}}
        ends(conn, stop_report(), EXIT_INFO, STOPPED)

    return script


@pytest.mark.parametrize(
    "garbage", [b'{"stream":x}\n', b"\xff\n", b'{"stream": 1, "result": 2}\n', b'{"harp": 1, "stream_result": true}\n']
)
async def test_resumable_run_invalid_message_ends_the_job(tmp_path: Path, garbage: bytes) -> None:
    def begin(conn: PeerConnection) -> None:
        started(conn, stream=True)
        conn.send(b'{"at": 1.0}\n{"stream": 0}\n' + garbage + b'{"stream": 2}\n')
        conn.until_closed()

    scripts = (call_list(), begin, call_list(), refused_behind_all(7), stopped_behind(7))
    with playing(tmp_path, *scripts) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            records, end = await followed(dispatcher, job_id, since=0)
            assert records == [(0, 0)]
            assert isinstance(end, Failed)
            assert end.type == "protocol_error"
            assert "web01" in end.message
            assert "expected record 1" in end.message
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED


async def test_resumable_run_long_record_on_real_host_ends_the_job(tmp_path: Path) -> None:
    procedures = """
import time
from harpd.proc import streaming_procedure

@streaming_procedure
def long_record():
    yield "short"
    yield "x" * 100_000
    time.sleep(600)
"""
    with Harpd(tmp_path / "harpd", procedures) as harpd:
        line = json.dumps(
            {
                "hostname": "web01",
                "address": "127.0.0.1",
                "port": harpd.port,
                "credentials": {"user": harpd.user, "password": harpd.password},
            }
        )
        async with running(tmp_path, line + "\n", resumable_calls=True, record_line=50_000) as dispatcher:
            job_id = await dispatcher.submit(call("long_record"), "test")
            end = await dispatcher.result(job_id)
            assert isinstance(end, Failed)
            assert end.type == "protocol_error"
            assert "longer than 50000 bytes" in end.message
            job = await settled(dispatcher, job_id)
            assert job.stop is StopState.CONFIRMED
            assert (await dispatcher.details(job_id))["stop_report"] is not None
        assert harpd.status()["calls"] == 0


async def test_resumable_run_repeated_errors_slow_reattaching(tmp_path: Path) -> None:
    """An acknowledgement is not progress. The job keeps its slot until the host reports the end."""
    attaches: list[float] = []

    def script(conn: PeerConnection) -> None:
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": [], "instance": "w1"})
            return
        if "attach" in request:
            attaches.append(time.monotonic())
        conn.reply(acknowledgement(stream=True))
        if len(attaches) >= 5:
            assert "stop" in next(commands(conn))
            ends(conn, stop_report(), EXIT_INFO, STOPPED)
            return
        conn.send(b"garbage\n")
        conn.until_closed()

    with playing(tmp_path, always=script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id, end = await result_of(dispatcher)
            assert isinstance(end, Failed)
            assert end.type == "protocol_error"
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED
    assert (
        attaches[4] - attaches[3] > 0.79
    )  # at least half of the delay after four failed attempts: 0.2 s * 2 ** 4 / 2 = 1.6 s


async def test_resumable_run_ack_and_disconnect_slows_reattaching(tmp_path: Path) -> None:
    attaches: list[float] = []

    def script(conn: PeerConnection) -> None:
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": [], "instance": "w1"})
            return
        if "attach" in request:
            attaches.append(time.monotonic())
        conn.reply(acknowledgement())
        if len(attaches) >= 5:
            ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, always=script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher))[1] == Returned(b"1")
    assert attaches[4] - attaches[3] > 0.79


@pytest.mark.parametrize("data", [{}, {"end": "x"}, {"end": -1}, {"end": 1.5}, {"end": True}, [1], 10**400, "x"])
async def test_records_gone_with_invalid_data_is_retried(tmp_path: Path, data: Any) -> None:
    """The attempt counts as failed; it is not an internal error."""

    def begin(conn: PeerConnection) -> None:
        started(conn)
        conn.reset()

    def odd(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "error": {"type": "records_gone", "message": "gone", "data": data}})

    def right(conn: PeerConnection) -> None:
        attached(conn)
        ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, call_list(), begin, call_list(), odd, right) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher))[1] == Returned(b"1")


async def test_records_gone_continues_at_the_given_number(tmp_path: Path) -> None:
    """Without an ack of these records the host would never send the end."""
    counts: list[int] = []

    def begin(conn: PeerConnection) -> None:
        started(conn, stream=True)
        conn.reset()

    def lacking(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(records_gone(first=5, end=9))

    def rest(conn: PeerConnection) -> None:
        assert attached(conn, stream=True)["since"] == 9
        received = commands(conn)
        assert "stop" in next(received)
        conn.reply({"stream": 9}, {"stream": 10})
        while not counts or counts[-1] < 11:
            counts.append(next(received)["ack"])
        ends(conn, stop_report(), EXIT_INFO, STOPPED)

    with playing(tmp_path, call_list(), begin, call_list(), lacking, rest) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id, _ = await result_of(dispatcher)
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED


async def test_resumable_run_data_after_the_end_is_ignored(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        started(conn, stream=True)
        conn.send(b'{"stream": 0}\n{"result": 1}\n{"result": 2}\ngarbage\n{"stream": 1}\n')
        conn.until_closed()

    with playing(tmp_path, call_list(), script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            assert await followed(dispatcher, job_id, since=0) == ([(0, 0)], Returned(b"1"))
            assert not (await settled(dispatcher, job_id)).holds_slot


# Time.


LIMIT = 3.0


async def test_resumable_run_buffered_result_is_not_too_late(tmp_path: Path) -> None:
    """The call ended in time, during an outage. The host enforces the limits and reports the end."""
    may_answer = threading.Event()

    def begin(conn: PeerConnection) -> None:
        conn.expect()
        conn.reset()

    def late(conn: PeerConnection) -> None:
        assert may_answer.wait(30)
        request = conn.expect()
        assert "attach" in request
        conn.reply(acknowledgement(stream=True, elapsed=10_000.0, records=1))
        assert "heartbeat" in json.loads(conn.line())  # it has checked its limits
        conn.reply({"stream": 0})
        assert next(commands(conn)) == {"ack": 1}
        ends(conn, EXIT_INFO, {"result": "in time"})

    with playing(tmp_path, call_list(), begin, call_list(), late) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(timeout=LIMIT, max_exec_time=LIMIT), "test")
            await lost(dispatcher, job_id)  # within the limit, which is long for a slow machine
            over = time.monotonic() + LIMIT
            await eventually(lambda: time.monotonic() > over, what="the end of the limits")
            assert (await dispatcher.get_job(job_id)).end is None
            may_answer.set()
            assert await dispatcher.result(job_id) == Returned(b'"in time"')


async def test_resumable_run_missing_ack_does_not_end_the_job(tmp_path: Path) -> None:
    """The job's timeout is shorter than acknowledgement_timeout, and the job is cancelled before it."""
    silent = threading.Event()

    def begin(conn: PeerConnection) -> None:
        conn.expect()
        silent.set()
        conn.until_closed()

    def no_such_call(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(NO_SUCH_CALL)

    with playing(tmp_path, call_list(), begin, call_list(), no_such_call) as peer:
        options: dict[str, Any] = {"acknowledgement_timeout": 0.5, "resumable_calls": True}
        async with running(tmp_path, host_line(peer.port), **options) as dispatcher:
            job_id = await dispatcher.submit(call(timeout=0.2), "test")
            await eventually(silent.is_set, what="the request")
            end = await dispatcher.result(job_id)
            assert isinstance(end, Failed)
            assert end.type == "timeout"
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED


async def test_heartbeats_keep_a_minimum_interval(tmp_path: Path) -> None:
    """The minimum applies to every timeout that a host sends."""
    beats: list[float] = []

    def script(conn: PeerConnection) -> None:
        started(conn, disconnect_timeout=1e-9)
        while len(beats) < 4:
            assert "heartbeat" in json.loads(conn.line())
            beats.append(time.monotonic())
            conn.reply({"heartbeat": 0.0})
        ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, call_list(), script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher))[1] == Returned(b"1")
    assert beats[3] - beats[1] > 0.15


async def test_host_that_does_not_read_is_disconnected(tmp_path: Path) -> None:
    """Commands to it do not accumulate: they are bounded by the kernel's buffer and a little more."""
    over = threading.Event()

    def deaf(conn: PeerConnection) -> None:
        assert over.wait(30)

    config = Config(stream_directory=tmp_path, verify=False)
    with playing(tmp_path, deaf) as peer:
        host = Host("web01", "127.0.0.1", peer.port, "u", "p")
        conn = await open_connection(host, HostTLS(config), config, TimerWheel(), Resolver())
        messages = MessageQueue(conn)
        conn.send_request(encode_request(ListCalls("owner", "u", "p")), Phase.SENT_LIST, messages)
        reading = asyncio.create_task(messages.receive())
        received = 0
        while not reading.done() and received < 1_000_000:
            for _ in range(1000):
                conn.send_command(Ack(received))
            received += 1000
            await asyncio.sleep(0)
        over.set()
        assert received < 1_000_000
        assert await reading is None
        conn.abort()


async def test_host_that_ignores_the_window_is_paused(tmp_path: Path) -> None:
    """While the store fails, the memory for its records is bounded."""
    sent = 0
    held_back = threading.Event()

    def flood(conn: PeerConnection) -> None:
        nonlocal sent
        started(conn, stream=True)
        conn.sock.settimeout(1.0)
        line = json.dumps({"stream": "x" * 100_000}).encode() + b"\n"
        try:
            while sent < 100_000_000:
                conn.send(line)
                sent += len(line)
        except TimeoutError:
            pass
        held_back.set()

    def rest(conn: PeerConnection) -> None:
        attached(conn, stream=True)
        ends(conn, EXIT_INFO, {"result": 1})

    opened = await open_store(tmp_path / "store")
    store = Switched(opened, "append_records")
    store.off = True
    with playing(tmp_path, call_list(), flood, always=rest) as peer:
        peer.play_next(call_list())
        async with running(tmp_path, host_line(peer.port), store=store, resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await eventually(held_back.is_set, what="no more room")
            assert sent < 40_000_000
            store.off = False
            assert await dispatcher.result(job_id) == Returned(b"1")
    await opened.close()


def endless(conn: PeerConnection) -> None:
    """Stream records until the dispatcher stops the call."""
    request = conn.expect()
    if "calls" in request:
        conn.reply({"harp": 1, "calls": [], "instance": "w1"})
        return
    since = request.get("since", 0)
    conn.reply(acknowledgement(stream=True, records=since))
    for _ in range(500):
        conn.reply({"stream": "x" * 50_000})
    assert next(command for command in commands(conn) if "ack" not in command)["stop"]["why"] == "limit"
    ends(conn, stop_report(), EXIT_INFO, STOPPED)


async def test_records_beyond_the_limit_end_the_job(tmp_path: Path) -> None:
    with playing(tmp_path, always=endless) as peer:
        async with running(
            tmp_path, host_line(peer.port), resumable_calls=True, max_record_bytes=1_000_000
        ) as dispatcher:
            job_id, end = await result_of(dispatcher)
            message = "the records and the result of the job exceed max_record_bytes (1000000 bytes)"
            assert end == Failed("record_limit", message)
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED
            stored = (await dispatcher.store.get_details(job_id)).record_bytes
            assert 500_000 < stored <= 1_000_000


def many_times(conn: PeerConnection) -> None:
    """Stream short records, each of which has another time."""
    if "calls" in conn.expect():
        conn.reply({"harp": 1, "calls": [], "instance": "w1"})
        return
    conn.reply(acknowledgement(stream=True))
    conn.send(b"".join(b'{"at": %d.5}\n{"stream": 0}\n' % number for number in range(20_000)))
    assert next(command for command in commands(conn) if "ack" not in command)["stop"]["why"] == "limit"
    ends(conn, stop_report(), EXIT_INFO, STOPPED)


async def test_what_short_records_need_in_the_store_counts(tmp_path: Path) -> None:
    with playing(tmp_path, always=many_times) as peer:
        settings: dict[str, Any] = {"resumable_calls": True, "max_record_bytes": 100_000}
        async with running(tmp_path, host_line(peer.port), **settings) as dispatcher:
            job_id, end = await result_of(dispatcher)
            assert isinstance(end, Failed)
            assert end.type == "record_limit"
            await settled(dispatcher, job_id)
        with closing(sqlite3.connect(dispatcher.store.path)) as db:
            [(stored,)] = db.execute("SELECT sum(length(bytes) + length(timestamps)) FROM records").fetchall()
        assert 50_000 < stored <= 100_000


@pytest.mark.parametrize(
    ("record", "end_of_call"),
    [
        (600_000, {"result": "x" * 600_000}),
        (600_000, {"exception": {"type": "E", "message": "long", "data": "x" * 600_000}}),
        (1_200_000, {"result": "short"}),
        (1_200_000, {"exception": {"type": "E", "message": "short"}}),
    ],
)
async def test_end_beyond_the_limit_ends_the_job(tmp_path: Path, record: int, end_of_call: dict[str, Any]) -> None:
    def script(conn: PeerConnection) -> None:
        started(conn, stream=True)
        conn.reply({"stream": "x" * record}, EXIT_INFO, end_of_call)
        # The call is stopped if the record is handled before its end arrives.
        assert next(each for each in commands(conn) if not each.keys() & {"ack", "stop"}) == {"release": True}

    with playing(tmp_path, call_list(), script) as peer:
        async with running(
            tmp_path, host_line(peer.port), resumable_calls=True, max_record_bytes=1_000_000
        ) as dispatcher:
            _, end = await result_of(dispatcher)
            assert isinstance(end, Failed)
            assert end.type == "record_limit"


async def test_records_of_earlier_dispatcher_count_for_the_limit(tmp_path: Path) -> None:
    def begin(conn: PeerConnection) -> None:
        started(conn, stream=True)
        for _ in range(12):
            conn.reply({"stream": "x" * 50_000})
        conn.until_closed()

    with playing(tmp_path, call_list(), begin, call_list(), endless) as peer:
        settings: dict[str, Any] = {"resumable_calls": True, "max_record_bytes": 1_000_000}
        async with running(tmp_path, host_line(peer.port), **settings) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")

            async def are_stored() -> bool:
                return (await dispatcher.get_job(job_id)).records == 12

            check: Any = are_stored
            await eventually(check, what="the records")
        async with running(tmp_path, host_line(peer.port), **settings) as dispatcher:
            end = await dispatcher.result(job_id)
            assert isinstance(end, Failed)
            assert end.type == "record_limit"
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED
            assert (await dispatcher.store.get_details(job_id)).record_bytes < 12_000_000


async def test_refusal_with_long_data_is_no_record_limit(tmp_path: Path) -> None:
    refused: list[bool] = []

    def script(conn: PeerConnection) -> None:
        request = conn.expect()
        if "calls" in request:
            conn.reply({"harp": 1, "calls": [], "instance": "w1"})
        elif not refused:
            refused.append(True)
            conn.reply({"harp": 1, "error": {"type": "too_many_calls", "message": "full", "data": "x" * 5000}})
        else:
            conn.reply(acknowledgement())
            ends(conn, EXIT_INFO, {"result": 1})

    with playing(tmp_path, always=script) as peer:
        async with running(
            tmp_path, host_line(peer.port), resumable_calls=True, max_record_bytes=1000, start_within=60
        ) as dispatcher:
            _, end = await result_of(dispatcher)
            assert (refused, end) == ([True], Returned(Raw(b"1")))
