"""Tracks the processes that have written marks: which of them live, and since when the others are dead.

A process certainly lived from its first mark to the last check that found it. It may have died a little later.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chaos.marks import VARIABLE, Identity, Mark, Reader, is_alive, now

#: Seconds between two checks.
_PAUSE = 0.05


@dataclass
class Lifetime:
    """The lifetime of a process that has written a mark, for one job.

    Attributes:
        token: the job's token.
        host: the host on which it runs.
        main: whether it runs the procedure.
        started_at: time of its first mark.
        last_seen: when it was last found alive.
        died_at: when it was first found dead; None: it lives.
    """

    token: str
    host: str
    main: bool
    started_at: float
    last_seen: float
    died_at: float | None = None


@dataclass
class MarkedJob:
    """The state of a job's procedure, from its marks.

    Attributes:
        main: the lifetime of the process that runs it; None: it has not started.
        starts: the processes that started it; more than one is a violation.
        processes: all of its recorded processes.
        records: when each record was passed on.
        returned: each value that it was about to return.
        raised: whether it was about to raise.
    """

    main: Lifetime | None = None
    starts: list[Identity] = field(default_factory=list)
    processes: list[Identity] = field(default_factory=list)
    records: list[float] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
    raised: bool = False


class ProcessTracker:
    """Reads the marks of all hosts.

    Args:
        files: the file of marks of each host.

    Attributes:
        lifetimes: every process that has written a mark, with its lifetime for its last job.
        earlier_lifetimes: lifetimes of processes for earlier jobs.
        jobs: the marks of each job, by token.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.lifetimes: dict[Identity, Lifetime] = {}
        self.earlier_lifetimes: list[Lifetime] = []
        self.jobs: dict[str, MarkedJob] = {}
        self._readers = {host: Reader(file) for host, file in files.items()}
        self._living: set[Identity] = set()

    async def run(self) -> None:
        """Check regularly, until cancelled."""
        while True:
            self.update()
            await asyncio.sleep(_PAUSE)

    def update(self) -> None:
        """Read new marks, and check which processes live."""
        for host, reader in self._readers.items():
            for mark in reader.read():
                self._on_mark(host, mark)
        for process in list(self._living):
            before = now()
            if is_alive(process):
                self.lifetimes[process].last_seen = before
            else:
                self.lifetimes[process].died_at = now()
                self._living.remove(process)

    def _on_mark(self, host: str, mark: Mark) -> None:
        marked = self.jobs.setdefault(mark.token, MarkedJob())
        lifetime = self.lifetimes.get(mark.process)
        main = mark.kind == "start"
        if lifetime is not None and main and lifetime.died_at is not None and lifetime.token != mark.token:
            self.earlier_lifetimes.append(lifetime)  # an idle worker with its next job
            lifetime = None
        if lifetime is None:
            lifetime = self.lifetimes[mark.process] = Lifetime(mark.token, host, main, mark.at, mark.at)
            self._living.add(mark.process)
            marked.processes.append(mark.process)
        lifetime.last_seen = max(lifetime.last_seen, mark.at)
        match mark.kind:
            case "start":
                marked.starts.append(mark.process)
                marked.main = marked.main or lifetime
            case "idle":
                lifetime.died_at = mark.at
                self._living.discard(mark.process)
            case "record":
                marked.records.append(mark.at)
            case "raise":
                marked.raised = True
            case "end":
                marked.returned.append(mark.value)

    def marks_of(self, token: str) -> MarkedJob:
        """Return the marks of a job; without entries if it has not started."""
        return self.jobs.get(token, MarkedJob())

    def living(self, token: str | None = None) -> list[Identity]:
        """Return the processes, of one job or of all, that the last check found alive."""
        return [process for process in self._living if token in (None, self.lifetimes[process].token)]

    def main_process(self, token: str) -> Lifetime | None:
        """Return the lifetime of the process that runs the procedure; None: it has not started."""
        return self.marks_of(token).main


def find_processes(run: Path) -> list[int]:
    """Return all living processes of a run, daemons too: those with its file of marks in the environment."""
    job = f"{VARIABLE}={run}/".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                environment = Path("/proc", name, "environ").read_bytes()
            except OSError:
                continue
            if any(item.startswith(job) for item in environment.split(b"\0")):
                found.append(int(name))
    return found
