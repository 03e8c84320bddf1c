"""Limits of client connections: long, missing and partial requests, disconnects, too many clients."""

from __future__ import annotations

import json
import resource
import select
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd, LineClient
from support.peers import Peer
from support.scripted import connection_of, scripted_harpd

UNKNOWN = "00000000-0000-4000-8000-000000000000"
REFUSAL = {"type": "too_many_connections", "message": "too many clients are connected, in all or from here"}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("harpd")) as peer:
        yield peer


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> Iterator[Harpcallerd]:
    settings = {"request_line": 100_000, "idle_timeout": 1, "max_connections": 40}
    with Harpcallerd(tmp_path_factory.mktemp("limits"), {"web01": peer.port}, settings=settings) as dispatcher:
        yield dispatcher


def connections(dispatcher: Harpcallerd) -> int:
    """Return the number of client connections of the program."""
    found = psutil.Process(dispatcher.pid).net_connections("tcp")
    return sum(one.status != psutil.CONN_LISTEN and one.laddr.port == dispatcher.port for one in found)


def wait_for_connections(dispatcher: Harpcallerd, number: int) -> None:
    wait_until(lambda: connections(dispatcher) == number, DEADLINE, f"{number} connections")


def refused(message: str) -> list[object]:
    return [{"error": {"type": "invalid_request", "message": message}}]


# The request line.


def test_long_request_is_refused_while_it_is_sent(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        client.send(b"x" * 100_001)
        assert client.messages() == refused("the request line is longer than 100000 bytes")


def test_long_request_in_one_write_reads_the_refusal(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        client.send(b"x" * 20_000_000)
        assert client.messages() == refused("the request line is longer than 100000 bytes")


def test_request_of_maximum_length_is_accepted(dispatcher: Harpcallerd) -> None:
    request = json.dumps({"harpcaller": 1, "cancel": UNKNOWN}).encode()
    with dispatcher.connect() as client:
        client.send(request + b" " * (100_000 - len(request)) + b"\n")
        assert client.messages() == [{"cancelled": False}]


@pytest.mark.parametrize("part", [b"", b'{"harpcaller": 1,'])
def test_missing_request_is_refused(dispatcher: Harpcallerd, part: bytes) -> None:
    with dispatcher.connect() as client:
        client.send(part)
        assert client.messages() == refused("the request line was not complete within 1 s")


def test_partial_request_is_refused(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        client.send(b'{"harpcaller": 1')
        client.half_close()
        assert client.messages() == refused("the connection was closed in the middle of the request line")


def test_client_half_closed_without_request_gets_no_reply(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        client.half_close()
        assert client.lines() == []


@pytest.mark.parametrize("more", [b"\n", b"{}\n", b"x" * 1_000_000])
def test_data_after_the_request_is_ignored(dispatcher: Harpcallerd, more: bytes) -> None:
    job = dispatcher.submit("web01", "count", 2)
    assert dispatcher.ask(get_result=job) == [{"result": "counted"}]
    for request, replies in (
        ({"get_status": UNKNOWN}, 1),
        ({"get_result": job, "wait": True}, 1),
        ({"follow_stream": job, "since": 0}, 3),
    ):
        with dispatcher.connect() as client:
            client.send(json.dumps({"harpcaller": 1, **request}).encode() + b"\n" + more)
            assert len(client.messages()) == replies


# Disconnects.


def test_client_half_closed_gets_an_immediate_reply(dispatcher: Harpcallerd) -> None:
    job = dispatcher.submit("web01", "count", 2)
    assert dispatcher.ask(get_result=job) == [{"result": "counted"}]
    packets = [{"packet": 0, "data": 0}, {"packet": 1, "data": 1}]

    def ask(**request: object) -> list[object]:
        with dispatcher.connect() as client:
            client.send({"harpcaller": 1, **request})
            client.half_close()
            return client.messages()

    assert "job_id" in str(ask(host="web01", procedure="echo", arguments=[]))
    assert ask(cancel=job) == [{"cancelled": False}]
    assert "call" in str(ask(get_status=job))
    assert ask(get_result=job) == ask(get_result=job, wait=False) == [{"result": "counted"}]
    assert ask(follow_stream=job, since=0) == ask(read_stream=job) == [*packets, {"result": "counted"}]
    assert ask(follow_stream=job, recent=1) == [packets[1], {"result": "counted"}]
    assert ask(follow_stream=job) == [{"result": "counted"}]
    assert "invalid_jobid" in str(ask(follow_stream=UNKNOWN))


def test_client_half_closed_ends_the_wait(dispatcher: Harpcallerd) -> None:
    job = dispatcher.submit("web01", "feed", "a", "b")
    wait_until(lambda: len(dispatcher.ask(read_stream=job)) == 3, DEADLINE, "the records")
    for request, replies in (
        ({"get_result": job}, []),
        ({"follow_stream": job}, []),
        ({"follow_stream": job, "since": 1}, [{"packet": 1, "data": "b"}]),
        ({"follow_stream": job, "since": 2}, []),
    ):
        with dispatcher.connect() as client:
            client.send({"harpcaller": 1, **request})
            client.half_close()
            assert client.messages() == replies
    assert dispatcher.ask(cancel=job) == [{"cancelled": True}]


@pytest.mark.parametrize("kind", ["get_result", "follow_stream"])
def test_disconnect_during_a_wait_frees_the_connection(dispatcher: Harpcallerd, kind: str) -> None:
    job = dispatcher.submit("web01", "hang")
    wait_for_connections(dispatcher, 0)
    waiting = [dispatcher.connect() for _ in range(20)]
    for client in waiting:
        client.send({"harpcaller": 1, kind: job})
    wait_for_connections(dispatcher, 20)
    for client in waiting:
        client.close()
    wait_for_connections(dispatcher, 0)
    assert dispatcher.ask(get_result=job, wait=False) == [{"no_result": True}]
    assert dispatcher.ask(cancel=job) == [{"cancelled": True}]


def test_disconnect_during_a_stream_frees_the_connection(dispatcher: Harpcallerd, peer: Peer) -> None:
    job = dispatcher.submit("web01", "feed", "x" * 90_000)
    wait_until(lambda: len(dispatcher.ask(read_stream=job)) == 2, DEADLINE, "the record")
    conn = connection_of(peer, "x" * 90_000)
    client = dispatcher.connect()
    client.send({"harpcaller": 1, "follow_stream": job, "since": 0})
    for _ in range(200):  # more than the buffers of the connection
        conn.reply({"stream": "y" * 90_000})
    wait_until(lambda: len(dispatcher.ask(read_stream=job)) == 202, DEADLINE, "all records")
    client.close()
    wait_for_connections(dispatcher, 0)
    assert dispatcher.ask(cancel=job) == [{"cancelled": True}]


# Too many clients.


def test_clients_over_the_limit_are_refused(dispatcher: Harpcallerd) -> None:
    job = dispatcher.submit("web01", "feed", 0)
    wait_for_connections(dispatcher, 0)
    waiting = [dispatcher.connect() for _ in range(40)]
    for client in waiting:
        client.send({"harpcaller": 1, "follow_stream": job, "since": 0})
    for client in waiting:  # a connection whose request was not read yet would give way to others
        assert client.message() == {"packet": 0, "data": 0}
    assert dispatcher.ask(get_status=job) == [{"error": REFUSAL}]
    with dispatcher.connect() as silent:  # it does not delay the others
        assert silent.messages() == [{"error": REFUSAL}]
    waiting.pop().close()
    wait_until(lambda: "call" in dispatcher.ask(get_status=job)[0], DEADLINE, "room for another client")
    assert dispatcher.ask(cancel=job) == [{"cancelled": True}]
    for client in waiting:
        assert client.messages() == [{"cancelled": True}]
        client.close()
    dispatcher.wait_event("too many connections")


def test_accepting_pauses_without_descriptors(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> None:
    directory = tmp_path_factory.mktemp("descriptors")
    with Harpcallerd(directory, {"web01": peer.port}, descriptors=64) as dispatcher:
        crowd = [dispatcher.connect() for _ in range(100)]
        dispatcher.wait_event("cannot accept connections")
        for client in crowd:
            client.close()
        dispatcher.wait_event("accepting connections again")
        assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]
        dispatcher.wait_event("cannot accept connections")
        assert len(dispatcher.events("cannot accept connections")) == 1
        assert dispatcher.events("limit of open files too low", limit=64)


def test_descriptor_limit_is_raised(dispatcher: Harpcallerd) -> None:
    soft, hard = psutil.Process(dispatcher.pid).rlimit(resource.RLIMIT_NOFILE)
    assert soft == hard


def test_running_job_uses_little_memory(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> None:
    """60 jobs with their TLS connections use less than 9 MB."""
    with Harpcallerd(tmp_path_factory.mktemp("memory"), {"web01": peer.port}) as dispatcher:
        process = psutil.Process(dispatcher.pid)
        memory: list[int] = []
        for count in (10, 70):
            for _ in range(len(dispatcher.events("call started")), count):
                dispatcher.submit("web01", "hang")
            wait_until(lambda: len(dispatcher.events("call started")) == count, DEADLINE, "the calls")  # noqa: B023
            memory.append(process.memory_info().rss)
        grown = (memory[1] - memory[0]) / 60
        assert grown < 150_000, f"{grown / 1000:.0f} kB each"


# The store fails.


def test_full_disk_refuses_new_jobs_until_space_is_free(dispatcher: Harpcallerd) -> None:
    process = psutil.Process(dispatcher.pid)
    unlimited = process.rlimit(resource.RLIMIT_FSIZE)
    job = dispatcher.submit("web01", "hang")
    # No file can grow any more, including the log.
    process.rlimit(resource.RLIMIT_FSIZE, (1, unlimited[1]))
    try:
        (reply,) = dispatcher.ask(host="web01", procedure="echo", arguments=["x" * 50_000])
        assert reply["error"]["type"] == "storage_error"
        assert set(reply["error"]) == {"type", "message"}
        assert dispatcher.ask(get_result=job, wait=False) == [{"no_result": True}]
    finally:
        process.rlimit(resource.RLIMIT_FSIZE, unlimited)
    later = dispatcher.submit("web01", "echo", 1)
    assert dispatcher.ask(get_result=later) == [{"result": [1]}]
    assert dispatcher.ask(cancel=job) == [{"cancelled": True}]


# The end of clients and of the server.


def test_stop_ends_waits_immediately(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> None:
    directory = tmp_path_factory.mktemp("stop")
    with Harpcallerd(directory, {"web01": peer.port}, settings={"idle_timeout": 3600}) as dispatcher:
        job = dispatcher.submit("web01", "hang")
        clients = [dispatcher.connect() for _ in range(3)]
        clients[0].send({"harpcaller": 1, "get_result": job})
        clients[1].send({"harpcaller": 1, "follow_stream": job})
        clients[2].send(b'{"harpcaller"')
        wait_for_connections(dispatcher, 3)
        assert dispatcher.stop() == 0
        for client in clients:
            assert client.lines() == []
            client.close()


def test_silent_death_of_a_client_is_detected(dispatcher: Harpcallerd) -> None:
    """The kernel's timer on the program's side of an idle connection is the keepalive timer."""

    def timers(client: LineClient) -> list[str]:
        ends = (dispatcher.port, client.socket.getsockname()[1])
        lines = map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
        return [fields[5][:2] for fields in lines if (_port(fields[1]), _port(fields[2])) == ends]

    job = dispatcher.submit("web01", "hang")
    with dispatcher.connect() as client:
        client.send({"harpcaller": 1, "get_result": job})
        wait_until(lambda: timers(client) == ["02"], DEADLINE, "the keepalive timer")
    assert dispatcher.ask(cancel=job) == [{"cancelled": True}]


def _port(end: str) -> int:
    return int(end.rpartition(":")[2], 16)


def test_disconnected_clients_leave_no_connection(dispatcher: Harpcallerd) -> None:
    wait_for_connections(dispatcher, 0)


def test_long_requests_share_a_memory_limit(tmp_path: Path, peer: Peer) -> None:
    settings = {"request_memory": 1_500_000, "idle_timeout": 60}
    full = [{"error": {"type": "too_many_connections", "message": "too many long requests at once; try again later"}}]
    with Harpcallerd(tmp_path, {"web01": peer.port}, settings=settings) as dispatcher:
        with dispatcher.connect() as first:
            first.send(b"x" * 1_000_000)
            # It is refused only after the bytes of the first one were received.
            wait_until(lambda: long_request(dispatcher) == full, DEADLINE, "the refusal")
            assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]  # short requests are accepted
        wait_for_connections(dispatcher, 0)
        assert long_request(dispatcher) == [{"cancelled": False}]


def test_bulk_requests_do_not_delay_other_clients(tmp_path: Path, peer: Peer) -> None:
    """The jobs of requests with many jobs keep their order, and those of others are stored between them."""
    call = {"host": "web01", "procedure": "echo", "arguments": [], "queue": {"name": {}}}
    bulk = json.dumps({"harpcaller": 1, "submit_many": [call] * 5000}).encode() + b"\n"
    with Harpcallerd(tmp_path, {"web01": peer.port}) as dispatcher, ExitStack() as stack:
        blocking = dispatcher.submit("web01", "hang", queue={"name": {}})
        clients = [stack.enter_context(dispatcher.connect()) for _ in range(4)]
        for client in clients:
            client.send(bulk)
        others = []
        while select.select([client.socket for client in clients], [], [], 0)[0] != [
            client.socket for client in clients
        ]:
            others.append(dispatcher.submit("web01", "echo", queue={"name": {}}))
        bulks = [client.message()["job_ids"] for client in clients]
        order = [job["job"] for job in dispatcher.listed("list")]
        assert set(order) == {blocking, *others, *(job for ids in bulks for job in ids)}
        of_bulks = [job for job in order if job not in others]
        of_bulks.remove(blocking)
        assert all(of_bulks[start : start + 5000] in bulks for start in range(0, 20_000, 5000)), "one request at a time"
        first, last = order.index(of_bulks[0]), order.index(of_bulks[-1])
        assert any(first < order.index(job) < last for job in others)


def long_request(dispatcher: Harpcallerd) -> list[object]:
    """Return the reply to a request of a million bytes."""
    request = json.dumps({"harpcaller": 1, "cancel": UNKNOWN}).encode()
    with dispatcher.connect() as client:
        client.send(request + b" " * 1_000_000 + b"\n")
        return client.messages()
