"""Resumable calls over real sockets: commands and messages, attaching, disconnecting.

The transcripts quote docs/protocol.md, Resumable calls.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.daemonlog import DEADLINE
from support.deadline import wait_until
from support.harpd import OWNER, SECRET, Harpd, LineClient
from support.procedures_file import PROCEDURES
from support.scripted_supervisors import make_current, supervisor

LIMITS = {"write_timeout": 1, "disconnect_timeout": 1800}


@pytest.fixture(scope="module")
def harpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    with Harpd(tmp_path_factory.mktemp("resumable"), PROCEDURES, {"limits": LIMITS}) as harpd:
        yield harpd


def failed(type: str, message: str) -> dict[str, Any]:
    return {"harp": 1, "error": {"type": type, "message": message}}


def error_type(client: LineClient) -> Any:
    """Return the type of the error that is the only line."""
    (rejection,) = client.lines()
    return rejection["error"]["type"]


def records(client: LineClient, most: int | None = None) -> list[Any]:
    """Return the next `count` records, or all records; then the exit info is read, too."""
    found: list[Any] = []
    while most is None or len(found) < most:
        line = client.message()
        assert line.keys() <= {"stream", "at", "exit_info"}, line
        if "exit_info" in line:
            break
        if "stream" in line:
            found.append(line["stream"])
    return found


def last_lines(client: LineClient) -> list[Any]:
    """Return the lines up to the closing line; release the call, after which the connection closes."""
    found = [client.message()]
    while not found[-1].keys() & {"result", "exception", "error"}:
        found.append(client.message())
    client.send({"release": True})
    assert client.lines() == []
    return found


def closing_line(client: LineClient) -> Any:
    return last_lines(client)[-1]


def test_resumable_call_states_terms_and_waits_for_release(harpd: Harpd) -> None:
    with harpd.start_resumable("echo", 1, "two", disconnect_timeout=7200) as client:
        acknowledgement = client.message()
        terms = acknowledgement.pop("call")
        assert acknowledgement == {"harp": 1, "stream_result": False}
        assert terms.pop("elapsed") >= 0
        instance = harpd.status()["instance"]
        expected = {"instance": instance, "disconnect_timeout": 1800, "result_ttl": 60, "kill_grace": 5, "records": 0}
        assert terms == expected  # at most the configured limits
        exit_info, end = last_lines(client)
        assert exit_info["exit_info"]["exit"] == 0
        assert end == {"result": [1, "two"]}
    assert client.call not in harpd.list_calls()["calls"]


def test_records_carry_their_times(harpd: Harpd) -> None:
    with harpd.start_resumable("count", 3) as client:
        assert client.message()["stream_result"] is True
        lines = last_lines(client)
        assert "at" in lines[0]
        assert [line["stream"] for line in lines if "stream" in line] == [0, 1, 2]
        assert lines[-1] == {"result": 3}


def test_commands_are_answered_and_executed(harpd: Harpd, tmp_path: Path) -> None:
    with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
        client.message()
        client.send(b'{"heartbeat":0}\n{"he')
        assert client.message().keys() == {"heartbeat"}
        client.send(b'artbeat":0}\n')
        assert client.message().keys() == {"heartbeat"}
        client.send({"stop": {"why": "cancel", "by": "127.0.0.1:5"}})
        stop_report, exit_info, end = last_lines(client)
        assert stop_report["stop_report"]["survivors"] == []
        assert (exit_info["exit_info"]["by"], exit_info["exit_info"]["by_whom"]) == ("cancel", "127.0.0.1:5")
        assert end["error"]["type"] == "cancelled"


def test_commands_directly_after_the_request_are_accepted(harpd: Harpd) -> None:
    terms = {"id": str(uuid.uuid4()), "owner": OWNER, "secret": SECRET, "instance": harpd.status()["instance"]}
    terms |= dict.fromkeys(("disconnect_timeout", "result_ttl", "timeout", "max_exec_time"), 60)
    with harpd.connect() as client:
        client.send(
            json.dumps(harpd.request("echo", [], call=terms)).encode() + b'\n{"heartbeat":0}\n{"heartbeat":0}\n'
        )
        lines = [
            client.message() for _ in range(5)
        ]  # acknowledgement, exit info, result, and these replies anywhere between
        assert len([line for line in lines if "heartbeat" in line]) == 2
        client.send({"release": True})
        assert client.lines() == []


def test_attach_continues_from_any_record(harpd: Harpd, tmp_path: Path) -> None:
    with harpd.start_resumable("count", 1000, str(tmp_path / "go")) as client:
        client.message()
        assert records(client, 10) == list(range(10))
    for since in (0, 5, 999, 1000):
        with harpd.attach(client.call, since) as again:
            terms = again.message()["call"]
            assert terms["records"] <= 1000
            assert records(again, 1000 - since) == list(range(since, 1000))
    with harpd.attach(client.call, 7) as again:
        again.message()
        again.send({"ack": 500})
        assert records(again, 993) == list(range(7, 1000))
        again.send({"heartbeat": 0})
        assert again.message().keys() == {"heartbeat"}  # the command before it has been executed
    with harpd.attach(client.call, 1001) as gone:
        assert error_type(gone) == "records_gone"
    (tmp_path / "go").touch()
    with harpd.attach(client.call, 1000) as again:
        again.message()
        assert closing_line(again) == {"result": 1000}


def test_ended_call_is_stored_for_its_client(harpd: Harpd) -> None:
    with harpd.start_resumable("count", 5) as client:
        client.message()
    wait_until(lambda: harpd.status()["calls"] == 0, DEADLINE, "the end of the call")
    calls = harpd.list_calls()
    assert calls.keys() == {"harp", "calls", "instance", "features", "version"}
    assert client.call in calls["calls"]
    assert calls["instance"] == harpd.status()["instance"]
    with harpd.attach(client.call) as again:
        assert again.message()["call"]["records"] == 5
        assert records(again) == list(range(5))
        assert closing_line(again) == {"result": 5}
    assert client.call not in harpd.list_calls()["calls"]


def test_second_attach_replaces_the_first(harpd: Harpd, tmp_path: Path) -> None:
    with harpd.start_resumable("wait_for", str(tmp_path / "go")) as first:
        first.message()
        with harpd.attach(first.call) as second:
            second.message()
            assert first.lines() == []
            (tmp_path / "go").touch()
            assert closing_line(second) == {"result": "there"}


@pytest.mark.parametrize("changes", [{"secret": "guessed"}, {"owner": "another"}])
def test_attach_without_the_owner_gets_no_such_call(harpd: Harpd, tmp_path: Path, changes: dict[str, Any]) -> None:
    with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
        client.message()
        with harpd.attach(client.call, **changes) as other:
            (rejection,) = other.lines()
        assert rejection["error"]["type"] == "no_such_call"
        assert rejection["error"]["data"] == {"instance": harpd.status()["instance"]}
        assert harpd.list_calls("another")["calls"] == []
        assert client.call in harpd.list_calls()["calls"]
        (tmp_path / "go").touch()
        assert closing_line(client) == {"result": "there"}


def test_abandoned_or_used_id_never_starts(harpd: Harpd) -> None:
    call = str(uuid.uuid4())
    with harpd.attach(call) as client:
        assert error_type(client) == "no_such_call"
    with harpd.start_resumable("echo", id=call) as client:
        assert error_type(client) == "call_refused"
    with harpd.start_resumable("echo") as client:
        client.message()
        closing_line(client)
    with harpd.start_resumable("echo", id=client.call) as client:
        assert error_type(client) == "call_refused"


def test_start_for_another_instance_is_rejected(harpd: Harpd) -> None:
    with harpd.start_resumable("echo", instance="0123456789abcdef") as client:
        (rejection,) = client.lines()
    assert rejection["error"]["type"] == "wrong_instance"
    assert rejection["error"]["data"] == {"instance": harpd.status()["instance"]}
    assert client.call not in harpd.list_calls()["calls"]


@pytest.mark.parametrize("what", ["start", "attach", "list"])
def test_request_without_password_is_rejected(harpd: Harpd, what: str) -> None:
    wrong = {"user": harpd.user, "password": "wrong"}
    request: dict[str, Any] = {"harp": 1, "calls": OWNER}
    if what == "attach":
        request = {"harp": 1, "attach": str(uuid.uuid4()), "owner": OWNER, "secret": SECRET, "since": 0}
    if what == "start":
        terms: dict[str, Any] = {"id": str(uuid.uuid4()), "owner": OWNER, "secret": SECRET, "instance": "w"}
        terms |= dict.fromkeys(("disconnect_timeout", "result_ttl", "timeout", "max_exec_time"), 60)
        request = harpd.request("echo", [], call=terms)
    with harpd.connect() as client:
        client.send({**request, "auth": wrong})
        assert client.lines() == [failed("auth_error", "unknown user or wrong password")]
    with harpd.connect() as client:
        client.send(request | ({"auth": harpd.auth} if what != "start" else {"call": {**terms, "result_ttl": 0}}))
        answer = client.message()
        assert (what == "list") == ("calls" in answer)


@pytest.mark.parametrize(
    "data", [b"garbage\n", b"{}\n", b'{"release":true}\n', b'{"ack":5}\n', b'{"stop":1}\n', b'{"heartbeat":1e9}\n']
)
def test_invalid_command_closes_only_the_connection(harpd: Harpd, tmp_path: Path, data: bytes) -> None:
    with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
        client.message()
        client.send(data)
        assert client.lines() == []  # no closing line: the call continues
    with harpd.attach(client.call) as again:
        again.message()
        (tmp_path / "go").touch()
        assert closing_line(again) == {"result": "there"}


@pytest.mark.parametrize("data", [b"x" * 5000, b'{"heartbeat":0' + b" " * 5000 + b"}\n"])
def test_command_too_long_closes_only_the_connection(harpd: Harpd, tmp_path: Path, data: bytes) -> None:
    with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
        client.message()
        client.send(data)
        assert client.lines() == []
        harpd.wait_event("invalid command from client; detached", call=client.call)
    with harpd.attach(client.call) as again:
        again.message()
        (tmp_path / "go").touch()
        assert closing_line(again) == {"result": "there"}


def test_client_half_closed_is_detached(harpd: Harpd, tmp_path: Path) -> None:
    with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
        client.message()
        client.socket.shutdown(socket.SHUT_WR)
    with harpd.attach(client.call) as again:
        again.message()
        (tmp_path / "go").touch()
        assert closing_line(again) == {"result": "there"}


def test_client_reset_before_acknowledgement_is_detached(harpd: Harpd, tmp_path: Path) -> None:
    client = harpd.start_resumable("wait_for", str(tmp_path / "go"))
    wait_until(lambda: client.call in harpd.list_calls()["calls"], DEADLINE, "the call")
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    with harpd.attach(client.call) as again:
        again.message()
        (tmp_path / "go").touch()
        assert closing_line(again) == {"result": "there"}


def test_client_that_does_not_read_loses_no_record(harpd: Harpd) -> None:
    many = 8  # records, longer in total than the unacknowledged data and the socket buffers
    with harpd.start_resumable("long_records", many, 8_000_000) as client:
        client.message()
        harpd.wait_event("client does not read")
        numbers: list[int] = []
        while len(numbers) < many:
            with harpd.attach(client.call, len(numbers)) as again:
                again.message()
                found = records(again, 1)
                numbers += [number for number, _ in found]
                again.send({"ack": len(numbers)})
                again.send({"heartbeat": 0})
                while b'"heartbeat"' not in again.line():
                    pass
        assert numbers == list(range(many))
    with harpd.attach(client.call, many) as again:
        again.message()
        assert closing_line(again) == {"result": None}


def test_log_contains_no_owner_and_no_secret(harpd: Harpd) -> None:
    with harpd.start_resumable("echo") as client:
        client.message()
        closing_line(client)
    with harpd.attach(client.call) as again:
        again.lines()
    harpd.list_calls()
    harpd.wait_event("call accepted", call=client.call)
    harpd.wait_event("attach accepted", call=client.call)
    assert not [line for line in harpd.log_lines() if OWNER in line or SECRET in line]


def test_supervisor_death_sends_no_error_for_its_calls(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES) as harpd:
        with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
            old = client.message()["call"]["instance"]
            os.kill(harpd.supervisor, signal.SIGKILL)
            assert client.lines() == []
        with harpd.attach(client.call) as again:  # waits for the next supervisor
            terms = again.message()["call"]
            assert terms["instance"] != old
            assert closing_line(again)["error"]["type"] == "call_died"
        names = {path.name for path in harpd.runtime_directory.glob("supervisor-*")}
        assert names == {f"supervisor-{terms['instance']}"}  # the socket of the dead supervisor is removed
        with harpd.start_resumable("echo", instance=old) as client:
            assert error_type(client) == "wrong_instance"


def test_attach_without_supervisor_gets_no_final_answer(tmp_path: Path) -> None:
    with Harpd(tmp_path / "harpd", PROCEDURES) as harpd:
        harpd.procedures_file.write_text("raise RuntimeError('broken on purpose')\n")
        os.kill(harpd.supervisor, signal.SIGKILL)
        harpd.wait_event("cannot start supervisor; retrying")
        with harpd.attach(str(uuid.uuid4())) as client:
            assert error_type(client) == "procedure_loading_error"
        assert harpd.list_calls()["error"]["type"] == "procedure_loading_error"


def test_full_stop_ends_resumable_calls_with_shutdown(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", PROCEDURES)
    harpd.start()
    with harpd.start_resumable("wait_for", str(tmp_path / "go")) as client:
        client.message()
        os.kill(harpd.pid, signal.SIGTERM)
        lines = client.lines()
        assert lines[-1]["error"]["type"] == "shutdown"
        assert [line for line in lines if "stop_report" in line]
    assert harpd.stop() == 0
    assert not harpd.faults()


async def test_bound_call_at_a_retiring_supervisor_uses_the_next(tmp_path: Path) -> None:
    harpd = Harpd(tmp_path / "harpd", "", services=True)
    directory = harpd.runtime_directory
    directory.mkdir()
    asked: list[str] = []

    def old(request: dict[str, Any]) -> bytes:
        asked.append(f"old {request['procedure']}")
        if request["procedure"] == "first":
            make_current(directory, "b")
        return json.dumps(failed("shutdown", "harpd is being stopped"), separators=(",", ":")).encode() + b"\n"

    def new(request: dict[str, Any]) -> bytes:
        asked.append(f"new {request['procedure']}")
        return b'{"harp":1,"stream_result":false}\n{"result":1}\n'

    async with supervisor(directory, "a", old), supervisor(directory, "b", new):
        make_current(directory, "a")
        await asyncio.to_thread(harpd.start_frontend)
        assert await asyncio.to_thread(harpd.call, "zeroth") == [failed("shutdown", "harpd is being stopped")]
        assert await asyncio.to_thread(harpd.call, "first") == [{"harp": 1, "stream_result": False}, {"result": 1}]
        assert asked == ["old zeroth", "old first", "new first"]
        assert await asyncio.to_thread(harpd.stop_frontend) == 0
    assert not harpd.faults()
