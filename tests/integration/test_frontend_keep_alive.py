"""Keep-alive connections to harpd: which request can follow which, and what closes them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harp
import harp.aio
from support.calls import nothing_is_left
from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import OWNER, SECRET, Harpd, LineClient
from support.procedures_file import PROCEDURES
from support.scripted_supervisors import make_current, supervisor

#: Longer than a test waits, so that an idle connection does not look closed.
IDLE = 600.0
ID = "00000000-0000-4000-8000-0000000000cc"


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    configuration = {"limits": {"kill_grace": 1, "keep_alive_timeout": IDLE}}
    with Harpd(tmp_path_factory.mktemp("keep"), PROCEDURES, configuration, services=True) as harpd:
        yield harpd
        nothing_is_left(harpd)


def ask(harpd: Harpd, client: LineClient, procedure: str, *arguments: Any, **more: Any) -> Any:
    """Send a request with keep-alive; return the acknowledgement or the error."""
    client.send({**harpd.request(procedure, list(arguments)), "keep_alive": True, **more})
    return client.message()


def call_terms(call_id: str, harpd: Harpd, client: LineClient) -> dict[str, Any]:
    """Return the terms of a resumable call; get the instance over the same connection."""
    client.send({"harp": 1, "calls": OWNER, "auth": harpd.auth, "keep_alive": True})
    calls = client.message()
    assert calls["keep_alive"] == IDLE
    terms = {"disconnect_timeout": 60, "result_ttl": 60, "timeout": 60, "max_exec_time": 60}
    return {"id": call_id, "owner": OWNER, "secret": SECRET, "instance": calls["instance"], **terms}


def closed(client: LineClient) -> bool:
    return bool(client.lines() == [])


def test_keep_alive_connection_serves_many_calls(harpd: Harpd) -> None:
    pids = set()
    with harpd.connect() as client:
        for _ in range(20):
            assert ask(harpd, client, "pid") == {"harp": 1, "stream_result": False, "keep_alive": IDLE}
            pids.add(client.message()["result"])
        assert ask(harpd, client, "count", 3)["stream_result"] is True
        assert [client.message() for _ in range(4)] == [{"stream": n} for n in range(3)] + [{"result": 3}]
        ask(harpd, client, "fail", "text")
        assert client.message()["exception"]["message"] == "text"
        ask(harpd, client, "same", "last")
        assert client.message() == {"result": "last"}
    assert len(pids) == 20


def test_connection_without_keep_alive_is_closed(harpd: Harpd) -> None:
    with harpd.connect() as client:
        client.send(harpd.request("same", [1]))
        assert client.lines() == [{"harp": 1, "stream_result": False}, {"result": 1}]
    with harpd.connect() as client:  # at any time
        ask(harpd, client, "same", 1)
        client.message()
        client.send(harpd.request("same", [2]))
        assert client.lines() == [{"harp": 1, "stream_result": False}, {"result": 2}]


@pytest.mark.parametrize("procedure", ["unknown", "too_long"])
def test_keep_alive_connection_closes_after_an_error(harpd: Harpd, procedure: str) -> None:
    with harpd.connect() as client:
        ask(harpd, client, "same", 1)
        client.message()
        client.send({**harpd.request(procedure, []), "keep_alive": True})
        lines = client.lines()
        assert lines[-1]["error"]["type"] in {"no_such_procedure", "timeout"}


def test_data_before_the_end_stops_a_keep_alive_call(harpd: Harpd, tmp_path: Path) -> None:
    with harpd.connect() as client:
        ask(harpd, client, "wait_for", str(tmp_path / "never"))
        client.send({**harpd.request("same", [1]), "keep_alive": True})
        (error,) = client.lines()
        assert error["error"]["message"] == "data after the request line"
    harpd.wait_event("client sent unexpected data; call stopped")


def test_keep_alive_client_that_disconnects_stops_its_call(harpd: Harpd, tmp_path: Path) -> None:
    with harpd.connect() as client:
        ask(harpd, client, "same", 1)
        client.message()
        ask(harpd, client, "wait_for", str(tmp_path / "never"))
    harpd.wait_event("client disconnected; call stopped")


def test_keep_alive_requests_are_each_authenticated(harpd: Harpd) -> None:
    with harpd.connect() as client:
        ask(harpd, client, "same", 1)
        client.message()
        client.send(
            {**harpd.request("same", [2]), "auth": {"user": harpd.user, "password": "wrong"}, "keep_alive": True}
        )
        (rejection,) = client.lines()
        assert rejection["error"]["type"] == "auth_error"


def test_keep_alive_requests_byte_by_byte_are_accepted(harpd: Harpd) -> None:
    line = json.dumps({**harpd.request("same", [1]), "keep_alive": True}).encode() + b"\n"
    with harpd.connect() as client:
        for _ in range(2):
            for at in range(len(line)):
                client.send(line[at : at + 1])
            assert client.message()["keep_alive"] == IDLE
            assert client.message() == {"result": 1}


def test_invalid_next_request_is_rejected(harpd: Harpd) -> None:
    with harpd.connect() as client:
        ask(harpd, client, "same", 1)
        client.message()
        client.send(b"garbage\n")
        (rejection,) = client.lines()
        assert rejection["error"]["type"] == "parse_error"


def test_keep_alive_connection_mixes_resumable_calls_and_lists(harpd: Harpd) -> None:
    """Data directly after `release` is the next request."""
    ids = [f"00000000-0000-4000-8000-00000000000{number}" for number in range(4)]
    with harpd.connect() as client:
        terms = [call_terms(call_id, harpd, client) for call_id in ids]
        requests = [{**harpd.request("count", [2]), "call": one, "keep_alive": True} for one in terms]
        client.send(requests[0])
        for number, call_id in enumerate(ids):
            acknowledged = client.message()
            assert (acknowledged["keep_alive"], acknowledged["call"]["records"]) == (IDLE, 0)
            lines = []
            while "result" not in (line := client.message()):
                lines.append(line)
            assert [one for one in lines if "stream" in one] == [{"stream": 0}, {"stream": 1}], call_id
            following = (
                requests[number + 1] if number + 1 < len(ids) else {**harpd.request("same", [5]), "keep_alive": True}
            )
            behind = b'{"release":true}\n' + json.dumps(following).encode() + b"\n"
            client.send(behind if number % 2 else behind[:20])
            if not number % 2:
                client.send(behind[20:])
        assert client.message() == {"harp": 1, "stream_result": False, "keep_alive": IDLE}
        assert client.message() == {"result": 5}
        client.send({"harp": 1, "calls": OWNER, "auth": harpd.auth, "keep_alive": True})
        assert client.message()["calls"] == []


def test_next_request_may_be_longer_than_a_command(harpd: Harpd) -> None:
    large = "x" * 300_000
    with harpd.connect() as client:
        client.send({**harpd.request("same", [1]), "call": call_terms(ID, harpd, client), "keep_alive": True})
        while "result" not in client.message():
            pass
        following = json.dumps({**harpd.request("same", [large]), "keep_alive": True}).encode() + b"\n"
        client.send(b'{"ack":0}\n{"release":true}\n' + following)
        assert client.message()["keep_alive"] == IDLE
        assert client.message() == {"result": large}
        client.send({"harp": 1, "calls": OWNER, "auth": harpd.auth, "keep_alive": True})
        assert client.message()["calls"] == []


def test_attach_with_keep_alive_resumes_a_call(harpd: Harpd, tmp_path: Path) -> None:
    call_id = "00000000-0000-4000-8000-0000000000aa"
    with harpd.connect() as client:
        client.send({**harpd.request("wait_for", [str(tmp_path / "go")]), "call": call_terms(call_id, harpd, client)})
        assert "keep_alive" not in client.message()
    with harpd.connect() as client:
        attach = {"harp": 1, "attach": call_id, "owner": OWNER, "secret": SECRET, "since": 0, "auth": harpd.auth}
        client.send({**attach, "keep_alive": True})
        assert client.message()["keep_alive"] == IDLE
        (tmp_path / "go").touch()
        while "result" not in (line := client.message()):
            assert "exit_info" in line
        client.send({"release": True})
        ask(harpd, client, "same", 1)
        assert client.message() == {"result": 1}


def test_idle_keep_alive_connection_is_closed(tmp_path: Path) -> None:
    with (
        Harpd(tmp_path / "harpd", PROCEDURES, {"limits": {"keep_alive_timeout": 0.2}}) as harpd,
        harpd.connect() as client,
    ):
        assert ask(harpd, client, "same", 1)["keep_alive"] == 0.2
        client.message()
        assert closed(client)


def test_lists_over_one_connection_release_their_memory(tmp_path: Path) -> None:
    limits = {"request_line": 1_000_000, "request_memory": 1_000_000}
    with Harpd(tmp_path / "harpd", PROCEDURES, {"limits": limits}) as harpd, harpd.connect() as client:
        request = json.dumps({"harp": 1, "calls": OWNER, "auth": harpd.auth, "keep_alive": True}).encode()
        for _ in range(4):
            client.send(request + b" " * 500_000 + b"\n")
            assert client.message()["calls"] == []


def test_frontend_stop_closes_idle_connections_silently(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES).start()
    with harpd.connect() as client:
        ask(harpd, client, "same", 1)
        client.message()
        harpd.stop()
        assert closed(client)


def test_request_during_suspension_counts_from_its_arrival(tmp_path: Path) -> None:
    """Otherwise a request that its dispatcher has abandoned could still start a call."""
    configuration = {"limits": {"keep_alive_timeout": IDLE}}
    with Harpd(tmp_path / "harpd", PROCEDURES, configuration, services=True) as harpd, harpd.connect() as client:
        terms = {**call_terms("00000000-0000-4000-8000-0000000000bb", harpd, client), "disconnect_timeout": 3}
        os.kill(harpd.pid, signal.SIGSTOP)
        try:
            client.send({**harpd.request("wait_for", [str(tmp_path / "never")]), "call": terms, "keep_alive": True})
            halted = time.monotonic()
            wait_until(lambda: time.monotonic() - halted > 4, DEADLINE, "a while")
        finally:
            os.kill(harpd.pid, signal.SIGCONT)
        (rejection,) = client.lines()
        assert rejection["error"]["type"] == "call_refused"
        assert rejection["error"]["data"] == {"reason": "delayed"}  # the dispatcher sends it again


def test_request_after_suspension_is_accepted(tmp_path: Path) -> None:
    """Otherwise jobs are rejected as delayed although they were submitted after the suspension."""
    configuration = {"limits": {"keep_alive_timeout": IDLE}}
    with (
        Harpd(tmp_path / "harpd", PROCEDURES, configuration, services=True) as harpd,
        harpd.connect() as client,
        harpd.connect() as other,
    ):
        terms = {**call_terms("00000000-0000-4000-8000-0000000000bc", harpd, client), "disconnect_timeout": 2}
        call_terms("", harpd, other)
        os.kill(harpd.pid, signal.SIGSTOP)
        try:
            halted = time.monotonic()
            wait_until(lambda: time.monotonic() - halted > 3, DEADLINE, "a while")
        finally:
            os.kill(harpd.pid, signal.SIGCONT)
        call_terms("", harpd, other)  # its reply proves that the frontend runs
        assert ask(harpd, client, "same", 1, call=terms)["stream_result"] is False


async def test_next_request_counts_from_its_arrival(tmp_path: Path) -> None:
    """Otherwise a start on a connection that was idle for long would be rejected as delayed."""
    harpd = Harpd(tmp_path / "harpd", "", services=True)
    directory = harpd.runtime_directory
    directory.mkdir()
    received: list[float] = []

    def acknowledge(request: dict[str, Any]) -> bytes:
        received.append(request["resumable"]["received"])
        return b'{"harp":1,"stream_result":false}\n'

    def start_call(client: LineClient) -> float:
        terms: dict[str, Any] = {"id": ID, "owner": OWNER, "secret": SECRET, "instance": "a"}
        terms |= dict.fromkeys(("disconnect_timeout", "result_ttl", "timeout", "max_exec_time"), 60)
        request = {**harpd.request("same", [1]), "call": terms, "keep_alive": True}
        client.send(json.dumps(request).encode() + b'\n{"release":true}\n')
        client.message()
        return received[-1]

    def start_until_later() -> None:
        with harpd.connect() as client:
            start_call(client)
            replied = time.clock_gettime(time.CLOCK_BOOTTIME)
            wait_until(lambda: start_call(client) > replied, DEADLINE, "a request that arrived after the first reply")

    async with supervisor(directory, "a", acknowledge):
        make_current(directory, "a")
        await asyncio.to_thread(harpd.start_frontend)
        await asyncio.to_thread(start_until_later)
        assert await asyncio.to_thread(harpd.stop_frontend) == 0
    assert not harpd.faults()


async def test_stopping_frontend_does_not_deny_an_unknown_start(tmp_path: Path) -> None:
    """Without an acknowledgement, the error shutdown promises that no call was started."""
    harpd = Harpd(tmp_path / "harpd", "", services=True)
    directory = harpd.runtime_directory
    directory.mkdir()
    received = asyncio.Event()

    def accept(request: dict[str, Any]) -> None:
        received.set()

    def refused() -> bool:
        try:
            harpd.connect().close()
        except ConnectionRefusedError:
            return True
        except ConnectionError:
            pass  # it stopped during the handshake
        return False

    async with supervisor(directory, "a", accept):
        make_current(directory, "a")
        await asyncio.to_thread(harpd.start_frontend)
        client = await asyncio.to_thread(harpd.connect)
        client.send(harpd.request("same", [1]))
        await asyncio.wait_for(received.wait(), DEADLINE)
        os.kill(harpd.pid, signal.SIGTERM)
        await asyncio.to_thread(wait_until, refused, DEADLINE, "the stop")
    with client:
        (error,) = await asyncio.to_thread(client.lines)
    assert error["error"]["type"] == "call_died"
    assert await asyncio.to_thread(harpd.stop_frontend) == 0


@pytest.mark.parametrize("keep", [True, False])
def test_client_with_keep_alive_reuses_its_connection(harpd: Harpd, keep: bool) -> None:
    before = len(harpd.events("call accepted"))
    arguments = (harpd.host, harpd.user, harpd.password, harpd.port, str(harpd.ca_file))
    with harp.HarpServer(*arguments, keep_alive=keep) as server:
        assert [server.same(number) for number in range(10)] == list(range(10))
        assert list(server.count(3))[:3] == [0, 1, 2]
        with pytest.raises(harp.RemoteException):
            server.fail("text")
        assert server.same("last") == "last"
    accepted = harpd.wait_events(before + 13, "call accepted")[before:]
    assert len(accepted) == 13
    assert len({event["peer"] for event in accepted}) == (1 if keep else 13)


async def test_async_client_with_keep_alive_reuses_its_connection(harpd: Harpd) -> None:
    before = len(harpd.events("call accepted"))
    arguments = (harpd.host, harpd.user, harpd.password, harpd.port, str(harpd.ca_file))
    async with harp.aio.AsyncHarpServer(*arguments, keep_alive=True) as server:
        assert [await server.same(number) for number in range(10)] == list(range(10))
    assert len({event["peer"] for event in harpd.wait_events(before + 10, "call accepted")[before:]}) == 1
