"""Idle connections to hosts: when they are reused, and what can happen to them in between."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harp
from harp.protocol.ends import Failed, Returned
from support.certificates import server_files
from support.deadline import eventually, wait_until
from support.dispatcher import host_line, running
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd
from support.peers import Peer, PeerConnection, Script, server_context
from support.procedures_file import PROCEDURES
from support.resumable_host import EXIT_INFO, NO_SUCH_CALL, acknowledgement, commands, playing, result_of

CALL_LIST_KEEP_ALIVE = {"harp": 1, "calls": [], "instance": "w1", "keep_alive": 60}
ACKNOWLEDGEMENT_KEEP_ALIVE = {**acknowledgement(), "keep_alive": 60}


@pytest.fixture
def harpd(tmp_path: Path) -> Harpd:
    return Harpd(tmp_path / "harpd", PROCEDURES, {"limits": {"kill_grace": 1}}, services=True)


def dispatcher_of(harpd: Harpd, directory: Path) -> Harpcallerd:
    settings = {"ca_file": str(harpd.ca_file)}
    return Harpcallerd(directory, {"web01": harpd.port}, (harpd.user, harpd.password), settings)


def rpc_of(dispatcher: Harpcallerd) -> harp.HarpCaller:
    return harp.HarpCaller("127.0.0.1", dispatcher.port)


def test_pool_reuses_one_connection_after_any_end(harpd: Harpd, tmp_path: Path) -> None:
    with harpd, dispatcher_of(harpd, tmp_path / "d") as dispatcher:
        host = rpc_of(dispatcher).web01
        for number in range(5):
            assert host.same(number).get() == number
            assert host.count(3).follow(since=0).all() == [0, 1, 2]
            for job in (host.fail("text"), host.too_long()):
                with pytest.raises(Exception, match=r"text|limit"):
                    job.get()
        found = [event["peer"] for event in harpd.wait_events(20, "call accepted")]
        assert len(found) == 20
        # A call may start before the previous one has returned its connection.
        assert len(set(found)) <= 4


def test_pool_after_frontend_restart_loses_no_job(harpd: Harpd, tmp_path: Path) -> None:
    with harpd, dispatcher_of(harpd, tmp_path / "d") as dispatcher:
        host = rpc_of(dispatcher).web01
        for number in range(3):
            assert host.same(number).get() == number
            harpd.kill() if number % 2 else harpd.stop_frontend()
            harpd.start_frontend()
            assert host.same("after").get() == "after"


def test_pool_connection_closed_by_the_host_is_replaced(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES, {"limits": {"keep_alive_timeout": 0.1}})
    with harpd, dispatcher_of(harpd, tmp_path / "d") as dispatcher:
        for number in range(3):
            assert rpc_of(dispatcher).web01.same(number).get() == number
            wait_until(lambda: not connections(harpd.port), what="the end of the connection")


def connections(port: int) -> int:
    """Return the number of connections to a port of this machine."""
    own = f":{port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[2].endswith(own) and line[3] == "01" for line in lines)


def serving(conn: PeerConnection, count: int, between: Callable[[PeerConnection], None] = lambda conn: None) -> None:
    """Serve resumable calls on one connection."""
    for number in range(count):
        request = conn.expect()
        assert request["keep_alive"] is True
        if number:
            between(conn)
        conn.reply(ACKNOWLEDGEMENT_KEEP_ALIVE)
        conn.reply(EXIT_INFO, {"result": number})
        assert next(command for command in commands(conn) if "ack" not in command) == {"release": True}


def keeping(conn: PeerConnection) -> None:
    conn.expect()
    conn.reply(CALL_LIST_KEEP_ALIVE)


async def results(directory: Path, *scripts: Script, count: int) -> list[Any]:
    """Return the ends of jobs that are submitted one after the other."""
    with playing(directory, keeping, *scripts) as peer:
        async with running(directory, host_line(peer.port), resumable_calls=True) as dispatcher:
            ends = []
            for _ in range(count):
                job_id, end = await result_of(dispatcher)
                await dispatcher.wait_stopped(job_id)
                ends.append(end)
            return ends


async def test_pool_late_heartbeat_of_the_previous_call_is_ignored(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        serving(conn, 3, lambda conn: conn.reply({"heartbeat": 12345.0}))

    assert await results(tmp_path, script, count=3) == [Returned(b"0"), Returned(b"1"), Returned(b"2")]


async def test_pool_heartbeat_after_the_ack_is_echoed(tmp_path: Path) -> None:
    """On a reused connection, too: the host measures contact from the echoed time."""
    echoed: list[object] = []

    def script(conn: PeerConnection) -> None:
        serving(conn, 1)
        conn.expect()
        conn.reply({**acknowledgement(stream=True, disconnect_timeout=5.0), "keep_alive": 60})
        conn.reply({"heartbeat": 7.5}, {"at": 1.0}, {"stream": 0})
        found = map(json.loads, iter(conn.line, None))
        assert next(command for command in found if "heartbeat" not in command) == {"ack": 1}
        echoed.append(next(found))
        conn.reply(EXIT_INFO, {"result": 1})
        assert next(command for command in commands(conn) if "ack" not in command) == {"release": True}

    assert await results(tmp_path, script, count=2) == [Returned(b"0"), Returned(b"1")]
    assert echoed == [{"heartbeat": 7.5}]


async def test_pool_closed_connection_is_not_used(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        serving(conn, 1)
        conn.sock.close()

    found = []
    with playing(tmp_path, keeping, script, script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            for _ in range(2):
                found.append((await result_of(dispatcher))[1])
                await eventually(lambda: not connections(peer.port), what="the close")
    assert found == [Returned(b"0"), Returned(b"0")]


async def test_pool_connection_that_breaks_leads_to_attach(
    tmp_path: Path,
) -> None:
    starts: list[str] = []

    def script(conn: PeerConnection) -> None:
        serving(conn, 1)
        starts.append(conn.expect()["call"]["id"])
        conn.reset()

    def attach(conn: PeerConnection) -> None:
        starts.append(conn.expect()["attach"])
        conn.reply(NO_SUCH_CALL)

    ends = await results(tmp_path, script, keeping, attach, count=2)
    assert ends[0] == Returned(b"0")
    assert isinstance(ends[1], Failed)
    assert ends[1].type == "missing_result"
    assert starts[0] == starts[1]


async def test_pool_without_host_support_is_not_used(tmp_path: Path) -> None:
    def plain(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "calls": [], "instance": "w1"})

    def script(conn: PeerConnection) -> None:
        assert "keep_alive" not in conn.expect()
        conn.reply(acknowledgement(), EXIT_INFO, {"result": 1})
        assert next(command for command in commands(conn) if "ack" not in command) == {"release": True}
        conn.until_closed()

    with playing(tmp_path, plain, script, script) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            assert [(await result_of(dispatcher))[1] for _ in range(2)] == [Returned(b"1")] * 2


def test_pool_drops_host_with_removed_certificate(harpd: Harpd, tmp_path: Path) -> None:
    """Although it is called so often that its connection never expires."""
    known = tmp_path / "known.pem"
    known.write_bytes(harpd.certfile.read_bytes())
    settings = {"known_certs_file": str(known)}
    with harpd, Harpcallerd(tmp_path / "d", {"web01": harpd.port}, (harpd.user, harpd.password), settings) as daemon:
        host = rpc_of(daemon).web01
        assert host.same(1).get() == 1
        known.write_text("# no host is known any more\n")

        def refused() -> str | None:
            try:
                host.same(1).get()
            except harp.RemoteError as error:
                return error.type
            return None

        assert wait_until(refused, what="the refusal") == "certificate_error"


def test_host_with_old_tls_is_reported_with_the_setting(tmp_path: Path) -> None:
    context = server_context(server_files(tmp_path))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with Peer(always=PeerConnection.until_closed, tls=context) as peer:
        settings = {"tls_minimum": "1.3", "start_within": 0}
        with Harpcallerd(tmp_path / "d", {"web01": peer.port}, settings=settings) as daemon:
            with pytest.raises(harp.RemoteError, match="tls_minimum") as caught:
                rpc_of(daemon).web01.p().get()
            assert caught.value.type == "network_error"
            assert "tls_minimum" in daemon.wait_event("call ended", end="failed")["reason"]


def test_pool_of_a_killed_dispatcher_is_rebuilt(harpd: Harpd, tmp_path: Path) -> None:
    with harpd, dispatcher_of(harpd, tmp_path / "d") as dispatcher:
        assert rpc_of(dispatcher).web01.same(1).get() == 1
        assert connections(harpd.port)
        dispatcher.restart(kill=True)
        assert rpc_of(dispatcher).web01.same(3).get() == 3
