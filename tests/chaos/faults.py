"""Carries out a schedule of faults and heals each when its time is over."""

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

from chaos.census import Census
from chaos.marks import Identity, now, stat
from chaos.proxy import Mode
from chaos.schedule import Fault, Kind
from chaos.service import Service
from chaos.system import Host, System
from harpd.processes.process_tree import send_signal

_MEBIBYTE = bytes(1 << 20)
#: Seconds in which a start that found the disk full may still be failing when there is room again.
_LAST_FAILED_START = 10.0


@dataclass
class History:
    """What has been done to the system, as it may explain how jobs end.

    Attributes:
        done: the faults that struck something, by kind.
        missed: how many found nothing to strike: a supervisor that is away can't be killed.
        killed: calls' processes that were killed.
        supervisors: when a supervisor of a host was killed.
        shutdowns: when all calls of a host were told to end.
        gates: when the gate of a host was told to end.
        outages: which fault struck from when to when; those that were over at once are among them.
    """

    done: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    killed: set[Identity] = field(default_factory=set)
    supervisors: list[tuple[str, float]] = field(default_factory=list)
    shutdowns: list[tuple[str, float]] = field(default_factory=list)
    gates: list[tuple[str, float]] = field(default_factory=list)
    outages: list[tuple[Fault, float, float]] = field(default_factory=list)

    def between(self, since: float, to: float, host: str) -> list[tuple[Fault, float, float]]:
        """The faults that struck the host, or the dispatcher, in this time; each no longer than it lasted in it."""
        return [
            (fault, max(begin, since), min(end, to))
            for fault, begin, end in self.outages
            if fault.host in (None, host) and begin <= to and since <= end
        ]


class Injector:
    """Strikes.

    Args:
        system: whom.
        census: knows the calls' processes.
        disk: a small file system of its own that the dispatcher's store is on; None: it is never full.
    """

    def __init__(self, system: System, census: Census, disk: Path | None) -> None:
        self.history = History()
        self._system = system
        self._census = census
        self._ballast = disk / "ballast" if disk else None
        self._filled = 0
        self._network: dict[str, Fault] = {}

    async def run(self, faults: Iterable[Fault], begin: float) -> None:
        """Carry out the faults; return when all are over. When cancelled, faults that last are left as they are.

        Args:
            faults: in the order of their moments.
            begin: the moment 0 of the schedule, of the loop's clock.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(max(0.0, begin + fault.at - loop.time()))
                group.create_task(self._strike(fault))

    async def _strike(self, fault: Fault) -> None:
        begin = now()
        if await self._carry_out(fault):
            self.history.done[fault.kind.value] += 1
            self.history.outages.append((fault, begin, now()))
        else:
            self.history.missed += 1

    async def _carry_out(self, fault: Fault) -> bool:
        """Do it, and undo it when its time is over. False: there was nothing to strike."""
        if fault.host is not None:
            return await self._on_host(fault, self._system.hosts[fault.host])
        dispatcher = self._system.dispatcher
        match fault.kind:
            case Kind.KILL_DISPATCHER:
                return await _end(dispatcher, signal.SIGKILL, fault)
            case Kind.RESTART_DISPATCHER:
                return await _end(dispatcher, signal.SIGTERM, fault)
            case Kind.HALT_DISPATCHER:
                return await _halt(dispatcher, fault)
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
                return await self._spoil(fault, host)
            case Kind.KILL_GATE:
                return await _end(host.gate, signal.SIGKILL, fault)
            case Kind.RESTART_GATE:
                self.history.gates.append((host.name, now()))
                return await _end(host.gate, signal.SIGTERM, fault)
            case Kind.HALT_GATE:
                return await _halt(host.gate, fault)
            case Kind.RELOAD_GATE:
                return host.gate.send(signal.SIGHUP)
            case Kind.RESTART_CALLS:
                self.history.shutdowns.append((host.name, now()))
                return await _end(host.calls, signal.SIGTERM, fault)
            case Kind.KILL_KEEPER:
                return host.calls.send(signal.SIGKILL)
            case Kind.RESTART_KEEPER:
                return await _end(host.calls, signal.SIGUSR1, fault)
            case Kind.NEW_SUPERVISOR:
                return host.calls.send(signal.SIGHUP)
            case Kind.KILL_CALL:
                return self._kill_call(fault, host)
            case _:
                return await self._on_supervisor(fault, host)

    async def _spoil(self, fault: Fault, host: Host) -> bool:
        assert isinstance(fault.kind, Mode)
        self._network[host.name] = fault
        await host.proxy.set(fault.kind)
        await asyncio.sleep(fault.seconds)
        if self._network.get(host.name) is fault:  # else a later one has taken its place
            await host.proxy.set(Mode.PASS)
        return True

    def _kill_call(self, fault: Fault, host: Host) -> bool:
        census = self._census
        calls = sorted(
            process
            for process in census.living()
            if census.lives[process].host == host.name and census.lives[process].main
        )
        if not calls:
            return False
        process = calls[int(fault.choice * len(calls))]
        self.history.killed.add(process)
        return send_signal(signal.SIGKILL, process)

    async def _on_supervisor(self, fault: Fault, host: Host) -> bool:
        supervisors = await host.supervisors()
        if not supervisors:
            return False
        pid = supervisors[int(fault.choice * len(supervisors))]
        found = stat(pid)
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
        self._system.dispatcher.excused = math.inf
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(_MEBIBYTE) == len(_MEBIBYTE):
                pass
        await asyncio.sleep(fault.seconds)
        self._system.dispatcher.away.append((begin, now()))  # it can store no end
        self._filled -= 1
        if not self._filled:
            self._make_room()
        return True

    def _make_room(self) -> None:
        if self._ballast is not None and self._ballast.exists():
            os.truncate(self._ballast, 0)
            self._system.dispatcher.excused = now() + _LAST_FAILED_START

    async def heal(self) -> None:
        """Undo whatever lasts."""
        for service in self._system.services:
            service.resume()
        for host in self._system.hosts.values():
            await host.proxy.set(Mode.PASS)
        self._make_room()


async def _end(service: Service, number: signal.Signals, fault: Fault) -> bool:
    if not service.send(number, pause=fault.seconds):
        return False
    if number is signal.SIGTERM:
        service.resume()  # a halted one would end later, in the middle of something else
    await asyncio.sleep(fault.seconds)
    return True


async def _halt(service: Service, fault: Fault) -> bool:
    if not service.halt():
        return False
    try:
        await asyncio.sleep(fault.seconds)
    finally:
        service.resume()
    return True
