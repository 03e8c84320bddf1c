"""The load: what a client sends, how often, and what it measures. The same code drives every contender.

Clients import this module, HARP's under the project's Python and the peers' under theirs: standard library only.
Each client is a process of its own, forked before anything is connected. So no client waits for another one's
interpreter lock or library threads.

The costs of clients and servers are those of the kernel's books, from the moment at which all clients are connected.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from threading import BrokenBarrierError
from typing import Any, TypeVar

T = TypeVar("T")

#: Results of a function by name: ``rate`` (1/s), ``p50`` and ``p99`` (ms), and others that it documents; and what one
#: call, job or record costs a process, see `costs`. Only the names of costs have two words.
Figures = dict[str, float]

#: Blocks until all clients of a workload are connected.
Ready = Callable[[], object]

#: What the harness passes to clients and to the workers of peers: ports, files, switches. ``pids``: the processes of
#: the servers by name; a negative number: all processes below that one, those that have exited, too.
SETTINGS: dict[str, Any] = json.loads(os.environ.get("BENCH_SETTINGS", "{}"))

#: Text of each record of a stream.
TEXT = "a line of output, as procedures have them"

#: Seconds that clients wait for each other, and between two looks whether all are ready.
_PATIENCE, _LOOK = 60.0, 0.002
#: Seconds between two jobs on an idle system, and jobs before the first that is measured.
_PAUSE, _WARM_UP = 0.01, 5

_fork = multiprocessing.get_context("fork")


class Missing(Exception):
    """A contender cannot do a workload; the message says what it lacks."""


def payload(number: int) -> dict[str, Any]:
    """Return the argument and expected result of a call: small, and different for each number."""
    return {"number": number, "name": "web01.example.net", "flags": [True, False, None], "ratio": 0.25}


def fast_records(count: int) -> Iterator[dict[str, Any]]:
    """Return the records of a fast stream."""
    return ({"number": number, "text": TEXT} for number in range(count))


def slow_records(count: int, pause: float) -> Iterator[dict[str, Any]]:
    """Yield the records of a slow stream; ``at`` is the creation time, in Unix seconds."""
    for number in range(count):
        time.sleep(pause)
        yield {"number": number, "at": time.time()}


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise RuntimeError(f"expected {wanted!r}, got {found!r}")


def quantiles(seconds: Sequence[float]) -> Figures:
    """Return ``p50`` and ``p99`` of durations, in milliseconds."""
    ordered = sorted(seconds)
    return {name: 1000 * ordered[int(share * len(ordered))] for name, share in (("p50", 0.5), ("p99", 0.99))}


def costs() -> Figures:
    """Return what each process in the settings has cost so far: ``cpu NAME`` (ms) and ``faults NAME`` (page faults)."""
    parents, own, reaped = {}, {}, {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()  # from the third field of proc_pid_stat(5) on
        except OSError:  # it has ended
            continue
        parents[int(pid)] = int(fields[1])
        faults, faults_of_children, _, _, *times = map(int, fields[7:15])
        own[int(pid)] = times[0] + times[1], faults
        reaped[int(pid)] = times[2] + times[3], faults_of_children

    def below(pid: int, kind: int) -> int:
        children = [child for child, parent in parents.items() if parent == pid]
        return reaped.get(pid, (0, 0))[kind] + sum(own[child][kind] + below(child, kind) for child in children)

    found: Figures = {}
    for name, pid in SETTINGS.get("pids", {}).items():
        if pid > 0:
            found |= {f"cpu {name}": _read_cpu_clock(pid), f"faults {name}": own.get(pid, (0, 0))[1]}
        else:
            found |= {f"cpu {name}": 1000 * below(-pid, 0) / os.sysconf("SC_CLK_TCK"), f"faults {name}": below(-pid, 1)}
    return found


def _read_cpu_clock(pid: int) -> float:
    """Return the CPU milliseconds of all threads of a process, more exact than its status; 0: it has ended."""
    try:
        return time.clock_gettime_ns(~pid << 3 | 2) / 1e6  # as clock_getcpuclockid(3) names the clock of a process
    except OSError:
        return 0.0


def _own_costs() -> Figures:
    """Return the same of this process and of those that it has started and that have ended, as ``client``."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = 1000 * sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return {"cpu client": cpu, "faults client": sum(usage.ru_minflt for usage in usages)}


def less(after: Figures, before: Figures) -> Figures:
    """Return the difference of each figure."""
    return {name: value - before[name] for name, value in after.items()}


def together(clients: int, body: Callable[[int, Ready], T]) -> tuple[list[T], Figures]:
    """Run clients as processes; raise RuntimeError if one fails.

    Args:
        clients: number of processes.
        body: receives the number of its client, and a function that it calls once it is connected: this blocks until
            all clients have called it.

    Returns:
        What each client returns; `costs` of the servers, and of all clients as ``client``, from that moment on.
    """
    barrier = _fork.Barrier(clients + 1)

    def run(number: int, pipe: Connection) -> None:
        before = _own_costs()

        def ready() -> None:
            nonlocal before
            barrier.wait(_PATIENCE)
            before = _own_costs()

        try:
            value = body(number, ready)
            pipe.send((True, (value, less(_own_costs(), before))))
        except Exception:  # noqa: BLE001 - the parent raises it
            barrier.abort()
            pipe.send((False, traceback.format_exc()))

    running = []
    for number in range(clients):
        reader, writer = _fork.Pipe(duplex=False)
        process = _fork.Process(target=run, args=(number, writer), daemon=True)
        process.start()
        writer.close()
        running.append((process, reader))
    ends = [process.sentinel for process, _ in running]
    while barrier.n_waiting < clients and not barrier.broken and not wait(ends, _LOOK):
        pass
    before = costs()
    with suppress(BrokenBarrierError):  # a client has failed
        barrier.wait(0)
    outcomes = []
    for _, reader in running:
        try:
            outcomes.append(reader.recv())
        except EOFError:
            barrier.abort()
            outcomes.append((False, "a client died"))
    spent = less(costs(), before)
    for process, _ in running:
        process.join()
    # The client that failed first gives the reason; the others failed because the barrier was aborted.
    failures = sorted((what for fine, what in outcomes if not fine), key=lambda what: "BrokenBarrier" in what)
    if failures:
        raise RuntimeError(failures[0])
    for _, (_, own) in outcomes:
        for name, cost in own.items():
            spent[name] = spent.get(name, 0.0) + cost
    return [value for _, (value, _) in outcomes], spent


def of_each(spent: Figures, count: int) -> Figures:
    """Return the costs of each of so many calls, jobs or records."""
    return {name: cost / count for name, cost in spent.items()}


def calls(connect: Callable[[], Callable[[Any], Any]], clients: int, seconds: float) -> Figures:
    """Have each client call as fast as it gets answers.

    Args:
        connect: returns a function that makes one call: it receives a payload and returns the answer.
        clients: how many.
        seconds: how long.

    Returns:
        ``rate``: calls of all clients; costs of a call.
    """

    def body(client: int, ready: Ready) -> tuple[float, int]:
        call = connect()
        _expect(call(payload(0)), payload(0))
        ready()
        count = 0
        began = now = time.monotonic()
        while now < began + seconds:
            count += 1
            value = payload(count)
            _expect(call(value), value)
            now = time.monotonic()
        return count / (now - began), count

    outcomes, spent = together(clients, body)
    return {"rate": sum(rate for rate, _ in outcomes), **of_each(spent, sum(count for _, count in outcomes))}


@dataclass(frozen=True)
class Queue:
    """A connected client of a job queue."""

    submit: Callable[[Any], Any]  # submits the job that returns this value; returns a handle
    result: Callable[[Any], Any]  # waits for the result of a handle
    submit_waiting: Callable[[Any], Any]  # submits a job that no worker starts
    submit_many: Callable[[Sequence[Any]], Any] | None = None  # submits such jobs in one request, if it can


def jobs(connect: Callable[[], Queue], clients: int, jobs: int) -> Figures:
    """Have clients share in submitting jobs; then each collects the results of its own.

    Returns:
        ``rate``: jobs from the first submission to the last result; costs of a job.
    """

    def body(client: int, ready: Ready) -> tuple[float, float]:
        queue = connect()
        mine = [payload(number) for number in range(client, jobs, clients)]
        queue.result(queue.submit(payload(0)))
        ready()
        began = time.monotonic()
        handles = [queue.submit(value) for value in mine]
        results = [queue.result(handle) for handle in handles]
        ended = time.monotonic()
        _expect(results, mine)
        return began, ended

    times, spent = together(clients, body)
    took = max(ended for _, ended in times) - min(began for began, _ in times)
    return {"rate": jobs / took, **of_each(spent, jobs)}


def submissions(connect: Callable[[], Queue], clients: int, seconds: float, batch: int = 0) -> Figures:
    """Have each client submit jobs that no worker starts; return the ``rate`` of jobs accepted, and costs of a job.

    A batch is that many jobs in one request; 0: one job a request, by the ordinary operation.
    """

    def body(client: int, ready: Ready) -> tuple[float, int]:
        queue = connect()
        queue.submit_waiting(payload(0))
        values = [payload(number) for number in range(batch)]
        ready()
        count = 0
        began = now = time.monotonic()
        while now < began + seconds:
            if batch:
                assert queue.submit_many is not None
                queue.submit_many(values)
            else:
                queue.submit_waiting(payload(count))
            count += batch or 1
            now = time.monotonic()
        return count / (now - began), count

    outcomes, spent = together(clients, body)
    return {"rate": sum(rate for rate, _ in outcomes), **of_each(spent, sum(count for _, count in outcomes))}


def latency(connect: Callable[[], Queue], jobs: int) -> Figures:
    """Run one job at a time on an idle system; return ``p50`` and ``p99`` from submission to result, and its costs."""

    def body(client: int, ready: Ready) -> list[float]:
        queue = connect()
        took = []
        for number in range(-_WARM_UP, jobs):
            if number == 0:
                ready()
            value = payload(number)
            time.sleep(_PAUSE)
            began = time.monotonic()
            found = queue.result(queue.submit(value))
            took.append(time.monotonic() - began)
            _expect(found, value)
        return took[_WARM_UP:]

    [took], spent = together(1, body)
    return {**quantiles(took), **of_each(spent, jobs)}


def queue_functions(connect: Callable[[], Queue]) -> Mapping[str, Callable[..., Figures]]:
    """Return the functions that every job queue offers to the harness, by name."""
    return {
        "jobs": partial(jobs, connect),
        "submissions": partial(submissions, connect),
        "latency": partial(latency, connect),
    }


def follow(stream: Callable[[int], Iterator[Any]], records: int) -> Figures:
    """Read a stream as fast as it comes; return the ``rate`` of records from request to last record, and its costs."""

    def body(client: int, ready: Ready) -> float:
        _expect(list(stream(10)), list(fast_records(10)))
        ready()
        began = time.monotonic()
        count = 0
        for found in stream(records):
            if found["number"] != count:
                raise RuntimeError(f"expected record {count}, got {found!r}")
            count += 1
        took = time.monotonic() - began
        _expect(count, records)
        return records / took

    [rate], spent = together(1, body)
    return {"rate": rate, **of_each(spent, records)}


def follow_slowly(stream: Callable[[int, float], Iterator[Any]], records: int, pause: float) -> Figures:
    """Read a stream that has a record now and then; return ``p50`` and ``p99`` from creation to arrival."""

    def body(client: int, ready: Ready) -> list[float]:
        ready()
        took = [time.time() - found["at"] for found in stream(records, pause)]
        _expect(len(took), records)
        return took

    [took], spent = together(1, body)
    return {**quantiles(took), **of_each(spent, records)}
