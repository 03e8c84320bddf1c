"""Marks: lines that procedures write to disk about their calls, so that the facts do not come from HARP.

A mark is a line with a JSON array, appended by one write to the file of its host. Times are seconds of CLOCK_BOOTTIME,
which is the same for all processes of the machine and independent of the wall clock.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

#: The environment variable with the path of the file. It also identifies the processes of a run.
VARIABLE = "CHAOS_MARKS"
#: A file beside those of the marks, with a promise that procedures break, and the pid of a process that does not
#: belong to HARP.
SABOTAGE_FILE = "sabotage"


class Identity(NamedTuple):
    """A process: its pid, and its start time in clock ticks since boot. Together they are unique."""

    pid: int
    start: int


class Mark(NamedTuple):
    """A line of the file.

    Attributes:
        token: identifies the job; the first argument of the procedure.
        process: the process that wrote it.
        at: the time.
        kind: ``start``, ``record`` (one was passed on), ``child`` (written by a process that the procedure has made),
            ``raise``, ``end``; ``idle``: the process is about to become an idle worker.
        value: the number of the record, or the value that the procedure is about to return.
    """

    token: str
    process: Identity
    at: float
    kind: str
    value: Any


def now() -> float:
    """Return the time by the clock of the marks."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_stat(pid: int) -> tuple[str, int] | None:
    """Return the state (a letter) and start time of a process; None if it does not exist."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return fields[0].decode(), int(fields[19])


def is_alive(process: Identity) -> bool:
    """Return whether a process lives; a zombie does not."""
    found = read_stat(process.pid)
    return found is not None and found[1] == process.start and found[0] not in "ZX"


class Writer:
    """Appends marks to a file; usable in a process and in the processes that it forks."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._process = Identity(0, 0)

    def write(self, token: str, kind: str, value: Any = None, process: Identity | None = None) -> None:
        """Append a mark of this process, or of another process."""
        if self._process.pid != os.getpid():
            found = read_stat(os.getpid())
            assert found is not None
            self._process = Identity(os.getpid(), found[1])
        line = json.dumps([token, *(process or self._process), now(), kind, value]) + "\n"
        os.write(self._file, line.encode())


class Reader:
    """Reads the marks that were appended to a file since the last read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def read(self) -> Iterator[Mark]:
        """Yield the new marks."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                text = file.read()
        except FileNotFoundError:
            return
        complete = text[: text.rfind(b"\n") + 1]
        self._at += len(complete)
        for line in complete.splitlines():
            token, pid, start, at, kind, value = json.loads(line)
            yield Mark(token, Identity(pid, start), at, kind, value)
