"""A run from its start to its verdict."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from chaos import report
from chaos.census import Census, strays
from chaos.clients import Clients
from chaos.faults import History, Injector
from chaos.judge import Judge
from chaos.ledger import Ledger
from chaos.schedule import schedule
from chaos.sweep import sweep
from chaos.system import HOSTS, System
from chaos.watch import Watch

#: Seconds between two lines of progress.
_PROGRESS = 10.0
#: Seconds for the daemons to serve at the start.
_START = 60.0
#: Seconds for the last processes to be gone after the daemons have ended, and between two looks.
_LAST, _PAUSE = 10.0, 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run.

    Attributes:
        seconds: for how long there are new jobs and faults.
        sabotage: ``none``, or what the dispatcher does wrong.
        directory: where everything lies.
        disk: whether the dispatcher's store is on a small file system of its own.
    """

    seed: int
    seconds: float
    sabotage: str
    directory: Path
    disk: bool


class Run:
    """A run.

    Attributes:
        ledger: what clients were told, and the broken promises.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.ledger = Ledger()
        self._system = System(plan.directory, plan.seed, plan.sabotage)
        self._census = Census(self._system.marks)
        disk = plan.directory / "store" if plan.disk else None
        self._injector = Injector(self._system, self._census, disk)
        self._watch = Watch(self._system, self.ledger, self._census)
        self._clients = Clients(self._system, self.ledger, self._census, plan.seed)
        self._begin = time.monotonic()

    @property
    def history(self) -> History:
        """What was done to the system."""
        return self._injector.history

    async def run(self) -> None:
        """Run, and judge. Whatever happens, all processes have ended when this returns."""
        try:
            await self._system.start()
            await self._until_serving()
            await self._storm_and_quiet()
            for wrong in await self._system.stop():
                self.ledger.break_(0, None, wrong)
            self._note_deaths()
            await self._check_strays()
            self._census.look()
            Judge(self.ledger, self._census, self.history).judge()
        finally:
            await self._system.stop()
            for pid in strays(self._plan.directory):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def _until_serving(self) -> None:
        async with asyncio.timeout(_START):
            while await self._system.listed("list") is None or not await self._hosts_serve():
                await asyncio.sleep(_PAUSE)

    async def _hosts_serve(self) -> bool:
        supervisors = await asyncio.gather(*(host.supervisors() for host in self._system.hosts.values()))
        return all(supervisors)

    async def _storm_and_quiet(self) -> None:
        plan = self._plan
        faults = schedule(plan.seed, plan.seconds, HOSTS)
        loop = asyncio.get_running_loop()
        self._begin = time.monotonic()
        census = asyncio.create_task(self._census.run())
        watch = asyncio.create_task(self._watch.run())
        progress = asyncio.create_task(self._progress())
        clients = asyncio.create_task(self._clients.run())
        storm = asyncio.create_task(self._injector.run(faults, loop.time()))
        tasks = {census, watch, progress, clients, storm}
        try:
            await _first_failure(asyncio.sleep(plan.seconds), tasks)
            self._clients.stop()
            await _first_failure(storm, tasks - {storm})
            await self._injector.heal()
            watch.cancel()
            await _first_failure(self._watch.settle(clients), {census, progress})
            clients.cancel()
            await sweep(self._system, self.ledger)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _progress(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS)
            entries = [entry for entry in self.ledger.entries.values() if entry.id is not None]
            ended = sum(entry.end is not None for entry in entries)
            print(
                f"{time.monotonic() - self._begin:5.0f} s: {len(entries)} jobs ({ended} known to have ended, "
                f"{self._watch.unended} not), {len(self._census.living())} processes, "
                f"{self.history.done.total()} faults, {len(self.ledger.broken)} broken promises",
                flush=True,
            )

    def _note_deaths(self) -> None:
        for service in self._system.services:
            for death in service.deaths:
                self.ledger.break_(0, None, death)

    async def _check_strays(self) -> None:
        """All daemons have ended in order: nothing may be left of any call."""
        last = time.monotonic() + _LAST
        while (left := strays(self._plan.directory)) and time.monotonic() < last:
            await asyncio.sleep(_PAUSE)
        for pid in left:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                self.ledger.break_(3, None, f"process {pid} is left after all daemons have ended: {command}")

    def report(self) -> None:
        """Print what became of it."""
        plan = self._plan
        print(f"seed {plan.seed}, {plan.seconds:g} s of faults, {time.monotonic() - self._begin:.0f} s in all")
        for line in report.table(self.ledger, self._census):
            print(line)
        for line in report.counts(self.ledger, self.history):
            print(line)
        for line in report.broken(self.ledger, self.history, plan.directory):
            print(line)


async def _first_failure(awaited: Awaitable[None], tasks: set[asyncio.Task[None]]) -> None:
    """Wait for something, or until one of the tasks, which are not to end before, fails: then raise what it raised."""
    main = asyncio.ensure_future(awaited)
    pending = tasks | {main}
    while not main.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
