"""Memory of replies: clients that do not read a long one wait for each other, and delay no other client."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd, LineClient
from support.peers import Peer
from support.scripted import scripted_harpd

MIB = 1024 * 1024
LONG = 10 * MIB
COUNT = 60
LIMIT = 25 * MIB
#: Memory for its usual work, and for the replies that the four reading threads read and copy at the same time.
OTHER = 350 * MIB


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("harpd")) as peer:
        yield peer


def peak(dispatcher: Harpcallerd) -> int:
    (line,) = (
        line for line in Path(f"/proc/{dispatcher.pid}/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def never_reading(dispatcher: Harpcallerd, request: dict[str, Any]) -> LineClient:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.settimeout(DEADLINE)
    connection.connect((dispatcher.host, dispatcher.port))
    client = LineClient(connection)
    client.send({"harpcaller": 1, **request})
    return client


def connections(dispatcher: Harpcallerd) -> int:
    found = psutil.Process(dispatcher.pid).net_connections("tcp")
    return sum(one.status != psutil.CONN_LISTEN and one.laddr.port == dispatcher.port for one in found)


def test_long_requests_of_one_connection_are_forgotten(tmp_path: Path, peer: Peer) -> None:
    arguments = ["x" * 1000] * (2 * MIB // 1000)
    request = {"harpcaller": 1, "keep_alive": True, "host": "none", "procedure": "p", "arguments": arguments}
    with Harpcallerd(tmp_path, {"web01": peer.port}) as dispatcher, dispatcher.connect() as client:

        def submit(number: int) -> int:
            for _ in range(number):
                client.send(request)
                assert "job_id" in json.loads(client.line())
            return psutil.Process(dispatcher.pid).memory_info().rss

        before = submit(40)  # after these, the memory that Python keeps for others no longer grows
        assert submit(80) < before + 80 * MIB


@pytest.mark.parametrize("kind", ["result", "wait", "status", "end of a stream", "record"])
def test_clients_that_do_not_read_share_a_limited_memory(
    tmp_path: Path, peer: Peer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the clients that then read gets its complete reply, and does not delay a short reply."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")  # the C library returns freed memory at once
    settings = {"reply_memory": LIMIT, "write_timeout": 3600, "request_line": 2 * LONG}
    with Harpcallerd(tmp_path, {"web01": peer.port}, settings=settings) as dispatcher, ExitStack() as stack:
        text = "x" * LONG
        short = dispatcher.submit("web01", "echo", 1)
        job = dispatcher.submit("web01", "feed" if kind == "record" else "echo", text)
        if kind == "record":
            wait_until(lambda: len(dispatcher.ask(read_stream=job)) > 1, DEADLINE, "the record")
        else:
            dispatcher.ask(get_result=job)
        requests: dict[str, dict[str, Any]] = {
            "result": {"get_result": job, "wait": False},
            "wait": {"get_result": job},
            "status": {"get_status": job},
            "end of a stream": {"follow_stream": job, "since": 0},
            "record": {"read_stream": job},
        }
        Path(f"/proc/{dispatcher.pid}/clear_refs").write_text("5")  # the peak is the present size
        before = peak(dispatcher)
        clients = [stack.enter_context(never_reading(dispatcher, requests[kind])) for _ in range(COUNT)]
        assert select.select([client.socket for client in clients], [], [], DEADLINE)[0]
        for _ in range(20):
            assert dispatcher.ask(get_result=short) == [{"result": [1]}]
        with ThreadPoolExecutor(COUNT) as threads:
            for lines in threads.map(LineClient.lines, clients):
                assert any(len(line) > LONG for line in lines)
        grown = peak(dispatcher) - before
        print(f"grown by {grown / MIB:.0f} MiB")
        assert grown < LIMIT + OTHER < COUNT * LONG * 2 // 3, f"{grown / MIB:.0f} MiB"
        if kind == "record":
            dispatcher.ask(cancel=job)


def test_client_that_does_not_read_is_disconnected_for_others(tmp_path: Path, peer: Peer) -> None:
    """A client that nobody waits for may take its time; one whose reply exceeds the limit is served alone."""
    settings = {"reply_memory": 1024, "write_timeout": 0.2}
    with Harpcallerd(tmp_path, {"web01": peer.port}, settings=settings) as dispatcher:
        job = dispatcher.submit("web01", "echo", "x" * LONG)
        expected = dispatcher.ask(get_result=job)
        with never_reading(dispatcher, {"get_result": job}) as stuck:
            assert stuck.socket.recv(1, socket.MSG_PEEK)
            assert dispatcher.ask(cancel=job) == [{"cancelled": False}]
            assert connections(dispatcher) == 1
            assert dispatcher.ask(get_result=job) == expected
            dispatcher.wait_event("client does not read")
            assert len(stuck.socket.recv(1)) == 1
