"""Keep-alive of client connections: when another request may follow a reply."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd, LineClient
from support.peers import Peer
from support.scripted import scripted_harpd

UNKNOWN = "00000000-0000-4000-8000-000000000000"
CANCEL = {"harpcaller": 1, "cancel": UNKNOWN, "keep_alive": True}
#: The setting `idle_timeout`, which is the granted time.
IDLE = 2.5


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    with scripted_harpd(tmp_path_factory.mktemp("harpd")) as peer:
        yield peer


@pytest.fixture(scope="module")
def dispatcher(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> Iterator[Harpcallerd]:
    settings = {"idle_timeout": IDLE, "max_connections": 10}
    with Harpcallerd(tmp_path_factory.mktemp("keep"), {"web01": peer.port}, settings=settings) as dispatcher:
        yield dispatcher


def ask(client: LineClient, **request: Any) -> Any:
    client.send({"harpcaller": 1, **request})
    return client.message()


def test_keep_alive_serves_a_whole_job(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        submitted = ask(client, host="web01", procedure="echo", arguments=[5], keep_alive=True)
        job = submitted["job_id"]
        assert submitted == {"harpcaller": 1, "job_id": job, "keep_alive": IDLE}
        assert ask(client, get_result=job, keep_alive=True) == {"result": [5], "keep_alive": IDLE}
        assert ask(client, get_result=job, wait=False, keep_alive=True) == {"result": [5], "keep_alive": IDLE}
        assert ask(client, get_status=job, keep_alive=True)["keep_alive"] == IDLE
        assert ask(client, get_details=job, keep_alive=True)["keep_alive"] == IDLE
        many = [{"host": "web01", "procedure": "echo", "arguments": []}] * 3
        assert len(ask(client, submit_many=many, keep_alive=True)["job_ids"]) == 3
        # The last request does not set keep_alive.
        assert ask(client, cancel=job) == {"cancelled": False}
        assert client.line() == b""


def test_keep_alive_grant_is_the_last_member(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        client.send(CANCEL)
        assert client.line() == b'{"cancelled":false,"keep_alive":2.5}\n'


@pytest.mark.parametrize("keep", [False, None])
def test_client_without_keep_alive_gets_version_1(dispatcher: Harpcallerd, keep: object) -> None:
    assert dispatcher.ask(cancel=UNKNOWN, keep_alive=keep) == [{"cancelled": False}]
    assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]


def test_keep_alive_of_another_type_is_refused(dispatcher: Harpcallerd) -> None:
    (reply,) = dispatcher.ask(cancel=UNKNOWN, keep_alive=1)
    assert reply["error"] == {"type": "invalid_request", "message": "keep_alive: expected true or false"}


def test_keep_alive_ends_after_a_refusal(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        assert "keep_alive" in ask(client, cancel=UNKNOWN, keep_alive=True)
        client.send({"harpcaller": 1, "get_result": UNKNOWN, "keep_alive": True})
        (reply,) = client.messages()
        assert reply["error"]["type"] == "invalid_jobid"
        assert "keep_alive" not in reply


@pytest.mark.parametrize("kind", ["follow_stream", "read_stream"])
def test_keep_alive_ends_after_records(dispatcher: Harpcallerd, kind: str) -> None:
    job = dispatcher.submit("web01", "count", 2)
    with dispatcher.connect() as client:
        assert ask(client, get_result=job, keep_alive=True)["keep_alive"] == IDLE
        client.send({"harpcaller": 1, kind: job, "since": 0, "keep_alive": True})
        *records, end = client.messages()
        assert [record["data"] for record in records] == [0, 1]
        assert end == {"result": "counted"}


@pytest.mark.parametrize("more", [CANCEL, b"{"], ids=["whole", "part"])
def test_keep_alive_with_extra_input_gets_one_reply(dispatcher: Harpcallerd, more: object) -> None:
    with dispatcher.connect() as client:
        extra = more if isinstance(more, bytes) else json.dumps(more).encode() + b"\n"
        client.send(json.dumps(CANCEL).encode() + b"\n" + extra)
        client.half_close()
        assert client.messages() == [{"cancelled": False}]


def test_keep_alive_with_input_while_waiting_gets_one_reply(dispatcher: Harpcallerd, peer: Peer) -> None:
    job = dispatcher.submit("web01", "hang")
    with dispatcher.connect() as client:
        client.send({"harpcaller": 1, "get_result": job, "keep_alive": True})
        # After the reply to a later request, this one is waiting.
        assert dispatcher.ask(get_result=job, wait=False) == [{"no_result": True}]
        client.send(CANCEL)
        dispatcher.ask(cancel=UNKNOWN)
        assert dispatcher.ask(cancel=job) == [{"cancelled": True}]
        replies = client.messages()
        assert [set(reply) for reply in replies] in (
            [{"cancelled"}],
            [{"cancelled", "keep_alive"}, {"cancelled", "keep_alive"}],
        )


def test_keep_alive_idle_connection_is_closed(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        client.send(CANCEL)
        assert client.messages() == [{"cancelled": False, "keep_alive": IDLE}]


def test_keep_alive_partial_request_gets_an_error(dispatcher: Harpcallerd) -> None:
    with dispatcher.connect() as client:
        client.send(CANCEL)
        assert client.message()["keep_alive"] == IDLE
        client.send(b'{"harpcaller":')
        (reply,) = client.messages()
        assert reply["error"]["message"] == f"the request line was not complete within {IDLE} s"


def test_keep_alive_near_capacity_is_not_granted(dispatcher: Harpcallerd) -> None:
    """With a limit of ten connections, no connection is kept alive at ten."""
    process = psutil.Process(dispatcher.pid)

    def connections() -> int:
        found = process.net_connections("tcp")
        return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == dispatcher.port for one in found)

    wait_until(lambda: connections() == 0, DEADLINE, "the end of all others")
    job = dispatcher.submit("web01", "hang")
    crowd = [dispatcher.connect() for _ in range(9)]
    for client in crowd:
        client.send({"harpcaller": 1, "get_result": job})
    wait_until(lambda: connections() == len(crowd), DEADLINE, "the crowd")
    with dispatcher.connect() as client:
        client.send(CANCEL)
        assert client.messages() == [{"cancelled": False}]
    dispatcher.ask(cancel=job)
    for client in crowd:
        assert client.messages() == [{"cancelled": True}]
        client.close()


def test_stop_does_not_wait_for_idle_connections(tmp_path: Path, peer: Peer) -> None:
    with Harpcallerd(tmp_path, {"web01": peer.port}) as dispatcher, dispatcher.connect() as client:
        client.send(CANCEL)
        assert client.message()["keep_alive"] == 30
        dispatcher.stop()
        assert client.line() == b""
