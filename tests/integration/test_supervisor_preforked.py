"""Pre-forked workers: each serves one call, all end, and the death of a worker fails no call."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from support.deadline import wait_until
from support.supervisor import PLAIN, Supervisor, is_running

PROCEDURES = """
import os, random, signal, subprocess, time
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
        "handlers": [int(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGHUP)],
        "cookie": os.environ["HARPD_CALL"],
        "shown": subprocess.check_output(["printenv"], text=True).splitlines(),
    }

@procedure
def note(path):
    with open(path, "a") as file:
        file.write("x")
    return os.getpid()

@procedure
def resist(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(path, "w").close()
    time.sleep(3600)
"""


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path / "supervisor", PROCEDURES, kill_grace=0.3) as supervisor:
        yield supervisor


def is_dead(process: psutil.Process) -> bool:
    return not is_running(process)


def preforked(supervisor: Supervisor) -> list[psutil.Process]:
    """Wait until there are pre-forked workers, and return them."""
    zygote = psutil.Process(supervisor.status()["zygote"])
    return wait_until(lambda: zygote.children(), what="processes that wait")


def test_call_has_own_process_and_session(supervisor: Supervisor) -> None:
    found = [supervisor.result("own") for _ in range(10)]
    assert len({one["pid"] for one in found}) == len({one["random"] for one in found}) == 10
    for one in found:
        assert one["session"] == one["group"] == one["pid"]
        assert (one["blocked"], one["handlers"]) == ([], [0, 0])
        assert one["files"][:3] == [0, 1, 2]
        assert len(one["files"]) == 6  # the two pipes of the channel, and the directory that is being listed
        assert f"HARPD_CALL={one['cookie']}" in one["shown"]
        assert not [entry for entry in one["shown"] if entry.startswith("LD_")]  # the zygote's own option
    assert len({one["cookie"] for one in found}) == 10


def test_preforked_worker_serves_next_call(supervisor: Supervisor) -> None:
    waiting = {process.pid for process in preforked(supervisor)}
    assert supervisor.result("own")["pid"] in waiting


def test_preforked_worker_killed_fails_no_call(supervisor: Supervisor) -> None:
    for _ in range(5):
        for process in preforked(supervisor):
            os.kill(process.pid, signal.SIGKILL)
            wait_until(partial(is_dead, process), what="its death")
        assert supervisor.result("own")["cookie"]


def test_preforked_worker_killed_with_arguments_fails_its_call(supervisor: Supervisor, tmp_path: Path) -> None:
    """After its arguments were sent to a worker, a call is not sent to another: it might start twice."""
    path = tmp_path / "notes"
    for number in range(3):
        waiting = preforked(supervisor)
        for process in waiting:
            process.suspend()
        with supervisor.call("note", [str(path)]) as call:
            assert call.line() == PLAIN
            pid = supervisor.wait_event("call started", call=call.id)["pid"]
            assert pid in {process.pid for process in waiting}
            os.kill(pid, signal.SIGKILL)
            assert call.line()["error"]["type"] == "call_died"
        for process in waiting:
            if process.pid != pid:
                process.resume()
        assert not path.exists() or path.read_text() == "x" * number
        assert supervisor.result("note", str(path)) != pid
        assert path.read_text() == "x" * (number + 1)


def test_preforked_worker_interrupted_runs_a_call_or_fails_it(supervisor: Supervisor, tmp_path: Path) -> None:
    """Any process of the same user can signal a worker. Its call runs at most once, and always ends."""
    for number in range(5):
        path = tmp_path / str(number)
        for process in preforked(supervisor):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(random.choice([signal.SIGTERM, signal.SIGXCPU, signal.SIGHUP]))
        lines = supervisor.lines("note", str(path))
        assert lines[-1].keys() == {"result"} or lines[-1]["error"]["type"] == "call_died"
        assert not path.exists() or path.read_text() == "x"


def test_preforked_workers_end_with_zygote(supervisor: Supervisor) -> None:
    waiting = preforked(supervisor)
    assert supervisor.reload(PROCEDURES) == {"ok": True}
    wait_until(lambda: not any(process.is_running() for process in waiting), what="the end of what waited")
    waiting = preforked(supervisor)
    os.kill(supervisor.status()["zygote"], signal.SIGKILL)
    wait_until(lambda: not any(process.is_running() for process in waiting), what="the end of what waited")
    wait_until(lambda: supervisor.status()["zygote"] is not None, what="another zygote")
    assert supervisor.result("own")["cookie"]


def test_preforked_workers_are_no_possible_escapes(supervisor: Supervisor, tmp_path: Path) -> None:
    """Workers that the zygote forks while a call is stopped are recorded, so the stop report is complete."""
    for number in range(5):
        path = tmp_path / str(number)
        with supervisor.call_resumable("resist", str(path)) as call:
            call.line()
            wait_until(path.exists)
            call.send({"stop": {"why": "cancelled"}})
            while "stop_report" not in (line := call.line()):
                pass
            assert (line["stop_report"]["survivors"], line["stop_report"]["complete"]) == ([], True)
            call.send({"release": True})
            call.lines()
        supervisor.result("own")
