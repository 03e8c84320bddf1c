"""Dramatiq on Redis, for messages and for results."""

from __future__ import annotations

from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from bench.load import SETTINGS, Queue, queue_functions

#: Milliseconds to wait for a result.
_TIMEOUT = 60_000

_URL = f"redis://127.0.0.1:{SETTINGS.get('redis')}/0"

broker = RedisBroker(url=_URL)
broker.add_middleware(Results(backend=RedisBackend(url=_URL)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def echo(value: Any) -> Any:
    """Return the value."""
    return value


@dramatiq.actor(store_results=True, queue_name="waiting")
def wait(value: Any) -> Any:
    """Return the value; no worker serves this queue."""
    return value


def _connect() -> Queue:
    return Queue(echo.send, lambda message: message.get_result(block=True, timeout=_TIMEOUT), wait.send)


FUNCTIONS = queue_functions(_connect)
