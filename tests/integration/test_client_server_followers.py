"""Followers of a stream: many, slow, or never reading. They delay no other client, and memory stays bounded."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd, LineClient
from support.peers import Peer
from support.scripted import connection_of

MANY = 1000
STUCK = 50
MEGABYTE = 1_000_000


@pytest.fixture
def dispatcher(tmp_path: Path, peer: Peer) -> Iterator[Harpcallerd]:
    with Harpcallerd(tmp_path / "harpcallerd", {"web01": peer.port}) as dispatcher:
        yield dispatcher


@contextmanager
def many_descriptors() -> Iterator[None]:
    """Raise the descriptor limit of this process to a socket for each follower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4 * MANY, hard)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def never_reading(dispatcher: Harpcallerd, job: str) -> LineClient:
    """Return a follower that sends a request and does not read; its buffer is small."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(DEADLINE)
    connection.connect((dispatcher.host, dispatcher.port))
    client = LineClient(connection)
    client.send({"harpcaller": 1, "follow_stream": job, "since": 0})
    return client


async def test_thousand_followers_get_every_record_in_order(dispatcher: Harpcallerd, peer: Peer) -> None:
    job = dispatcher.submit("web01", "feed", 0)
    wait_until(lambda: len(dispatcher.ask(read_stream=job)) == 2, DEADLINE, "the first record")
    conn = connection_of(peer, 0)
    records = 50
    ready = 0
    all_ready = asyncio.Event()

    async def follow() -> list[bytes]:
        nonlocal ready
        reader, writer = await asyncio.open_connection(dispatcher.host, dispatcher.port)
        try:
            writer.write(json.dumps({"harpcaller": 1, "follow_stream": job, "since": 0}).encode() + b"\n")
            lines = [await reader.readline()]
            ready += 1
            if ready == MANY:
                all_ready.set()
            return lines + (await reader.read()).splitlines(keepends=True)
        finally:
            writer.close()
            await writer.wait_closed()

    with many_descriptors(), never_reading(dispatcher, job):
        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
            followers = [group.create_task(follow()) for _ in range(MANY)]
            await all_ready.wait()
            for number in range(1, records):
                conn.reply({"stream": number})
            conn.reply({"result": "end"})
    expected = [{"packet": number, "data": number} for number in range(records)] + [{"result": "end"}]
    for follower in followers:
        assert [json.loads(line) for line in follower.result()] == expected


def test_followers_that_never_read_use_little_memory(dispatcher: Harpcallerd, peer: Peer) -> None:
    """50 of them, each with 20 MB to read, use less than a tenth of that; another follower gets all records."""
    record = "x" * 100_000
    records = 200
    job = dispatcher.submit("web01", "feed", record)
    wait_until(lambda: len(dispatcher.ask(read_stream=job)) == 2, DEADLINE, "the first record")
    conn = connection_of(peer, record)
    process = psutil.Process(dispatcher.pid)
    stuck = [never_reading(dispatcher, job) for _ in range(STUCK)]
    for client in stuck:
        assert client.socket.recv(1)
    before = process.memory_info().rss
    with dispatcher.connect() as reading:
        reading.send({"harpcaller": 1, "follow_stream": job, "since": 0})
        for _ in range(1, records):
            conn.reply({"stream": record})
        for number in range(records):
            assert reading.message()["packet"] == number
        grown = process.memory_info().rss - before
        assert grown < STUCK * records * len(record) / 10, f"{grown / MEGABYTE:.0f} MB"
        conn.reply({"result": None})
        assert reading.messages() == [{"result": None}]
    for client in stuck:
        client.close()


def test_slow_follower_gets_every_record(dispatcher: Harpcallerd, peer: Peer) -> None:
    """A follower that starts to read after the end gets every record once."""
    job = dispatcher.submit("web01", "feed", 0)
    wait_until(lambda: len(dispatcher.ask(read_stream=job)) == 2, DEADLINE, "the first record")
    conn = connection_of(peer, 0)
    with never_reading(dispatcher, job) as slow, dispatcher.connect() as fast:
        fast.send({"harpcaller": 1, "follow_stream": job, "since": 0})
        for number in range(1, 300):
            conn.reply({"stream": [number, "x" * 20_000]})
        conn.reply({"result": "end"})
        lines = fast.lines()
        assert [json.loads(line).get("packet") for line in lines] == [*range(300), None]
        assert slow.lines() == lines
