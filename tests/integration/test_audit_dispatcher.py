"""The audit file of harpcallerd: what it has, that no reply comes before its entry, and that its chain holds."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import harp
from harp_daemon.audit_file import Position, hash_line, read_head
from harp_daemon.audit_reading import verify
from support.audit_entries import read_audit, wait_audit
from support.deadline import wait_until
from support.harpcallerd import Harpcallerd
from support.procedures_file import PROCEDURES
from support.system import System, running

RULES = """\
[[rule]]
who = ["token:shop"]
allow = ["call", "read", "cancel"]
procedures = ["same"]

[[rule]]
who = ["anonymous@*"]
allow = ["call", "read"]
procedures = ["same"]
"""


def entries(dispatcher: Harpcallerd, **wanted: Any) -> list[dict[str, Any]]:
    return read_audit(dispatcher.directory / "audit.jsonl", **wanted)


def wait_ends(dispatcher: Harpcallerd, count: int, **wanted: Any) -> None:
    assert len(wait_audit(dispatcher.directory / "audit.jsonl", count, action="end", **wanted)) == count


def assert_complete(dispatcher: Harpcallerd) -> None:
    done = dispatcher.control("audit", "verify", f"--config={dispatcher.config_file}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("complete: entries 1 to "), done.stdout


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("audit")
    (directory / "access.toml").write_text(RULES)
    settings = {"audit_file": "audit.jsonl", "access_file": str(directory / "access.toml"), "tokens_file": "tokens"}
    with running(directory, PROCEDURES, dispatcher=settings) as system:
        yield system


def test_audit_call_and_end_answer_who_did_it(system: System) -> None:
    call = system.rpc.web01.same("secret-of-1234")
    assert call.get() == "secret-of-1234"
    wait_ends(system.dispatcher, 1, job=call.id())
    found = system.dispatcher.control(
        *("audit", "search", "--host=web01", "--procedure=sa*", f"--job={call.id()}", "--json"),
        f"--config={system.dispatcher.config_file}",
    )
    called, ended = map(json.loads, found.stdout.splitlines())
    assert called["principal"].startswith("anonymous@127.0.0.1:")
    expected = {"decision": "allowed", "rule": 2, "procedure": "same"}
    assert called.items() >= expected.items()
    assert len(called["arguments"]) == 32
    assert ended.items() >= {"action": "end", "end": "returned", "owner": called["principal"]}.items()
    assert "secret-of-1234" not in (system.dispatcher.directory / "audit.jsonl").read_text()
    assert_complete(system.dispatcher)


def test_audit_many_calls_have_an_entry_each(system: System) -> None:
    calls = harp.HarpCaller("127.0.0.1", system.dispatcher.port, keep_alive=False)
    jobs = calls.submit_many([harp.Call("web01", "same", [number]) for number in range(20)])
    assert [job.get() for job in jobs] == [*range(20)]
    ids = {job.id() for job in jobs}
    assert {entry["job"] for entry in entries(system.dispatcher, action="call") if entry["job"] in ids} == ids


def test_audit_denied_call_of_legacy_client_has_entry(system: System) -> None:
    with pytest.raises(harp.HarpException):
        system.rpc.web01.restart().get()
    [denied] = entries(system.dispatcher, action="call", decision="denied", procedure="restart")
    assert denied["host"] == "web01"


def test_audit_denied_cancel_and_unknown_token_have_entries(system: System) -> None:
    call = system.rpc.web01.same("x")
    call.get()
    assert not call.cancel()
    assert [entry["job"] for entry in entries(system.dispatcher, action="cancel", decision="denied")] == [call.id()]
    line = b'{"harpcaller":1,"get_status":"%s","auth":{"token":"harp_shop_%s"}}\n' % (call.id().encode(), b"0" * 64)
    before = len(entries(system.dispatcher, action="authenticate"))
    assert b"auth_error" in system.transcript(line)[0]
    assert entries(system.dispatcher, action="authenticate")[before]["token"] == "shop"


def test_audit_of_administration_has_commands(system: System) -> None:
    dispatcher = system.dispatcher
    token = dispatcher.control("token", "add", "shop", "--role=web").stdout.strip()
    assert dispatcher.control("reload").returncode == 0
    assert dispatcher.control("token", "revoke", "shop").returncode == 0
    assert dispatcher.control("prune-jobs", "--age=30").returncode == 0
    [added] = entries(dispatcher, action="token-add")
    assert added.items() >= {"principal": "administrator", "target": "shop", "roles": ["web"]}.items()
    assert token.split("_")[-1] not in (dispatcher.directory / "audit.jsonl").read_text()
    for action in ("reload", "token-revoke", "prune-jobs"):
        assert len(entries(dispatcher, action=action)) == 1, action
    assert len(wait_audit(dispatcher.directory / "audit.jsonl", 1, action="reloaded")) == 1
    [started] = entries(dispatcher, action="start")
    assert {"version", "config_sha256", "access_sha256"} <= started.keys()


def test_audit_denials_of_one_peer_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "access.toml").write_text(RULES)
    with Harpcallerd(tmp_path, settings={"audit_file": "audit.jsonl", "access_file": "access.toml"}) as dispatcher:
        for number in range(60):
            with socket.create_connection(("127.0.0.1", dispatcher.port), 10) as connection:
                connection.sendall(b'{"harpcaller":1,"cancel":"job-%d"}\n' % number)
                assert connection.recv(100) == b'{"cancelled":false}\n'
        assert len(entries(dispatcher, action="cancel")) == 10
    [shared] = [entry for entry in entries(dispatcher, action="cancel", decision="denied") if "count" in entry]
    assert shared["count"] == 50


def test_audit_follows_logrotate(system: System) -> None:
    file = system.dispatcher.directory / "audit.jsonl"
    rotated = file.with_name("audit.jsonl.1")
    assert system.rpc.web01.same(2).get() == 2
    file.rename(rotated)
    assert system.dispatcher.control("reopen-logs").returncode == 0
    assert system.rpc.web01.same(3).get() == 3
    assert entries(system.dispatcher, action="audit-file")[0]["previous_file"] == "audit.jsonl.1"
    assert_complete(system.dispatcher)
    rotated.write_bytes(rotated.read_bytes().replace(b"allowed", b"denied!", 1))
    done = system.dispatcher.control("audit", "verify", f"--config={system.dispatcher.config_file}")
    assert done.returncode == 1
    assert "audit.jsonl.1:" in done.stderr
    assert "was changed" in done.stderr


@pytest.mark.parametrize("seed", range(3))
def test_audit_kill_loses_no_entry_of_a_reply(tmp_path: Path, seed: int) -> None:
    """Clients submit and cancel jobs; the dispatcher is killed at random moments. Each reply has its entry."""
    random = Random(seed)
    replies: list[tuple[str, str]] = []
    stopping = threading.Event()

    def ask(number: int) -> None:
        while not stopping.is_set():
            try:
                with socket.create_connection(("127.0.0.1", dispatcher.port), 10) as connection:
                    file = connection.makefile("rwb")
                    file.write(b'{"harpcaller":1,"host":"web01","procedure":"same","arguments":[%d]}\n' % number)
                    file.flush()
                    job = json.loads(file.readline())["job_id"]
                replies.append(("call", job))
                if number % 2:
                    with socket.create_connection(("127.0.0.1", dispatcher.port), 10) as connection:
                        file = connection.makefile("rwb")
                        file.write(b'{"harpcaller":1,"cancel":"%s"}\n' % job.encode())
                        file.flush()
                        if json.loads(file.readline())["cancelled"]:
                            replies.append(("cancel", job))
            except (OSError, ValueError, KeyError):
                stopping.wait(0.02)

    dispatcher = Harpcallerd(tmp_path, settings={"audit_file": "audit.jsonl", "audit_file_bytes": 20_000})
    with dispatcher:
        clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for client in clients:
            client.start()
        try:
            for _ in range(4):
                count = len(replies)
                wait_until(lambda count=count: len(replies) > count + 20, what="replies")  # type: ignore[misc]
                stopping.wait(random.uniform(0, 0.05))
                dispatcher.restart(kill=True)
        finally:
            stopping.set()
            for client in clients:
                client.join()
        ended = {job["job"] for job in dispatcher.listed("list", "--all") if job["time"]["end"] is not None}
    lines = [line for file in tmp_path.glob("audit.jsonl*") for line in file.read_bytes().splitlines()]
    recorded = {(entry["action"], entry.get("job")) for entry in map(json.loads, lines)}
    assert len(replies) > 80
    assert [reply for reply in replies if reply not in recorded] == []
    assert len(ended) > 40
    assert [job for job in ended if ("end", job) not in recorded] == []
    report = verify(tmp_path / "audit.jsonl")
    assert report.problems == []
    assert report.first == 1


def test_audit_after_power_failure_has_the_stored_calls_again(tmp_path: Path) -> None:
    """The audit file lacks what the disk did not have yet; the store has the jobs."""
    (tmp_path / "access.toml").write_text(RULES)
    settings = {"audit_file": "audit.jsonl", "access_file": "access.toml"}
    file, head = tmp_path / "audit.jsonl", tmp_path / ".audit.jsonl.head"
    with Harpcallerd(tmp_path, settings=settings) as dispatcher:
        dispatcher.submit("web01", "same", 0)
        wait_ends(dispatcher, 1)
        stored = file.read_bytes()
        last = Position(len(stored.splitlines()), hash_line(stored.splitlines()[-1]))
        wait_until(lambda: read_head(file) == last, what="the wait for the disk")
        old_head = head.read_bytes()
        for number in range(1, 6):
            dispatcher.submit("web01", "same", number)
        dispatcher.submit("web01", "drop")
        wait_ends(dispatcher, 7)
        before = {entry["job"]: entry for entry in entries(dispatcher, action="call")}
        dispatcher.kill()
        file.write_bytes(stored + b'{"entry":')
        head.write_bytes(old_head)
        dispatcher.start()
        wait_ends(dispatcher, 7)
        after = {entry["job"]: entry for entry in entries(dispatcher, action="call")}
        assert [entry["decision"] for entry in after.values()] == [*["allowed"] * 6, "denied"]
        assert [entry.get("recovered") for entry in after.values()] == [None, *[True] * 6]
        for name in ("principal", "host", "procedure", "arguments"):
            assert {job: entry[name] for job, entry in after.items()} == {j: entry[name] for j, entry in before.items()}
        assert_complete(dispatcher)


def test_audit_without_file_creates_none(tmp_path: Path) -> None:
    with Harpcallerd(tmp_path) as dispatcher:
        done = dispatcher.control("audit", "verify", f"--config={dispatcher.config_file}")
        assert (done.returncode, "not set" in done.stderr) == (1, True)
    assert not [*tmp_path.glob("*audit*")]
