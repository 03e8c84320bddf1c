"""What keeps the store small: jobs that ended long ago are deleted, with their records."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from harpcaller.store import StorageError, Store

__all__ = ["PRUNE_EVERY", "prune", "prune_regularly"]

log = logging.getLogger(__name__)

#: Seconds between two looks for old jobs.
PRUNE_EVERY = 600.0

#: How many jobs are deleted in a step, and the pause after it, in seconds: others' writes come first.
_STEP = 200
_PAUSE = 0.05


async def prune(store: Store, ended_before: float) -> int:
    """Delete the jobs that ended before a time, in small steps.

    Args:
        store: where they are.
        ended_before: Unix seconds.

    Returns:
        How many were deleted.

    Raises:
        StorageError: the store can't; what was deleted before stays deleted.
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
    """Delete old jobs now and then, until cancelled.

    Args:
        store: where they are.
        wall: the wall clock, Unix seconds.
        max_age: gives the age after its end at which a job is deleted, in seconds.
        every: seconds between two looks.
    """
    while True:
        try:
            await prune(store, wall() - max_age())
        except StorageError as error:
            log.error("old jobs can't be deleted now", extra={"error": str(error)})
        await asyncio.sleep(every)
