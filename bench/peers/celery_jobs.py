"""Celery on Redis, as broker and for results. Durable: acknowledged late, so that no job is lost with its worker."""

from __future__ import annotations

from typing import Any

from celery import Celery

from bench.load import SETTINGS, Queue, queue_functions

_URL = f"redis://127.0.0.1:{SETTINGS.get('redis')}/0"

app = Celery("bench", broker=_URL, backend=_URL)
app.conf.broker_connection_retry_on_startup = True
if SETTINGS.get("durable"):
    app.conf.task_acks_late = True
    app.conf.task_reject_on_worker_lost = True


@app.task(name="echo")
def echo(value: Any) -> Any:
    """Return the value."""
    return value


def _connect() -> Queue:
    return Queue(
        submit=echo.delay,
        result=lambda result: result.get(),  # notified; ResultSet.join_native polls twice a second
        submit_waiting=lambda value: echo.apply_async((value,), queue="waiting"),
    )


FUNCTIONS = queue_functions(_connect)
