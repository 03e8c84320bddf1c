"""Injects the faults of a schedule, and undoes each after its duration."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from chaos.marks import Identity, now, read_stat
from chaos.process_tracker import ProcessTracker
from chaos.proxy import Mode
from chaos.schedule import Fault, Kind
from chaos.service import Service
from chaos.system import Host, System
from harpd.processes.process_tree import send_signal

_MEBIBYTE = bytes(1 << 20)
#: Seconds after a full disk in which a start of the dispatcher may still fail.
_LAST_FAILED_START = 10.0


@dataclass
class History:
    """The injected faults, which may explain how jobs end.

    Attributes:
        injected: number of injected faults, by kind.
        without_target: number of faults without a target, such as a kill of a supervisor that does not run.
        killed_calls: processes of calls that were killed.
        supervisors: host and time of each kill of a supervisor.
        zygotes: host and time of each kill of a zygote.
        workers: host and time of each kill of a worker in a failpoint run, also of one that may not have had a call.
        places: time and place of each kill of a failpoint run.
        call_stops: host and time of each end of all calls.
        frontend_stops: host and time of each stop of a frontend.
        outages: each fault with its begin and end.
    """

    injected: Counter[str] = field(default_factory=Counter)
    without_target: int = 0
    killed_calls: set[Identity] = field(default_factory=set)
    supervisors: list[tuple[str, float]] = field(default_factory=list)
    zygotes: list[tuple[str, float]] = field(default_factory=list)
    workers: list[tuple[str, float]] = field(default_factory=list)
    places: list[tuple[float, str]] = field(default_factory=list)
    call_stops: list[tuple[str, float]] = field(default_factory=list)
    frontend_stops: list[tuple[str, float]] = field(default_factory=list)
    outages: list[tuple[Fault, float, float]] = field(default_factory=list)

    def between(self, since: float, to: float, host: str) -> list[tuple[Fault, float, float]]:
        """Return the faults of the host and of the dispatcher in a period, each cut to the period."""
        return [
            (fault, max(begin, since), min(end, to))
            for fault, begin, end in self.outages
            if fault.host in (None, host) and begin <= to and since <= end
        ]


class FaultInjector:
    """Injects faults into a system.

    Args:
        system: the system.
        tracker: knows the processes of calls.
        disk: the separate small file system of the dispatcher's store; None: its disk is never full.
    """

    def __init__(self, system: System, tracker: ProcessTracker, disk: Path | None) -> None:
        self.history = History()
        self._system = system
        self._tracker = tracker
        self._ballast = disk / "ballast" if disk else None
        self._filled = 0
        self._network: dict[str, Fault] = {}

    async def run(self, faults: Iterable[Fault], begin: float) -> None:
        """Inject the faults; return when all are over. When cancelled, faults that last are not undone.

        Args:
            faults: the faults in the order of their times.
            begin: time 0 of the schedule, by the clock of the event loop.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, begin + fault.at - loop.time()))
                group.create_task(self._inject(fault))

    async def _inject(self, fault: Fault) -> None:
        begin = now()
        if await self._carry_out(fault):
            self.history.injected[fault.kind.value] += 1
            self.history.outages.append((fault, begin, now()))
        else:
            self.history.without_target += 1

    async def _carry_out(self, fault: Fault) -> bool:
        """Inject a fault and undo it after its duration. Return False if it had no target."""
        if fault.host is not None:
            return await self._on_host(fault, self._system.hosts[fault.host])
        dispatcher = self._system.dispatcher
        match fault.kind:
            case Kind.KILL_DISPATCHER:
                return await _end(dispatcher, signal.SIGKILL, fault)
            case Kind.RESTART_DISPATCHER:
                return await _end(dispatcher, signal.SIGTERM, fault)
            case Kind.SUSPEND_DISPATCHER:
                return await _suspend(dispatcher, fault)
            case Kind.RELOAD_DISPATCHER:
                return dispatcher.send(signal.SIGHUP)
            case Kind.FULL_DISK:
                return await self._fill(fault)
            case _:
                self._system.step_clock(fault.step)
                return True

    async def _on_host(self, fault: Fault, host: Host) -> bool:
        match fault.kind:
            case Mode():
                return await self._disturb_network(fault, host)
            case Kind.KILL_FRONTEND:
                return await _end(host.frontend, signal.SIGKILL, fault)
            case Kind.RESTART_FRONTEND:
                self.history.frontend_stops.append((host.name, now()))
                return await _end(host.frontend, signal.SIGTERM, fault)
            case Kind.SUSPEND_FRONTEND:
                return await _suspend(host.frontend, fault)
            case Kind.RELOAD_FRONTEND:
                return host.frontend.send(signal.SIGHUP)
            case Kind.END_ALL_CALLS:
                self.history.call_stops.append((host.name, now()))
                return await _end(host.launcher, signal.SIGTERM, fault)
            case Kind.KILL_LAUNCHER:
                return host.launcher.send(signal.SIGKILL)
            case Kind.RESTART_LAUNCHER:
                return await _end(host.launcher, signal.SIGUSR1, fault)
            case Kind.REPLACE_SUPERVISOR:
                return host.launcher.send(signal.SIGHUP)
            case Kind.KILL_CALL:
                return self._kill_call(fault, host)
            case Kind.KILL_ZYGOTE:
                return await self._kill_zygote(fault, host)
            case _:
                return await self._on_supervisor(fault, host)

    async def _disturb_network(self, fault: Fault, host: Host) -> bool:
        assert isinstance(fault.kind, Mode)
        self._network[host.name] = fault
        await host.proxy.set(fault.kind)
        await asyncio.sleep(fault.seconds)
        if self._network.get(host.name) is fault:  # else a later one has taken its place
            await host.proxy.set(Mode.PASS)
        return True

    def _kill_call(self, fault: Fault, host: Host) -> bool:
        tracker = self._tracker
        calls = sorted(
            process
            for process in tracker.living()
            if tracker.lifetimes[process].host == host.name and tracker.lifetimes[process].main
        )
        if not calls:
            return False
        process = calls[int(fault.choice * len(calls))]
        self.history.killed_calls.add(process)
        return send_signal(signal.SIGKILL, process)

    async def _kill_zygote(self, fault: Fault, host: Host) -> bool:
        zygotes = [status["zygote"] for status in await host.statuses() if status["zygote"] is not None]
        if not zygotes or (found := read_stat(pid := zygotes[int(fault.choice * len(zygotes))])) is None:
            return False
        self.history.zygotes.append((host.name, now()))
        return send_signal(signal.SIGKILL, Identity(pid, found[1]))

    async def _on_supervisor(self, fault: Fault, host: Host) -> bool:
        supervisors = await host.supervisors()
        if not supervisors:
            return False
        pid = supervisors[int(fault.choice * len(supervisors))]
        found = read_stat(pid)
        if found is None:
            return False
        supervisor = Identity(pid, found[1])
        if fault.kind is Kind.KILL_SUPERVISOR:
            self.history.supervisors.append((host.name, now()))
            return send_signal(signal.SIGKILL, supervisor)
        if not send_signal(signal.SIGSTOP, supervisor):
            return False
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            send_signal(signal.SIGCONT, supervisor)
        return True

    async def _fill(self, fault: Fault) -> bool:
        if self._ballast is None:
            return False
        self._filled += 1
        begin = now()
        self._system.dispatcher.may_fail_until = math.inf
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(_MEBIBYTE) == len(_MEBIBYTE):
                pass
        await asyncio.sleep(fault.seconds)
        self._system.dispatcher.absences.append((begin, now()))  # it can store no end
        self._filled -= 1
        if not self._filled:
            self._make_room()
        return True

    def _make_room(self) -> None:
        if self._ballast is not None and self._ballast.exists():
            os.truncate(self._ballast, 0)
            self._system.dispatcher.may_fail_until = now() + _LAST_FAILED_START

    async def undo_all(self) -> None:
        """Undo all faults that last."""
        for service in self._system.services:
            service.resume()
        for host in self._system.hosts.values():
            await host.proxy.set(Mode.PASS)
        self._make_room()


async def _end(service: Service, number: signal.Signals, fault: Fault) -> bool:
    if not service.send(number, pause=fault.seconds):
        return False
    if number is signal.SIGTERM:
        service.resume()  # a suspended one would exit later
    await asyncio.sleep(fault.seconds)
    return True


async def _suspend(service: Service, fault: Fault) -> bool:
    if not service.suspend():
        return False
    try:
        await asyncio.sleep(fault.seconds)
    finally:
        service.resume()
    return True
