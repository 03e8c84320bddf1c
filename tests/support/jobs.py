"""Jobs for tests: new ones, and stored ones in the state that a test starts from."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.jsontext import Raw
from harpcaller.jobs import NewJob, State
from harpcaller.store import Store

#: An end for each state that is one; payloads that would not survive decoding.
ENDS: Mapping[State, End] = {
    State.RETURNED: Returned(Raw(b'{"b": 1.10, "a": 100000000000000000000000000000000000000000, "": "\\ud800"}')),
    State.RAISED: Raised("Trouble\ud800", "line\nline \x00", Raw(b'{"class": "T",  "module": null}')),
    State.FAILED: Failed("timeout", "max_exec_time: 3 s are over"),
    State.CANCELLED: Cancelled(),
}


def new_id() -> str:
    return str(uuid.uuid4())


def new_job(host: str = "web01", queue: Any = None, concurrency: int = 1, **attributes: Any) -> NewJob:
    """A job; `queue` is the name as a value, or as `Raw`."""
    name = queue if queue is None or isinstance(queue, Raw) else Raw(json.dumps(queue).encode())
    given = {"id": new_id(), "procedure": "deploy", "arguments": Raw(b"[]"), "timeout": 10.0, "max_exec_time": 60.0}
    return NewJob(host=host, queue=name, concurrency=concurrency, **{**given, **attributes})


async def job_in(store: Store, state: State, now: float = 1.0, **attributes: Any) -> str:
    """Bring a new job to a state, the shortest way; return its id. There must be no other that could start."""
    job = new_job(**attributes)
    await store.add_job(job, now)
    if state is State.QUEUED:
        return job.id
    if state is State.CANCELLED:
        assert await store.cancel_job(job.id, now) is State.QUEUED
        return job.id
    assert [claimed.id for claimed in await store.claim_jobs(now, 1, 1000)] == [job.id]
    if state is not State.RUNNING:
        assert await store.finish_job(job.id, ENDS[state], now)
    return job.id
