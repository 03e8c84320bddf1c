"""The load: what a client sends, how often, and what it measures. The same code drives every contender.

Clients import this module, HARP's under the project's Python and the peers' under theirs: standard library only.
Each client is a process of its own, forked before anything is connected. So no client waits for another one's
interpreter lock or library threads.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")

#: Results of a function by name: ``rate`` (1/s), ``p50`` and ``p99`` (ms), and others that it documents.
Figures = dict[str, float]

#: Blocks until all clients of a workload are connected.
Ready = Callable[[], object]

#: What the harness passes to clients and to the workers of peers: ports, files, switches.
SETTINGS: dict[str, Any] = json.loads(os.environ.get("BENCH_SETTINGS", "{}"))

#: Text of each record of a stream.
TEXT = "a line of output, as procedures have them"

#: Seconds that clients wait for each other.
_PATIENCE = 60.0
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


def together(clients: int, body: Callable[[int, Ready], T]) -> list[T]:
    """Run clients as processes and return what each returns; raise RuntimeError if one fails.

    Args:
        clients: number of processes.
        body: receives the number of its client, and a function that blocks until all clients have called it.
    """
    barrier = _fork.Barrier(clients)

    def run(number: int, pipe: Connection) -> None:
        try:
            pipe.send((True, body(number, lambda: barrier.wait(_PATIENCE))))
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
    outcomes = []
    for process, reader in running:
        try:
            outcomes.append(reader.recv())
        except EOFError:
            barrier.abort()
            outcomes.append((False, "a client died"))
        process.join()
    # The client that failed first gives the reason; the others failed because the barrier was aborted.
    failures = sorted((what for fine, what in outcomes if not fine), key=lambda what: "BrokenBarrier" in what)
    if failures:
        raise RuntimeError(failures[0])
    return [what for _, what in outcomes]


def calls(connect: Callable[[], Callable[[Any], Any]], clients: int, seconds: float) -> Figures:
    """Have each client call as fast as it gets answers.

    Args:
        connect: returns a function that makes one call: it receives a payload and returns the answer.
        clients: how many.
        seconds: how long.

    Returns:
        ``rate``: calls of all clients; ``count``: calls made, with the first of each client.
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

    outcomes = together(clients, body)
    return {"rate": sum(rate for rate, _ in outcomes), "count": sum(count for _, count in outcomes) + clients}


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
        ``rate``: jobs from the first submission to the last result; ``count``: jobs, with the first of each client.
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

    times = together(clients, body)
    took = max(ended for _, ended in times) - min(began for began, _ in times)
    return {"rate": jobs / took, "count": jobs + clients}


def submissions(connect: Callable[[], Queue], clients: int, seconds: float, batch: int = 0) -> Figures:
    """Have each client submit jobs that no worker starts; return the ``rate`` of jobs accepted.

    A batch is that many jobs in one request; 0: one job a request, by the ordinary operation.
    """

    def body(client: int, ready: Ready) -> float:
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
        return count / (now - began)

    return {"rate": sum(together(clients, body))}


def latency(connect: Callable[[], Queue], jobs: int) -> Figures:
    """Run one job at a time on an idle system; return ``p50`` and ``p99`` from submission to result."""

    def body(client: int, ready: Ready) -> Figures:
        queue = connect()
        took = []
        for number in range(_WARM_UP + jobs):
            value = payload(number)
            time.sleep(_PAUSE)
            began = time.monotonic()
            found = queue.result(queue.submit(value))
            took.append(time.monotonic() - began)
            _expect(found, value)
        return quantiles(took[_WARM_UP:])

    return together(1, body)[0]


def queue_functions(connect: Callable[[], Queue]) -> Mapping[str, Callable[..., Figures]]:
    """Return the functions that every job queue offers to the harness, by name."""
    return {
        "jobs": partial(jobs, connect),
        "submissions": partial(submissions, connect),
        "latency": partial(latency, connect),
    }


def follow(stream: Callable[[int], Iterator[Any]], records: int) -> Figures:
    """Read a stream as fast as it comes; return the ``rate`` of records, from the request to the last one."""

    def body(client: int, ready: Ready) -> float:
        _expect(list(stream(10)), list(fast_records(10)))
        began = time.monotonic()
        count = 0
        for found in stream(records):
            if found["number"] != count:
                raise RuntimeError(f"expected record {count}, got {found!r}")
            count += 1
        took = time.monotonic() - began
        _expect(count, records)
        return records / took

    return {"rate": together(1, body)[0]}


def follow_slowly(stream: Callable[[int, float], Iterator[Any]], records: int, pause: float) -> Figures:
    """Read a stream that has a record now and then; return ``p50`` and ``p99`` from creation to arrival."""

    def body(client: int, ready: Ready) -> Figures:
        took = [time.time() - found["at"] for found in stream(records, pause)]
        _expect(len(took), records)
        return quantiles(took)

    return together(1, body)[0]
