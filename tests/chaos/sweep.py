"""The sweep at the end: every job is asked once more for its end, every stream is read from its first record."""

from __future__ import annotations

import asyncio

import harp
from chaos.ledger import Entry, Follower, Ledger, end_of
from chaos.system import System
from chaos.watch import token_of
from harp import aio

#: How many are asked at once.
_AT_ONCE = 12


async def sweep(system: System, ledger: Ledger) -> None:
    """Complete the ledger.

    Args:
        system: quiet, all jobs ended.
        ledger: gets ids that were never given out, ends, stops, numbers of records; and what is wrong with them.
    """
    listed = await system.listed("list", "--all", patience=120.0)
    if listed is None:
        ledger.break_(0, None, "the dispatcher does not answer in the quiet")
        return
    known = {job["job"]: token_of(job) for job in listed}
    for entry in ledger.entries.values():
        if entry.id is not None and entry.id not in known:
            ledger.break_(1, entry.order.token, f"job {entry.id} was accepted and is not in the list")
    for job_id, token in known.items():
        found = ledger.entries.get(token)
        if found is None:
            ledger.break_(0, token, f"job {job_id} was never asked for")
        elif found.id is None:
            found.id = job_id
        elif found.id != job_id:
            ledger.break_(5, token, f"it was submitted once and became two jobs, {found.id} and {job_id}")
    turn = asyncio.Semaphore(_AT_ONCE)

    async def ask(entry: Entry) -> None:
        async with turn:
            try:
                await _ask(system.async_rpc, ledger, entry)
            except harp.HarpException as error:
                ledger.break_(1, entry.order.token, f"it can't be asked about in the quiet: {error}")

    await asyncio.gather(*(ask(entry) for entry in ledger.entries.values() if entry.id in known))


async def _ask(rpc: aio.AsyncHarpCaller, ledger: Ledger, entry: Entry) -> None:
    assert entry.id is not None
    call = rpc.job(entry.id)
    end = end_of(await call.result())
    if end is None:
        return  # that it has not ended is said elsewhere
    ledger.tell(entry, end)
    if end.kind != "returned":
        entry.stop = (await call.details())["stop"]
    if entry.order.records is not None:
        reader = Follower(entry.order, 0)
        async for number, value in call.stream(since=0, numbered=True):
            reader.take(number, value)
        entry.records = reader.next
        if reader.wrong is not None:
            ledger.break_(4, entry.order.token, f"in the store {reader.wrong}")
