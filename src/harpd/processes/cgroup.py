"""The cgroup of a call, where the daemon may create one. Its processes stay in it unless they are moved on purpose.

The daemon may create cgroups where systemd has delegated the service's cgroup (``Delegate=yes``), or where the setting
`cgroup` names a directory. Without one, the processes of a call are found by parent, session and environment cookie.

Where the kernel has the controllers, a cgroup also limits memory and processes of its call, and all calls and the
daemon get equal shares of the processors: a call that forks without end delays no other call for long.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("harpd.supervisor")

#: How many of the cgroups that ended calls have left are tried to remove before one is created.
_REMOVED_AT_ONCE = 2
#: Seconds after which a cgroup without processes is not one that another supervisor is creating.
_CREATION_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The cgroup of a call."""

    path: str  #: Its directory.

    def pids(self) -> set[int]:
        """Return the pids of all processes in it and in the cgroups below it."""
        return {
            int(pid) for directory, _, _ in os.walk(self.path) for pid in _read(f"{directory}/cgroup.procs").split()
        }

    @property
    def populated(self) -> bool:
        """Whether it or a cgroup below it has a live process. One that forks too fast for a scan counts."""
        return b"populated 1\n" in _read(f"{self.path}/cgroup.events")

    @property
    def can_kill(self) -> bool:
        """Whether the kernel can kill all of its processes in one step (since Linux 5.14)."""
        return os.access(f"{self.path}/cgroup.kill", os.W_OK)

    def kill(self) -> None:
        """Kill all processes in it and below it in one step, so that no process can fork; only since Linux 5.14."""
        with contextlib.suppress(OSError), open(f"{self.path}/cgroup.kill", "wb") as file:
            file.write(b"1")

    def out_of_memory(self) -> bool:
        """Return whether the kernel has killed one of its processes for lack of memory; False if that is unknown."""
        counts = dict(line.split() for line in _read(f"{self.path}/memory.events").splitlines())
        return counts.get(b"oom_kill", b"0") != b"0"

    def remove(self) -> bool:
        """Remove it if it is empty; return whether it is gone. Processes that a call has left stay in it."""
        for directory, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        return not os.path.exists(self.path)


def _read(file: str) -> bytes:
    """Return the content of a file; b"" if it cannot be read: the cgroup has been removed."""
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        return opened.read()
    return b""


class CallCgroups:
    """The cgroups of the calls of a supervisor, in a directory.

    Processes that a call leaves on purpose stay in its cgroup. It is removed when it has become empty, before another
    one is created, or by the next supervisor.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._left: deque[Cgroup] = deque()  # those of ended calls, which have processes
        self._unlimited: set[str] = set()  # the controllers of which the log says that they cannot be used
        with contextlib.suppress(OSError):
            self._enable("cpu")
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                is_old = time.time() - entry.stat().st_mtime > _CREATION_SECONDS
                if entry.name.startswith("call-") and is_old:
                    Cgroup(entry.path).remove()

    def create(self, call_id: str, pid: int) -> Cgroup | None:
        """Create the cgroup of a call and move its main process there; None: that is not possible."""
        for group in [self._left.popleft() for _ in range(min(_REMOVED_AT_ONCE, len(self._left)))]:
            self.release(group)
        group = Cgroup(f"{self._directory}/call-{call_id}")
        try:
            os.mkdir(group.path)
            with open(f"{group.path}/cgroup.procs", "w") as file:
                file.write(str(pid))
        except OSError as error:
            log.error("cannot create cgroup for call", extra={"call": call_id, "reason": str(error)})
            group.remove()
            return None
        return group

    def release(self, group: Cgroup) -> None:
        """Remove a cgroup whose call has ended, as soon as it is empty."""
        if not group.remove():
            self._left.append(group)

    def limit(self, group: Cgroup, memory: int | None, processes: int | None) -> None:
        """Limit bytes of memory, and processes with their threads, of all in a cgroup; None: no limit.

        If they need more memory, the kernel kills all of them, so that no call continues without a part of its
        processes. Where the controllers cannot be used, the log says so once: then only limits of processes count.
        """
        if memory is not None:
            self._limit(group, "memory", {"memory.max": memory, "memory.oom.group": 1})
            with contextlib.suppress(OSError):  # a kernel without swap has no such file
                _write(f"{group.path}/memory.swap.max", b"0")
        if processes is not None:
            self._limit(group, "pids", {"pids.max": processes})

    def _limit(self, group: Cgroup, controller: str, values: dict[str, int]) -> None:
        try:
            self._enable(controller)
            for name, value in values.items():
                _write(f"{group.path}/{name}", b"%d" % value)
        except OSError as error:
            if controller not in self._unlimited:
                self._unlimited.add(controller)
                log.warning(
                    "cannot limit calls as a whole",
                    extra={"controller": controller, "directory": self._directory, "reason": str(error)},
                )

    def _enable(self, controller: str) -> None:
        """Have the kernel control this in the cgroups of calls. Raises OSError."""
        _write(f"{self._directory}/cgroup.subtree_control", b"+" + controller.encode())


def _write(file: str, text: bytes) -> None:
    """Write to a file of the kernel; it is not created. Raises OSError."""
    with open(file, "r+b", buffering=0) as opened:
        opened.write(text)


def delegated_cgroup() -> str | None:
    """Return the directory of this process's cgroup, or of the one above it, if it was delegated to the daemon.

    A cgroup that has processes of its own cannot limit memory and processes of those below it. With
    ``DelegateSubgroup=`` (systemd 254), the daemon is in a cgroup below the delegated one, which has no processes then.
    """
    own = own_cgroup()
    return None if own is None else next(filter(_is_delegated, (own.path, os.path.dirname(own.path))), None)


def service_cgroup() -> Cgroup | None:
    """Return this process's cgroup if it is that of a service of systemd, and has no other process yet."""
    own = own_cgroup()
    is_own = own is not None and "INVOCATION_ID" in os.environ and own.path.endswith(".service")
    return own if own is not None and is_own and own.pids() == {os.getpid()} else None


def own_cgroup() -> Cgroup | None:
    """Return the cgroup of this process; None if it can see no cgroup of version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in mounts:
        before, _, after = line.partition(" - ")
        root, mounted = before.split()[3:5]
        if own is not None and after.startswith("cgroup2 ") and own.startswith(root):
            return Cgroup(os.path.normpath(f"{mounted}/{own.removeprefix(root)}"))
    return None


def _is_delegated(path: str) -> bool:
    for attribute in ("trusted.delegate", "user.delegate"):  # set by systemd; the second if harpd is not root
        with contextlib.suppress(OSError):
            if os.getxattr(path, attribute) == b"1":
                return os.access(path, os.W_OK)
    return False
