"""Many jobs in parallel: all return, limits and order are kept, and slow readers delay no other client."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.deadline import wait_until
from support.procedures_file import PROCEDURES
from support.system import DEADLINE, System, running

OWN = """
import fcntl, os, time
from harpd.proc import procedure

@procedure
def mark_turn(path, number):
    # The facts, independent of the dispatcher: a log of the start and end of each call.
    with open(path, "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.write(f"start {number}\\n")
    time.sleep(0.03)
    with open(path, "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.write(f"end {number}\\n")
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(tmp_path_factory.mktemp("load"), PROCEDURES + OWN) as system:
        yield system


def test_harpd_two_hundred_jobs_run_in_parallel(system: System, tmp_path: Path) -> None:
    jobs = [system.rpc.web01.wait_for(str(tmp_path / "go"), number) for number in range(200)]
    for job in jobs:
        wait_until(job.start_time, DEADLINE, "the start of all jobs")
    (tmp_path / "go").touch()
    assert [job.get() for job in jobs] == list(range(200))
    starts = [job.start_time() or 0 for job in jobs]
    ends = [job.end_time() or 0 for job in jobs]
    assert max(starts) <= min(ends)  # they ran at the same time


def test_queue_of_eight_runs_a_thousand_jobs(system: System, tmp_path: Path) -> None:
    log = tmp_path / "log"
    host = system.rpc.host("web01", queue={"eight": 8}, concurrency=8)
    jobs = [host.mark_turn(str(log), number) for number in range(1000)]
    for job in jobs:
        assert job.get() is None
    at_once: set[str] = set()
    most = 0
    ran = []
    for line in log.read_text().splitlines():
        what, number = line.split()
        if what == "start":
            ran.append(int(number))
            at_once.add(number)
            most = max(most, len(at_once))
        else:
            at_once.remove(number)
    assert not at_once
    assert sorted(ran) == list(range(1000))
    assert 1 < most <= 8
    # Calls that were started one after the other may overtake each other on the host; the starts are in order.
    ids = [job.id() for job in jobs]
    system.dispatcher.wait_event("call started", job=ids[-1])
    started = [event["job"] for event in system.dispatcher.events("call started")]
    assert [job for job in started if job in set(ids)] == ids
    starts = [job.start_time() or 0 for job in jobs]
    assert starts == sorted(starts)


def test_thousand_followers_beside_a_stuck_one_get_all(system: System) -> None:
    job = system.rpc.web01.long_records(20_000, 500)
    request = b'{"harpcaller":1,"follow_stream":"%s","since":0}\n' % job.id().encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", system.dispatcher.port))
        deaf.sendall(request)
        idle = system.rpc.host("web01", queue={"lane": 1})
        first, second = idle.sleep(600), idle.long_records(3, 1)
        crowd = [second.follow(since=0) for _ in range(1000)]
        assert [number for number, _ in job.follow(since=0)] == list(range(20_000))
        assert first.cancel()
        for follower in crowd:
            assert [number for number, _ in follower] == [0, 1, 2]
        assert job.get() is None
    status = Path(f"/proc/{system.dispatcher.pid}/status").read_text()
    memory = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
    assert memory < 300_000, f"the dispatcher's memory peaked at {memory} kB"
