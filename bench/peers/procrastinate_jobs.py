"""Procrastinate on PostgreSQL. It keeps no results: the task writes its own into a table, which the caller reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import psycopg
from procrastinate import App, PsycopgConnector
from psycopg.types.json import Jsonb

from bench.clients import Figures
from bench.load import Queue, jobs, latency, submissions
from bench.peers import SETTINGS

_URL = SETTINGS.get("postgres")

#: Seconds between two looks for results: at first, and at most.
_LOOK, _LONGEST_LOOK = 0.001, 0.02

app = App(connector=PsycopgConnector(conninfo=_URL))


@app.task(name="echo", pass_context=True)
async def echo(context: Any, value: Any) -> None:
    """The job."""
    query = "INSERT INTO results (job, value) VALUES (%(job)s, %(value)s)"
    await app.connector.execute_query_async(query, job=context.job.id, value=Jsonb(value))


class Client(Queue):
    """A client of Procrastinate's."""

    def __init__(self) -> None:
        app.open()
        self._results = psycopg.connect(_URL, autocommit=True)

    def submit(self, value: Any) -> Any:
        """Submit a job."""
        return echo.defer(value=value)

    def submit_waiting(self, value: Any) -> Any:
        """Submit a job to a queue without workers."""
        return echo.configure(queue="waiting").defer(value=value)

    def submit_many(self, values: Sequence[Any]) -> Any:
        """Submit jobs in one statement."""
        return echo.configure(queue="waiting").batch_defer(*({"value": value} for value in values))

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for results."""
        left, found, pause = list(handles), dict[int, Any](), _LOOK
        while left:
            rows = self._results.execute("SELECT job, value FROM results WHERE job = ANY(%s)", (left,)).fetchall()
            found.update(rows)
            if rows:
                left = [job for job in left if job not in found]
            elif left:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_LOOK)
        return [found[job] for job in handles]


def prepare() -> Figures:
    """Make the tables, in place of those of the run before."""
    with psycopg.connect(_URL) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    with app.open():
        app.schema_manager.apply_schema()
    with psycopg.connect(_URL) as connection:
        connection.execute("CREATE TABLE results (job bigint PRIMARY KEY, value jsonb NOT NULL)")
    return {}


WORKS = {
    "prepare": prepare,
    "jobs": partial(jobs, Client),
    "submissions": partial(submissions, Client),
    "latency": partial(latency, Client),
}
