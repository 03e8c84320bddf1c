"""Names of any length, too many jobs, and records without end: what an attacker leaves in the log and in the store.

Each test plays the attacker against running daemons, and looks at the others: their requests, jobs and delays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.delays import Delays, measured
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd
from support.peers import PeerConnection
from support.procedures_file import PROCEDURES
from support.resumable_host import EXIT_INFO, acknowledgement, commands, ends, playing, stop_report

_SIZE = 15 * 1024 * 1024
#: Maximum seconds of processor time for which the event loop of a daemon may be busy at once, or wait for a processor
#: while a thread of the daemon has one: 0.015 s alone, and 0.08 s were seen beside three other tests.
_LONGEST_CPU = 0.2
_LINE, _NAME, _QUEUE = 4096, 255, 4096
UNKNOWN = "3f22e0d4-c8ed-11e5-8d66-001e8c140268"
#: Names that are too long, by what is expensive about them.
LONG = {
    "15 MiB": "x" * _SIZE,
    "one too many": "x" * (_NAME + 1),
    "escaped": "\udcff" * (_NAME + 1),
    "control characters": "\x1b" * (_NAME + 1),
}


@pytest.fixture(scope="module")
def delays() -> Iterator[Delays]:
    with measured() as delays:
        yield delays


@pytest.fixture(scope="module")
def harpd(delays: Delays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpd]:
    with Harpd(tmp_path_factory.mktemp("harpd"), PROCEDURES, services=True) as harpd:
        yield harpd


@pytest.fixture(scope="module")
def dispatcher(delays: Delays, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harpcallerd]:
    with Harpcallerd(tmp_path_factory.mktemp("dispatcher")) as dispatcher:
        yield dispatcher


def longest_line(log: Path, since: int) -> int:
    return max(map(len, log.read_bytes()[since:].split(b"\n")))


def stored_bytes(dispatcher: Harpcallerd) -> int:
    """Return the bytes of the store that are in use: its files have room for more."""
    return sum(path.stat().st_blocks * 512 for path in dispatcher.store_directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("member", ["procedure", "auth.user", "auth.password", "call.id", "call.owner", "calls"])
def test_long_name_to_harpd_is_refused(harpd: Harpd, delays: Delays, member: str, kind: str) -> None:
    terms = {"id": UNKNOWN, "owner": "o", "secret": "s", "disconnect_timeout": 60, "result_ttl": 1, "timeout": 60}
    call: dict[str, Any] = {**terms, "max_exec_time": 60, "instance": harpd.status()["instance"]}
    request: dict[str, Any] = harpd.request("echo", [1], auth={"user": "nobody", "password": "wrong"})
    name = LONG[kind] * (20 if member == "auth.password" and kind != "15 MiB" else 1)  # it may have 4096 characters
    match member.split("."):
        case ["auth", key]:
            request["auth"] = {"user": "nobody", "password": "wrong", key: name}
        case ["call", key]:
            request["call"] = {**call, key: name}
        case ["calls"]:
            request = {"harp": 1, "calls": name, "auth": request["auth"]}
        case [key]:
            request[key] = name
    delays.forget(harpd.pid)
    before = harpd.log_file.stat().st_size
    with harpd.connect() as client:
        client.socket.settimeout(60)
        client.send(request)
        reply = client.line()
    assert json.loads(reply)["error"]["type"] == "invalid_request", reply
    assert len(reply) < _LINE
    assert harpd.call("echo", 1)[-1] == {"result": [1]}
    assert harpd.log_file.stat().st_size - before < 16 * _LINE
    assert longest_line(harpd.log_file, before) <= _LINE
    assert delays.longest(harpd.pid) < _LONGEST_CPU


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("member", ["host", "procedure", "queue", "get_result", "many"])
def test_long_name_to_dispatcher_is_refused(dispatcher: Harpcallerd, delays: Delays, member: str, kind: str) -> None:
    call: dict[str, Any] = {"host": "nowhere", "procedure": "p", "arguments": []}
    name = LONG[kind] * (20 if member == "queue" and kind != "15 MiB" else 1)
    match member:
        case "queue":
            request = {**call, "queue": {"name": {"q": name}}}
        case "get_result":
            request = {"get_result": name}
        case "many":
            request = {"submit_many": [call, {**call, "procedure": name}]}
        case _:
            request = {**call, member: name}
    delays.forget(dispatcher.pid)
    before, jobs, stored = (
        dispatcher.log_file.stat().st_size,
        dispatcher.listed("list", "--all"),
        stored_bytes(dispatcher),
    )
    with dispatcher.connect() as client:
        client.send({"harpcaller": 1, **request})
        reply = client.line()
    assert json.loads(reply)["error"]["type"] == ("invalid_jobid" if member == "get_result" else "invalid_request")
    assert len(reply) < _LINE
    assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]
    assert dispatcher.listed("list", "--all") == jobs, "not one of many"
    assert stored_bytes(dispatcher) - stored < 64 * 1024
    assert dispatcher.log_file.stat().st_size - before < 16 * _LINE
    assert longest_line(dispatcher.log_file, before) <= _LINE
    assert delays.longest(dispatcher.pid) < _LONGEST_CPU


def test_longest_names_are_short_in_the_log(dispatcher: Harpcallerd) -> None:
    """Of characters that need most bytes when they are written."""
    name = "\udcff" * _NAME
    queue = {"q": "x" * (_QUEUE - len('{"q":""}'))}
    before = dispatcher.log_file.stat().st_size
    with dispatcher.connect() as client:
        call = {"harpcaller": 1, "host": name, "procedure": name, "arguments": [], "queue": {"name": queue}}
        client.send(json.dumps(call, separators=(",", ":")).encode() + b"\n")
        job = json.loads(client.line())["job_id"]
    dispatcher.ask(get_result=job)
    assert longest_line(dispatcher.log_file, before) <= _LINE


def test_request_with_too_many_jobs_stores_none(dispatcher: Harpcallerd, delays: Delays) -> None:
    jobs, stored = dispatcher.listed("list", "--all"), stored_bytes(dispatcher)
    calls = [{"host": "nowhere", "procedure": "p", "arguments": []}] * 200_000
    delays.forget(dispatcher.pid)
    with dispatcher.connect() as client:
        client.send(json.dumps({"harpcaller": 1, "submit_many": calls}).encode() + b"\n")
        [reply] = client.messages()
    assert reply["error"] == {"type": "invalid_request", "message": "submit_many[10000]: expected at most 10000 calls"}
    assert dispatcher.ask(cancel=UNKNOWN) == [{"cancelled": False}]
    assert dispatcher.listed("list", "--all") == jobs
    assert stored_bytes(dispatcher) - stored < 64 * 1024
    assert delays.longest(dispatcher.pid) < _LONGEST_CPU


def test_records_without_end_leave_store_and_time_to_others(tmp_path: Path, delays: Delays) -> None:
    """A host streams as much as it can; jobs of another host run meanwhile."""
    records = [line.encode() for line in (json.dumps({"stream": "x" * 50_000}) + "\n", '{"stream":0}\n')]

    def flood(conn: PeerConnection) -> None:
        with suppress(OSError):
            request = conn.expect()
            if "calls" in request:
                conn.reply({"harp": 1, "calls": [], "instance": "w1"})
                return
            conn.reply(acknowledgement(stream=True, records=request.get("since", 0)))
            for _ in range(400):
                conn.send(records[0], records[1] * 1000)
            assert next(command for command in commands(conn) if "ack" not in command)["stop"]["why"] == "limit"
            ends(conn, stop_report(), EXIT_INFO, {"error": {"type": "stopped", "message": ""}})

    def serve(conn: PeerConnection) -> None:
        if "calls" in conn.expect():
            conn.reply({"harp": 1, "calls": [], "instance": "w2"})
            return
        conn.reply(acknowledgement(instance="w2"))
        ends(conn, EXIT_INFO, {"result": 1})

    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    limit = 2_000_000
    settings = {"max_record_bytes": limit}
    with playing(tmp_path / "1", always=flood) as hostile, playing(tmp_path / "2", always=serve) as honest:
        hosts = {"web01": hostile.port, "web02": honest.port}
        with Harpcallerd(tmp_path / "dispatcher", hosts, settings=settings) as dispatcher:
            stored = stored_bytes(dispatcher)
            delays.forget(dispatcher.pid)
            flooding = [dispatcher.submit("web01", "p") for _ in range(3)]
            for _ in range(10):
                assert dispatcher.ask(get_result=dispatcher.submit("web02", "p")) == [{"result": 1}]
            for job in flooding:
                [end] = dispatcher.ask(get_result=job)
                assert end["error"]["type"] == "record_limit", end
            assert dispatcher.ask(get_result=dispatcher.submit("web02", "p")) == [{"result": 1}]
            # Each record is in the store, and in its log, which is copied into the file from time to time.
            assert stored_bytes(dispatcher) - stored < 3 * 2 * limit + 32 * 1024 * 1024
            assert delays.longest(dispatcher.pid) < 2 * _LONGEST_CPU
