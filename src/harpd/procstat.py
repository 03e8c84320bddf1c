"""A process's line in /proc: when it was started. Pid and start time together are one process until a system start."""

from __future__ import annotations

import os

__all__ = ["start_time", "stat_of"]

#: More than the line can have.
_SIZE = 4096
#: Which of the fields after the command is the start time.
_START = 19


def stat_of(pid: int) -> tuple[bytes, list[bytes]] | None:
    """The process's command and the fields after it, the first of which is its state; None: there is no such process.

    Spec: proc_pid_stat(5).
    """
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    try:
        text = os.read(descriptor, _SIZE)
    except ProcessLookupError:
        return None
    finally:
        os.close(descriptor)
    end = text.rindex(b")")  # the command before may hold anything
    return text[text.index(b"(") + 1 : end], text[end + 2 :].split()


def start_time(pid: int) -> int:
    """The start time of a process in clock ticks since boot; 0: there is none."""
    found = stat_of(pid)
    return int(found[1][_START]) if found else 0
