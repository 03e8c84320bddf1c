"""Deletion of jobs that ended long ago, with their records."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from harpcaller.store import StorageError
from harpcaller.store.sqlite import Store

log = logging.getLogger(__name__)

PRUNE_EVERY = 600.0  #: Seconds between two deletions of old jobs.
_STEP = 200  #: Number of jobs in a step.
_PAUSE = 0.05  #: Seconds between two steps, so that other writes come first.


async def prune(store: Store, ended_before: float) -> int:
    """Delete the jobs that ended before a time in Unix seconds, in small steps; return how many.

    Raises `StorageError` if a step failed; the earlier steps have deleted their jobs.
    """
    pruned = 0
    while deleted := await store.prune_jobs(ended_before, _STEP):
        pruned += deleted
        await asyncio.sleep(_PAUSE)
    if pruned:
        log.info("old jobs deleted", extra={"jobs": pruned})
    return pruned


async def prune_regularly(
    store: Store, wall: Callable[[], float], max_age: Callable[[], float], every: float = PRUNE_EVERY
) -> None:
    """Delete old jobs every `every` seconds, until cancelled.

    `wall` returns the wall clock in Unix seconds, `max_age` the seconds from a job's end to its deletion.
    """
    while True:
        try:
            await prune(store, wall() - max_age())
        except StorageError as error:
            log.error("cannot delete old jobs; retrying later", extra={"error": str(error)})
        await asyncio.sleep(every)
