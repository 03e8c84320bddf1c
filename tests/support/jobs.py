"""Jobs for tests: new jobs, and stored jobs in a given state."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import ENDED, NewJob, Records, State
from harpcaller.store.sqlite import Store

#: An end for each closing state, with payloads that decoding and encoding would change.
ENDS: Mapping[State, End] = {
    State.RETURNED: Returned(Raw(b'{"b": 1.10, "a": 100000000000000000000000000000000000000000, "": "\\ud800"}')),
    State.RAISED: Raised("Trouble\ud800", "line\nline \x00", Raw(b'{"class": "T",  "module": null}')),
    State.FAILED: Failed("timeout", "max_exec_time: 3 s are over"),
    State.CANCELLED: Cancelled(),
}


#: Every state, with and without a slot where both are possible.
STANDS = (
    (State.QUEUED, False),
    (State.RUNNING, True),
    *((state, keep_slot) for state in State if state in ENDED for keep_slot in (False, True)),
)


def new_id() -> str:
    return str(uuid.uuid4())


def new_job(host: str = "web01", queue: Any = None, concurrency: int = 1, **attributes: Any) -> NewJob:
    """Return a job; `queue` is the name as a value or as `Raw`."""
    name = queue if queue is None or isinstance(queue, Raw) else Raw(json.dumps(queue).encode())
    given = {"id": new_id(), "procedure": "deploy", "arguments": Raw(b"[]"), "timeout": 10.0, "max_exec_time": 60.0}
    return NewJob(host=host, queue=name, concurrency=concurrency, **{**given, **attributes})


def records(values: Iterable[bytes], made: float = 2.0) -> Records:
    """Return records with these values and one time."""
    raw = tuple(map(Raw, values))
    return Records(raw, (made,) * len(raw))


async def job_in(store: Store, state: State, now: float = 1.0, *, keep_slot: bool = False, **attributes: Any) -> str:
    """Add a job and bring it to a state; return its id. No other job may be able to start.

    With `keep_slot` an ended job keeps its slot.
    """
    job = new_job(**attributes)
    await store.add_job(job, now)
    if state is State.QUEUED:
        return job.id
    if state is State.CANCELLED and not keep_slot:
        assert await store.cancel_job(job.id, now) is State.QUEUED
        return job.id
    assert [claimed.id for claimed in await store.claim_jobs(now, 1, 1000)] == [job.id]
    if state is State.CANCELLED:
        assert await store.cancel_job(job.id, now) is State.RUNNING
    elif state is not State.RUNNING:
        assert await store.finish_job(job.id, ENDS[state], now, keep_slot=keep_slot)
    return job.id


async def added(store: Store, *, count: int = 1, **attributes: Any) -> list[str]:
    """Add equal jobs; return their ids."""
    ids = []
    for _ in range(count):
        job = new_job(**attributes)
        await store.add_job(job, 1.0)
        ids.append(job.id)
    return ids


async def claimed(store: Store, limit: int = 1000, max_calls_per_host: int = 1000, now: float = 5.0) -> list[str]:
    """Claim jobs; return their ids."""
    return [job.id for job in await store.claim_jobs(now, limit, max_calls_per_host)]
