"""Processes as /proc shows them: finds those of a call, and sends a signal to one process and never to another.

A pid can be reused once its process was reaped. Pid and start time together identify a process until the next boot. A
signal is sent through a pidfd, after a comparison of the start time.

When a snapshot is complete
===========================

/proc is first listed, then read, while processes continue to run. Pids are assigned in ascending order, and /proc is
listed in that order. So a process that forks and exits in a tight loop is listed under one pid. When that pid is read,
it may have ended, and its child is not in the list. Therefore a snapshot lists /proc again until every process of the
last list was read alive. Then it is *complete*: a process that is not in it did not live at the time of the last list,
or its parent is in it. A process with a dead parent is read again, because it has another parent now. Only processes
that live for a fraction of a millisecond prevent a complete snapshot.

After the highest pid the kernel assigns low pids again, which a list may have passed. So this must not happen during
the last list. It counts from the list before: a pid is assigned a little earlier than its process is listed.

A host may have thousands of processes, so a scan has steps (`Scan`): an event loop does other work between them. The
rules above still apply: a slow scan lists /proc again.

A process that is older than all calls belongs to no call, and its pid is not reused within `_REUSE_SECONDS`. So a scan
soon after an earlier scan does not read it again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from harpd.processes.cgroup import Cgroup
from harpd.processes.cookie import find_cookies

#: How often /proc is listed before a snapshot stays incomplete.
_MAX_LISTS = 8
#: The most processes that one step of a scan reads: about half a millisecond.
STEP_PROCESSES = 10
#: Seconds for which older processes need not be read again: the kernel cannot assign all pids in this time.
_REUSE_SECONDS = 0.25
#: An upper bound of the length of a stat line.
_MAX_STAT_BYTES = 4096
#: Flags of the kernel (PF_EXITING, PF_KTHREAD).
_EXITING, _KERNEL_THREAD = 0x4, 0x200000


@dataclass(frozen=True, slots=True)
class Process:
    """A process at one time. `parent`, `group` and `session` are pids."""

    pid: int
    start: int  #: Its start time, in clock ticks since boot.
    parent: int = 0
    group: int = 0
    session: int = 0
    state: str = "R"  #: A letter, as in /proc.
    command: str = ""
    threads: int = 1
    flags: int = 0  #: The kernel flags of its first thread.
    cookies: frozenset[bytes] = frozenset()  #: The environment cookies at its execution, if they may be read.
    uid: int | None = None  #: Its real user id; None: it is unknown, because it has no cookie.

    @property
    def identity(self) -> tuple[int, int]:
        """Pid and start time, which identify the process until the next boot."""
        return self.pid, self.start

    @property
    def alive(self) -> bool:
        """Whether a thread of it lives. If the first thread ends before the others, the process looks like a zombie."""
        return self.state not in "ZX" or self.threads > 1


class Snapshot(dict[int, Process]):
    """Processes by pid."""

    #: Whether it has every process that lived at some time after its begin; see above.
    complete = True
    #: The monotonic time at which its scan was started.
    started_at = 0.0
    #: The pid that the kernel had assigned last when it was complete.
    last_pid = 0


@dataclass(frozen=True, slots=True)
class CallTree:
    """The processes of a call."""

    pid: int  #: The main process, which leads the session of the call.
    start: int  #: The start time of the main process.
    cookie: bytes  #: The environment cookie that the processes inherit, see `harpd.processes.cookie`.
    cgroup: Cgroup | None = None  #: Processes move out of it only on purpose (`su` may).
    #: The user id of the call. Another user's processes can have any environment. So their cookies do not count; None:
    #: it is unknown, and none counts.
    uid: int | None = None

    def members(
        self, processes: Mapping[int, Process], previous: Iterable[tuple[int, int]] = (), ignore_session: bool = False
    ) -> list[Process]:
        """Return those processes of a snapshot that belong to the call and are alive.

        `previous` are the identities of processes that belonged to the call before; they and their children still do.
        `ignore_session`: the session has ended, or was not watched for a while. Its id may now belong to another
        session without a leader, so only the cookie counts.
        """
        found = {pid for pid, start in previous if pid in processes and processes[pid].start == start}
        main = processes.get(self.pid)
        # A pid is not reused while it is a session id. A leader with another start time has a new session.
        if main.start == self.start if main is not None else not ignore_session:
            found |= {p.pid for p in processes.values() if self.pid in (p.pid, p.session, p.group)}
        own_uids = {self.uid}  # and that of the main process, which may have changed it
        if main is not None and main.start == self.start:
            own_uids.add(main.uid)
        own_uids.discard(None)
        found |= {
            p.pid
            for p in processes.values()
            if p.start >= self.start and self.cookie in p.cookies and p.uid in own_uids
        }
        if self.cgroup is not None:
            found |= self.cgroup.pids() & processes.keys()
        children: dict[int, list[int]] = {}
        for process in processes.values():
            children.setdefault(process.parent, []).append(process.pid)
        unvisited = list(found)
        while unvisited:
            for child in children.get(unvisited.pop(), ()):
                if child not in found:
                    found.add(child)
                    unvisited.append(child)
        return [processes[pid] for pid in found if processes[pid].alive]

    def has_session(self, processes: Snapshot) -> bool:
        """Return whether the id of the call's session may still be in use, by a session or a process group."""
        return not processes.complete or any(self.pid in (p.pid, p.session, p.group) for p in processes.values())

    def process_groups(
        self, targets: Iterable[Process], members: Container[tuple[int, int]], processes: Mapping[int, Process]
    ) -> set[int]:
        """Return those process groups of some members that have no other living process.

        A process with a cookie of the call may be in the group of a service, so a group is not the call's because a
        member is in it. Until the main process has created its own group, right after the fork, it is in its zygote's
        and has no children.

        Args:
            targets: the members whose groups are looked for.
            members: the identities of all members.
            processes: the snapshot in which they were found.
        """
        own = (target for target in targets if target.pid != self.pid or target.session == self.pid)
        groups = {target.group for target in own if target.group > 1}
        if not groups:
            return groups
        others = (p for p in processes.values() if p.alive and not p.flags & _EXITING and p.identity not in members)
        return groups - {other.group for other in others}

    def has_possible_escapes(
        self, zygote: int, processes: Snapshot, main_processes: Container[tuple[int, int]], cookies: Container[bytes]
    ) -> bool:
        """Return whether an unknown process may belong to the call, whose main process has been reaped.

        The zygote is a subreaper, so orphans of a call become its children. A child of the zygote may belong to the
        call, with three exceptions: it is one of the `main_processes` of calls; it has one of the cookies of other
        present and recent calls; it is older than the call. The snapshot is from after the main process was reaped.
        """
        if not processes.complete or zygote not in processes:
            return True
        return any(
            process.parent == zygote
            and process.start >= self.start
            and process.alive
            and process.identity not in main_processes
            and not any(cookie in cookies and cookie != self.cookie for cookie in process.cookies)
            for process in processes.values()
        )


class Scan:
    """A scan of all processes, in steps.

    Processes that started before `since`, in clock ticks since boot, do not belong to a call that started then or
    later. Their environment cookies are not read, and a recent snapshot `earlier` is enough for everything else.
    """

    def __init__(self, since: float = 0, earlier: Snapshot | None = None) -> None:
        self.snapshot = Snapshot()
        self.snapshot.started_at = time.monotonic()
        self._since = since
        self._earlier = earlier or Snapshot()
        self._steps = self._scan()

    def step(self) -> bool:
        """Read at most `STEP_PROCESSES` further processes; return whether the snapshot is finished."""
        return next(self._steps, True) is True

    def _scan(self) -> Iterator[None]:
        processes, since = self.snapshot, self._since
        ascending, last_pid = False, _last_pid()
        for _ in range(_MAX_LISTS):
            new = {int(name) for name in os.listdir("/proc") if name.isdecimal()} - processes.keys()
            was_ascending, before, last_pid = ascending, last_pid, _last_pid()
            ascending = before <= last_pid
            if not processes:
                processes.update(self._reusable(new, last_pid))
                new -= processes.keys()
            new_alive = True
            for number, pid in enumerate(new):
                if number and number % STEP_PROCESSES == 0:
                    yield
                new_alive &= _add_process(pid, processes, since)
            # A dead process has no children: a process with a dead parent was read before it got another parent, and is
            # read again. If its parent is the same, the parent is not visible from here.
            alive = {0, *(process.pid for process in processes.values() if process.alive)}
            orphans = [process for process in processes.values() if process.alive and process.parent not in alive]
            same_parent = [
                _add_process(p.pid, processes, since) and processes[p.pid].parent == p.parent for p in orphans
            ]
            processes.complete = was_ascending and ascending and new_alive and all(same_parent)
            if processes.complete:
                processes.last_pid = last_pid
                break
            if len(new) >= STEP_PROCESSES:
                yield

    def _reusable(self, pids: Container[int], last_pid: int) -> dict[int, Process]:
        """Return the older processes of the earlier snapshot whose pids cannot have been assigned again."""
        earlier = self._earlier
        if self.snapshot.started_at - earlier.started_at > _REUSE_SECONDS or not 0 < earlier.last_pid <= last_pid:
            return {}
        return {
            pid: process
            for pid, process in earlier.items()
            if process.start < self._since and process.alive and pid in pids and not earlier.last_pid < pid <= last_pid
        }


def take_snapshot(since: float = 0) -> Snapshot:
    """Return all processes at one time from now on. `since`: see `Scan`."""
    scan = Scan(since)
    while not scan.step():
        pass
    return scan.snapshot


def _last_pid() -> int:
    """Return the pid that the kernel has assigned last."""
    with open("/proc/loadavg", "rb") as file:
        return int(file.read().split()[4])


def _add_process(pid: int, processes: dict[int, Process], since: float) -> bool:
    """Read a process into `processes`; return whether it lives, or may not be read. `since`: see `Scan`."""
    try:
        process = _read(pid)
    except PermissionError:
        return True
    if process is None:
        processes.pop(pid, None)
        return False
    cookies = _read_cookies(process) if process.start >= since else frozenset()
    if cookies:
        process = replace(process, cookies=cookies, uid=_read_uid(pid))
    elif cookies is None:
        process = replace(process, flags=process.flags | _EXITING)
    processes[pid] = process
    return process.alive and cookies is not None


def _read_cookies(process: Process) -> frozenset[bytes] | None:
    """Return the cookies that a process was executed with; None if it is exiting and shows no environment any more.

    A process in uninterruptible sleep is not read: the read could wait for a lock of it, as long as its disk or network
    is unavailable. Kernel threads and dead processes have no environment. (A session id of 0 does not
    identify a kernel thread: in a container, the session leader may be outside.)
    """
    if process.state == "D" or process.flags & _KERNEL_THREAD or not process.alive:
        return frozenset()
    directories = [f"/proc/{process.pid}"]
    try:
        if process.state in "ZX":  # the first thread has released its memory, the others have not
            directories = [f"/proc/{process.pid}/task/{thread}" for thread in os.listdir(f"/proc/{process.pid}/task")]
        for directory in directories:
            with suppress(ProcessLookupError), open(f"{directory}/environ", "rb") as file:
                if text := file.read():
                    return find_cookies(text)
        current = _read(process.pid)
        return None if current is None or current.flags & _EXITING else frozenset()
    except PermissionError:
        return frozenset()
    except OSError:
        return None


def _read_uid(pid: int) -> int | None:
    """Return the real user id of a process: that of its starter, also if it executes a setuid program; None: ended."""
    with suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        text = file.read()
        return int(text[text.index(b"\nUid:") + 5 :].split(None, 1)[0])
    return None


def _read(pid: int) -> Process | None:
    """Return a process without its cookies; None if it has ended. Raises PermissionError if it may not be read."""
    try:
        name, fields = _read_stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    parent, group, session = (int(field) for field in fields[1:4])
    state, flags, threads, start = fields[0].decode(), int(fields[6]), int(fields[17]), int(fields[19])
    return Process(pid, start, parent, group, session, state, name.decode("utf-8", "backslashreplace"), threads, flags)


def _read_stat(pid: int) -> tuple[bytes, list[bytes]]:
    """Return command and further fields of a stat line. Raises OSError. Spec: proc_pid_stat(5)."""
    descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(descriptor, _MAX_STAT_BYTES)
    finally:
        os.close(descriptor)
    end = text.rindex(b")")  # the command may contain any character
    return text[text.index(b"(") + 1 : end], text[end + 2 :].split()


def start_time(pid: int, parent: int | None = None) -> int:
    """Return the start time of a process in clock ticks since boot; 0: ended, unreadable, or not of `parent`."""
    try:
        _, fields = _read_stat(pid)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return int(fields[19]) if parent in (None, int(fields[1])) else 0


def wait_status(pid: int) -> int:
    """Return the wait status of a process that has died and was not reaped; 0: it was reaped, or may not be read."""
    try:
        _, fields = _read_stat(pid)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return int(fields[49])


def send_signal(number: signal.Signals, identity: tuple[int, int]) -> bool:
    """Send a signal to this process, not to a later one of its pid; return False if it has ended or may not get it."""
    pid, start = identity
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if start_time(pid) == start:
            signal.pidfd_send_signal(descriptor, number)
            return True
    except (ProcessLookupError, PermissionError):
        pass
    finally:
        os.close(descriptor)
    return False


def kill_group(group: int, leader: Process | None) -> None:
    """Kill all processes of a group of `CallTree.process_groups` in one step, so that no process can fork.

    `leader` is the process with this pid in the same snapshot. The group has its id while it has members. If another
    process has the pid by now, the group has ended: the pid may be the id of that process's group.
    """
    found = start_time(group)
    if found and (leader is None or leader.start != found):
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
