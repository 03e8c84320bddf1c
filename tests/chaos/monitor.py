"""Checks during the run, and the wait after it, in which all jobs must end."""

from __future__ import annotations

import asyncio
from typing import Any

from chaos.marks import Identity, is_alive, now
from chaos.observations import End, Observations
from chaos.process_tracker import ProcessTracker
from chaos.system import DISCONNECT_TIMEOUT, HOST_TIMEOUT, KILL_GRACE, System

#: Seconds between two checks, during the run and after it.
_PAUSE, _IDLE_PAUSE = 2.0, 0.5
#: Seconds for which a job without a process may be running: the promise, and a margin for a slow machine.
_MAX_DELAY = HOST_TIMEOUT + 10.0
_MARGIN = 10.0
#: Seconds for which a process may live after the end of its call, if the end comes after its exit, and otherwise: a
#: host without contact stops it.
_MAX_AFTER_EXIT, _MAX_ORPHANED = 10.0, DISCONNECT_TIMEOUT + KILL_GRACE + 20.0
#: Seconds without any change after which the wait has failed: every job changes something more often.
_MAX_STILL = 90.0


def token_of(job: dict[str, Any]) -> str:
    """Return the token of a job in a list."""
    return str(job["call"]["arguments"][0])


class Monitor:
    """Checks the jobs that have not ended, as the dispatcher lists them.

    Args:
        system: the system.
        observations: receives violations.
        tracker: has the live processes.

    Attributes:
        unended: number of jobs that had not ended at the last check.
    """

    def __init__(self, system: System, observations: Observations, tracker: ProcessTracker) -> None:
        self._system = system
        self._observations = observations
        self._tracker = tracker
        self._running: dict[str, float] = {}
        self._orphans: set[Identity] = set()
        self.unended = 0

    async def run(self) -> None:
        """Check regularly, until cancelled."""
        while True:
            await self._check_running()
            self._check_orphans()
            await asyncio.sleep(_PAUSE)

    async def _check_running(self) -> list[dict[str, Any]] | None:
        listed = await self._system.list_from_dispatcher("list")
        if listed is None:
            return None
        self.unended = len(listed)
        self._tracker.update()
        running = {token_of(job) for job in listed if job["time"]["start"] is not None}
        self._running = {token: self._running.get(token, now()) for token in running}
        for token, first in self._running.items():
            self._check(token, first)
        return listed

    def _check(self, token: str, first: float) -> None:
        """Check that a running job has a process, or had one not long ago."""
        lifetime = self._tracker.main_process(token)
        if lifetime is not None and lifetime.died_at is None:
            return
        since = max(first, lifetime.died_at or 0.0) if lifetime is not None else first
        overdue = now() - since - self._system.dispatcher.absent_since(since)
        if overdue > _MAX_DELAY + _MARGIN:
            what = "its process died" if lifetime is not None else "its start, without a process"
            self._observations.add_violation(2, token, f"it is still running more than {_MAX_DELAY:g} s after {what}")

    def _check_orphans(self) -> None:
        """Check that no process lives long after the end of its call."""
        for process in self._tracker.living():
            token = self._tracker.lifetimes[process].token
            ended = self._observations.jobs.get(token) or self._observations.direct_calls.get(token)
            if ended is None or ended.ended is None or ended.end == End("failed", "host_lost"):
                continue
            returned = ended.end is not None and ended.end.kind in ("returned", "raised")
            longest = _MAX_AFTER_EXIT if returned else _MAX_ORPHANED
            if now() - ended.ended > longest and is_alive(process):
                what = f"process {process.pid} lives more than {longest:g} s after its call ended as {ended.end}"
                self._observations.add_violation(3, token, what)
                self._orphans.add(process)

    async def wait_until_idle(self, clients: asyncio.Task[None]) -> None:
        """Return when all jobs have ended, all slots are free and all clients are done; or without progress."""
        last: object = None
        changed = now()
        while now() - changed < _MAX_STILL:
            listed = await self._check_running()
            self._check_orphans()
            done = listed == [] and clients.done() and self._orphans.issuperset(self._tracker.living())
            queues = await self._system.list_from_dispatcher("queue-list", "--full") if done else None
            if queues == []:
                return
            end_received = sum(observed.end is not None for observed in self._observations.jobs.values())
            state = listed, queues, len(self._tracker.living()), end_received
            if state != last:
                last, changed = state, now()
            await asyncio.sleep(_IDLE_PAUSE)
        queues = await self._system.list_from_dispatcher("queue-list", "--full")
        self._observations.add_violation(2, None, f"nothing has changed for {_MAX_STILL:g} s, but jobs remain")
        for job in listed or []:
            self._observations.add_violation(2, token_of(job), "it has not ended although all faults are undone")
        for queue in queues or []:
            self._observations.add_violation(7, None, f"a slot is still held although all jobs have ended: {queue}")
        for process in set(self._tracker.living()) - self._orphans:
            token = self._tracker.lifetimes[process].token
            self._observations.add_violation(3, token, f"process {process.pid} lives although all faults are undone")
        for observed in self._observations.jobs.values():
            if any(not follower.ended for follower in observed.followers):
                self._observations.add_violation(4, observed.spec.token, "a follower did not receive the end")
