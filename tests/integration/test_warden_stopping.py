"""What a stop's receipt says of processes that outrun a look, hide from it, or can't die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harpd.processes.cookie import cookie_for
from harpd.processes.process_tree import take_snapshot
from support.cgroups import freezer, own_cgroup
from support.deadline import wait_until
from support.hopper import HOP, group_lives
from support.warden import DEADLINE, Conversation, Warden

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

def begin_to_hop(stop, session):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hop(stop, session)

@procedure
def hops(stop, session):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begin_to_hop(stop, session)
    while True:
        time.sleep(3600)

@procedure
def hops_and_dies(stop, session):
    begin_to_hop(stop, session)
    os._exit(7)

@procedure
def loses_a_hopper(stop, begun):
    """Nothing of the call is left in it: no parent, no session, no environment."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            code = HOP + "import sys; open(sys.argv[2], 'w'); hop(sys.argv[1], True)"
            os.execve(sys.executable, [sys.executable, "-c", code, stop, begun], {})
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
    """What is left in a session of its own, and has ended its first thread."""
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
def warden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warden]:
    with Warden(tmp_path_factory.mktemp("stopping"), PROCEDURES, kill_grace=0.3) as warden:
        yield warden


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[Path]:
    """The file that ends what hops."""
    yield tmp_path / "stop"
    (tmp_path / "stop").touch()


def started(warden: Warden, call: Conversation) -> int:
    """Wait until the call's process is there; return its pid."""
    call.line()
    return int(warden.wait_event("call started", call=call.id)["pid"])


def receipt_of(call: Conversation) -> dict[str, Any]:
    """Read to the closing line; return the last receipt."""
    receipt: dict[str, Any] = {}
    while "exit_info" not in (line := call.line()):
        receipt = line["stop_report"]
    call.line()
    return receipt


def lives(call_id: str) -> bool:
    """Whether anything runs that carries the call's mark."""
    return any(process.alive and cookie_for(call_id) in process.cookies for process in take_snapshot().values())


def done(call: Conversation) -> None:
    call.send({"release": True})
    assert call.lines() == []


def test_what_forks_without_pause_is_ended(warden: Warden, stop: Path) -> None:
    with warden.keep("hops", str(stop), False) as call:
        pid = started(warden, call)
        wait_until(lambda: any(p.group == pid != p.pid for p in take_snapshot().values()), DEADLINE, "the first hop")
        call.send({"stop": {"why": "cancelled"}})
        receipt = receipt_of(call)
        assert not group_lives(pid)
        assert (receipt["survivors"], receipt["surviving"], receipt["complete"]) == ([], 0, True)
        done(call)


def test_what_forks_without_pause_is_ended_when_the_main_process_has_died(warden: Warden, stop: Path) -> None:
    with warden.keep("hops_and_dies", str(stop), False) as call:
        pid = started(warden, call)
        receipt = receipt_of(call)
        assert not group_lives(pid)
        assert (receipt["survivors"], receipt["complete"]) == ([], True)
        done(call)


def test_what_outruns_every_signal_is_told(warden: Warden, stop: Path) -> None:
    """It is in another session each time; without a cgroup nothing but luck ends it."""
    with warden.keep("hops_and_dies", str(stop), True) as call:
        started(warden, call)
        receipt = receipt_of(call)
        assert receipt["survivors"] or not receipt["complete"] or not lives(call.id)
        stop.touch()
        wait_until(lambda: not lives(call.id), DEADLINE, "its end")
        wait_until(lambda: warden.status()["calls"] == 0, DEADLINE, "the call gone")


def test_a_mark_that_is_no_calls_makes_a_receipt_incomplete(warden: Warden, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with warden.keep("leaves_one_with_a_false_mark", str(path)) as call:
        started(warden, call)
        receipt = receipt_of(call)
        os.kill(int(path.read_text()), signal.SIGKILL)
        assert (receipt["survivors"], receipt["complete"]) == ([], False)
        done(call)


def test_what_can_be_neither_seen_nor_known_makes_a_receipt_incomplete(
    warden: Warden, stop: Path, tmp_path: Path
) -> None:
    with warden.keep("loses_a_hopper", str(stop), str(tmp_path / "begun")) as call:
        started(warden, call)
        receipt = receipt_of(call)
        assert (receipt["survivors"], receipt["complete"]) == ([], False)
        done(call)


@pytest.mark.root
@ROOT
def test_in_a_cgroup_nothing_outruns_the_end(tmp_path: Path, stop: Path) -> None:
    with own_cgroup() as place, Warden(tmp_path / "warden", PROCEDURES, kill_grace=0.3, cgroup=str(place)) as warden:
        for procedure in ("hops", "hops_and_dies"):
            with warden.keep(procedure, str(stop), True) as call:
                started(warden, call)
                wait_until(lambda: lives(call.id), DEADLINE, "the first hop")
                call.send({"stop": {"why": "cancelled"}})
                receipt = receipt_of(call)
                assert not lives(call.id)
                assert (receipt["survivors"], receipt["complete"]) == ([], True)
                done(call)
        assert not list(place.glob("call-*"))


def test_a_process_whose_first_thread_has_ended_is_ended(warden: Warden, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with warden.keep("leaves_one_without_a_head", str(path)) as call:
        started(warden, call)
        receipt = receipt_of(call)
        pid = int(path.read_text())
        assert pid not in take_snapshot()
        assert pid in {one["pid"] for one in receipt["processes"]}
        assert (receipt["survivors"], receipt["complete"]) == ([], True)
        done(call)


def test_a_main_process_that_nobody_has_reaped_survives(warden: Warden) -> None:
    with warden.keep("wait") as call:
        pid = started(warden, call)
        zygote = warden.status()["zygote"]
        os.kill(zygote, signal.SIGSTOP)
        try:
            call.send({"stop": {"why": "cancelled"}})
            receipt = receipt_of(call)
            assert [one["pid"] for one in receipt["survivors"]] == [pid]
            assert not receipt["complete"]
        finally:
            os.kill(zygote, signal.SIGCONT)
        receipt = call.line()["stop_report"]
        assert (receipt["survivors"], receipt["complete"]) == ([], True)
        done(call)


@pytest.mark.root
@ROOT
def test_survivors_of_a_dead_wardens_call_are_told_and_their_end(tmp_path: Path) -> None:
    warden = Warden(tmp_path / "warden", PROCEDURES).start()
    with freezer() as cold:
        with warden.keep("wait") as call:
            pid = started(warden, call)
            cold.freeze(pid)
            warden.kill()
        with warden, warden.attach(call.id) as again:
            again.line()
            assert [one["pid"] for one in receipt_of(again)["survivors"]] == [pid]
            cold.thaw()
            assert again.line()["stop_report"]["survivors"] == []
            done(again)


@pytest.mark.root
@ROOT
def test_what_survives_a_call_that_was_forgotten_is_left_to_the_next_warden(tmp_path: Path) -> None:
    warden = Warden(tmp_path / "warden", PROCEDURES, kill_grace=0.1).start()
    with freezer() as cold:
        with warden.keep("wait") as call:
            pid = started(warden, call)
            cold.freeze(pid)
            call.send({"stop": {"why": "cancelled"}})
            assert [one["pid"] for one in receipt_of(call)["survivors"]] == [pid]
            done(call)
        (record,) = wait_until(
            lambda: [*warden.runtime_directory.glob(f"calls/*/{call.id}.reported")], what="the record"
        )
        warden.kill()
        with warden:
            assert warden.held() == []
            cold.thaw()
            wait_until(lambda: not record.exists(), DEADLINE, "the record gone")
