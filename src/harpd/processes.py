"""Processes as /proc shows them: which belong to a call, and how to signal one without ever hitting another.

A pid may be given to a new process once its owner was reaped; pid and start time together are one process until
the system starts anew. A signal goes through a pidfd that was checked against the start time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from harpd.cgroup import Cgroup
from harpd.mark import entry

__all__ = ["Process", "Tree", "send", "snapshot", "start_time"]


_MARK = entry("")


@dataclass(frozen=True)
class Process:
    """A process at one moment. `start` is its start time in clock ticks since boot, `command` its name for itself."""

    pid: int
    start: int
    parent: int = 0
    group: int = 0
    session: int = 0
    state: str = "R"
    command: str = ""

    @property
    def identity(self) -> tuple[int, int]:
        """What no other process has before the system starts anew."""
        return self.pid, self.start

    @property
    def is_marked(self) -> bool:
        """Whether it carries some call's mark."""
        return any(found.startswith(_MARK) and not found.startswith(_MARK + b"-") for found in self.environment)

    @cached_property
    def environment(self) -> frozenset[bytes]:
        """The entries that it was executed with, as far as we may know them; looked at once."""
        try:
            with open(f"/proc/{self.pid}/environ", "rb") as file:
                return frozenset(file.read().split(b"\0"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return frozenset()


@dataclass(frozen=True, slots=True)
class Tree:
    """A call's processes: by its main process, which leads their session, and by the call's mark.

    Attributes:
        pid: the main process.
        start: its start time.
        mark: the environment entry that what the call forks and executes inherits, see `harpd.mark`.
        group: its cgroup, which nothing of the call can leave; None: it has none.
    """

    pid: int
    start: int
    mark: bytes
    group: Cgroup | None = None

    def members(
        self, processes: Mapping[int, Process], known: Iterable[tuple[int, int]] = (), late: bool = False
    ) -> list[Process]:
        """Which of these processes are the call's, zombies left out.

        Args:
            processes: a `snapshot`.
            known: identities that were found to be the call's before; they and their children still are.
            late: nobody has watched the call for a while. Its session's number may be another session's by now that
                has lost its leader, too: then only the mark counts.
        """
        found = {pid for pid, start in known if pid in processes and processes[pid].start == start}
        main = processes.get(self.pid)
        # A number is not given again while a session has it; a leader with another start time has it anew.
        if main.start == self.start if main is not None else not late:
            found |= {p.pid for p in processes.values() if self.pid in (p.pid, p.session, p.group)}
        found |= {p.pid for p in processes.values() if p.start >= self.start and self.mark in p.environment}
        if self.group is not None:
            found |= self.group.pids() & processes.keys()
        children: dict[int, list[int]] = {}
        for process in processes.values():
            children.setdefault(process.parent, []).append(process.pid)
        waiting = list(found)
        while waiting:
            for child in children.get(waiting.pop(), ()):
                if child not in found:
                    found.add(child)
                    waiting.append(child)
        return [processes[pid] for pid in found if processes[pid].state not in "ZX"]


def snapshot() -> dict[int, Process]:
    """All processes of this moment, by pid."""
    return {process.pid: process for process in _all()}


def _all() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdecimal():
            process = _read(int(name))
            if process is not None:
                yield process


def _read(pid: int) -> Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            text = stat.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    end = text.rindex(b")")  # the command before may hold anything
    fields = text[end + 2 :].split()
    parent, group, session = (int(field) for field in fields[1:4])
    command = text[text.index(b"(") + 1 : end].decode("utf-8", "backslashreplace")
    return Process(pid, int(fields[19]), parent, group, session, fields[0].decode(), command)


def start_time(pid: int) -> int:
    """The start time of a process in clock ticks since boot; 0: there is none."""
    process = _read(pid)
    return process.start if process else 0


def send(number: signal.Signals, identity: tuple[int, int]) -> bool:
    """Send a signal to this very process; False: it is gone, or not ours to signal."""
    pid, start = identity
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if start_time(pid) != start:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.close(descriptor)
    return True
