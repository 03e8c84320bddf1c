"""Program: harpcallerd that is killed when it has committed a submission and has not replied.

    python -m support.killed_after_commit MARK ARGUMENTS-OF-HARPCALLERD...

If the file MARK exists, it removes the file and is killed by SIGKILL after the commit of a submission.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from harpcaller import cli
from harpcaller.store import sqlite


class _KilledAfterCommit:
    """A store that kills its process after the commit of jobs."""

    def __init__(self, store: sqlite.Store, mark: Path) -> None:
        self._store = store
        self._mark = mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def add_job(self, *arguments: Any) -> Any:
        return self._after_commit(await self._store.add_job(*arguments))

    async def add_jobs(self, *arguments: Any) -> Any:
        return self._after_commit(await self._store.add_jobs(*arguments))

    def _after_commit(self, outcome: Any) -> Any:
        if self._mark.exists():
            self._mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome


def main(mark: str, *arguments: str) -> int:
    """Run harpcallerd."""
    real = sqlite.open_store

    async def open_store(directory: Path) -> Any:
        return _KilledAfterCommit(await real(directory), Path(mark))

    sqlite.open_store = open_store
    return cli.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
