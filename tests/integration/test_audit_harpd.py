"""The audit file of harpd: calls and their ends, denials, failed logins and commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from harp_daemon.audit_reading import verify
from support.audit_entries import read_audit, wait_audit
from support.deadline import wait_until
from support.harpd import Harpd
from support.procedures_file import PROCEDURES


def entries(harpd: Harpd, **wanted: Any) -> list[dict[str, Any]]:
    return read_audit(harpd.directory / "audit.jsonl", **wanted)


@pytest.fixture
def harpd(tmp_path: Path) -> Iterator[Harpd]:
    rights = {"tester": {"procedures": ["same", "sleep", "echo", "wait_for"]}}
    configuration = {"audit_file": str(tmp_path / "audit.jsonl"), "rights": rights}
    with Harpd(tmp_path, PROCEDURES, configuration) as harpd:
        yield harpd


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "harpd.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_audit_harpd_records_calls_and_ends(harpd: Harpd) -> None:
    assert harpd.call("same", "secret-1234")[-1] == {"result": "secret-1234"}
    [started] = entries(harpd, action="call")
    expected = {"principal": "user:tester", "decision": "allowed", "procedure": "same"}
    assert started.items() >= expected.items()
    assert started["peer"].startswith("127.0.0.1:")
    assert "secret-1234" not in (harpd.directory / "audit.jsonl").read_text()
    [ended] = entries(harpd, action="end", job=started["job"])
    assert ended["end"] == "result"


def test_audit_harpd_records_who_stopped_a_call(harpd: Harpd, tmp_path: Path) -> None:
    with harpd.start_resumable("wait_for", str(tmp_path / "never")) as client:
        client.message()
        client.send({"stop": {"why": "cancelled", "by": "token:alice"}})
        client.closing_line()
    [ended] = entries(harpd, action="end")
    assert ended.items() >= {"end": "cancelled", "by": "token:alice"}.items()


def test_audit_harpd_records_denials_and_failed_logins(harpd: Harpd) -> None:
    harpd.call("fail", "x")
    [denied] = entries(harpd, action="call", decision="denied")
    assert denied["procedure"] == "fail"
    for _ in range(3):
        harpd.request("same", [1], auth={"user": "mallory", "password": "guess"})
        with harpd.connect() as client:
            client.send(harpd.request("same", [1], auth={"user": "mallory", "password": "guess"}))
            client.lines()
    failed = wait_audit(harpd.directory / "audit.jsonl", 1, action="authenticate")
    assert failed[0].items() >= {"principal": "user:mallory", "reporter": "frontend", "peer": "127.0.0.1"}.items()


def test_audit_harpd_survives_kill_and_reload_with_one_chain(harpd: Harpd) -> None:
    for number in range(5):
        harpd.call("same", number)
    harpd.reload()
    for number in range(5):
        harpd.call("same", number)
    path = harpd.directory / "audit.jsonl"
    recorded = len(entries(harpd, action="call"))
    harpd.kill()
    assert recorded == 10
    assert verify(path).problems == []
    harpd.start()
    harpd.call("same", 1)
    assert len(entries(harpd, action="call")) == 11
    done = run("audit", "verify", f"--config={harpd.config_file}")
    assert (done.returncode, done.stdout[:9]) == (0, "complete:"), done.stderr
    found = run("audit", "search", "--procedure=same", "--action=call", f"--config={harpd.config_file}")
    assert len(found.stdout.splitlines()) == 11
    path.write_bytes(path.read_bytes().replace(b'"user:tester"', b'"user:nobody"', 1))
    done = run("audit", "verify", f"--file={path}")
    assert (done.returncode, "was changed" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("missing/audit.jsonl", "missing: No such file"),
        ("link", "not a regular file"),
        ("file/audit.jsonl", "Not a dir"),
    ],
)
def test_audit_file_that_cannot_be_used_is_an_error_of_the_check(tmp_path: Path, where: str, reason: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    harpd = Harpd(tmp_path, PROCEDURES, {"audit_file": str(tmp_path / where)})
    checked = subprocess.run(harpd.command("--test"), capture_output=True, text=True, check=False)
    assert checked.returncode == 1
    assert "audit_file: " in checked.stderr
    assert reason in checked.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_audit_harpd_has_each_call_answered_before_a_kill(harpd: Harpd) -> None:
    """Eight clients call without pause; the supervisor is killed in the midst of that, three times."""
    answered: list[int] = []
    stop = threading.Event()

    def call_often(first: int) -> None:
        number = first
        while not stop.is_set():
            with suppress(OSError, ValueError, AssertionError, IndexError):  # the supervisor is dead
                if harpd.call("same", number)[-1] == {"result": number}:
                    answered.append(number)
            number += 8

    threads = [threading.Thread(target=call_often, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            least = len(answered) + 40
            wait_until(lambda least=least: len(answered) >= least, what="some calls")  # type: ignore[misc]
            os.kill(harpd.supervisor, signal.SIGKILL)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    path = harpd.directory / "audit.jsonl"
    wait_until(lambda: harpd.call("same", -1)[-1] == {"result": -1}, what="the next supervisor")
    assert verify(path).problems == []
    key = (harpd.directory / ".audit.jsonl.key").read_bytes()
    jobs = {entry["arguments"]: entry["job"] for entry in entries(harpd, action="call")}
    assert [number for number in answered if digest(key, number) not in jobs] == []
    ended = {entry["job"] for entry in entries(harpd, action="end")}
    assert [number for number in answered if jobs[digest(key, number)] not in ended] == []


def test_audit_harpd_has_each_call_when_its_procedure_begins(tmp_path: Path) -> None:
    """Calls arrive together: the procedure of the first one begins while the supervisor starts the others."""
    procedures = """
from harpd.proc import procedure

@procedure
def read(number):
    return open(FILE).read()[-20_000:]
"""
    path = tmp_path / "audit.jsonl"
    with Harpd(tmp_path, procedures.replace("FILE", repr(str(path))), {"audit_file": str(path)}) as harpd:
        key = (tmp_path / ".audit.jsonl.key").read_bytes()
        barrier = threading.Barrier(8)

        def call_often(first: int) -> list[int]:
            """Return the calls that began without an entry."""
            missing = []
            for number in range(first, 160, 8):
                barrier.wait(60)
                if digest(key, number) not in harpd.call("read", number)[-1]["result"]:
                    missing.append(number)
            return missing

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(call_often, range(8))) == [[]] * 8


def digest(key: bytes, number: int) -> str:
    return blake2b(json.dumps([number]).encode(), key=key, digest_size=16).hexdigest()


def test_audit_harpd_records_logins_after_its_supervisor_is_back(tmp_path: Path) -> None:
    configuration = {"audit_file": str(tmp_path / "audit.jsonl")}
    with Harpd(tmp_path, PROCEDURES, configuration, services=True) as harpd:
        harpd.stop_launcher()
        for user in ("mallory", "mallory", "eve"):
            with harpd.connect() as client:
                client.send(harpd.request("same", [1], auth={"user": user, "password": "guess"}))
                client.lines()
        harpd.wait_event("cannot report failed logins")
        harpd.start_launcher()
        wanted = {"user:mallory": 2, "user:eve": 1}

        def count() -> dict[str, int]:
            counts: dict[str, int] = {}
            for entry in entries(harpd, action="authenticate"):
                counts[entry["principal"]] = counts.get(entry["principal"], 0) + entry.get("count", 1)
            return counts

        wait_until(lambda: count() == wanted, what="the reports")
