"""The load, the same for every contender: what is asked, how often, and what is taken down.

Client programs import this, ours under our Python and the peers' under theirs, so it needs the standard library only.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.clients import Figures, Missing, quantile, together

__all__ = [
    "TEXT",
    "Queue",
    "calls",
    "follow",
    "follow_slowly",
    "jobs",
    "latency",
    "payload",
    "record",
    "submissions",
]

#: What a record says beside its number.
TEXT = "a line of output, as procedures have them"

#: Seconds between two jobs of an idle system.
_IDLE = 0.01


def payload(number: int) -> dict[str, Any]:
    """Arguments of a call, and its result: small, as most are; different in each call."""
    return {"number": number, "name": "web01.example.net", "flags": [True, False, None], "ratio": 0.25}


def record(number: int) -> dict[str, Any]:
    """A record of a stream."""
    return {"number": number, "text": TEXT}


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise RuntimeError(f"expected {wanted!r}, got {found!r}")


def calls(connect: Callable[[], Callable[[Any], Any]], clients: int, seconds: float) -> Figures:
    """Each client calls as fast as it gets answers, for some seconds.

    Args:
        connect: makes a client; what it returns is given a payload and returns the answer, the same payload.
        clients: how many.
        seconds: how long.

    Returns:
        ``rate``: calls a second of all clients together; ``p50`` and ``p99`` of a call, milliseconds; ``count``: all
        calls that were made, the first of each client included.
    """

    def body(client: int, start: Callable[[], object]) -> tuple[float, list[float]]:
        call = connect()
        _expect(call(payload(0)), payload(0))
        start()
        took: list[float] = []
        began = now = time.monotonic()
        until = began + seconds
        while now < until:
            value = payload(len(took))
            _expect(call(value), value)
            after = time.monotonic()
            took.append(after - now)
            now = after
        return len(took) / (now - began), took

    outcomes = together(clients, body)
    took = [one for _, all_ in outcomes for one in all_]
    return {"rate": sum(rate for rate, _ in outcomes), "count": len(took) + clients, **_quantiles(took)}


def _quantiles(seconds: Sequence[float]) -> Figures:
    return {"p50": 1000 * quantile(seconds, 0.5), "p99": 1000 * quantile(seconds, 0.99)}


class Queue(ABC):
    """A client of a job queue."""

    @abstractmethod
    def submit(self, value: Any) -> Any:
        """Submit the job that returns this value; return its handle."""

    @abstractmethod
    def submit_waiting(self, value: Any) -> Any:
        """Submit a job that nobody starts."""

    def submit_many(self, values: Sequence[Any]) -> Any:
        """Submit such jobs in one request."""
        raise Missing("it takes one job a request")

    @abstractmethod
    def collect(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for the results of jobs."""


def jobs(connect: Callable[[], Queue], clients: int, jobs: int) -> Figures:
    """Clients share in submitting jobs, then each collects the results of its own.

    Args:
        connect: makes a client.
        clients: how many.
        jobs: how many all of them submit.

    Returns:
        ``rate``: jobs a second, from the first submission to the last result; ``count``: all jobs, the first of each
        client included.
    """

    def body(client: int, start: Callable[[], object]) -> tuple[float, float]:
        queue = connect()
        mine = [payload(number) for number in range(client, jobs, clients)]
        queue.collect([queue.submit(payload(0))])
        start()
        began = time.monotonic()
        handles = [queue.submit(value) for value in mine]
        results = queue.collect(handles)
        ended = time.monotonic()
        _expect(results, mine)
        return began, ended

    times = together(clients, body)
    took = max(ended for _, ended in times) - min(began for began, _ in times)
    return {"rate": jobs / took, "count": jobs + clients}


def submissions(connect: Callable[[], Queue], clients: int, seconds: float, batch: int = 0) -> Figures:
    """Each client submits jobs that nobody starts, one after the other, for some seconds.

    Args:
        connect: makes a client.
        clients: how many.
        seconds: how long.
        batch: how many in one request, by `Queue.submit_many`; 0: one, by `Queue.submit_waiting`.

    Returns:
        ``rate``: jobs a second that were accepted.
    """

    def body(client: int, start: Callable[[], object]) -> float:
        queue = connect()
        queue.submit_waiting(payload(0))
        values = [payload(number) for number in range(batch)]
        start()
        count = 0
        began = now = time.monotonic()
        while now < began + seconds:
            if batch:
                queue.submit_many(values)
                count += batch
            else:
                queue.submit_waiting(payload(count))
                count += 1
            now = time.monotonic()
        return count / (now - began)

    return {"rate": sum(together(clients, body))}


def latency(connect: Callable[[], Queue], jobs: int) -> Figures:
    """One job at a time, on a system that has nothing else to do.

    Args:
        connect: makes a client.
        jobs: how many.

    Returns:
        ``p50`` and ``p99`` from before the submission to the result, milliseconds.
    """

    def body(client: int, start: Callable[[], object]) -> Figures:
        queue = connect()
        took = []
        for number in range(jobs + 5):
            value = payload(number)
            time.sleep(_IDLE)
            began = time.monotonic()
            found = queue.collect([queue.submit(value)])
            took.append(time.monotonic() - began)
            _expect(found, [value])
        return _quantiles(took[5:])

    return together(1, body)[0]


def follow(stream: Callable[[int], Iterator[Any]], records: int) -> Figures:
    """A follower reads a stream as fast as it comes.

    Args:
        stream: starts a stream of so many records and gives them.
        records: how many.

    Returns:
        ``rate``: records a second, from the request to the last record.
    """

    def body(client: int, start: Callable[[], object]) -> float:
        for number, found in enumerate(stream(10)):
            _expect(found, record(number))
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
    """A follower reads a stream that has a record now and then.

    Args:
        stream: is given the two others; each record says under ``at`` when it was made, in Unix seconds.
        records: how many.
        pause: seconds between two.

    Returns:
        ``p50`` and ``p99`` from a record's making to its arrival, milliseconds.
    """

    def body(client: int, start: Callable[[], object]) -> Figures:
        took = [time.time() - found["at"] for found in stream(records, pause)]
        _expect(len(took), records)
        return _quantiles(took)

    return together(1, body)[0]
