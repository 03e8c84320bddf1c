"""Calls of another user are stopped like all others: by a cancel, by a limit, by the supervisor's death."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.deadline import wait_until
from support.supervisor import DEADLINE, PLAIN, Supervisor, is_running

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root"),
]

PROCEDURES = """
import os, signal, subprocess, time
from harpd.proc import procedure

def note(path, pid):
    with open(path, "a") as file:
        file.write(f"{pid}\\n")

def away(path, then):
    \"\"\"Fork twice, with a session of its own between.\"\"\"
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            note(path, os.getpid())
            then()
        os._exit(0)
    os.wait()

def sleep():
    while True:
        time.sleep(600)

def execute():
    os.execvp("sleep", ["sleep", "600"])

def resist(path):
    \"\"\"Four processes: this one, a child, and two that went away.\"\"\"
    for number in (signal.SIGTERM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)
    note(path, os.getpid())
    note(path, subprocess.Popen(["sleep", "600"]).pid)
    away(path, sleep)
    away(path, execute)
    sleep()

named = procedure(uid="nobody")(resist)
numbered = procedure(uid=54321)(resist)

@procedure(uid="54321")
def number_as_text():
    return [os.getresuid(), os.getresgid(), os.getgroups()]

named_limited = procedure(uid="nobody", timeout=0.5)(resist)
numbered_limited = procedure(uid=54321, timeout=0.5)(resist)
"""
MEMBERS = 4


@pytest.fixture
def notes() -> Iterator[Path]:
    """A file that every user can write to; the parents of a test's directory are closed to them."""
    with tempfile.TemporaryDirectory(prefix="harp-test-") as directory:
        os.chmod(directory, 0o777)
        yield Path(directory) / "notes"


def family(notes: Path, user: str) -> list[psutil.Process]:
    """Wait until all processes of the call exist; return them, the main process first."""
    wait_until(lambda: notes.exists() and len(notes.read_text().splitlines()) == MEMBERS, DEADLINE, "the processes")
    processes = [psutil.Process(int(pid)) for pid in notes.read_text().split()]
    uid = psutil.Process(processes[0].pid).uids()
    assert set(uid) == {54321 if user == "numbered" else 65534}
    return processes


@pytest.mark.parametrize("user", ["named", "numbered"])
@pytest.mark.parametrize("how", ["cancel", "limit", "death of the supervisor"])
def test_stop_call_of_other_user(tmp_path: Path, notes: Path, user: str, how: str) -> None:
    with Supervisor(tmp_path / "supervisor", PROCEDURES, kill_grace=0.5) as supervisor:
        name = f"{user}_limited" if how == "limit" else user
        with supervisor.call(name, [str(notes)]) as call:
            assert call.line() == PLAIN
            processes = family(notes, user)
            if how == "cancel":
                call.stop()
            elif how == "limit":
                (end,) = call.lines()
                assert end["error"]["type"] == "timeout"
            else:
                supervisor.kill()
                wait_until(lambda: not is_running(processes[0]), 2.0, "the death of the main process")
                supervisor.start()
        assert not [process for process in processes if is_running(process)]


def test_default_user_as_numeric_text(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "supervisor", PROCEDURES) as supervisor:
        assert supervisor.result("number_as_text") == [[54321] * 3, [65534] * 3, []]
