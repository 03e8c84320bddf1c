"""The cgroup of a call, where the daemon may create one. Its processes stay in it unless they are moved on purpose.

The daemon may create cgroups where systemd has delegated the service's cgroup (``Delegate=yes``), or where the setting
`cgroup` names a directory. Without one, the processes of a call are found by parent, session and environment cookie.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("harpd.supervisor")


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

    def limit(self, memory: int | None, processes: int | None) -> None:
        """Limit bytes of memory, and processes with their threads, of all in it; None: no limit.

        Without the controllers of the kernel in its parent, it has no effect: then only the limits of processes count.
        """
        for controller, file, most in (("memory", "memory.max", memory), ("pids", "pids.max", processes)):
            if most is None:
                continue
            with contextlib.suppress(OSError), open(f"{self.path}/../cgroup.subtree_control", "r+b") as parent:
                parent.write(b"+" + controller.encode())
            with contextlib.suppress(OSError), open(f"{self.path}/{file}", "r+b") as limit:  # creates no file
                limit.write(b"%d" % most)

    def kill(self) -> None:
        """Kill all processes in it and below it in one step, so that no process can fork; only since Linux 5.14."""
        with contextlib.suppress(OSError), open(f"{self.path}/cgroup.kill", "wb") as file:
            file.write(b"1")

    def out_of_memory(self) -> bool:
        """Return whether the kernel has killed one of its processes for lack of memory; False if that is unknown."""
        counts = dict(line.split() for line in _read(f"{self.path}/memory.events").splitlines())
        return counts.get(b"oom_kill", b"0") != b"0"

    def remove(self) -> None:
        """Remove it if it is empty. Services that a procedure has started on purpose stay in it."""
        for directory, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def _read(file: str) -> bytes:
    """Return the content of a file; b"" if it cannot be read: the cgroup has been removed."""
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        return opened.read()
    return b""


def create_cgroup(directory: str, call_id: str, pid: int) -> Cgroup | None:
    """Create a cgroup for a call in a directory and move its main process there; None: that is not possible."""
    group = Cgroup(f"{directory}/call-{call_id}")
    try:
        os.mkdir(group.path)
        with open(f"{group.path}/cgroup.procs", "w") as file:
            file.write(str(pid))
    except OSError as error:
        log.error("cannot create cgroup for call", extra={"call": call_id, "reason": str(error)})
        group.remove()
        return None
    return group


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
