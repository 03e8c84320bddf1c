"""The viewers: they walk through lists of jobs and read events while everything dies, and compare what they see.

- A list has each job whose submission was acknowledged before it began, once, in the order of submission; so it has
  over kills of the dispatcher between two pages.
- A job that a viewer has seen ended stays as it ended, in every later list or event that this viewer gets.
- After the last event, no reader of events shows a job that has ended as one that has not.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx

import harp
from chaos.observations import Observations
from chaos.system import System
from harp import aio

#: Viewers of lists, and readers of events.
_VIEWERS, _READERS = 3, 3
#: Seconds before a viewer looks again, or repeats a request; for the last events; and of a connection without a byte.
_PAUSE, _RETRY, _LAST, _SILENCE = 1.0, 0.3, 20.0, 60.0
_OPEN = ("queued", "running")


class Viewers:
    """All viewers of a run.

    Attributes:
        walks: number of lists that were read to their end.
        events: number of events that were read.
    """

    def __init__(self, system: System, observations: Observations, seed: int) -> None:
        self._system = system
        self._observations = observations
        self._seed = seed
        self._readers: list[dict[str, str]] = []
        self.walks = self.events = 0

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(_VIEWERS):
                group.create_task(self._view(random.Random(f"{self._seed}/viewer/{number}")))
            for _ in range(_READERS):
                shown: dict[str, str] = {}
                self._readers.append(shown)
                group.create_task(self._read_events(shown))

    async def check_last_events(self) -> None:
        """Wait until no reader shows a job that has not ended: all jobs have."""
        try:
            async with asyncio.timeout(_LAST):
                while any(state in _OPEN for shown in self._readers for state in shown.values()):
                    await asyncio.sleep(_RETRY)
        except TimeoutError:
            for shown in self._readers:
                late = [job_id for job_id, state in shown.items() if state in _OPEN]
                self._report(f"a reader of events shows {len(late)} jobs as not ended: {', '.join(late[:3])}")
        if not self.walks or not self.events:
            self._report(f"viewers have read {self.walks} lists and {self.events} events")

    def _report(self, problem: str, promise: int = 0) -> None:
        self._observations.add_violation(promise, None, f"viewers: {problem}")

    def _check_state(self, ended_before: dict[str, str], job_id: str, state: str) -> None:
        ended = ended_before.get(job_id)
        if state not in _OPEN:
            ended_before[job_id] = state
        if ended is not None and ended != state:
            self._report(f"job {job_id} had ended as {ended}, and is shown as {state}")

    # Lists.

    async def _view(self, rng: random.Random) -> None:
        rpc = aio.AsyncHarpCaller("127.0.0.1", self._system.port, token=self._system.viewer_token, reconnect=5.0)
        ended: dict[str, str] = {}
        async with rpc:
            while True:
                known = {job.id for job in self._observations.jobs.values() if job.id is not None}
                found = await self._walk(rpc, rng, ended)
                if lacking := known.difference(found):
                    self._report(f"a list has not {len(lacking)} acknowledged jobs: {min(lacking)}", 1)
                if len(set(found)) != len(found):
                    self._report("a list has a job twice")
                self.walks += 1
                await asyncio.sleep(_PAUSE)

    async def _walk(self, rpc: aio.AsyncHarpCaller, rng: random.Random, ended: dict[str, str]) -> list[str]:
        """Return the ids of all jobs, in pages of random length."""
        oldest_first = rng.random() < 0.5
        found: list[str] = []
        cursor: str | None = None
        while True:
            page = rpc.jobs(oldest_first=oldest_first, limit=rng.choice((1, 7, 100, 500)), cursor=cursor)
            try:
                jobs = await page.all()
            except harp.CommunicationError:
                await asyncio.sleep(_RETRY)
                continue
            for job in jobs:
                self._check_state(ended, job.id, job.state)
            found += [job.id for job in jobs]
            if page.cursor is None:
                return found
            cursor = page.cursor

    # Events.

    async def _read_events(self, shown: dict[str, str]) -> None:
        """Keep the states of the jobs that events have shown."""
        last: str | None = None
        ended: dict[str, str] = {}
        while True:
            headers = {"Accept": "application/jsonl", "Authorization": f"Bearer {self._system.viewer_token}"}
            if last is not None:
                headers["Last-Event-ID"] = last
            url = f"http://127.0.0.1:{self._system.http_port}/api/v1/events"
            try:
                async with httpx.AsyncClient(timeout=_SILENCE) as client:
                    async with client.stream("GET", url, headers=headers) as response:
                        async for line in response.aiter_lines():
                            if line.startswith("{"):
                                last = self._on_event(json.loads(line), shown, ended) or last
            except httpx.HTTPError:
                pass
            await asyncio.sleep(_RETRY)

    def _on_event(self, event: dict[str, Any], shown: dict[str, str], ended: dict[str, str]) -> str | None:
        """Handle an event; return its id."""
        self.events += 1
        data = event.get("data") or {}
        if event["event"] == "reset" or data.get("more"):
            shown.clear()
        elif event["event"] == "jobs":
            for row in data["rows"]:
                self._check_state(ended, row["job"], row["state"])
                shown[row["job"]] = row["state"]
            for job_id in data["left"]:
                shown.pop(job_id, None)
        identifier = event.get("id")
        return None if identifier is None else str(identifier)
