"""Injects the faults of a schedule, and undoes each after its duration."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.disturbances import clean, crowd, rewrite_in_pieces
from chaos.marks import Identity, is_alive, now, read_stat
from chaos.process_tracker import ProcessTracker
from chaos.proxy import Mode
from chaos.schedule import Fault, Kind
from chaos.service import Service
from chaos.system import MAX_CONNECTIONS, Host, System
from harp_daemon.watched_file import SETTLE_SECONDS
from harpd.processes.process_tree import send_signal

_MEBIBYTE = bytes(1 << 20)
#: Seconds after a full disk in which a start of the dispatcher may still fail.
_LAST_FAILED_START = 10.0
#: Connections of a crowd beyond the dispatcher's limit.
_CROWD_MARGIN = 60
#: Seconds for a daemon to reply while its log is not read, and for supervisors in a cleaned runtime directory; for
#: one attempt; and between two attempts.
_PATIENCE, _ATTEMPT, _PAUSE = 45.0, 5.0, 0.1
#: Seconds until a dispatcher that has started with an incomplete hosts file uses the complete one.
_REPLACED_AFTER = 10.0
#: Seconds that a measured period may be shorter than the dispatcher's one.
_MARGIN = 0.1


@dataclass
class History:
    """The injected faults, which may explain how jobs end.

    Attributes:
        injected: number of injected faults, by kind.
        without_target: number of faults without a target, for example the kill of a supervisor that does not run.
        killed_calls: processes of calls that were killed.
        supervisors: host and time of each kill of a supervisor.
        zygotes: host and time of each kill of a zygote.
        workers: host and time of each kill of a worker in a failpoint run, even if the worker had no call.
        places: time and place of each kill of a failpoint run.
        call_stops: host and time of each end of all calls.
        frontend_stops: host and time of each stop of a frontend.
        outages: each fault with its begin and end.
        half_hosts: periods in which a dispatcher may have started with an incomplete hosts file that did not change
            for so long that it had to use it.
        problems: problems that a fault has shown immediately, as text.
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
    half_hosts: list[tuple[float, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

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
        tracker: has the processes of calls.
        disk: the separate small file system of the dispatcher's store; None: its disk is never full.
    """

    def __init__(self, system: System, tracker: ProcessTracker, disk: Path | None) -> None:
        self.history = History()
        self._system = system
        self._tracker = tracker
        self._ballast = disk / "ballast" if disk else None
        self._filled = 0
        self._network: dict[str, Fault] = {}
        self._hanging: Counter[str] = Counter()
        self._rewriting = asyncio.Lock()
        #: Each is locked while the supervisors of a host need their runtime directory, or have no files there.
        self._state_files: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

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
            case Kind.LEAVE_DISPATCHER_LOG:
                return await self._leave_logs_unread(fault, [dispatcher], self._dispatcher_replies)
            case Kind.REWRITE_HOSTS_FILE:
                return await self._rewrite_hosts_file(fault)
            case Kind.CROWD:
                return await crowd(self._system.port, MAX_CONNECTIONS + _CROWD_MARGIN, fault.seconds)
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
                async with self._state_files[host.name]:  # the launcher finds the supervisors by their sockets
                    pid = host.launcher.pid
                    self.history.call_stops.append((host.name, now()))
                    ended = await _end(host.launcher, signal.SIGTERM, fault)
                    await self._wait_until(lambda: host.launcher.pid != pid)
                    return ended
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
            case Kind.HANG_LOOKUPS:
                return await self._hang_lookups(fault, host)
            case Kind.LEAVE_HOST_LOGS:
                return await self._leave_logs_unread(fault, [host.frontend, host.launcher], host.serves)
            case Kind.CLEAN_RUNTIME_DIRECTORY:
                return await self._clean_runtime_directory(fault, host)
            case _:
                return await self._on_supervisor(fault, host)

    async def _disturb_network(self, fault: Fault, host: Host) -> bool:
        assert isinstance(fault.kind, Mode)
        self._network[host.name] = fault
        await host.proxy.set(fault.kind)
        await asyncio.sleep(fault.seconds)
        if self._network.get(host.name) is fault:  # else a later one has replaced it
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
        statuses = await host.statuses()
        if not statuses:
            return False
        status = statuses[int(fault.choice * len(statuses))]
        found = read_stat(status["supervisor"])
        if found is None:
            return False
        supervisor = Identity(status["supervisor"], found[1])
        if fault.kind is Kind.KILL_SUPERVISOR:
            async with self._state_files[host.name]:
                self.history.supervisors.append((host.name, now()))
                killed = send_signal(signal.SIGKILL, supervisor)
                await self._wait_until(lambda: not host.state_file(status["instance"]).exists())
                return killed
        if not send_signal(signal.SIGSTOP, supervisor):
            return False
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            send_signal(signal.SIGCONT, supervisor)
        return True

    async def _hang_lookups(self, fault: Fault, host: Host) -> bool:
        self._hanging[host.name] += 1
        self._system.hang_lookups(host.name, True)
        await asyncio.sleep(fault.seconds)
        self._hanging[host.name] -= 1
        if not self._hanging[host.name]:
            self._system.hang_lookups(host.name, False)
        return True

    async def _dispatcher_replies(self) -> bool:
        return await self._system.list_from_dispatcher("list", patience=_ATTEMPT) is not None

    async def _leave_logs_unread(
        self, fault: Fault, services: list[Service], serves: Callable[[], Awaitable[bool]]
    ) -> bool:
        """Leave logs unread; the first of the services must reply before they are read again."""
        for service in services:
            service.leave_log_unread()
        try:
            await asyncio.sleep(fault.seconds)
            await self._check_reply(services[0], serves)
        finally:
            for service in services:
                service.read_log()
        return True

    async def _check_reply(self, service: Service, serves: Callable[[], Awaitable[bool]]) -> None:
        """Note a problem if a service does not reply, unless it is suspended or ends, or its disk is full."""
        pid, last = service.pid, now() + _PATIENCE
        while service.pid == pid is not None and not service.is_suspended and not self._filled:
            if await serves():
                return
            if now() > last:
                self.history.problems.append(f"{service.name} does not reply while nobody reads its log")
                return
            await asyncio.sleep(_PAUSE)

    async def _rewrite_hosts_file(self, fault: Fault) -> bool:
        if self._rewriting.locked():
            return False
        async with self._rewriting:
            file, text = self._system.files.hosts_file, self._system.hosts_text
            periods = await rewrite_in_pieces(file, text, fault.seconds, fault.choice)
        for begin, end in periods:
            if end - begin >= SETTLE_SECONDS - _MARGIN and self._system.dispatcher.was_down(begin, end):
                self.history.half_hosts.append((begin, end + _REPLACED_AFTER))
        return True

    async def _clean_runtime_directory(self, fault: Fault, host: Host) -> bool:
        """Clean a runtime directory; wait until each supervisor has created its files there again."""
        lock = self._state_files[host.name]
        if lock.locked() or not (before := await host.statuses()):
            return False
        async with lock:
            processes = [Identity(pid, found[1]) for pid in map(_pid, before) if (found := read_stat(pid)) is not None]
            clean(host.runtime_directory, fault.choice)
            missing = list(processes)

            async def restored() -> bool:
                replying = await host.supervisors()
                missing[:] = [process for process in missing if is_alive(process) and process.pid not in replying]
                return not missing

            if not await self._wait_until(restored):
                pids = ", ".join(str(process.pid) for process in missing)
                self.history.problems.append(f"{host.name}: supervisors without sockets after a cleaning: {pids}")
        return True

    @staticmethod
    async def _wait_until(condition: Callable[[], bool | Awaitable[bool]]) -> bool:
        """Wait for a condition, for a limited time; return it."""
        last = now() + _PATIENCE
        while now() < last:
            found = condition()
            if await found if isinstance(found, Awaitable) else found:
                return True
            await asyncio.sleep(_PAUSE)
        return False

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
            self._system.hang_lookups(host.name, False)
        self._make_room()


def _pid(status: dict[str, Any]) -> int:
    return int(status["supervisor"])


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
