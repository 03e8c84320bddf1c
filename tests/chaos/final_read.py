"""The last read: the end of every job is requested again, and every stream is read from its first record."""

from __future__ import annotations

import asyncio

import harp
from chaos.monitor import token_of
from chaos.observations import Follower, Observations, ObservedJob, end_of
from chaos.system import System
from harp import aio

#: Number of jobs that are read at the same time.
_AT_ONCE = 12


async def read_all(system: System, observations: Observations) -> None:
    """Complete the observations.

    Args:
        system: the system, without faults; all jobs have ended.
        observations: receives ids that were not returned, ends, stops, numbers of records, and violations.
    """
    listed = await system.list_from_dispatcher("list", "--all", patience=120.0)
    if listed is None:
        observations.add_violation(0, None, "the dispatcher does not reply, although there are no faults")
        return
    known = {job["job"]: token_of(job) for job in listed}
    for observed in observations.jobs.values():
        if observed.id is not None and observed.id not in known:
            observations.add_violation(1, observed.spec.token, f"job {observed.id} was accepted and is not in the list")
    for job_id, token in known.items():
        found = observations.jobs.get(token)
        if found is None:
            observations.add_violation(0, token, f"job {job_id} was never submitted")
        elif found.id is None:
            found.id = job_id
        elif found.id != job_id:
            promise = 5 if found.spec.request_id is None else 8
            observations.add_violation(promise, token, f"it is two jobs, {found.id} and {job_id}")
    turn = asyncio.Semaphore(_AT_ONCE)

    async def ask(observed: ObservedJob) -> None:
        async with turn:
            try:
                await _read_job(system.async_rpc, observations, observed)
            except harp.HarpException as error:
                observations.add_violation(1, observed.spec.token, f"a request about it fails: {error}")

    await asyncio.gather(*(ask(observed) for observed in observations.jobs.values() if observed.id in known))


async def _read_job(rpc: aio.AsyncHarpCaller, observations: Observations, observed: ObservedJob) -> None:
    assert observed.id is not None
    call = rpc.job(observed.id)
    end = end_of(await call.result())
    if end is None:
        return  # `checks` reports a job without an end
    observations.record_end(observed, end)
    if end.kind != "returned":
        observed.stop = (await call.details())["stop"]
    if observed.spec.records is not None:
        reader = Follower(observed.spec, 0)
        async for number, value in call.stream(since=0, numbered=True):
            reader.on_record(number, value)
        observed.records = reader.next
        if reader.problem is not None:
            observations.add_violation(4, observed.spec.token, f"the stored stream: {reader.problem}")
