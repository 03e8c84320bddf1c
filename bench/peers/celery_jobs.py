"""Celery on Redis, as broker and for results. Durable: acknowledged late, so that a worker's death loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from celery import Celery

from bench.load import Queue, jobs, latency, submissions
from bench.peers import SETTINGS

_URL = f"redis://127.0.0.1:{SETTINGS.get('redis')}/0"

app = Celery("bench", broker=_URL, backend=_URL)
app.conf.broker_connection_retry_on_startup = True
if SETTINGS.get("durable"):
    app.conf.task_acks_late = True
    app.conf.task_reject_on_worker_lost = True


@app.task(name="echo")
def echo(value: Any) -> Any:
    """The job."""
    return value


class Client(Queue):
    """A client of Celery's."""

    def submit(self, value: Any) -> Any:
        """Submit a job."""
        return echo.delay(value)

    def submit_waiting(self, value: Any) -> Any:
        """Submit a job to a queue without workers."""
        return echo.apply_async((value,), queue="waiting")

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for results."""
        return [result.get() for result in handles]  # each is told; ResultSet.join_native looks twice a second


WORKS = {
    "jobs": partial(jobs, Client),
    "submissions": partial(submissions, Client),
    "latency": partial(latency, Client),
}
