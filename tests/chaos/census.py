"""The census: which of the processes that have marked themselves live, and since when they do not.

A process lived from its first mark until it was last seen alive: both are sure. It may have died a little after it was
last seen; nothing here claims the contrary.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chaos.marks import VARIABLE, Identity, Mark, Reader, lives, now

#: Seconds between two looks.
_PAUSE = 0.05


@dataclass
class Life:
    """A marked process.

    Attributes:
        token: its job's.
        host: where it runs.
        main: whether it is the one that runs the procedure.
        began: its first mark.
        seen: when it was last known to live.
        gone: when it was first known to be dead; None: it lives.
    """

    token: str
    host: str
    main: bool
    began: float
    seen: float
    gone: float | None = None


@dataclass
class Truth:
    """What a job's procedure says of itself.

    Attributes:
        main: the life of the process that runs it, while it does; None: it has never started.
        starts: the processes that started it: at most one, or a promise is broken.
        processes: all of its processes that are known.
        records: when records were handed over.
        returned: what it was about to return, once for each time.
        raised: whether it was about to raise.
    """

    main: Life | None = None
    starts: list[Identity] = field(default_factory=list)
    processes: list[Identity] = field(default_factory=list)
    records: list[float] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
    raised: bool = False


class Census:
    """Reads the marks of all hosts.

    Args:
        files: the file of marks of each host.

    Attributes:
        lives: every process that has marked itself, as its last job knows it.
        rested: what they were to jobs before that.
        truths: what is known by token.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.lives: dict[Identity, Life] = {}
        self.rested: list[Life] = []
        self.truths: dict[str, Truth] = {}
        self._readers = {host: Reader(file) for host, file in files.items()}
        self._living: set[Identity] = set()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_PAUSE)

    def look(self) -> None:
        """Read what is new, and see who lives."""
        for host, reader in self._readers.items():
            for mark in reader.read():
                self._take(host, mark)
        for process in list(self._living):
            before = now()
            if lives(process):
                self.lives[process].seen = before
            else:
                self.lives[process].gone = now()
                self._living.remove(process)

    def _take(self, host: str, mark: Mark) -> None:
        truth = self.truths.setdefault(mark.token, Truth())
        life = self.lives.get(mark.process)
        main = mark.kind == "start"
        if life is not None and main and life.gone is not None and life.token != mark.token:
            self.rested.append(life)  # it has waited for another job, and this is it
            life = None
        if life is None:
            life = self.lives[mark.process] = Life(mark.token, host, main, mark.at, mark.at)
            self._living.add(mark.process)
            truth.processes.append(mark.process)
        life.seen = max(life.seen, mark.at)
        match mark.kind:
            case "start":
                truth.starts.append(mark.process)
                truth.main = truth.main or life
            case "rest":
                life.gone = mark.at
                self._living.discard(mark.process)
            case "record":
                truth.records.append(mark.at)
            case "raise":
                truth.raised = True
            case "end":
                truth.returned.append(mark.value)

    def truth(self, token: str) -> Truth:
        """What is known of a job; an empty one when it has never started."""
        return self.truths.get(token, Truth())

    def living(self, token: str | None = None) -> list[Identity]:
        """The processes, of a job or of all, that lived at the last look."""
        return [process for process in self._living if token in (None, self.lives[process].token)]

    def main(self, token: str) -> Life | None:
        """The life of the process that runs the procedure; None: it has never started."""
        return self.truth(token).main


def strays(run: Path) -> list[int]:
    """All living processes of a run, daemons too: whoever has its files of marks in the environment."""
    entry = f"{VARIABLE}={run}/".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                environment = Path("/proc", name, "environ").read_bytes()
            except OSError:
                continue
            if any(item.startswith(entry) for item in environment.split(b"\0")):
                found.append(int(name))
    return found
