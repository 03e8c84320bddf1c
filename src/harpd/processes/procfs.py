"""A process's line in /proc, above all when it was started: pid and start time together are one process."""

from __future__ import annotations

import os

__all__ = ["read_stat", "start_time"]

#: More than the line can have.
_SIZE = 4096
#: Which of the fields after the command is the start time.
_START = 19


def read_stat(pid: int) -> tuple[bytes, list[bytes]] | None:
    """What /proc says of a process: its command, and the fields from its state on; None: it is gone.

    Raises:
        PermissionError: we may not know of it.

    Spec: proc_pid_stat(5).
    """
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
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
    """The start time of a process in clock ticks since boot; 0: there is none that we may know of."""
    try:
        found = read_stat(pid)
    except PermissionError:
        return 0
    return int(found[1][_START]) if found else 0
