"""Processes that wait for calls: each serves one, none is left, and one that dies costs no call."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from support.deadline import wait_until
from support.warden import Warden, runs

PROCEDURES = """
import os, random, signal, time
from harpd.proc import procedure

STARTED = time.time()

@procedure
def own():
    return {
        "pid": os.getpid(),
        "session": os.getsid(0),
        "group": os.getpgid(0),
        "random": random.random(),
        "files": sorted(map(int, os.listdir("/proc/self/fd"))),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "handlers": [int(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)],
        "mark": os.environ["HARPD_CALL"],
    }

@procedure
def resist(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(path, "w").close()
    time.sleep(3600)
"""


@pytest.fixture
def warden(tmp_path: Path) -> Iterator[Warden]:
    with Warden(tmp_path / "warden", PROCEDURES, kill_grace=0.3) as warden:
        yield warden


def is_dead(process: psutil.Process) -> bool:
    return not runs(process)


def spares(warden: Warden) -> list[psutil.Process]:
    """The processes that wait, once there are some."""
    zygote = psutil.Process(warden.status()["zygote"])
    return wait_until(lambda: zygote.children(), what="processes that wait")


def test_each_call_has_a_process_of_its_own_that_leads_its_session(warden: Warden) -> None:
    found = [warden.result("own") for _ in range(10)]
    assert len({one["pid"] for one in found}) == len({one["random"] for one in found}) == 10
    for one in found:
        assert one["session"] == one["group"] == one["pid"]
        assert (one["blocked"], one["handlers"]) == ([], [0, 0, 0])
        assert one["files"][:3] == [0, 1, 2]
        assert len(one["files"]) == 5  # the channel, and the directory that is being listed
    assert len({one["mark"] for one in found}) == 10


def test_a_process_that_waited_is_used_for_the_next_call(warden: Warden) -> None:
    waiting = {process.pid for process in spares(warden)}
    assert warden.result("own")["pid"] in waiting


def test_a_process_that_is_killed_while_it_waits_costs_no_call(warden: Warden) -> None:
    for _ in range(5):
        for process in spares(warden):
            os.kill(process.pid, signal.SIGKILL)
            wait_until(partial(is_dead, process), what="its death")
        assert warden.result("own")["mark"]


def test_with_its_zygote_what_waits_goes(warden: Warden) -> None:
    waiting = spares(warden)
    assert warden.reload(PROCEDURES) == {"ok": True}
    wait_until(lambda: not any(process.is_running() for process in waiting), what="the end of what waited")
    waiting = spares(warden)
    os.kill(warden.status()["zygote"], signal.SIGKILL)
    wait_until(lambda: not any(process.is_running() for process in waiting), what="the end of what waited")
    wait_until(lambda: warden.status()["zygote"] is not None, what="another zygote")
    assert warden.result("own")["mark"]


def test_what_waits_makes_no_receipt_incomplete(warden: Warden, tmp_path: Path) -> None:
    """The zygote forks others while a call is being stopped: they are known for what they are."""
    for number in range(5):
        path = tmp_path / str(number)
        with warden.keep("resist", str(path)) as call:
            call.line()
            wait_until(path.exists)
            call.send({"stop": {"why": "cancelled"}})
            while "stop_report" not in (line := call.line()):
                pass
            assert (line["stop_report"]["survivors"], line["stop_report"]["complete"]) == ([], True)
            call.send({"release": True})
            call.lines()
        warden.result("own")
