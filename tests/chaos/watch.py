"""What is looked at while a run lasts, and the quiet after it, in which everything that can end has to end."""

from __future__ import annotations

import asyncio
from typing import Any

from chaos.census import Census
from chaos.ledger import Ledger
from chaos.marks import now
from chaos.system import HOST_LOST_AFTER, System

#: Seconds between two looks, and in the quiet.
_PAUSE, _QUIET_PAUSE = 2.0, 0.3
#: Seconds for which a job may be called running without a process: what is promised, and what a slow machine takes.
_OVERDUE = HOST_LOST_AFTER + 10.0
_MARGIN = 10.0
#: Seconds without any change after which the quiet has failed: no job that goes on by itself is still for so long.
_STILL = 90.0


def token_of(job: dict[str, Any]) -> str:
    """The token of a job in a list."""
    return str(job["call"]["arguments"][0])


class Watch:
    """Looks at the jobs that the dispatcher says have not ended.

    Args:
        system: whom to ask.
        ledger: where broken promises go.
        census: knows which processes live.

    Attributes:
        unended: how many jobs had not ended at the last look.
    """

    def __init__(self, system: System, ledger: Ledger, census: Census) -> None:
        self._system = system
        self._ledger = ledger
        self._census = census
        self._running: dict[str, float] = {}
        self.unended = 0

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(_PAUSE)

    async def _look(self) -> list[dict[str, Any]] | None:
        listed = await self._system.listed("list")
        if listed is None:
            return None
        self.unended = len(listed)
        self._census.look()
        running = {token_of(job) for job in listed if job["time"]["start"] is not None}
        self._running = {token: self._running.get(token, now()) for token in running}
        for token, first in self._running.items():
            self._check(token, first)
        return listed

    def _check(self, token: str, first: float) -> None:
        """A job is running: so its process must be alive, or have been not long ago."""
        life = self._census.main(token)
        if life is not None and life.gone is None:
            return
        since = max(first, life.gone or 0.0) if life is not None else first
        overdue = now() - since - self._system.dispatcher.away_since(since)
        if overdue > _OVERDUE + _MARGIN:
            what = "its process died" if life is not None else "it was first so, without any process"
            self._ledger.break_(2, token, f"it was still called running more than {_OVERDUE:g} s after {what}")

    async def settle(self, clients: asyncio.Task[None]) -> None:
        """Return once all jobs have ended, all slots are free and all clients have been told; or nothing moves."""
        last: object = None
        changed = now()
        while now() - changed < _STILL:
            listed = await self._look()
            queues = await self._system.listed("queue-list")
            if listed == [] and queues == [] and clients.done():
                return
            told = sum(entry.end is not None for entry in self._ledger.entries.values())
            state = listed, queues, len(self._census.living()), told
            if state != last:
                last, changed = state, now()
            await asyncio.sleep(_QUIET_PAUSE)
        self._ledger.break_(2, None, f"nothing has moved for {_STILL:g} s, and not all is over")
        for job in listed or []:
            self._ledger.break_(2, token_of(job), "it has not ended though all faults are healed")
        for queue in queues or []:
            self._ledger.break_(7, None, f"a slot is still taken though all jobs have ended: {queue}")
        for entry in self._ledger.entries.values():
            if any(not follower.ended for follower in entry.followers):
                self._ledger.break_(4, entry.order.token, "a follower was not told the end")
