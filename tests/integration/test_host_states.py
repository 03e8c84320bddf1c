"""What the dispatcher knows about a host with resumable calls: contact, an outage, and its end."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

from cryptography.x509 import load_pem_x509_certificate

from harpcaller.dispatcher import Dispatcher
from harpcaller.host_states import HostState, Reachability
from harpcaller.metrics import Metrics
from harpcaller.monitoring import Monitor
from support.dispatcher import call, host_line, running
from support.peers import PeerConnection
from support.resumable_host import acknowledged, acknowledgement, call_list, ends, lost, playing, started


async def reached(dispatcher: Dispatcher, wanted: Reachability) -> HostState:
    """Wait until the host is in a state."""
    async with asyncio.timeout(30):
        while (state := await state_of(dispatcher)).reachability is not wanted:
            await asyncio.sleep(0.02)
    return state


async def state_of(dispatcher: Dispatcher) -> HostState:
    [state] = await dispatcher.describe_hosts(dispatcher.registry.list_hosts())
    return state


async def test_host_with_outage_is_down_until_call_is_attached(tmp_path: Path) -> None:
    cut, go_on, end = threading.Event(), threading.Event(), threading.Event()

    def begin(conn: PeerConnection) -> None:
        started(conn)
        cut.wait(30)
        conn.reset()

    def resume(conn: PeerConnection) -> None:
        if not go_on.is_set():
            conn.reset()
            return
        if "calls" in conn.expect():
            conn.reply({"harp": 1, "calls": [], "instance": "w1"})
        else:
            conn.reply(acknowledgement())
            end.wait(30)

    with playing(tmp_path, call_list(), begin, always=resume) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            assert (await state_of(dispatcher)).reachability is Reachability.UNKNOWN
            began_at = time.time()
            job_id = await dispatcher.submit(call(), "test")
            await acknowledged(dispatcher, job_id)
            up = await reached(dispatcher, Reachability.UP)
            assert up.contact is not None
            assert up.contact >= began_at - 1
            assert (up.error, up.since, up.outages, up.last_error) == (None, None, 0, None)
            assert up.daemon is not None
            assert (up.daemon["keeps_calls"], up.daemon["instance"]) == (True, "w1")
            cut.set()
            await lost(dispatcher, job_id)
            down = await state_of(dispatcher)
            assert (down.reachability, down.outages) == (Reachability.DOWN, 1)
            assert down.error
            assert down.since is not None
            assert began_at - 1 <= down.since <= time.time()
            go_on.set()
            again = await reached(dispatcher, Reachability.UP)
            assert (again.outages, again.error, again.last_error is not None) == (0, None, True)
            end.set()


async def test_host_shows_its_certificate_round_trip_and_version(tmp_path: Path) -> None:
    """Each is from the latest connection; nothing is shown that no connection has told."""

    def listed(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "calls": [], "instance": "w1", "version": "4.5"})

    def begin(conn: PeerConnection) -> None:
        started(conn, disconnect_timeout=1.0)
        while True:
            if "heartbeat" in json.loads(conn.line()):
                time.sleep(0.02)
                conn.reply({"heartbeat": 1.0})
                answered.set()
                return conn.until_closed()

    answered = threading.Event()
    with playing(tmp_path, listed, begin) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True) as dispatcher:
            before = await state_of(dispatcher)
            assert (before.daemon, before.round_trip, before.certificate_end) == (None, None, None)
            job_id = await dispatcher.submit(call(), "test")
            await acknowledged(dispatcher, job_id)
            state = await state_of(dispatcher)
            assert state.daemon is not None
            assert state.daemon["version"] == "4.5"
            certificate = load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
            assert state.certificate_end == certificate.not_valid_after_utc.timestamp()
            async with asyncio.timeout(30):
                while (found := (await state_of(dispatcher)).round_trip) is None:
                    await asyncio.sleep(0.02)
            assert answered.is_set()
            assert 0.02 <= found < 30
            await dispatcher.cancel(job_id)


async def test_host_shows_by_how_much_its_clock_differs(tmp_path: Path) -> None:
    ahead = 100.0

    def begin(conn: PeerConnection) -> None:
        started(conn)
        now = time.time() + ahead
        ends(conn, {"exit_info": {"exit": 0, "by": "itself", "started": now, "ended": now}}, {"result": 1})

    metrics = Metrics()
    with playing(tmp_path, call_list(), begin) as peer:
        async with running(tmp_path, host_line(peer.port), resumable_calls=True, metrics=metrics) as dispatcher:
            monitor = Monitor(dispatcher, metrics)
            assert (await state_of(dispatcher)).clock_skew is None
            assert b"\nharp_host_clock_skew_seconds" not in await monitor.scrape()
            began_at = time.time()
            await dispatcher.result(await dispatcher.submit(call(), "test"))
            found = (await state_of(dispatcher)).clock_skew
            assert found is not None
            assert ahead - (time.time() - began_at) <= found <= ahead
            assert f'\nharp_host_clock_skew_seconds{{host="web01"}} {found}\n'.encode() in await monitor.scrape()
