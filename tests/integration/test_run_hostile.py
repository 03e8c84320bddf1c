"""A run of a resumable call on a host that breaks the protocol, floods the dispatcher or is silent."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Failed, Returned
from harp.protocol.harpd import Ack, ListCalls
from harpcaller.config import Config
from harpcaller.hosts.connection import open_connection
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.tls import HostTLS
from harpcaller.model.jobs import StopState
from harpcaller.store.sqlite import open_store
from support.deadline import eventually
from support.dispatcher import Switched, call, followed, host_line, running
from support.harpd import Harpd
from support.peers import Conversation
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

    def script(talk: Conversation) -> None:
        assert talk.expect()["since"] == BEHIND_ALL
        talk.reply(records_gone(first=0, end=end))

    return script


def stopped_behind(end: int) -> Any:
    """Receive the attach past all records, and the stop command."""

    def script(talk: Conversation) -> None:
        assert attached(talk, stream=True, records=end)["since"] == end
        assert next(commands(talk)) == {"stop": {"why": "protocol_error", "by": "dispatcher"}}
        ends(talk, stop_report(), EXIT_INFO, STOPPED)

    return script


@pytest.mark.parametrize(
    "garbage", [b'{"stream":x}\n', b"\xff\n", b'{"stream": 1, "result": 2}\n', b'{"harp": 1, "stream_result": true}\n']
)
async def test_resumable_run_invalid_message_ends_the_job(tmp_path: Path, garbage: bytes) -> None:
    def begin(talk: Conversation) -> None:
        started(talk, stream=True)
        talk.send(b'{"at": 1.0}\n{"stream": 0}\n' + garbage + b'{"stream": 2}\n')
        talk.until_closed()

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
            end = await dispatcher.result(job_id, wait=True)
            assert isinstance(end, Failed)
            assert end.type == "protocol_error"
            assert "longer than 50000 bytes" in end.message
            job = await settled(dispatcher, job_id)
            assert job.stop is StopState.CONFIRMED
            assert (await dispatcher.details(job_id))["stop_report"] is not None
        assert harpd.status()["calls"] == 0


async def test_resumable_run_repeated_errors_slow_reattaching(tmp_path: Path) -> None:
    """An acknowledgement is not progress. The job holds its slot until the host reports the end."""
    attaches: list[float] = []

    def script(talk: Conversation) -> None:
        request = talk.expect()
        if "calls" in request:
            talk.reply({"harp": 1, "calls": [], "instance": "w1"})
            return
        if "attach" in request:
            attaches.append(time.monotonic())
        talk.reply(acknowledgement(stream=True))
        if len(attaches) >= 5:
            assert "stop" in next(commands(talk))
            ends(talk, stop_report(), EXIT_INFO, STOPPED)
            return
        talk.send(b"garbage\n")
        talk.until_closed()

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

    def script(talk: Conversation) -> None:
        request = talk.expect()
        if "calls" in request:
            talk.reply({"harp": 1, "calls": [], "instance": "w1"})
            return
        if "attach" in request:
            attaches.append(time.monotonic())
        talk.reply(acknowledgement())
        if len(attaches) >= 5:
            ends(talk, EXIT_INFO, {"result": 1})

    with playing(tmp_path, always=script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher))[1] == Returned(b"1")
    assert attaches[4] - attaches[3] > 0.79


@pytest.mark.parametrize("data", [{}, {"end": "x"}, {"end": -1}, {"end": 1.5}, {"end": True}, [1], 10**400, "x"])
async def test_records_gone_with_invalid_data_is_retried(tmp_path: Path, data: Any) -> None:
    """The attempt counts as failed; it is not an internal error."""

    def begin(talk: Conversation) -> None:
        started(talk)
        talk.reset()

    def odd(talk: Conversation) -> None:
        talk.expect()
        talk.reply({"harp": 1, "error": {"type": "records_gone", "message": "gone", "data": data}})

    def right(talk: Conversation) -> None:
        attached(talk)
        ends(talk, EXIT_INFO, {"result": 1})

    with playing(tmp_path, call_list(), begin, call_list(), odd, right) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher))[1] == Returned(b"1")


async def test_records_gone_continues_at_the_given_number(tmp_path: Path) -> None:
    """Without an ack of these records the host would never send the end."""
    counts: list[int] = []

    def begin(talk: Conversation) -> None:
        started(talk, stream=True)
        talk.reset()

    def lacking(talk: Conversation) -> None:
        talk.expect()
        talk.reply(records_gone(first=5, end=9))

    def rest(talk: Conversation) -> None:
        assert attached(talk, stream=True)["since"] == 9
        said = commands(talk)
        assert "stop" in next(said)
        talk.reply({"stream": 9}, {"stream": 10})
        while not counts or counts[-1] < 11:
            counts.append(next(said)["ack"])
        ends(talk, stop_report(), EXIT_INFO, STOPPED)

    with playing(tmp_path, call_list(), begin, call_list(), lacking, rest) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id, _ = await result_of(dispatcher)
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED


async def test_resumable_run_data_after_the_end_is_ignored(tmp_path: Path) -> None:
    def script(talk: Conversation) -> None:
        started(talk, stream=True)
        talk.send(b'{"stream": 0}\n{"result": 1}\n{"result": 2}\ngarbage\n{"stream": 1}\n')
        talk.until_closed()

    with playing(tmp_path, call_list(), script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            assert await followed(dispatcher, job_id, since=0) == ([(0, 0)], Returned(b"1"))
            assert not (await settled(dispatcher, job_id)).holds_slot


# Time.


async def test_resumable_run_buffered_result_is_not_too_late(tmp_path: Path) -> None:
    """The call ended in time, during an outage. The host enforces the limits and reports the end."""
    may_answer = threading.Event()

    def begin(talk: Conversation) -> None:
        talk.expect()
        talk.reset()

    def late(talk: Conversation) -> None:
        assert may_answer.wait(30)
        request = talk.expect()
        assert "attach" in request
        talk.reply(acknowledgement(stream=True, elapsed=10_000.0, records=1))
        assert "heartbeat" in json.loads(talk.line())  # it has checked its limits
        talk.reply({"stream": 0})
        assert next(commands(talk)) == {"ack": 1}
        ends(talk, EXIT_INFO, {"result": "in time"})

    with playing(tmp_path, call_list(), begin, call_list(), late) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            job_id = await dispatcher.submit(call(timeout=0.4, max_exec_time=0.4), "test")
            await lost(dispatcher, job_id)
            over = time.monotonic() + 0.5
            await eventually(lambda: time.monotonic() > over, what="the end of the limits")
            assert (await dispatcher.get_job(job_id)).end is None
            may_answer.set()
            assert await dispatcher.result(job_id, wait=True) == Returned(b'"in time"')


async def test_resumable_run_missing_ack_does_not_end_the_job(tmp_path: Path) -> None:
    """The job's timeout is shorter than acknowledgement_timeout, and the job is cancelled before it."""
    silent = threading.Event()

    def begin(talk: Conversation) -> None:
        talk.expect()
        silent.set()
        talk.until_closed()

    def no_such_call(talk: Conversation) -> None:
        talk.expect()
        talk.reply(NO_SUCH_CALL)

    with playing(tmp_path, call_list(), begin, call_list(), no_such_call) as peer:
        options: dict[str, Any] = {"acknowledgement_timeout": 0.5, "resumable_calls": True}
        async with running(tmp_path, host_line(peer.port), **options) as dispatcher:
            job_id = await dispatcher.submit(call(timeout=0.2), "test")
            await eventually(silent.is_set, what="the request")
            end = await dispatcher.result(job_id, wait=True)
            assert isinstance(end, Failed)
            assert end.type == "timeout"
            assert (await settled(dispatcher, job_id)).stop is StopState.CONFIRMED


async def test_heartbeats_keep_a_minimum_interval(tmp_path: Path) -> None:
    """The minimum applies to every timeout that a host sends."""
    beats: list[float] = []

    def script(talk: Conversation) -> None:
        started(talk, disconnect_timeout=1e-9)
        while len(beats) < 4:
            assert "heartbeat" in json.loads(talk.line())
            beats.append(time.monotonic())
            talk.reply({"heartbeat": 0.0})
        ends(talk, EXIT_INFO, {"result": 1})

    with playing(tmp_path, call_list(), script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            assert (await result_of(dispatcher))[1] == Returned(b"1")
    assert beats[3] - beats[1] > 0.15


async def test_host_that_does_not_read_is_disconnected(tmp_path: Path) -> None:
    """Commands to it do not accumulate: they are bounded by the kernel's buffer and a little more."""
    over = threading.Event()

    def deaf(talk: Conversation) -> None:
        assert over.wait(30)

    config = Config(stream_directory=tmp_path)
    with playing(tmp_path, deaf) as peer:
        talk = await open_connection(Host("web01", "127.0.0.1", peer.port, "u", "p"), HostTLS(config), config)
        talk.send_request(ListCalls("owner", "u", "p"))
        reading = asyncio.create_task(talk.read())
        said = 0
        while not reading.done() and said < 1_000_000:
            for _ in range(1000):
                talk.send_command(Ack(said))
            said += 1000
            await asyncio.sleep(0)
        over.set()
        assert said < 1_000_000
        assert await reading is None
        talk.abort()


async def test_host_that_ignores_the_window_is_paused(tmp_path: Path) -> None:
    """While the store fails, the memory for its records is bounded."""
    sent = 0
    held_back = threading.Event()

    def flood(talk: Conversation) -> None:
        nonlocal sent
        started(talk, stream=True)
        talk.sock.settimeout(1.0)
        line = json.dumps({"stream": "x" * 100_000}).encode() + b"\n"
        try:
            while sent < 100_000_000:
                talk.send(line)
                sent += len(line)
        except TimeoutError:
            pass
        held_back.set()

    def rest(talk: Conversation) -> None:
        attached(talk, stream=True)
        ends(talk, EXIT_INFO, {"result": 1})

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
            assert await dispatcher.result(job_id, wait=True) == Returned(b"1")
    await opened.close()
