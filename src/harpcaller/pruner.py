"""Deletion of jobs that ended long ago, with their records, and of old request ids.

Theory of operation: a wrong clock must not delete jobs. The age of a job is therefore not measured to the wall clock,
but to the prune time, which follows the wall clock while both agree. If the wall clock is much later, either the clock
leapt or the dispatcher did not run for a long time. In both cases the prune time advances only while the dispatcher
runs, four times as fast, until it has reached the wall clock. The prune time is stored, and survives restarts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from harpcaller.store import StorageError
from harpcaller.store.sqlite import Store

log = logging.getLogger(__name__)

PRUNE_EVERY = 600.0  #: Seconds between two deletions of old jobs.
REQUEST_ID_TTL = 86400.0  #: Seconds for which a request id is stored, at least. Spec: docs/protocol.md, Request ids.
_STEP = 200  #: Number of jobs in a step.
_PAUSE = 0.05  #: Seconds between two steps, so that other writes come first.
_CATCH_UP = 4.0  #: Seconds by which the prune time advances in a second, after a leap of the clock.
_MAX_LEAP = 86_400.0  #: Seconds that the clock is later than the prune time, above which this is a leap.
_MAX_LEAP_OF_AGE = 0.1  #: The same as a part of `max_age`, if that is less.


class PruneRefused(Exception):
    """Jobs cannot be deleted now. The message has the reason."""


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


class Pruner:
    """Deletes old jobs, regularly and on demand.

    `wall` returns the wall clock in Unix seconds, `max_age` the seconds from a job's end to its deletion; None: never.
    `on_deleted` is called after each deletion.
    """

    def __init__(
        self,
        store: Store,
        wall: Callable[[], float],
        max_age: Callable[[], float | None],
        monotonic: Callable[[], float] = time.monotonic,
        on_deleted: Callable[[], object] = lambda: None,
    ) -> None:
        self._store = store
        self._wall = wall
        self._max_age = max_age
        self._monotonic = monotonic
        self._on_deleted = on_deleted
        self._prune_time: float | None = None
        self._advanced_at = 0.0
        self._leap_logged = False

    async def prune(self, min_age: float | None = None, trust_clock: bool = False) -> int:
        """Delete the jobs that ended more than `min_age` seconds ago (None: `max_age`); return how many.

        With `trust_clock`, a leap of the clock is accepted. Raises `PruneRefused` after a leap, and if there is no age.
        """
        age = self._max_age() if min_age is None else min_age
        if age is None:
            raise PruneRefused("max_age is not set, so that jobs are never deleted; use --age")
        if trust_clock:
            self._prune_time = self._wall()
        leap = await self._advance()
        if leap:
            days = f"{leap / 86_400:.1f} days"
            raise PruneRefused(f"the clock is {days} ahead of the last deletion; if it is right, use --trust-clock")
        return await self._delete(age)

    async def run_regularly(self, every: float = PRUNE_EVERY) -> None:
        """Delete jobs that are older than `max_age` every `every` seconds, until cancelled."""
        while True:
            await self.run_once()
            await asyncio.sleep(every)

    async def run_once(self) -> None:
        """Delete jobs that are older than `max_age`; errors of the storage are logged."""
        try:
            leap = await self._advance()
            if leap and not self._leap_logged:
                log.warning("clock leapt; deleting old jobs later", extra={"seconds": round(leap)})
            self._leap_logged = leap > 0
            await self._delete(self._max_age())
        except StorageError as error:
            log.error("cannot delete old jobs; retrying later", extra={"error": str(error)})

    async def _delete(self, age: float | None) -> int:
        """Delete old request ids, and the jobs that ended `age` seconds before the prune time; store the prune time."""
        assert self._prune_time is not None
        now = min(self._prune_time, self._wall())  # the clock may have been set back
        try:
            pruned = 0 if age is None else await prune(self._store, now - age)
        finally:
            self._on_deleted()
        await self._store.forget_request_ids(now - REQUEST_ID_TTL)
        await self._store.set_prune_time(self._prune_time)  # last: on a full disk it needs the freed space
        return pruned

    async def _advance(self) -> float:
        """Advance the prune time; return how many seconds it is behind a wall clock that has leapt, otherwise 0."""
        if self._prune_time is None:
            self._prune_time = await self._store.get_prune_time() or self._wall()
            self._advanced_at = self._monotonic()
        now, monotonic, age = self._wall(), self._monotonic(), self._max_age()
        elapsed, self._advanced_at = monotonic - self._advanced_at, monotonic
        max_leap = _MAX_LEAP if age is None else min(_MAX_LEAP, _MAX_LEAP_OF_AGE * age)
        if now - self._prune_time > max_leap:
            self._prune_time = min(now, self._prune_time + _CATCH_UP * elapsed)
        if 0 <= now - self._prune_time <= max_leap:
            self._prune_time = now
        return max(0.0, now - self._prune_time)
