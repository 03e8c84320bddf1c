"""Leftovers of a test: child processes, descriptors and threads of the process that runs the tests, tasks of its loop.

`snapshot` takes a snapshot. New entries of a later snapshot are leftovers. Exception: a fixture that lives longer than
the test, that is, a process with an ancestor in the first snapshot.

Each test takes two snapshots. So they have the ids of all processes, and only those of new ones are looked at.
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
from dataclasses import dataclass
from pathlib import Path

__all__ = ["COOKIE_VARIABLE", "Snapshot", "find_leftover_tasks", "find_leftovers", "new_since", "snapshot"]

#: Seconds within which processes, threads and tasks must have ended.
DEADLINE = 10.0

#: Every process that the tests start inherits this variable, so it is found even when its parent has died.
COOKIE_VARIABLE = "HARP_TESTS"
os.environ[COOKIE_VARIABLE] = str(uuid.uuid4())
_COOKIE_ENTRY = f"{COOKIE_VARIABLE}={os.environ[COOKIE_VARIABLE]}".encode()

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process that runs, or a zombie: a child of this one, or one that has inherited the cookie."""

    parent: int
    description: str


@dataclass(frozen=True)
class Snapshot:
    """The resources at a time; descriptors are numbers with their targets, threads have the kernel's ids."""

    pids: frozenset[int]  # of all processes of the machine
    descriptors: frozenset[tuple[int, str]]
    threads: frozenset[int]


def snapshot() -> Snapshot:
    """Take a snapshot of this process and of the ids of all processes."""
    return Snapshot(
        frozenset(int(name) for name in os.listdir(_PROC) if name.isdecimal()),
        frozenset(_descriptors()),
        frozenset(map(int, os.listdir("/proc/self/task"))),
    )


def _descriptors() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("/dev/shm/pym-"):  # multiprocessing keeps it for further use
                yield int(name), target


def _find_process(pid: int) -> Process | None:
    """Return a process that the tests have started; None: it is another one, or has ended."""
    own = os.getpid()
    if pid == own:
        return None
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
        command, _, rest = stat.partition(b"(")[2].rpartition(b")")
        state, parent = rest.split()[:2]
        environment = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        if int(parent) != own and _COOKIE_ENTRY not in environment:
            return None
        line = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ") or command
    except OSError:  # it has ended, or is another user's
        return None
    text = f"process {pid} ({state.decode()}) of {int(parent)}: {line.decode(errors='replace')[:200]}"
    return Process(int(parent), text)


def new_since(before: Snapshot, after: Snapshot) -> list[str]:
    """Describe the new entries of `after` that do not belong to a process in `before`."""

    def has_old_ancestor(process: Process) -> bool:
        while (found := _find_process(process.parent)) is not None:
            if process.parent in before.pids:
                return True
            process = found
        return False

    new = filter(None, map(_find_process, sorted(after.pids - before.pids)))
    names = {thread.native_id: repr(thread) for thread in threading.enumerate()}
    return [
        *(process.description for process in new if not has_old_ancestor(process)),
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
