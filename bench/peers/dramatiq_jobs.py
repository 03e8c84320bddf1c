"""Dramatiq on Redis, for messages and for results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from bench.load import Queue, jobs, latency, submissions
from bench.peers import SETTINGS

#: Milliseconds.
_PATIENCE = 60_000

_URL = f"redis://127.0.0.1:{SETTINGS.get('redis')}/0"

broker = RedisBroker(url=_URL)
broker.add_middleware(Results(backend=RedisBackend(url=_URL)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def echo(value: Any) -> Any:
    """The job."""
    return value


@dramatiq.actor(store_results=True, queue_name="waiting")
def wait(value: Any) -> Any:
    """The job that nobody starts."""
    return value


class Client(Queue):
    """A client of Dramatiq's."""

    def submit(self, value: Any) -> Any:
        """Submit a job."""
        return echo.send(value)

    def submit_waiting(self, value: Any) -> Any:
        """Submit a job to a queue without workers."""
        return wait.send(value)

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for results."""
        return [message.get_result(block=True, timeout=_PATIENCE) for message in handles]


WORKS = {
    "jobs": partial(jobs, Client),
    "submissions": partial(submissions, Client),
    "latency": partial(latency, Client),
}
