"""A run of a connection-bound call: how each behaviour of a host ends the job."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harpcaller.dispatcher import Dispatcher
from harpcaller.model.jobs import State
from harpcaller.store.sqlite import open_store
from support.certificates import server_files
from support.deadline import eventually
from support.dispatcher import CREDENTIALS, Switched, call, follow, followed, host_line, result, running, until
from support.peers import Peer, PeerConnection, Script, server_context, silent, single_bytes

ACKNOWLEDGED = {"harp": 1, "stream_result": False}
STREAMING = {"harp": 1, "stream_result": True}


def acknowledge(conn: PeerConnection, stream: bool = False) -> Any:
    request = conn.expect()
    conn.reply(STREAMING if stream else ACKNOWLEDGED)
    return request


def saying(*messages: object) -> Script:
    """Return a host script that reads the request, sends these messages and closes."""

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(*messages)

    return script


@contextmanager
def playing(directory: Path, *scripts: Script, **options: Any) -> Iterator[Peer]:
    with Peer(*scripts, tls=server_context(server_files(directory)), **options) as peer:
        yield peer


async def ended(directory: Path, script: Script, settings: dict[str, Any] | None = None, **options: Any) -> End | None:
    """Return the end of a job whose host runs a script."""
    with playing(directory, script) as peer:
        async with running(directory, host_line(peer.port), **(settings or {})) as dispatcher:
            return await result(dispatcher, **options)


def failure(end: End | None, type: str, message: str, data: object = None) -> None:
    assert isinstance(end, Failed)
    assert (end.type, end.data and json.loads(end.data)) == (type, data), end
    assert message in end.message


async def test_run_result_is_stored_unchanged(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect({"harp": 1, "procedure": "p", "arguments": [1], "auth": CREDENTIALS})
        conn.reply(ACKNOWLEDGED, b'  {"result" : {"b": 1.10,"a":100000000000000000000000} } \r\n')

    assert await ended(tmp_path, script, arguments=[1]) == Returned(b'{"b": 1.10,"a":100000000000000000000000}')


async def test_run_exception_or_host_error_becomes_the_end(tmp_path: Path) -> None:
    raised = saying(ACKNOWLEDGED, {"exception": {"type": "T", "message": "m", "data": [1]}})
    refused = saying({"harp": 1, "error": {"type": "no_such_procedure", "message": "m", "data": {"procedure": "p"}}})
    late = saying(ACKNOWLEDGED, {"harp": 1, "error": {"type": "call_died", "message": "m"}})
    assert await ended(tmp_path, raised) == Raised("T", "m", b"[1]")
    assert await ended(tmp_path, refused) == Failed("no_such_procedure", "m", b'{"procedure": "p"}')
    assert await ended(tmp_path, late) == Failed("call_died", "m")


async def test_run_data_after_the_end_is_ignored(tmp_path: Path) -> None:
    assert await ended(tmp_path, saying(ACKNOWLEDGED, {"result": 1}, {"result": 2}, b"garbage")) == Returned(b"1")


async def test_run_records_in_any_chunks_stay_in_order(tmp_path: Path) -> None:
    def in_one_piece(conn: PeerConnection) -> None:
        acknowledge(conn, stream=True)
        conn.reply(*({"stream": {"n": n}} for n in range(500)), {"result": "end"})

    def bytewise(conn: PeerConnection) -> None:
        acknowledge(conn, stream=True)
        conn.send(*single_bytes(b'{"stream": {"n": 0}}\n{"stream":{"n": 1}}\n{"result":"end"}\n'))

    with playing(tmp_path, in_one_piece, bytewise) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            for count in (500, 2):
                job_id = await dispatcher.submit(call(), "test")
                records, end = await followed(dispatcher, job_id, since=0)
                assert records == [(n, {"n": n}) for n in range(count)]
                assert end == Returned(b'"end"')


async def test_run_unknown_host_ends_the_job(tmp_path: Path) -> None:
    async with running(tmp_path) as dispatcher:
        job_id = await dispatcher.submit(call(host="nowhere"), "test")
        failure(await dispatcher.result(job_id), "unknown_host", "nowhere")


async def test_run_unreachable_host_is_network_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    lines = (host_line(port), host_line(port, "nameless", "host.invalid"), host_line(port, "bad", "a" * 64 + ".b"))
    async with running(tmp_path, *lines) as dispatcher:
        refused = await result(dispatcher)
        failure(refused, "network_error", f"web01 (127.0.0.1, port {port}): connecting", {"errno": "ECONNREFUSED"})
        for host in ("nameless", "bad"):
            end = await result(dispatcher, host=host)
            assert isinstance(end, Failed)
            assert end.type == "network_error"
            assert host in end.message


async def test_run_without_tls_handshake_times_out(tmp_path: Path) -> None:
    with Peer(silent) as peer:
        async with running(tmp_path, host_line(peer.port), connect_timeout=0.2) as dispatcher:
            failure(await result(dispatcher), "network_error", "connecting", {"errno": "ETIMEDOUT"})


async def test_run_without_tls_is_protocol_error(tmp_path: Path) -> None:
    with Peer(lambda conn: conn.send(b"220 smtp\r\n")) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            failure(await result(dispatcher), "protocol_error", "it does not speak TLS")


async def test_run_without_acknowledgement_times_out(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.until_closed()

    end = await ended(tmp_path, script, {"acknowledgement_timeout": 0.2})
    failure(end, "network_error", "did not acknowledge", {"errno": "ETIMEDOUT"})
    failure(await ended(tmp_path, script, timeout=0.2), "timeout", "reading the result")


async def test_run_silent_host_times_out(tmp_path: Path) -> None:
    def quiet(conn: PeerConnection) -> None:
        acknowledge(conn)
        conn.until_closed()

    def dripping(conn: PeerConnection) -> None:
        acknowledge(conn)
        with pytest.raises(OSError):
            while True:
                conn.send(b" ")
                time.sleep(0.02)

    for script in (quiet, dripping):
        failure(await ended(tmp_path, script, timeout=0.3), "timeout", "reading the result")


async def test_run_over_max_exec_time_times_out(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        acknowledge(conn, stream=True)
        with pytest.raises(OSError):
            while True:
                conn.reply({"stream": 1})
                time.sleep(0.02)

    failure(await ended(tmp_path, script, max_exec_time=0.5), "timeout", "maximum execution time")


async def test_run_closed_connection_is_network_error(tmp_path: Path) -> None:
    def resetting(conn: PeerConnection) -> None:
        acknowledge(conn)
        conn.reset()

    failure(await ended(tmp_path, saying()), "network_error", "waiting for the acknowledgement")
    failure(await ended(tmp_path, saying(ACKNOWLEDGED)), "network_error", "waiting for the result")
    failure(await ended(tmp_path, saying(STREAMING, {"stream": 1}, b'{"str')), "network_error", "middle of a line")
    failure(await ended(tmp_path, resetting), "network_error", "waiting for", {"errno": "ECONNRESET"})


@pytest.mark.parametrize(
    "messages",
    [
        (b"garbage\n",),
        ({"harp": 2, "stream_result": False},),
        ({"result": 1},),
        (ACKNOWLEDGED, {"stream": 1}),
        (ACKNOWLEDGED, {"result": 1, "exception": 2}),
        (ACKNOWLEDGED, b'{"result": NaN}\n'),
        (STREAMING, {"stream": 1}, ACKNOWLEDGED),
        (ACKNOWLEDGED, b"x" * 5000),
    ],
)
async def test_run_invalid_message_is_protocol_error(tmp_path: Path, messages: tuple[object, ...]) -> None:
    end = await ended(tmp_path, saying(*messages), {"record_line": 4096})
    failure(end, "protocol_error", "web01 (127.0.0.1")


async def test_run_records_before_an_error_are_stored(tmp_path: Path) -> None:
    with playing(tmp_path, saying(STREAMING, {"stream": 1}, {"stream": 2}, b"garbage\n")) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            records, end = await followed(dispatcher, await dispatcher.submit(call(), "test"), since=0)
            assert records == [(0, 1), (1, 2)]
            failure(end, "protocol_error", "broke the protocol")


async def test_run_sends_server_name_for_names_only(tmp_path: Path) -> None:
    context = server_context(server_files(tmp_path))
    names: list[str | None] = []
    context.sni_callback = lambda connection, name, context: names.append(name)
    with Peer(saying(ACKNOWLEDGED, {"result": 1}), always=saying(ACKNOWLEDGED, {"result": 1}), tls=context) as peer:
        lines = host_line(peer.port), host_line(peer.port, "named", "localhost")
        async with running(tmp_path, *lines) as dispatcher:
            assert await result(dispatcher) == await result(dispatcher, host="named") == Returned(b"1")
    assert names == [None, "localhost"]


async def cancelled(dispatcher: Dispatcher, job_id: str) -> None:
    assert await dispatcher.cancel(job_id)
    assert (await dispatcher.get_job(job_id)).end == Cancelled()
    assert not await dispatcher.cancel(job_id)
    await eventually(lambda: dispatcher.active_calls == 0, what="the call's end")


async def test_cancel_before_the_request_closes_the_connection(tmp_path: Path) -> None:
    with Peer(silent) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await eventually(lambda: peer.connections, what="the connection")
            await cancelled(dispatcher, job_id)
            await eventually(peer.connections[0].closed.is_set, what="the connection's end")


async def test_cancel_after_the_ack_closes_the_connection(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        acknowledge(conn, stream=True)
        conn.reply({"stream": 1})
        conn.until_closed()

    with playing(tmp_path, script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            async for _ in follow(dispatcher, job_id, since=0):
                break
            await cancelled(dispatcher, job_id)
            await eventually(peer.connections[0].closed.is_set, what="the connection's end")


async def test_cancel_after_the_request_waits_for_the_ack(tmp_path: Path) -> None:
    read, go_on = threading.Event(), threading.Event()

    def script(conn: PeerConnection) -> None:
        conn.expect()
        read.set()
        assert go_on.wait(30)
        conn.reply(ACKNOWLEDGED)
        conn.until_closed()

    with playing(tmp_path, script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await eventually(read.is_set, what="the request")
            cancel = asyncio.create_task(dispatcher.cancel(job_id))
            await until(dispatcher, job_id, lambda job: job.state is State.CANCELLED, "the cancel's commit")
            assert not cancel.done()
            go_on.set()
            assert await cancel
            await eventually(peer.connections[0].closed.is_set, what="the connection's end")


async def test_cancel_without_ack_returns_after_a_time(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.until_closed()

    with playing(tmp_path, script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await eventually(lambda: peer.requests, what="the request")
            await cancelled(dispatcher, job_id)


async def test_cancel_by_a_departed_client_is_completed(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        acknowledge(conn)
        conn.until_closed()

    with playing(tmp_path, script) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await eventually(lambda: peer.requests, what="the request")
            asking = asyncio.create_task(dispatcher.cancel(job_id))
            await asyncio.sleep(0)
            asking.cancel()
            assert await dispatcher.result(job_id) == Cancelled()
            await eventually(peer.connections[0].closed.is_set, what="the connection's end")


async def test_run_data_during_store_failure_is_stored_later(tmp_path: Path) -> None:
    first, rest = threading.Event(), threading.Event()

    def script(conn: PeerConnection) -> None:
        acknowledge(conn, stream=True)
        assert first.wait(30)
        conn.reply({"stream": 0}, {"stream": 1})
        assert rest.wait(30)
        conn.reply({"stream": 2}, {"result": "end"})

    def other(conn: PeerConnection) -> None:
        acknowledge(conn)
        conn.reply({"result": "other"})

    real = await open_store(tmp_path / "store")
    store = Switched(real, "append_records", "finish_job")
    with playing(tmp_path, script, other) as peer:
        async with running(tmp_path, host_line(peer.port), store=store) as dispatcher:
            job_id = await dispatcher.submit(call(), "test")
            await eventually(lambda: peer.requests, what="the call")
            store.off = True
            first.set()
            await eventually(lambda: store.refused >= 2, what="a second try")
            waiting = await dispatcher.submit(call(), "test")
            rest.set()
            await eventually(lambda: store.refused >= 3, what="a third try")
            assert (await dispatcher.get_job(job_id)).state is State.RUNNING
            assert (await dispatcher.get_job(waiting)).state is State.QUEUED  # no job is claimed in the meantime
            store.off = False
            records, end = await followed(dispatcher, job_id, since=0)
            assert (records, end) == ([(0, 0), (1, 1), (2, 2)], Returned(b'"end"'))
            assert await dispatcher.result(waiting) == Returned(b'"other"')
    await real.close()


async def test_run_pauses_reading_while_the_store_fails(tmp_path: Path) -> None:
    enough = 64 * 1024 * 1024
    sent = 0

    def script(conn: PeerConnection) -> None:
        nonlocal sent
        acknowledge(conn, stream=True)
        record = b'{"stream": "' + b"x" * 65_500 + b'"}\n'
        while sent < enough:
            conn.send(record)
            sent += len(record)
        conn.reply({"result": None})

    real = await open_store(tmp_path / "store")
    store = Switched(real, "append_records")
    store.off = True
    with playing(tmp_path, script) as peer:
        async with running(tmp_path, host_line(peer.port), store=store) as dispatcher:
            job_id = await dispatcher.submit(call(timeout=3), "test")
            await eventually(lambda: store.refused >= 3, what="a third try")
            assert sent < enough  # the rest is in socket buffers and in bounded memory
            store.off = False
            assert await dispatcher.result(job_id) == Returned(b"null")
            assert (await dispatcher.get_job(job_id)).records == enough // len(
                b'{"stream": "' + b"x" * 65_500 + b'"}\n'
            ) + 1
    await real.close()


async def test_run_log_has_job_fields_and_no_secrets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with playing(tmp_path, saying(ACKNOWLEDGED, {"result": 1})) as peer:
        async with running(tmp_path, host_line(peer.port)) as dispatcher:
            end = await result(dispatcher, arguments=["confidential"], queue={"q": 1})
            assert end == Returned(b"1")
    events = {record.getMessage(): record.__dict__ for record in caplog.records}
    for event in ("job submitted", "call started", "call ended"):
        fields = events[event]
        assert (fields["host"], fields["procedure"], fields["queue"]) == ("web01", "p", '{"q": 1}')
        assert len(fields["job"]) == 36
    assert events["job submitted"]["client"] == "test"
    assert events["call ended"]["end"] == "returned"
    everything = " ".join(str(record.__dict__) for record in caplog.records)
    assert "confidential" not in everything
    assert "topsecret" not in everything
