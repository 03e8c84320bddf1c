"""RQ with its defaults: a process forked for each job."""

from __future__ import annotations

from typing import Any

import redis
import rq

from bench.load import SETTINGS, Queue, queue_functions

#: Seconds to wait for a result.
_TIMEOUT = 60


def echo(value: Any) -> Any:
    """Return the value."""
    return value


def _connect() -> Queue:
    connection = redis.Redis(port=SETTINGS["redis"])
    queue = rq.Queue("work", connection=connection)
    waiting = rq.Queue("waiting", connection=connection)
    return Queue(
        submit=lambda value: queue.enqueue(echo, value),
        result=lambda job: job.latest_result(timeout=_TIMEOUT).return_value,
        submit_waiting=lambda value: waiting.enqueue(echo, value),
        submit_many=lambda values: waiting.enqueue_many([rq.Queue.prepare_data(echo, (one,)) for one in values]),
    )


FUNCTIONS = queue_functions(_connect)
