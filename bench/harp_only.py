"""HARP's client; and what no peer is measured in: memory, function entries, a full store, many hosts, a long load."""

from __future__ import annotations

import json
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any

import psutil

import harp
from bench import access, harp_client, http
from bench.harp_client import connect_queue
from bench.load import SETTINGS, Figures, Missing, Ready, jobs, quantiles, together
from bench.neighbours import neighbours
from bench.processes import program
from harp.protocol.json_text import loads
from harpcaller.api.control_client import ControlClient
from harpcaller.store.sqlite.file import FILE_NAME
from support.certificates import server_files
from support.harpcallerd import Harpcallerd

_CLIENTS = 4
_DOMAIN = "simulated.example"
#: Hosts and queues over which stored jobs are spread, records of each job, and jobs in a request.
_STORE_HOSTS, _QUEUES, _RECORDS, _REQUEST = 20, 5, 10, 250
#: Jobs that a list is asked for.
_NEWEST = 100
#: Jobs that idle followers follow; seconds during which nothing happens; descriptors beside those of followers.
_WATCHED, _IDLE, _SPARE_DESCRIPTORS = 10, 3.0, 500
#: Jobs of a long load between two looks at the time.
_BATCH = 400
#: Seconds to wait for an answer on a plain connection.
_TIMEOUT = 60.0


def host_name(number: int) -> str:
    """Return the name of a simulated host; one certificate is for all of them."""
    return f"host{number:03}.{_DOMAIN}"


#: The first simulated host.
HOST = host_name(0)


@contextmanager
def simulated_hosts(directory: Path, hosts: int) -> Iterator[dict[str, Any]]:
    """Run `bench.simulated`; yield what `simulated_dispatcher` needs."""
    directory.mkdir(exist_ok=True)
    files = server_files(directory, (f"*.{_DOMAIN}",))
    listening = directory / "addresses"
    arguments = [str(files.certfile), str(files.keyfile), str(hosts), str(listening)]
    command = [sys.executable, "-P", "-m", "bench.simulated", *arguments]
    with program(command, directory / "simulated.log", ready=listening.exists):
        yield {"addresses": json.loads(listening.read_text()), "ca_file": str(files.ca_file)}


def simulated_dispatcher(directory: Path, simulated: Mapping[str, Any]) -> Harpcallerd:
    """Return a dispatcher, not started, that knows all simulated hosts."""
    dispatcher = Harpcallerd(directory, settings={"ca_file": simulated["ca_file"], "log_level": "info"})
    credentials = {"user": "u", "password": "p"}
    lines = [
        {"hostname": host_name(number), "address": address, "port": port, "credentials": credentials}
        for number, (address, port) in enumerate(simulated["addresses"])
    ]
    dispatcher.hosts_file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return dispatcher


@contextmanager
def _simulated(name: str, hosts: int) -> Iterator[Harpcallerd]:
    """Run simulated hosts and a dispatcher that knows them, with files in a new directory."""
    directory = Path(tempfile.mkdtemp(prefix=name, dir=SETTINGS["directory"]))
    with simulated_hosts(directory, hosts) as simulated, simulated_dispatcher(directory, simulated) as dispatcher:
        yield dispatcher


def _request(port: int, request: Mapping[str, Any]) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), _TIMEOUT)
    sock.sendall(json.dumps({"harpcaller": 1, **request}).encode() + b"\n")
    return sock


def _answer(sock: socket.socket) -> Iterator[Any]:
    """Yield each line of a connection, decoded, until it is closed."""
    rest = b""
    while data := sock.recv(1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        yield from map(json.loads, lines)


def _jobs_on_simulated(port: int, clients: int, count: int) -> Figures:
    return jobs(partial(connect_queue, port=port, host=HOST), clients, count)


def _simulated_cpu(clients: int, jobs: int) -> Figures:
    """Return the CPU milliseconds of the dispatcher for one job on a simulated host."""
    with _simulated("simulated-cpu", 1) as dispatcher:
        SETTINGS["pids"] = {"dispatcher": dispatcher.pid}
        figures = _jobs_on_simulated(dispatcher.port, clients, jobs)
    return {**figures, "dispatcher": figures["cpu dispatcher"]}


def _trace(runs: int) -> Figures:
    """Return how many functions of HARP one job enters: ``entries``, and ``entries NAME`` by process."""
    command = [sys.executable, "-P", "-m", "tracing", "--json", "--runs", str(runs), "--records", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise Missing(f"./dev trace ended with status {done.returncode}; is the machine too busy?")
    found = json.loads(done.stdout)
    job = found["jobs"]["add(1, 2).get()"]
    by_process = {f"entries {process['process']}": process["ours"] for process in job["processes"]}
    return {"entries": job["ours"], **by_process}


def _memory() -> Figures:
    """Return the memory (PSS) in MB of harpd, all its processes, and of the dispatcher, before any work."""
    pids = SETTINGS["pids"]
    parents = [psutil.Process(pids[name]) for name in ("frontend", "supervisor")]
    harpd = {*parents, *(child for parent in parents for child in parent.children(recursive=True))}
    return {"harpd": sum(map(_pss, harpd)), "dispatcher": _pss(psutil.Process(pids["dispatcher"]))}


def _pss(process: psutil.Process) -> float:
    return float(process.memory_full_info().pss) / 1e6


def _idle(followers: int) -> Figures:
    """Return what a follower of a quiet stream adds to the dispatcher's memory (RSS), in kB."""
    needed = followers + _SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), max(hard, needed)))  # the dispatcher inherits it
    except (ValueError, OSError):
        raise Missing(f"{needed:,} descriptors are needed; a process may have {hard:,}") from None
    with _simulated("idle", 1) as dispatcher:
        rpc = harp.HarpCaller("127.0.0.1", dispatcher.port)
        watched = [rpc.host(HOST).watch() for _ in range(_WATCHED)]

        def follow(number: int) -> tuple[socket.socket, Iterator[Any]]:
            sock = _request(dispatcher.port, {"follow_stream": watched[number % _WATCHED].id(), "since": 0})
            lines = _answer(sock)
            next(lines)  # the record
            return sock, lines

        for number in range(_WATCHED):  # not counted: the memory of a first follower
            follow(number)[0].close()
        process = psutil.Process(dispatcher.pid)
        before = process.memory_info().rss
        following = [follow(number) for number in range(followers)]
        time.sleep(_IDLE)
        taken = process.memory_info().rss - before
        for job in watched:
            job.cancel()
        for sock, lines in following:
            if list(lines) != [{"cancelled": True}]:
                raise RuntimeError("a follower did not receive the end")
            sock.close()
    return {"memory": taken / followers / 1e3}


def _wide(jobs: int, hosts: int) -> Figures:
    """Run jobs on many hosts, each of which ends once all are running.

    Returns:
        ``seconds`` from the first submission to the last result; ``memory``: the dispatcher's peak, in MB.
    """
    with _simulated("wide", hosts) as dispatcher:

        def body(client: int, ready: Ready) -> tuple[float, float]:
            rpc = harp.HarpCaller("127.0.0.1", dispatcher.port)
            ready()
            began = time.monotonic()
            calls = [rpc.host(host_name(number % hosts)).gather(jobs) for number in range(client, jobs, _CLIENTS)]
            for call in calls:
                call.get()
            return began, time.monotonic()

        times, _ = together(_CLIENTS, body)
        status = Path(f"/proc/{dispatcher.pid}/status").read_text().splitlines()
        [peak] = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
    took = max(ended for _, ended in times) - min(began for began, _ in times)
    return {"seconds": took, "memory": peak * 1024 / 1e6}


def _store(stored: int, queries: int, jobs: int) -> Figures:
    """Fill a store with ended jobs, query it, run jobs on it, and restart its dispatcher.

    Returns:
        ``status`` and so on: p99 in ms of each query, on a new connection; ``full``, ``empty``: rate of jobs on the
        full store and on an empty one; ``bytes``: disk space of a small job; ``start``: seconds from a start to the
        first answer.
    """
    directory = Path(SETTINGS["directory"]) / "store"
    figures: Figures = {}
    with simulated_hosts(directory, _STORE_HOSTS) as simulated:
        empty = simulated_dispatcher(directory / "empty", simulated)
        full = simulated_dispatcher(directory / "full", simulated)
        with full, empty:
            ids = _fill(full, stored)
            queries_of_full = _queries(full, ids)
            for name, query in queries_of_full.items():
                query()
                figures[name] = quantiles([_timed(query) for _ in range(queries)])["p99"]
            # Half of the jobs on the empty store before, half after: so a slow period of the machine affects both.
            first, filled, second = (
                _jobs_on_simulated(dispatcher.port, _CLIENTS, count)
                for dispatcher, count in ((empty, jobs // 2), (full, jobs), (empty, jobs // 2))
            )
            figures["full"], figures["empty"] = filled["rate"], harmonic_mean([first["rate"], second["rate"]])
            empty.stop()
            size = (empty.store_directory / FILE_NAME).stat().st_size
            figures["bytes"] = size / (2 * (jobs // 2 + _CLIENTS))  # each client has run one job more, to begin
            full.stop()
            figures["start"] = _timed(lambda: (full.start(), queries_of_full["status"]()))
    return figures


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _fill(dispatcher: Harpcallerd, stored: int) -> list[str]:
    """Run jobs, half of them in queues; return the ids of some, from the first to the last."""

    def body(client: int, ready: Ready) -> list[str]:
        rpc = harp.HarpCaller("127.0.0.1", dispatcher.port, keep_alive=True)
        ready()
        ids = []
        for begin in range(client * _REQUEST, stored, _CLIENTS * _REQUEST):
            numbers = range(begin, min(begin + _REQUEST, stored))
            calls = rpc.submit_many([_stored_call(number) for number in numbers])
            calls[-1].get()  # not far more jobs are submitted than have ended
            ids.append(calls[-1].id())
        return ids

    found, _ = together(_CLIENTS, body)
    ids = [id_ for each in found for id_ in each]
    while dispatcher.listed("list", "--newest=1"):
        time.sleep(0.1)
    os.truncate(dispatcher.log_file, 0)  # a million jobs leave hundreds of MB
    return ids


def _stored_call(number: int) -> harp.Call:
    queue = {"service": number // 2 % _QUEUES} if number % 2 else None
    return harp.Call(host_name(number % _STORE_HOSTS), "count", [_RECORDS], queue=queue)


def _queries(dispatcher: Harpcallerd, ids: list[str]) -> dict[str, Callable[[], object]]:
    """Return the queries of users and administrators; each raises if the answer is not right."""

    def ask(request: str, answer: str, **more: Any) -> None:
        with _request(dispatcher.port, {request: random.choice(ids), **more}) as sock:  # noqa: S311 - no secret
            [found] = _answer(sock)
        if answer not in found:
            raise RuntimeError(f"expected {answer}, got {found!r}")

    def listed(**options: Any) -> None:
        found = [
            loads(item)
            for item in ControlClient(dispatcher.socket).send_command("list", all=True, newest=_NEWEST, **options)
        ]
        hosts = {job["call"]["host"] for job in found}
        if not 0 < len(found) <= _NEWEST or ("host" in options and hosts != {HOST}):
            raise RuntimeError(f"expected the newest {_NEWEST} jobs, got {len(found)} of {hosts}")

    return {
        "status": partial(ask, "get_status", "call"),
        "result": partial(ask, "get_result", "result", wait=False),
        "list": listed,
        "host": partial(listed, host=HOST),
        "queue": partial(listed, of_queue={"service": 0}),
    }


def _soak(seconds: float) -> Figures:
    """Run jobs for a long time, in batches.

    Returns:
        ``rate``: median; ``slowest``; by process: growth of its memory (RSS) in MB, from a tenth of the time on.
    """
    begin = time.monotonic()
    rates, sizes = [], []
    while time.monotonic() < begin + seconds:
        rates.append(jobs(connect_queue, _CLIENTS, _BATCH)["rate"])
        sizes.append({name: psutil.Process(pid).memory_info().rss for name, pid in SETTINGS["pids"].items() if pid > 0})
    growth = {name: (size - sizes[len(sizes) // 10][name]) / 1e6 for name, size in sizes[-1].items()}
    return {"rate": median(rates), "slowest": min(rates), **growth}


FUNCTIONS: dict[str, Callable[..., Figures]] = {
    **harp_client.FUNCTIONS,
    "memory": _memory,
    "simulated-cpu": _simulated_cpu,
    "idle": _idle,
    "trace": _trace,
    "wide": _wide,
    "flood": partial(jobs, connect_queue),
    "store": _store,
    "soak": _soak,
    "neighbours": neighbours,
    **access.FUNCTIONS,
    **http.FUNCTIONS,
}
