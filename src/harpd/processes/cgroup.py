"""A cgroup for each call, where the daemon may make one: what a call starts is in it, unless it is moved on purpose.

That is where systemd has delegated the service's cgroup (``Delegate=yes``), or where the setting `cgroup` names a
directory. Only the grouping is used, no controller: what a call may use is not limited here. Elsewhere there is none,
and a call's processes are found by their parents, session and mark.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cgroup", "Cgroups", "delegated_cgroup"]

log = logging.getLogger("harpd.supervisor")

#: systemd marks the cgroups that are the service's to divide; the second name is for daemons that are not root.
_DELEGATED = ("trusted.delegate", "user.delegate")


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A call's cgroup."""

    path: str

    def pids(self) -> set[int]:
        """The processes in it, those in cgroups below it too."""
        found: set[int] = set()
        for directory, _, _ in os.walk(self.path):
            with contextlib.suppress(OSError, ValueError):
                with open(f"{directory}/cgroup.procs", "rb") as file:
                    found |= {int(line) for line in file}
        return found

    @property
    def populated(self) -> bool:
        """Whether anything lives in it, or below it: the system knows, however fast it forks."""
        try:
            with open(f"{self.path}/cgroup.events", "rb") as file:
                return b"populated 1\n" in file.read()
        except OSError:  # it has been removed
            return False

    @property
    def can_kill(self) -> bool:
        """Whether the system can kill all that is in it at once: Linux 5.14 and later can."""
        return os.access(f"{self.path}/cgroup.kill", os.W_OK)

    def kill(self) -> None:
        """Kill all that is in it, and below it, at once: none of it can fork meanwhile. Nothing where that can't be."""
        with contextlib.suppress(OSError):
            descriptor = os.open(f"{self.path}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, b"1")
            finally:
                os.close(descriptor)

    def out_of_memory(self) -> bool:
        """Whether the system has killed something in it for want of memory; it may not be known."""
        try:
            with open(f"{self.path}/memory.events", "rb") as file:
                counts = dict(line.split() for line in file)
            return int(counts.get(b"oom_kill", 0)) > 0
        except (OSError, ValueError):
            return False

    def remove(self) -> None:
        """Remove it, if it is empty: what a procedure has left running on purpose stays in it."""
        for directory, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


class Cgroups:
    """Where calls get their cgroups.

    Args:
        directory: the cgroup to make them in; None: calls get none.
    """

    def __init__(self, directory: str | None) -> None:
        self._directory = directory

    def create(self, call_id: str, pid: int) -> Cgroup | None:
        """Make a cgroup for a call and put its main process there; None: that can't be done."""
        if self._directory is None:
            return None
        group = Cgroup(f"{self._directory}/call-{call_id}")
        try:
            os.mkdir(group.path)
            with open(f"{group.path}/cgroup.procs", "w") as file:
                file.write(str(pid))
        except OSError as error:
            log.error("a call gets no cgroup", extra={"call": call_id, "reason": str(error)})
            group.remove()
            return None
        return group


def delegated_cgroup() -> str | None:
    """The directory of this process's cgroup, if it was delegated to us; else None."""
    try:
        path = _own_directory()
        if path is None or not os.access(path, os.W_OK):
            return None
        for name in _DELEGATED:
            with contextlib.suppress(OSError):
                if os.getxattr(path, name) == b"1":
                    return path
    except OSError:
        pass
    return None


def _own_directory() -> str | None:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if own is not None and after.startswith("cgroup2 "):
            root, mounted = before.split()[3:5]
            if own.startswith(root):
                return os.path.normpath(f"{mounted}/{own.removeprefix(root)}")
    return None
