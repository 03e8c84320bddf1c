"""Processes as /proc shows them: which belong to a call, and how to signal one without ever hitting another.

A pid may be given to a new process once its owner was reaped; pid and start time together are one process until
the system starts anew. A signal goes through a pidfd that was checked against the start time.

When a look proves something
============================

/proc is listed first and read then, and processes go on meanwhile. One that forks and exits without pause (a hopper) is
listed under some number, for numbers are given in turn and /proc is listed in their order; but when that number is
read its process may be gone, and its child is not in the list. So a look lists again until everything that a list has
brought was read alive: then it is *whole*, and whatever is not in it did not live at the moment of its last list. Whose
parent has ended meanwhile is read again, for it has another parent by now. Only processes that end within a fraction
of a millisecond make a look fail to become whole; on a busy system the second list has few that are new.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

from harpd.processes.cgroup import Cgroup
from harpd.processes.cookie import find_cookies
from harpd.processes.procfs import read_stat, start_time

__all__ = ["CallTree", "Process", "Snapshot", "has_possible_escapes", "kill_group", "send_signal", "take_snapshot"]

#: So often processes are listed before a look is given up as not whole.
_MOST_LISTS = 8
#: Flags of a process, as the kernel has them: it is on its way out; it is a thread of the kernel's own.
_EXITING, _KERNEL_THREAD = 0x4, 0x200000


@dataclass(frozen=True, slots=True)
class Process:
    """A process at one moment.

    Attributes:
        pid: its number.
        start: its start time, in clock ticks since boot.
        parent, group, session: numbers, as others are known by.
        state: a letter, as /proc has it.
        command: its name for itself.
        threads: how many it has.
        flags: the kernel's, of its first thread.
        marks: the marks of calls that it was executed with, see `harpd.processes.cookie`, as far as we may know them.
    """

    pid: int
    start: int
    parent: int = 0
    group: int = 0
    session: int = 0
    state: str = "R"
    command: str = ""
    threads: int = 1
    flags: int = 0
    cookies: frozenset[bytes] = frozenset()

    @property
    def identity(self) -> tuple[int, int]:
        """What no other process has before the system starts anew."""
        return self.pid, self.start

    @property
    def alive(self) -> bool:
        """Whether any of its threads lives: the first may have ended before the others, which shows it as a zombie."""
        return self.state not in "ZX" or self.threads > 1


class Snapshot(dict[int, Process]):
    """Processes by pid.

    Attributes:
        whole: whether it has all that lived at one moment, later than the call of `snapshot`; see above.
    """

    complete = True


@dataclass(frozen=True, slots=True)
class CallTree:
    """A call's processes: by its main process, which leads their session, and by the call's mark.

    Attributes:
        pid: the main process.
        start: its start time.
        mark: the environment entry that what the call forks and executes inherits, see `harpd.processes.cookie`.
        group: its cgroup, which only what gets another one on purpose leaves (`su` may); None: it has none.
    """

    pid: int
    start: int
    cookie: bytes
    cgroup: Cgroup | None = None

    def members(
        self, processes: Mapping[int, Process], known: Iterable[tuple[int, int]] = (), late: bool = False
    ) -> list[Process]:
        """Which of these processes are the call's, dead ones left out.

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
        found |= {p.pid for p in processes.values() if p.start >= self.start and self.cookie in p.cookies}
        if self.cgroup is not None:
            found |= self.cgroup.pids() & processes.keys()
        children: dict[int, list[int]] = {}
        for process in processes.values():
            children.setdefault(process.parent, []).append(process.pid)
        waiting = list(found)
        while waiting:
            for child in children.get(waiting.pop(), ()):
                if child not in found:
                    found.add(child)
                    waiting.append(child)
        return [processes[pid] for pid in found if processes[pid].alive]

    def process_groups(self, members: Iterable[Process]) -> set[int]:
        """The process groups of these members. Nobody else is in them, for the call has made them all.

        The main process makes the first as soon as it was forked; till then it is alone, and in its zygote's group.
        """
        return {
            member.group
            for member in members
            if member.group > 1 and (member.pid != self.pid or member.session == self.pid)
        }


def has_possible_escapes(
    tree: CallTree, zygote: int, processes: Snapshot, mains: Container[tuple[int, int] | None], marks: Container[bytes]
) -> bool:
    """Whether something of a call may live that can't be told to be the call's; its main process has been reaped.

    The zygote is a subreaper: what a call has left behind is its child, or that child's descendant. A child that is no
    call's main process, carries no known call's mark and is not older than the call may be this call's.

    Args:
        tree: the call.
        zygote: the pid of the zygote that forked it.
        processes: a look that is younger than the main process's death.
        mains: the main processes of the zygote's calls.
        marks: the marks of all known calls; anybody can write any other.
    """
    if not processes.complete or zygote not in processes:
        return True
    return any(
        process.parent == zygote
        and process.start >= tree.start
        and process.alive
        and process.identity not in mains
        and not any(mark in marks for mark in process.cookies)
        for process in processes.values()
    )


def take_snapshot() -> Snapshot:
    """All processes of a moment from now on."""
    processes = Snapshot()
    for _ in range(_MOST_LISTS):
        new = {int(name) for name in os.listdir("/proc") if name.isdecimal()} - processes.keys()
        alive = [_add(pid, processes) for pid in new]
        # A dead process has no children: who has a dead parent was read before they were given another.
        orphans = [p for p in processes.values() if p.alive and p.parent and not _lives(p.parent, processes)]
        moved = [_has_moved(orphan, processes) for orphan in orphans]
        processes.complete = all(alive) and not any(moved)
        if processes.complete:
            break
    return processes


def _lives(pid: int, processes: Mapping[int, Process]) -> bool:
    return pid in processes and processes[pid].alive


def _add(pid: int, processes: dict[int, Process]) -> bool:
    """Read a process; whether it lives, or is one that we may not know."""
    try:
        process = _read(pid)
    except PermissionError:
        return True
    if process is None:
        processes.pop(pid, None)
        return False
    marks = _marks(process)
    processes[pid] = replace(process, cookies=marks) if marks else process
    return process.alive and marks is not None


def _marks(process: Process) -> frozenset[bytes] | None:
    """The marks that a process was executed with, as far as we may know them; None: it is ending, and shows none now.

    One in uninterruptible sleep is not asked: it may hold what the answer would wait for, for as long as its disk or
    its network is away. The kernel's own threads have nothing to tell; nor have the dead. (That a process shows no
    session says nothing: in a container its session's leader may be outside.)
    """
    if process.state == "D" or process.flags & _KERNEL_THREAD or not process.alive:
        return frozenset()
    places = [f"/proc/{process.pid}"]
    try:
        if process.state in "ZX":  # the first thread has given its memory away, the others have it still
            places = [f"/proc/{process.pid}/task/{thread}" for thread in os.listdir(f"/proc/{process.pid}/task")]
        for place in places:
            with contextlib.suppress(ProcessLookupError), open(f"{place}/environ", "rb") as file:
                if text := file.read():
                    return find_cookies(text)
        return None if _is_ending(process.pid) else frozenset()
    except PermissionError:
        return frozenset()
    except OSError:
        return None


def _has_moved(orphan: Process, processes: dict[int, Process]) -> bool:
    """Read again whose parent is not known to live; whether it has another now. There are parents that we don't see."""
    return not _add(orphan.pid, processes) or processes[orphan.pid].parent != orphan.parent


def _is_ending(pid: int) -> bool:
    """Whether a process is on its way out, or gone."""
    found = read_stat(pid)
    return found is None or bool(int(found[1][6]) & _EXITING)


def _read(pid: int) -> Process | None:
    """A process as it is now, its marks left out; None: it is gone. Raises PermissionError: we may not know of it."""
    found = read_stat(pid)
    if found is None:
        return None
    command, fields = found[0].decode("utf-8", "backslashreplace"), found[1]
    parent, group, session = (int(field) for field in fields[1:4])
    state, flags, threads, start = fields[0].decode(), int(fields[6]), int(fields[17]), int(fields[19])
    return Process(pid, start, parent, group, session, state, command, threads, flags)


def send_signal(number: signal.Signals, identity: tuple[int, int]) -> bool:
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


def kill_group(group: int) -> None:
    """Kill a process group at once: none of it can fork while the others are killed.

    Args:
        group: one of `CallTree.process_groups` of a snapshot of now. A group has its number while it has members, and
            numbers are given in turn: this one is not another's before all others were given.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
