"""A run, from its start to its report."""

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
from chaos.bystanders import Bystanders
from chaos.checks import Checker
from chaos.clients import Clients
from chaos.direct_clients import DirectClients
from chaos.faults import FaultInjector, History
from chaos.final_read import read_all
from chaos.killer import KillInjector
from chaos.metrics import check_metrics
from chaos.monitor import Monitor
from chaos.observations import Observations
from chaos.process_tracker import ProcessTracker, find_processes
from chaos.schedule import schedule
from chaos.system import HOSTS, System
from chaos.viewers import Viewers

#: Seconds between two lines of progress.
_PROGRESS = 10.0
#: Seconds for the start of all daemons.
_START = 60.0
#: Seconds for the last processes to end after the daemons, and between two checks.
_LAST, _PAUSE = 10.0, 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a run.

    Attributes:
        seed: decides jobs and faults.
        seconds: duration of new jobs and faults.
        kills: number of kills of a failpoint run, which lasts until they are done; 0: another run.
        sabotage: ``none``, or the promise that the dispatcher or a procedure breaks.
        directory: the directory of all files.
        disk: whether the dispatcher's store is on a separate small file system.
    """

    seed: int
    seconds: float
    kills: int
    sabotage: str
    directory: Path
    disk: bool


class Run:
    """A run.

    Attributes:
        observations: what clients received, and the violations.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.observations = Observations()
        self._system = System(plan.directory, plan.seed, plan.sabotage)
        self._tracker = ProcessTracker(self._system.marks)
        disk = plan.directory / "store" if plan.disk else None
        self._injector = FaultInjector(self._system, self._tracker, disk)
        self._monitor = Monitor(self._system, self.observations, self._tracker)
        self._bystanders = Bystanders()
        self._clients = Clients(self._system, self.observations, self._tracker, plan.seed)
        self._direct_clients = DirectClients(self._system, self.observations, plan.seed)
        self._viewers = Viewers(self._system, self.observations, plan.seed)
        self._begin = time.monotonic()

    @property
    def history(self) -> History:
        """The injected faults."""
        return self._injector.history

    async def run(self) -> None:
        """Run and check. All processes have ended when this returns or raises."""
        try:
            await self._bystanders.start()
            await self._system.start(self._bystanders.first)
            await self._until_serving()
            await self._run_faults_and_wait()
            for problem in await self._system.stop():
                self.observations.add_violation(0, None, problem)
            self._check_exits()
            for problem in self.history.problems:
                self.observations.add_violation(0, None, problem)
            await self._check_processes_left()
            await self._bystanders.stop()
            for killed in self._bystanders.killed:
                self.observations.add_violation(3, None, killed)
            self._tracker.update()
            Checker(self.observations, self._tracker, self.history).check()
        finally:
            await self._system.stop()
            await self._bystanders.stop()
            for pid in find_processes(self._plan.directory):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def _until_serving(self) -> None:
        async with asyncio.timeout(_START):
            while await self._system.list_from_dispatcher("list") is None or not await self._hosts_serve():
                await asyncio.sleep(_PAUSE)

    async def _hosts_serve(self) -> bool:
        supervisors = await asyncio.gather(*(host.supervisors() for host in self._system.hosts.values()))
        return all(supervisors)

    async def _run_faults_and_wait(self) -> None:
        plan = self._plan
        loop = asyncio.get_running_loop()
        self._begin = time.monotonic()
        tracker = asyncio.create_task(self._tracker.run())
        monitor = asyncio.create_task(self._monitor.run())
        progress = asyncio.create_task(self._progress())
        viewers = asyncio.create_task(self._viewers.run())
        clients = asyncio.create_task(self._run_clients())
        if plan.kills:
            killer = KillInjector(self._system, self._tracker, self.history, self.observations, self._bystanders)
            faults_task = duration = asyncio.create_task(killer.run(plan.seed, plan.kills))
        else:
            faults = schedule(plan.seed, plan.seconds, HOSTS)
            faults_task = asyncio.create_task(self._injector.run(faults, loop.time()))
            duration = asyncio.create_task(asyncio.sleep(plan.seconds))
        tasks = {tracker, monitor, progress, viewers, clients, faults_task, duration}
        try:
            await _first_failure(duration, tasks - {duration})
            self._clients.stop()
            self._direct_clients.stop()
            await _first_failure(faults_task, tasks - {faults_task})
            await self._injector.undo_all()
            monitor.cancel()
            await _first_failure(self._monitor.wait_until_idle(clients), {tracker, progress, viewers})
            clients.cancel()
            await read_all(self._system, self.observations)
            await self._viewers.check_last_events()
            viewers.cancel()
            await check_metrics(self._system, self.observations)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_clients(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._clients.run())
            if self._plan.kills:  # a disturbed network is not in the way of direct calls
                group.create_task(self._direct_clients.run())

    async def _progress(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS)
            jobs = [job for job in self.observations.jobs.values() if job.id is not None]
            ended = sum(job.end is not None for job in jobs)
            print(
                f"{time.monotonic() - self._begin:5.0f} s: {len(jobs)} jobs ({ended} ended for their clients, "
                f"{self._monitor.unended} not ended), {len(self._tracker.living())} processes, "
                f"{self.history.injected.total()} faults, {len(self.observations.violations)} broken promises",
                flush=True,
            )

    def _check_exits(self) -> None:
        for service in self._system.services:
            for death in service.unexpected_exits:
                self.observations.add_violation(0, None, death)

    async def _check_processes_left(self) -> None:
        """Check that no process of a call remains after all daemons have ended."""
        last = time.monotonic() + _LAST
        while (left := find_processes(self._plan.directory)) and time.monotonic() < last:
            await asyncio.sleep(_PAUSE)
        for pid in left:
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                self.observations.add_violation(
                    3, None, f"process {pid} is left after all daemons have ended: {command}"
                )

    def report(self) -> None:
        """Print the report."""
        plan = self._plan
        faults = f"{plan.kills} kills" if plan.kills else f"{plan.seconds:g} s of faults"
        print(f"seed {plan.seed}, {faults}, {time.monotonic() - self._begin:.0f} s in all")
        for line in report.table(self.observations, self._tracker):
            print(line)
        for line in report.counts(self.observations, self.history):
            print(line)
        print(f"viewers: {self._viewers.walks} lists, {self._viewers.events} events")
        if self._bystanders.reused:
            print(f"bystanders: {self._bystanders.reused} got the pid of a process that had died")
        for line in report.violations(self.observations, self.history, plan.directory):
            print(line)


async def _first_failure(awaited: Awaitable[None], tasks: set[asyncio.Task[None]]) -> None:
    """Wait for an awaitable. If one of the tasks fails first, raise its exception."""
    main = asyncio.ensure_future(awaited)
    pending = tasks | {main}
    while not main.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
