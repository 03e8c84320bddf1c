"""RQ: a process forked for each job, as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import redis
import rq

from bench.load import Queue, jobs, latency, submissions
from bench.peers import SETTINGS

#: Seconds.
_PATIENCE = 60


def echo(value: Any) -> Any:
    """The job."""
    return value


class Client(Queue):
    """A client of RQ's."""

    def __init__(self) -> None:
        connection = redis.Redis(port=SETTINGS["redis"])
        self._queue = rq.Queue("work", connection=connection)
        self._waiting = rq.Queue("nobody works on this", connection=connection)

    def submit(self, value: Any) -> Any:
        """Submit a job."""
        return self._queue.enqueue(echo, value)

    def submit_waiting(self, value: Any) -> Any:
        """Submit a job to a queue without workers."""
        return self._waiting.enqueue(echo, value)

    def submit_many(self, values: Sequence[Any]) -> Any:
        """Submit jobs in one pipeline."""
        return self._waiting.enqueue_many([rq.Queue.prepare_data(echo, (value,)) for value in values])

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for results."""
        return [job.latest_result(timeout=_PATIENCE).return_value for job in handles]


WORKS = {
    "jobs": partial(jobs, Client),
    "submissions": partial(submissions, Client),
    "latency": partial(latency, Client),
}
