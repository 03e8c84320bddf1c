"""A connection to a host: data at unusual moments, long lines, paused reading, the last command of a call."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from harp.protocol.ends import Failed, Returned
from harp.protocol.harpd import ListCalls, Message, Phase, Release, Request, encode_command, encode_request
from harp.protocol.json_text import Raw, dumps
from harp.protocol.schema import ProtocolError
from harp_daemon.timer_wheel import TimerWheel
from harpcaller.config import Config
from harpcaller.hosts.connecting import open_connection
from harpcaller.hosts.connection import HarpdConnection, MessageQueue
from harpcaller.hosts.registry import Host
from harpcaller.hosts.resolving import Resolver
from harpcaller.hosts.tls import HostTLS
from support.certificates import server_files
from support.deadline import eventually
from support.peers import Peer, PeerConnection, Script, server_context

START = encode_request(Request("p", Raw(b"[]"), "u", "p"))
STREAMING = {"harp": 1, "stream_result": True}


@asynccontextmanager
async def connected(directory: Path, script: Script) -> AsyncIterator[tuple[HarpdConnection, Peer]]:
    config = Config(stream_directory=directory, verify=False)
    timers = TimerWheel()
    with Peer(script, tls=server_context(server_files(directory))) as peer:
        host = Host("web01", "127.0.0.1", peer.port, "u", "p")
        conn = await open_connection(host, HostTLS(config), config, timers, Resolver())
        yield conn, peer
        conn.abort()
    timers.close()


class Collector:
    """A receiver that keeps everything; `on_event` is called after each event."""

    def __init__(self, on_event: Callable[[], None] = lambda: None) -> None:
        self.records: list[bytes] = []
        self.messages: list[Message] = []
        self.ends: list[Exception | None] = []
        self._on_event = on_event

    def on_records(self, records: list[bytes]) -> None:
        self.records += records
        self._on_event()

    def on_message(self, message: Message) -> None:
        self.messages.append(message)
        self._on_event()

    def on_disconnect(self, error: Exception | None) -> None:
        self.ends.append(error)


async def test_data_before_the_request_is_its_reply(tmp_path: Path) -> None:
    """A harpd with too many connections refuses them without reading the request."""

    def script(conn: PeerConnection) -> None:
        conn.reply({"harp": 1, "error": {"type": "too_many_connections", "message": "m"}})
        conn.until_closed()

    async with connected(tmp_path, script) as (conn, _):
        await eventually(lambda: conn.is_paused, what="the early data")
        queue = MessageQueue(conn)
        conn.send_request(START, Phase.SENT, queue)
        assert await queue.receive() == Failed("too_many_connections", "m")


async def test_long_lines_stay_in_order_until_the_end(tmp_path: Path) -> None:
    """Each long line is decoded in a thread; the host closes immediately, with data in all buffers."""
    lengths = [200_000, 10, 70_000, 90_000, 5, 300_000] * 4

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(STREAMING, *({"stream": "x" * length} for length in lengths), {"result": None})

    async with connected(tmp_path, script) as (conn, _):
        collector = Collector()
        conn.send_request(START, Phase.SENT, collector)
        await eventually(lambda: collector.ends, what="the end")
        assert [len(json.loads(record)) for record in collector.records] == lengths
        assert len(collector.messages) == 2
        assert collector.ends == [None]


async def test_slow_masking_keeps_the_order_and_the_loop_free(tmp_path: Path) -> None:
    """600 texts in a long value take a while; between two steps the loop does other work."""
    masked = [f"secret {number:04}".encode() for number in range(600)]
    values = [
        "short secret 0001",
        "x" * 300_000 + "secret 0002" + "y" * 300_000,
        *("z" * 2_000 + f"secret {number:04}" for number in range(600)),
        "secret 0003",
    ]

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(STREAMING, *({"stream": value} for value in values), {"result": values[:2]})

    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with connected(tmp_path, script) as (conn, _):
        collector = Collector()
        counting = asyncio.create_task(count_turns())
        conn.send_request(START, Phase.SENT, collector, masked)
        await eventually(lambda: collector.ends, what="the end")
        counting.cancel()
        assert [json.loads(record) for record in collector.records] == [
            re.sub(r"secret \d{4}", "***", value) for value in values
        ]
        assert b"secret" not in cast(Returned, collector.messages[-1]).result
        assert turns > 200, "the loop has waited for the masks"


async def test_pausing_in_every_turn_loses_no_data(tmp_path: Path) -> None:
    count = 20_000

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(STREAMING, *({"stream": number} for number in range(count)), {"result": None})

    async with connected(tmp_path, script) as (conn, _):

        def pause() -> None:
            conn.pause_reading()
            conn.resume_reading()
            conn.pause_reading()
            asyncio.get_running_loop().call_soon(conn.resume_reading)

        collector = Collector(pause)
        conn.send_request(START, Phase.SENT, collector)
        await eventually(lambda: collector.ends, what="the end")
        assert list(map(json.loads, collector.records)) == list(range(count))
        assert len(collector.messages) == 2


async def test_host_that_is_not_read_is_paused(tmp_path: Path) -> None:
    sent, blocked = 0, threading.Event()

    def script(conn: PeerConnection) -> None:
        nonlocal sent
        conn.expect()
        conn.reply(STREAMING)
        conn.sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            while sent < 100_000_000:
                conn.reply(*[{"stream": "x" * 1000}] * 100)
                sent += 100_000
        blocked.set()

    async with connected(tmp_path, script) as (conn, _):
        conn.send_request(START, Phase.SENT, Collector(conn.pause_reading))
        await eventually(blocked.is_set, what="no more room")
    assert sent < 40_000_000


@pytest.mark.parametrize(
    ("line", "most"),
    [(b'{"stream":1}', 1000), (b'{"stream": 1}', 1000), (b' {"stream":1}', 34)],
    ids=["fast", "fast, with a space", "one by one"],
)
async def test_host_that_floods_does_not_delay_other_hosts(tmp_path: Path, line: bytes, most: int) -> None:
    """Between two turns of another callback, at most the records of two turns are received, in order."""
    count, turns = 50_000, [0]

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(STREAMING)
        conn.send(b"".join(line.replace(b"1", b"%d" % number) + b"\n" for number in range(count)))
        conn.until_closed()

    def take_turn() -> None:
        turns.append(len(collector.records))
        if turns[-1] < count:
            asyncio.get_running_loop().call_soon(take_turn)

    collector = Collector()
    async with connected(tmp_path, script) as (conn, _):
        conn.send_request(START, Phase.SENT, collector)
        take_turn()
        await eventually(lambda: len(collector.records) == count, what="all records")
        take_turn()
    assert collector.records == [b"%d" % number for number in range(count)]
    received = [after - before for before, after in pairwise(turns)]
    assert max(received) <= 2 * most


async def test_host_that_floods_pauses_when_it_is_told_to(tmp_path: Path) -> None:
    """Between two pauses, the records of one turn are received; what it has used is more than nothing, and bounded."""
    count, used = 10_000, []
    received: list[int] = []

    def find_pause(seconds: float) -> float:
        used.append(seconds)
        received.append(len(collector.records))
        return 0.001

    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply(STREAMING)
        conn.send(b"".join(b'{"stream":%d}\n' % number for number in range(count)))
        conn.until_closed()

    collector = Collector()
    async with connected(tmp_path, script) as (conn, _):
        conn.find_pause = find_pause
        conn.send_request(START, Phase.SENT, collector)
        await eventually(lambda: len(collector.records) == count, what="all records")
    assert collector.records == [b"%d" % number for number in range(count)]
    assert len(used) > 1
    assert all(0 < seconds <= 0.01 for seconds in used)
    assert max(after - before for before, after in pairwise([0, *received])) <= 2000


@pytest.mark.parametrize("close", [False, True])
async def test_long_request_arrives_before_later_commands(tmp_path: Path, close: bool) -> None:
    """A long request is written in several turns."""
    received: list[Any] = []

    def script(conn: PeerConnection) -> None:
        received.append(conn.expect())
        received.append(conn.expect())

    async with connected(tmp_path, script) as (conn, _):
        arguments = ["x" * 3_000_000]
        conn.send_request(encode_request(Request("p", dumps(arguments), "u", "p")), Phase.SENT, Collector())
        conn.send_command(Release())
        if close:
            conn.close()
        await eventually(lambda: len(received) == 2, what="request and command")
        assert received[0]["arguments"] == arguments
        assert received[1] == {"release": True}


async def test_idle_connection_survives_late_heartbeats_only(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.reply({"harp": 1, "calls": [], "instance": "w1", "keep_alive": 60})
        conn.expect()
        conn.reply({"heartbeat": 1.0}, {"heartbeat": 2.0})
        conn.expect()
        conn.reply({"result": 1})
        conn.until_closed()

    async with connected(tmp_path, script) as (conn, peer):
        for number in range(2):
            queue = MessageQueue(conn)
            conn.send_request(encode_request(ListCalls("o", "u", "p")), Phase.SENT_LIST, queue)
            if number == 0:
                assert await queue.receive() is not None
            conn.finish_request()
        await eventually(lambda: len(peer.connections[0].received) == 2, what="the second request")
        assert conn.is_reusable
        conn.send_command(Release())
        await eventually(lambda: not conn.is_reusable, what="the close after unexpected data")


async def test_last_command_is_sent_without_a_next_request(tmp_path: Path) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        assert conn.expect() == {"release": True}
        conn.until_closed()

    async with connected(tmp_path, script) as (conn, peer):
        conn.send_request(START, Phase.SENT, Collector())
        conn.finish_request(encode_command(Release()))
        await eventually(lambda: len(peer.requests) == 2, what="the release")


@pytest.mark.parametrize("garbage", [b"garbage\n", b'"' + b"x" * 100_000 + b"\n"])
async def test_protocol_error_ends_the_connection(tmp_path: Path, garbage: bytes) -> None:
    def script(conn: PeerConnection) -> None:
        conn.expect()
        conn.send(b'{"harp":1,"stream_result":true}\n{"stream":1}\n' + garbage + b'{"stream":2}\n')
        conn.until_closed()

    async with connected(tmp_path, script) as (conn, peer):
        collector = Collector()
        conn.send_request(START, Phase.SENT, collector)
        await eventually(lambda: collector.ends, what="the end")
        assert isinstance(collector.ends[0], ProtocolError)
        assert collector.records == [b"1"]
        await eventually(peer.connections[0].closed.is_set, what="the close")
