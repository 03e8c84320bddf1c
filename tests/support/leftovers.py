"""Leftovers of a test: child processes, descriptors and threads of the process that runs the tests, tasks of its loop.

`snapshot` takes a snapshot. New entries of a later snapshot are leftovers. Exception: a fixture that lives longer than
the test, that is, a process with an ancestor in the first snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["COOKIE_VARIABLE", "Snapshot", "find_leftover_tasks", "find_leftovers", "new_since", "snapshot"]

#: Seconds within which processes, threads and tasks must have ended.
DEADLINE = 10.0

#: Every process that the tests start inherits this variable, so it is found even when its parent has died.
COOKIE_VARIABLE = "HARP_TESTS"
os.environ[COOKIE_VARIABLE] = str(uuid.uuid4())
_COOKIE_ENTRY = f"{COOKIE_VARIABLE}={os.environ[COOKIE_VARIABLE]}".encode()

_PROC = Path("/proc")

#: Processes without the cookie: pid, and when it started. They do not get it later, and reading it takes long.
_strangers: set[tuple[int, int]] = set()


@dataclass(frozen=True)
class Process:
    """A process that runs, or a zombie."""

    pid: int
    started: int
    parent: int = field(compare=False)
    description: str = field(compare=False)


@dataclass(frozen=True)
class Snapshot:
    """The resources at a time; descriptors are numbers with their targets, threads have the kernel's ids."""

    processes: frozenset[Process]
    descriptors: frozenset[tuple[int, str]]
    threads: frozenset[int]


def snapshot() -> Snapshot:
    """Take a snapshot of this process and of all processes that the tests have started."""
    return Snapshot(
        frozenset(_processes()), frozenset(_descriptors()), frozenset(map(int, os.listdir("/proc/self/task")))
    )


def _descriptors() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("/dev/shm/pym-"):  # multiprocessing keeps it for further use
                yield int(name), target


def _processes() -> Iterator[Process]:
    """Yield the children of this process, and all processes that have inherited the cookie."""
    own = os.getpid()
    for name in os.listdir(_PROC):
        if name.isdecimal() and int(name) != own:
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                stat = (_PROC / name / "stat").read_bytes()
                command, _, rest = stat.partition(b"(")[2].rpartition(b")")
                fields = rest.split()
                parent, started = int(fields[1]), int(fields[19])
                if parent == own or _has_cookie(int(name), started):
                    line = (_PROC / name / "cmdline").read_bytes().replace(b"\0", b" ") or command
                    state = fields[0].decode()
                    text = f"process {name} ({state}) of {parent}: {line.decode(errors='replace')[:200]}"
                    yield Process(int(name), started, parent, text)


def _has_cookie(pid: int, started: int) -> bool:
    """Return whether a process has inherited the cookie. Raises OSError if it has ended or is another user's."""
    if (pid, started) in _strangers:
        return False
    environment = (_PROC / str(pid) / "environ").read_bytes()
    found = _COOKIE_ENTRY in environment.split(b"\0")
    if environment and not found:  # it is empty while a process executes another program
        _strangers.add((pid, started))
    return found


def new_since(before: Snapshot, after: Snapshot) -> list[str]:
    """Describe the new entries of `after` that do not belong to a process in `before`."""
    parents = {process.pid: process.parent for process in after.processes}
    old = {process.pid for process in before.processes & after.processes}

    def has_old_ancestor(pid: int) -> bool:
        while pid in parents:
            if pid in old:
                return True
            pid = parents[pid]
        return False

    names = {thread.native_id: repr(thread) for thread in threading.enumerate()}
    return [
        *(process.description for process in after.processes if not has_old_ancestor(process.pid)),
        *(f"descriptor {number}: {target}" for number, target in after.descriptors - before.descriptors),
        *(f"thread {number}: {names.get(number)}" for number in after.threads - before.threads),
    ]


def find_leftovers(before: Snapshot) -> list[str]:
    """Describe the leftovers since a snapshot that still exist at the deadline."""
    deadline = time.monotonic() + DEADLINE
    collected = False
    while left := new_since(before, snapshot()):
        if not collected:
            gc.collect()  # objects of a cycle close their descriptors only now
            collected = True
        elif time.monotonic() > deadline:
            break
        else:
            time.sleep(0.01)
    return left


async def find_leftover_tasks(before: set[asyncio.Task[object]]) -> list[str]:
    """Describe the leftover tasks of this loop that have not ended at the deadline."""
    deadline = time.monotonic() + DEADLINE
    before = {*before, *filter(None, [asyncio.current_task()])}
    while (left := asyncio.all_tasks() - before) and time.monotonic() < deadline:
        await asyncio.wait(left, timeout=deadline - time.monotonic())
    return [repr(task) for task in left]
