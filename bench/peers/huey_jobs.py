"""Huey: on Redis as it comes, or on SQLite with every commit synced."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from huey import RedisHuey, SqliteHuey

from bench.load import Queue, jobs, latency, submissions
from bench.peers import SETTINGS

#: Seconds between two looks for a result, at most. Huey's own is 1, which is no use to who waits.
_LOOK = 0.002


def _make(name: str) -> Any:
    if "file" in SETTINGS:
        return SqliteHuey(name, filename=SETTINGS["file"], fsync=True)
    return RedisHuey(name, port=SETTINGS["redis"], notify_result=True)


huey = _make("work")
waiting = _make("nobody works on this")


@huey.task()
def echo(value: Any) -> Any:
    """The job."""
    return value


@waiting.task()
def wait(value: Any) -> Any:
    """The job that nobody starts."""
    return value


class Client(Queue):
    """A client of Huey's."""

    def submit(self, value: Any) -> Any:
        """Submit a job."""
        return echo(value)

    def submit_waiting(self, value: Any) -> Any:
        """Submit a job to a queue without workers."""
        return wait(value)

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for results."""
        return [handle.get(blocking=True, max_delay=_LOOK) for handle in handles]


WORKS = {
    "jobs": partial(jobs, Client),
    "submissions": partial(submissions, Client),
    "latency": partial(latency, Client),
}
