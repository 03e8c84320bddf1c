"""Marks: what a procedure writes on disk about itself, so that the truth is known without HARP.

A mark is a line, a JSON array, appended by one write to the file of its host. Times are seconds of CLOCK_BOOTTIME,
which is the same for all processes of the machine and which no step of the wall clock moves.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

#: The entry of the environment that names the file; each process of a run has it, so it tells them from all others.
VARIABLE = "CHAOS_MARKS"


class Identity(NamedTuple):
    """A process: its pid, and its start time in clock ticks since boot, which no later owner of the pid has."""

    pid: int
    start: int


class Mark(NamedTuple):
    """A line of the file.

    Attributes:
        token: names the job; given to the procedure as its first argument.
        process: who wrote it.
        at: when.
        kind: ``start``, ``record`` (one was handed over), ``child`` (a process that the procedure made), ``raise``,
            ``end``; ``rest``: the process is about to wait for another job.
        value: the record's number, or what the procedure is about to return.
    """

    token: str
    process: Identity
    at: float
    kind: str
    value: Any


def now() -> float:
    """Seconds of the clock that marks have."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def stat(pid: int) -> tuple[str, int] | None:
    """A process's state, a letter, and start time; None: there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return fields[0].decode(), int(fields[19])


def lives(process: Identity) -> bool:
    """Whether it runs; one that only waits for its parent's notice does not."""
    found = stat(process.pid)
    return found is not None and found[1] == process.start and found[0] not in "ZX"


class Writer:
    """Appends marks to a file. One may be used by a process and by what it forks."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._process = Identity(0, 0)

    def write(self, token: str, kind: str, value: Any = None) -> None:
        """Append a mark of this process."""
        if self._process.pid != os.getpid():
            found = stat(os.getpid())
            assert found is not None
            self._process = Identity(os.getpid(), found[1])
        line = json.dumps([token, *self._process, now(), kind, value]) + "\n"
        os.write(self._file, line.encode())


class Reader:
    """Reads what has been appended to a file since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def read(self) -> Iterator[Mark]:
        """Yield the marks that are new."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            token, pid, start, at, kind, value = json.loads(line)
            yield Mark(token, Identity(pid, start), at, kind, value)
