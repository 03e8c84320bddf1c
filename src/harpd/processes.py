"""Processes as /proc shows them: which belong to a call, and how to signal one without ever hitting another.

A pid may be given to a new process once its owner was reaped; pid and start time together are one process for
ever. A signal goes through a pidfd that was checked against the start time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Process", "Tree", "alive", "send", "snapshot", "start_time"]


@dataclass(frozen=True, slots=True)
class Process:
    """A process at one moment. `start` is its start time in clock ticks since boot."""

    pid: int
    start: int
    parent: int = 0
    group: int = 0
    session: int = 0
    state: str = "R"

    @property
    def identity(self) -> tuple[int, int]:
        """What no other process ever has."""
        return self.pid, self.start


@dataclass(frozen=True, slots=True)
class Tree:
    """A call's processes: by its main process, which leads their session, and by the call's id.

    Attributes:
        pid: the main process.
        start: its start time.
        variable: the environment entry, ``NAME=ID``, that what the call executes inherits.
    """

    pid: int
    start: int
    variable: bytes

    def members(self, processes: Mapping[int, Process], known: Iterable[tuple[int, int]] = ()) -> list[Process]:
        """Which of these processes are the call's, zombies left out.

        Args:
            processes: a `snapshot`.
            known: identities that were found to be the call's before; they and their children still are.
        """
        found = {pid for pid, start in known if pid in processes and processes[pid].start == start}
        main = processes.get(self.pid)
        # A number is not given again while a session has it; a leader with another start time has it anew.
        if main is None or main.start == self.start:
            found |= {p.pid for p in processes.values() if self.pid in (p.session, p.group)}
            found |= {self.pid} & processes.keys()
        found |= {p.pid for p in processes.values() if p.start >= self.start and self._marked(p)}
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

    def _marked(self, process: Process) -> bool:
        try:
            with open(f"/proc/{process.pid}/environ", "rb") as environment:
                return self.variable in environment.read().split(b"\0")
        except OSError:
            return False  # gone, or another user's: its family shows it


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
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the command before may hold anything
    parent, group, session = (int(field) for field in fields[1:4])
    return Process(pid, int(fields[19]), parent, group, session, fields[0].decode())


def start_time(pid: int) -> int:
    """The start time of a process in clock ticks since boot; 0: there is none."""
    process = _read(pid)
    return process.start if process else 0


def alive(identity: tuple[int, int]) -> bool:
    """Whether this very process runs still; a zombie does not."""
    process = _read(identity[0])
    return process is not None and process.start == identity[1] and process.state not in "ZX"


def send(number: signal.Signals, identity: tuple[int, int]) -> bool:
    """Send a signal to this very process; False: it is gone, or not ours to signal."""
    pid, start = identity
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if start_time(pid) != start:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
