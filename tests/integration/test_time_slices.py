"""The daemons have short time slices, the processes of calls have the usual ones."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import harp
from harp_daemon import time_slices
from support.harpcallerd import Harpcallerd
from support.harpd import Harpd

PROCEDURES = """
import os, time
from harpd.proc import streaming_procedure

@streaming_procedure
def pids():
    yield os.getpid()
    time.sleep(60)
"""
#: The number of sched_getattr(2), which fills the same structure.
GET = {"x86_64": 315, "aarch64": 275}.get(os.uname().machine)
STRUCTURE = struct.Struct("IIQiIQQQ")
SHORT = 300_000
#: Runs statements in another process; returns its pid.
Run = Callable[..., int]
PROGRAM = """
import os, sys, threading
from harp_daemon.time_slices import take_short_slices, take_usual_slices
{}
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def slice_of(thread: int) -> int:
    """Return the nanoseconds of the slice of a thread; 0: the kernel does not tell."""
    buffer = ctypes.create_string_buffer(STRUCTURE.size)
    if GET is None or ctypes.CDLL(None).syscall(GET, thread, buffer, STRUCTURE.size, 0):
        return 0
    return int(STRUCTURE.unpack(buffer.raw)[5])


def slices_of(process: int) -> set[int]:
    return {slice_of(int(thread)) for thread in os.listdir(f"/proc/{process}/task")}


@pytest.fixture
def program() -> Iterator[Run]:
    """Run statements in another process; return its pid."""
    running: list[subprocess.Popen[str]] = []

    def run(*statements: str) -> int:
        command = [sys.executable, "-c", PROGRAM.format("\n".join(statements))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    yield run
    for process in running:
        process.communicate("")


@pytest.fixture
def needs_slices(program: Run) -> None:
    if slice_of(program("take_short_slices()")) != SHORT:
        pytest.skip("this kernel has no slices of programs: Linux 6.12 has")


@pytest.mark.usefixtures("needs_slices")
def test_daemons_have_short_slices_and_calls_have_not(tmp_path: Path) -> None:
    usual = slice_of(os.getpid())
    with Harpd(tmp_path / "harpd", PROCEDURES) as harpd:
        settings = {"ca_file": str(harpd.ca_file)}
        credentials = (harpd.user, harpd.password)
        with Harpcallerd(tmp_path / "dispatcher", {"web01": harpd.port}, credentials, settings) as dispatcher:
            job = harp.HarpCaller("127.0.0.1", dispatcher.port).web01.pids()
            worker = next(iter(job.follow(since=0)))
            assert slices_of(dispatcher.pid) == {SHORT}
            assert slices_of(harpd.pid) == {SHORT}
            assert slices_of(harpd.supervisor) == {SHORT}
            assert slices_of(harpd.zygote) == {usual}
            assert slices_of(worker) == {usual}
            job.cancel()


@pytest.mark.usefixtures("needs_slices")
def test_slices_keep_the_nice_value(program: Run) -> None:
    pid = program("os.nice(3)", "take_short_slices()")
    assert (slice_of(pid), os.getpriority(os.PRIO_PROCESS, pid)) == (SHORT, 3)
    assert slice_of(program("take_short_slices()", "take_usual_slices()")) != SHORT


def test_slices_keep_the_policy_of_the_administrator(program: Run) -> None:
    pid = program("os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))", "take_short_slices()")
    assert os.sched_getscheduler(pid) == os.SCHED_BATCH


def test_machine_without_slices_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = slice_of(os.getpid())
    monkeypatch.setattr(time_slices, "_SYSTEM_CALLS", {})
    time_slices.take_short_slices()
    assert slice_of(os.getpid()) == before
