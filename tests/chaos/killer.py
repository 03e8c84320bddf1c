"""Injects kills: one lane for the dispatcher and one for each host, each lane one kill after the other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from chaos.bystanders import Bystanders
from chaos.faults import History
from chaos.kills import Kill, Place, kills
from chaos.marks import Identity, now, read_stat
from chaos.observations import Observations
from chaos.process_tracker import ProcessTracker
from chaos.schedule import Fault, Kind
from chaos.service import Service
from chaos.system import HOSTS, Host, System

#: The lane of the dispatcher.
_DISPATCHER = "dispatcher"
#: Seconds after which an observed process is killed in any case: it waits, or it needs long for a system call.
_LONGEST = 0.7
#: Seconds between two checks whether a target exists or serves again, and the maximum time for the latter.
_PAUSE, _RECOVERY = 0.05, 60.0
#: Seconds between two kills of a host's supervisor: a launcher waits longer after each of several deaths.
_SUPERVISOR_PAUSE = 11.0


class Tracer:
    """The program that kills processes at system calls."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._replies: dict[int, asyncio.Future[str | None]] = {}
        self._number = 0

    async def start(self) -> None:
        """Start the program."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "chaos.tracer"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            number, killed, where = line.decode().strip().split(" ", 2)
            self._replies.pop(int(number)).set_result(where if int(killed) else None)

    async def kill(self, process: Identity, thread: int, stops: int, longest: float) -> str | None:
        """Kill a process after a number of entries and exits of system calls of a thread; return where, None: not."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._number += 1
        reply: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._replies[self._number] = reply
        request = (self._number, process.pid, process.start, thread, stops, longest)
        self._process.stdin.write((" ".join(map(str, request)) + "\n").encode())
        async with asyncio.timeout(_RECOVERY):
            return await reply

    async def stop(self) -> None:
        """End the program."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()
        if self._task is not None:
            await self._task


class KillInjector:
    """Kills processes of a system.

    Args:
        system: the system.
        tracker: has the processes of calls.
        history: receives the kills.
        observations: receives a violation if a daemon does not serve again.
        bystanders: get the pids of killed processes.
    """

    def __init__(
        self,
        system: System,
        tracker: ProcessTracker,
        history: History,
        observations: Observations,
        bystanders: Bystanders,
    ) -> None:
        self._system = system
        self._tracker = tracker
        self._history = history
        self._observations = observations
        self._bystanders = bystanders
        self._tracer = Tracer()
        self._supervisor_kills: dict[str, float] = {}
        self._left = 0
        self._reused: set[Identity] = set()

    async def run(self, seed: int, count: int) -> None:
        """Kill so many processes, and return when all daemons serve again."""
        self._left = count
        await self._tracer.start()
        reuse = asyncio.create_task(self._reuse_pids_of_calls())
        try:
            async with asyncio.TaskGroup() as group:
                for lane in (_DISPATCHER, *HOSTS):
                    group.create_task(self._run_lane(seed, lane))
        finally:
            reuse.cancel()
            await self._tracer.stop()

    async def _run_lane(self, seed: int, lane: str) -> None:
        for kill in kills(seed, lane, HOSTS):
            if self._left <= 0:
                return
            self._left -= 1
            if not await self._inject(kill, self._system.hosts.get(lane)):
                self._left += 1
                self._history.without_target += 1
                await asyncio.sleep(_PAUSE)
            elif self._left > 0:
                await asyncio.sleep(kill.pause)

    async def _inject(self, kill: Kill, host: Host | None) -> bool:
        match kill.kind:
            case Kind.KILL_DISPATCHER:
                serves: Callable[[], Awaitable[bool]] = lambda: _listens(self._system.port)  # noqa: E731
                return await self._kill_service(kill, None, self._system.dispatcher, serves)
            case Kind.KILL_FRONTEND:
                assert host is not None
                port = host.port
                return await self._kill_service(kill, host, host.frontend, lambda: _listens(port))
            case _:
                assert host is not None
                return await self._kill_on_host(kill, host)

    async def _kill_service(
        self, kill: Kill, host: Host | None, service: Service, serves: Callable[[], Awaitable[bool]]
    ) -> bool:
        process = _identity(service.pid)
        if process is None:
            return False
        service.expect_kill()
        return await self._kill(kill, host, process, serves)

    async def _kill_on_host(self, kill: Kill, host: Host) -> bool:
        statuses = [status for status in await host.statuses() if status["zygote"] is not None]
        if not statuses:
            return False
        status = statuses[int(kill.choice * len(statuses))]
        zygote = _identity(status["zygote"])
        events = self._history.zygotes
        match kill.kind:
            case Kind.KILL_SUPERVISOR:
                if now() < self._supervisor_kills.get(host.name, 0.0) + _SUPERVISOR_PAUSE:
                    return False
                process = _identity(status["supervisor"])
                events = self._history.supervisors
            case Kind.KILL_ZYGOTE:
                process = zygote
            case _:
                process = None if zygote is None else _child(zygote, kill.choice)
                events = self._history.workers
        if process is None:
            return False
        dead = process

        async def serves() -> bool:
            if kill.kind is Kind.KILL_CALL:
                return True
            return any(
                status["accepting"]
                and status["zygote"]
                and dead not in map(_identity, (status["zygote"], status["supervisor"]))
                for status in await host.statuses()
            )  # by identity: a later process may have the same pid

        if kill.kind is Kind.KILL_CALL:
            self._history.killed_calls.add(process)
        killed = await self._kill(kill, host, process, serves, lambda: events.append((host.name, now())))
        if kill.kind is Kind.KILL_SUPERVISOR and killed:
            self._supervisor_kills[host.name] = now()
        return killed

    async def _kill(
        self,
        kill: Kill,
        host: Host | None,
        process: Identity,
        serves: Callable[[], Awaitable[bool]],
        note: Callable[[], None] = lambda: None,
    ) -> bool:
        await asyncio.sleep(kill.delay)
        begin = now()
        note()  # before the kill: a job may end before this task continues
        timed = kill.place is Place.TIME
        thread = process.pid if timed else _thread(process, kill.choice)
        where = await self._tracer.kill(process, thread, 0 if timed else kill.stops, _LONGEST)
        if where is None:
            return False
        note()
        self._bystanders.reuse(process.pid)
        name = "dispatcher" if host is None else host.name
        self._history.injected[kill.kind.value] += 1
        self._history.places.append((begin, f"{kill.kind.value} {name} {kill.place}: {where}"))
        await self._until_serving(kill, name, serves)
        fault = Fault(begin, kill.kind, host.name if host else None, now() - begin, 0.0, kill.choice)
        self._history.outages.append((fault, begin, now()))
        return True

    async def _until_serving(self, kill: Kill, name: str, serves: Callable[[], Awaitable[bool]]) -> None:
        try:
            async with asyncio.timeout(_RECOVERY):
                while not await serves():
                    await asyncio.sleep(_PAUSE)
        except TimeoutError:
            what = f"{name} does not serve {_RECOVERY:g} s after: {kill.kind}"
            self._observations.add_violation(0, None, what)

    async def _reuse_pids_of_calls(self) -> None:
        """Create bystanders with the pids of dead processes of calls."""
        while True:
            for process, lifetime in list(self._tracker.lifetimes.items()):
                if lifetime.died_at is not None and process not in self._reused and read_stat(process.pid) is None:
                    self._reused.add(process)
                    self._bystanders.reuse(process.pid)
            await asyncio.sleep(_PAUSE)


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def _identity(pid: Any) -> Identity | None:
    found = None if pid is None else read_stat(pid)
    return None if found is None or found[0] in "ZX" else Identity(pid, found[1])


def _child(process: Identity, choice: float) -> Identity | None:
    """Return a child of a process: a worker of a zygote."""
    with contextlib.suppress(OSError):
        children = [
            int(pid)
            for task in sorted(os.listdir(f"/proc/{process.pid}/task"))
            for pid in Path(f"/proc/{process.pid}/task/{task}/children").read_text().split()
        ]
        if children:
            return _identity(children[int(choice * len(children))])
    return None


def _thread(process: Identity, choice: float) -> int:
    """Return a thread of a process: in half of the cases its first one."""
    with contextlib.suppress(OSError):
        threads = sorted(map(int, os.listdir(f"/proc/{process.pid}/task")))
        if choice > 0.5 and threads:
            return threads[int((2 * choice - 1) * len(threads))]
    return process.pid
