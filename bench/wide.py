"""Works with many hosts and many followers. Each has a dispatcher of its own, so that it finds no memory used before.

`SETTINGS` has under ``simulated`` what `bench.simulation` needs.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import psutil

import harp
from bench.clients import Figures, Missing, together
from bench.harp_client import SETTINGS, follower, lines_of
from bench.simulation import HOST, dispatcher_on_simulated_hosts, host_name
from harpcaller.api.control_client import Daemon

__all__ = ["WORKS"]

_CLIENTS = 4
#: Jobs that the idle followers follow.
_WATCHED = 10
#: Seconds for which nothing is said to idle followers.
_IDLE = 3.0
#: Descriptors that a process needs beside those of its followers.
_SPARE = 500


def _most_memory(pid: int) -> float:
    """The most bytes of memory that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [most] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024.0 * int(most)


def wide(jobs: int, hosts: int) -> Figures:
    """Jobs that end once all of them are under way, spread over many hosts.

    Returns:
        ``lost``: how many did not return; ``seconds`` from the first submission to the last result; ``memory`` of the
        dispatcher at the most, MB.
    """
    directory = Path(SETTINGS["directory"]) / "wide"
    with dispatcher_on_simulated_hosts(directory, SETTINGS["simulated"], map(host_name, range(hosts))) as dispatcher:

        def body(client: int, start: Callable[[], object]) -> tuple[int, float, float]:
            rpc = harp.HarpCaller("127.0.0.1", dispatcher.port)
            start()
            began = time.monotonic()
            calls = [rpc.host(host_name(number % hosts)).gather(jobs) for number in range(client, jobs, _CLIENTS)]
            lost = sum(not _returns(call) for call in calls)
            return lost, began, time.monotonic()

        outcomes = together(_CLIENTS, body)
        began, ended = min(one[1] for one in outcomes), max(one[2] for one in outcomes)
        memory = _most_memory(dispatcher.pid)
    return {"lost": sum(one[0] for one in outcomes), "seconds": ended - began, "memory": memory / 1e6}


def _returns(call: harp.RemoteCall) -> bool:
    try:
        call.get()
    except harp.HarpException:
        return False
    return True


def idle(followers: int) -> Figures:
    """Followers of jobs that say one thing, then nothing for a while, then end.

    Returns:
        ``held``: how many got both; ``memory``: what each takes of the dispatcher, kB, without the kernel's buffers.

    Raises:
        Missing: this machine does not allow as many descriptors.
    """
    _allow_descriptors(followers + _SPARE)
    directory = Path(SETTINGS["directory"]) / "idle"
    with dispatcher_on_simulated_hosts(directory, SETTINGS["simulated"], [HOST]) as dispatcher:
        rpc = harp.HarpCaller("127.0.0.1", dispatcher.port)
        jobs = [rpc.host(HOST).watch().id() for _ in range(_WATCHED)]
        for job in jobs:  # they are under way, and one follower has been there
            with follower(dispatcher.port, job) as sock:
                next(lines_of(sock))
        process = psutil.Process(dispatcher.pid)

        def body(client: int, start: Callable[[], object]) -> float:
            if client == 0:
                return _conduct(process, Daemon(dispatcher.socket), jobs, start)
            return _hold(dispatcher.port, jobs, range(client - 1, followers, _CLIENTS), start)

        taken, *held = together(1 + _CLIENTS, body)
    return {"held": sum(held), "memory": taken / followers / 1e3}


def _conduct(process: psutil.Process, daemon: Daemon, jobs: list[str], start: Callable[[], object]) -> float:
    """Say when it begins and ends; return the bytes that the followers take meanwhile."""
    before = process.memory_info().rss
    start()
    start()  # they are there
    time.sleep(_IDLE)
    taken = process.memory_info().rss - before
    for job in jobs:  # the client's port has no room: they are as many as may connect
        list(daemon.ask("cancel", job=job))
    return float(taken)


def _hold(port: int, jobs: list[str], numbers: range, start: Callable[[], object]) -> float:
    """Follow; return how many were told the record and the end."""
    start()
    following = [follower(port, jobs[number % len(jobs)]) for number in numbers]
    told = [lines_of(sock) for sock in following]
    first = [next(lines, None) for lines in told]
    start()
    rest = [list(lines) for lines in told]
    for sock in following:
        sock.close()
    return float(
        sum(
            record is not None and "packet" in record and end == [{"cancelled": True}]
            for record, end in zip(first, rest, strict=True)
        )
    )


def _allow_descriptors(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(hard, needed)))
    except (ValueError, OSError):
        raise Missing(f"this machine allows a process {hard:,} descriptors; {needed:,} are needed") from None


#: What the harness can ask for.
WORKS: dict[str, Callable[..., Figures]] = {"wide": wide, "idle": idle}
