"""Program: the real dispatcher with an injected wall clock, and on request with a store that breaks a promise.

    python -m chaos.dispatcher CLOCK SABOTAGE ARGUMENTS-OF-HARPCALLERD...

CLOCK is a file whose first eight bytes are added to the wall clock, in seconds. SABOTAGE is ``none`` or a name of
`SABOTAGES`. The product has no code for this: its store is wrapped from outside.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from harpcaller import cli
from harpcaller.model.jobs import NewJob, Records
from harpcaller.store import sqlite
from harpcaller.store.sqlite import Store

__all__ = ["CLOCK", "SABOTAGES"]

#: The format of the file CLOCK.
CLOCK = struct.Struct("d")

#: One append in this many loses a record; the maximum number of lost records.
_DROP_EVERY, _DROPS = 5, 3


class _Sabotaged:
    """A store of which a subclass changes one verb."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class DropRecord(_Sabotaged):
    """Loses the first record of some batches, and reports all as stored."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._appends = 0
        self._dropped: dict[str, int] = {}

    async def append_records(self, job_id: str, first: int, records: Records) -> bool:
        self._appends += 1
        before = self._dropped.get(job_id, 0)
        if not before and len(self._dropped) < _DROPS and not self._appends % _DROP_EVERY:
            self._dropped[job_id] = 1
            records = replace(records, values=records.values[1:], timestamps=records.timestamps[1:])
        return not len(records) or await self._store.append_records(job_id, first - before, records)


class StartTwice(_Sabotaged):
    """Stores every fourth job twice, as a dispatcher that repeats an unconfirmed start would."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._jobs = 0

    async def add_job(self, job: NewJob, now: float) -> str:
        job_id = await self._store.add_job(job, now)
        self._jobs += 1
        if not self._jobs % 4:
            await self._store.add_job(replace(job, id=str(uuid.uuid4()), request_id=None), now)
        return job_id


class LeakSlot(_Sabotaged):
    """Lets one job too many run in each queue, as a leaked counter would."""

    async def add_job(self, job: NewJob, now: float) -> str:
        return await self._store.add_job(replace(job, concurrency=job.concurrency + 1), now)


class ForgetRequest(_Sabotaged):
    """Stores no request id, so that a submission that is sent again is another job."""

    async def add_job(self, job: NewJob, now: float) -> str:
        return await self._store.add_job(replace(job, request_id=None), now)


SABOTAGES: dict[str, Callable[[Store], _Sabotaged]] = {
    "drop-record": DropRecord,
    "start-twice": StartTwice,
    "leak-slot": LeakSlot,
    "forget-request": ForgetRequest,
}


def _clock(file: Path) -> Callable[[], float]:
    with file.open("rb") as opened:
        shared = mmap.mmap(opened.fileno(), CLOCK.size, prot=mmap.PROT_READ)

    def wall() -> float:
        (wrong,) = CLOCK.unpack_from(shared)
        return time.time() + float(wrong)

    return wall


def main(clock: str, sabotage: str, *arguments: str) -> int:
    """Run harpcallerd."""
    if sabotage != "none":
        real = sqlite.open_store

        async def open_store(directory: Path) -> Any:
            return SABOTAGES[sabotage](await real(directory))

        sqlite.open_store = open_store
    from harpcaller import daemon as program  # not before: it takes `open_store` when it is imported

    program.run = partial(program.run, wall=_clock(Path(clock)))
    return cli.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
