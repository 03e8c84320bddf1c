"""Stop reports about processes that fork faster than scans, hide from them, or cannot be killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harpd.processes.cookie import cookie_for
from harpd.processes.process_tree import take_snapshot
from harpd.supervisor.state_files import Purpose
from support.cgroups import freezer, own_cgroup
from support.deadline import wait_until
from support.hopper import HOP, group_lives
from support.state_entries import read_entries
from support.supervisor import DEADLINE, Channel, Supervisor

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PROCEDURES = (
    HOP
    + f"\nHOP = {HOP!r}\n"
    + '''
import ctypes, platform, sys, threading, time
from harpd.proc import procedure

@procedure
def wait():
    while True:
        time.sleep(3600)

def begin_to_hop(going, session):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hop(going, session)

@procedure
def hops(going, session):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begin_to_hop(going, session)
    while True:
        time.sleep(3600)

@procedure
def hops_and_dies(going, session):
    begin_to_hop(going, session)
    os._exit(7)

@procedure
def loses_a_hopper(going, begun):
    """Hide from scans: change parent, session and environment."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            code = HOP + "import sys; open(sys.argv[2], 'w'); hop(sys.argv[1], True)"
            os.execve(sys.executable, [sys.executable, "-c", code, going, begun], {})
        os._exit(0)
    while not os.path.exists(begun):
        time.sleep(0.01)
    os._exit(7)

@procedure
def leaves_one_with_a_false_mark(path):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
            os.execve(sys.executable, [sys.executable, "-c", code, path], {"HARPD_CALL": "made-up"})
        os._exit(0)
    while not os.path.exists(path) or not open(path).read():
        time.sleep(0.01)
    os._exit(7)

@procedure
def leaves_one_without_a_head(path):
    """Leave a process in its own session whose first thread has ended."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            threading.Thread(target=time.sleep, args=(3600,)).start()
            with open(path, "w") as file:
                file.write(str(os.getpid()))
            number = {"x86_64": 60}.get(platform.machine(), 93)
            ctypes.CDLL(None).syscall(number, 0)
        os._exit(0)
    while not os.path.exists(path) or not open(path).read():
        time.sleep(0.01)
    os._exit(7)
'''
)


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    with Supervisor(tmp_path_factory.mktemp("stopping"), PROCEDURES, kill_grace=0.3) as supervisor:
        yield supervisor


@pytest.fixture
def going(tmp_path: Path) -> Iterator[Path]:
    """The file whose removal ends the fork loop; that of its directory does so, too."""
    file = tmp_path / "going"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


def started(supervisor: Supervisor, call: Channel) -> int:
    """Wait until the call's process exists; return its pid."""
    call.line()
    return int(supervisor.wait_event("call started", call=call.id)["pid"])


def read_stop_report(call: Channel) -> dict[str, Any]:
    """Read to the closing line; return the last stop report."""
    stop_report: dict[str, Any] = {}
    while "exit_info" not in (line := call.line()):
        stop_report = line["stop_report"]
    call.line()
    return stop_report


def lives(call_id: str) -> bool:
    """Return whether a process with the call's cookie runs."""
    return any(process.alive and cookie_for(call_id) in process.cookies for process in take_snapshot().values())


def done(call: Channel) -> None:
    call.send({"release": True})
    assert call.lines() == []


def test_stop_fork_loop(supervisor: Supervisor, going: Path) -> None:
    with supervisor.call_resumable("hops", str(going), False) as call:
        pid = started(supervisor, call)
        wait_until(lambda: any(p.group == pid != p.pid for p in take_snapshot().values()), DEADLINE, "the first hop")
        call.send({"stop": {"why": "cancelled"}})
        stop_report = read_stop_report(call)
        assert not group_lives(pid)
        assert (stop_report["survivors"], stop_report["surviving"], stop_report["complete"]) == ([], 0, True)
        done(call)


def test_stop_fork_loop_after_main_death(supervisor: Supervisor, going: Path) -> None:
    with supervisor.call_resumable("hops_and_dies", str(going), False) as call:
        pid = started(supervisor, call)
        stop_report = read_stop_report(call)
        assert not group_lives(pid)
        assert (stop_report["survivors"], stop_report["complete"]) == ([], True)
        done(call)


def test_stop_unstoppable_fork_loop_reports_survivors(supervisor: Supervisor, going: Path) -> None:
    """It changes its session each time: without a cgroup, only chance ends it."""
    with supervisor.call_resumable("hops_and_dies", str(going), True) as call:
        started(supervisor, call)
        stop_report = read_stop_report(call)
        assert stop_report["survivors"] or not stop_report["complete"] or not lives(call.id)
        going.unlink()
        wait_until(lambda: not lives(call.id), DEADLINE, "its end")
        wait_until(lambda: supervisor.status()["calls"] == 0, DEADLINE, "the call gone")


def test_stop_with_unknown_cookie_is_incomplete(supervisor: Supervisor, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with supervisor.call_resumable("leaves_one_with_a_false_mark", str(path)) as call:
        started(supervisor, call)
        stop_report = read_stop_report(call)
        os.kill(int(path.read_text()), signal.SIGKILL)
        assert (stop_report["survivors"], stop_report["complete"]) == ([], False)
        done(call)


def test_stop_with_invisible_process_is_incomplete(supervisor: Supervisor, going: Path, tmp_path: Path) -> None:
    with supervisor.call_resumable("loses_a_hopper", str(going), str(tmp_path / "begun")) as call:
        started(supervisor, call)
        stop_report = read_stop_report(call)
        assert (stop_report["survivors"], stop_report["complete"]) == ([], False)
        done(call)


@pytest.mark.root
@ROOT
def test_stop_fork_loop_in_cgroup(tmp_path: Path, going: Path) -> None:
    with (
        own_cgroup() as place,
        Supervisor(tmp_path / "supervisor", PROCEDURES, kill_grace=0.3, cgroup=str(place)) as supervisor,
    ):
        for procedure in ("hops", "hops_and_dies"):
            with supervisor.call_resumable(procedure, str(going), True) as call:
                started(supervisor, call)
                wait_until(lambda: lives(call.id), DEADLINE, "the first hop")
                call.send({"stop": {"why": "cancelled"}})
                stop_report = read_stop_report(call)
                assert not lives(call.id)
                assert (stop_report["survivors"], stop_report["complete"]) == ([], True)
                done(call)
        assert not list(place.glob("call-*"))


def test_stop_process_without_first_thread(supervisor: Supervisor, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with supervisor.call_resumable("leaves_one_without_a_head", str(path)) as call:
        started(supervisor, call)
        stop_report = read_stop_report(call)
        pid = int(path.read_text())
        assert pid not in take_snapshot()
        assert pid in {one["pid"] for one in stop_report["processes"]}
        assert (stop_report["survivors"], stop_report["complete"]) == ([], True)
        done(call)


def test_stop_unreaped_main_process_survives(supervisor: Supervisor) -> None:
    with supervisor.call_resumable("wait") as call:
        pid = started(supervisor, call)
        zygote = supervisor.status()["zygote"]
        os.kill(zygote, signal.SIGSTOP)
        try:
            call.send({"stop": {"why": "cancelled"}})
            stop_report = read_stop_report(call)
            assert [one["pid"] for one in stop_report["survivors"]] == [pid]
            assert not stop_report["complete"]
        finally:
            os.kill(zygote, signal.SIGCONT)
        stop_report = call.line()["stop_report"]
        assert (stop_report["survivors"], stop_report["complete"]) == ([], True)
        done(call)


@pytest.mark.root
@ROOT
def test_orphan_survivors_and_their_end_are_reported(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "supervisor", PROCEDURES).start()
    with freezer() as cold:
        with supervisor.call_resumable("wait") as call:
            pid = started(supervisor, call)
            cold.freeze(pid)
            supervisor.kill()
        with supervisor, supervisor.attach(call.id) as again:
            again.line()
            assert [one["pid"] for one in read_stop_report(again)["survivors"]] == [pid]
            cold.thaw()
            assert again.line()["stop_report"]["survivors"] == []
            done(again)


@pytest.mark.root
@ROOT
def test_survivors_of_discarded_call_stay_recorded(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "supervisor", PROCEDURES, kill_grace=0.1).start()
    with freezer() as cold:
        with supervisor.call_resumable("wait") as call:
            pid = started(supervisor, call)
            cold.freeze(pid)
            call.send({"stop": {"why": "cancelled"}})
            assert [one["pid"] for one in read_stop_report(call)["survivors"]] == [pid]
            done(call)
        expected = {call.id: Purpose.ONLY_STOP}
        wait_until(lambda: read_entries(supervisor.runtime_directory) == expected, DEADLINE, "the entry")
        supervisor.kill()
        with supervisor:
            assert supervisor.list_calls() == []
            cold.thaw()
            wait_until(lambda: not read_entries(supervisor.runtime_directory), DEADLINE, "the entry gone")


def test_shutdown_kills_calls_whose_termination_is_late(tmp_path: Path, going: Path) -> None:
    supervisor = Supervisor(tmp_path / "supervisor", PROCEDURES, kill_grace=DEADLINE).start()
    with supervisor.call_resumable("hops", str(going), False) as call:
        group = os.getpgid(started(supervisor, call))
        wait_until(lambda: members(group) > 1, DEADLINE, "the process that hops")
        call.send({"stop": {"why": "cancelled"}})
        supervisor.wait_event("stopping call", call=call.id)
        assert "error" not in supervisor.reload(kill_grace=0.1)
        assert supervisor.control("shutdown") == {"ok": True}
        assert supervisor.wait() == 0
        assert not group_lives(group)


def members(group: int) -> int:
    return sum(process.group == group and process.alive for process in take_snapshot().values())
