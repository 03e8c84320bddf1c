"""The stat line of a process in /proc, above all its start time: pid and start time together identify a process."""

from __future__ import annotations

import os

#: An upper bound of the line's length.
_MAX_BYTES = 4096


def read_stat(pid: int) -> tuple[bytes, list[bytes]] | None:
    """Return the command of a process and its fields from the state on; None if the process is gone.

    Raises:
        PermissionError: this process may not read it.

    Spec: proc_pid_stat(5).
    """
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        text = os.read(descriptor, _MAX_BYTES)
    except ProcessLookupError:
        return None
    finally:
        os.close(descriptor)
    end = text.rindex(b")")  # the command may contain any character
    return text[text.index(b"(") + 1 : end], text[end + 2 :].split()


def start_time(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot; 0 if it is gone or may not be read."""
    try:
        found = read_stat(pid)
    except PermissionError:
        return 0
    return int(found[1][19]) if found else 0


def child_start_time(pid: int, parent: int) -> int:
    """Return the start time of a child of `parent`, as `start_time` does; 0 also if the pid is of another process."""
    try:
        found = read_stat(pid)
    except PermissionError:
        return 0
    return int(found[1][19]) if found and int(found[1][1]) == parent else 0
