"""Program: the real dispatcher with an injected wall clock and name service, and on request with a broken promise.

    python -m chaos.dispatcher CLOCK LOOKUPS SABOTAGE ARGUMENTS-OF-HARPCALLERD...

CLOCK is a file whose first eight bytes are added to the wall clock, in seconds. The names under `DOMAIN` have the
address 127.0.0.1; the lookup of a name hangs while the directory LOOKUPS has a file of this name. SABOTAGE is ``none``
or a name of `SABOTAGES`. The product has no code for it: this module replaces functions.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace as replace_fields
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from harp_daemon import watched_file
from harpcaller import cli
from harpcaller.hosts import registry
from harpcaller.model.jobs import NewJob, Records
from harpcaller.store import sqlite
from harpcaller.store.sqlite import Store

__all__ = ["CLOCK", "DOMAIN", "SABOTAGES"]

#: The format of the file CLOCK.
CLOCK = struct.Struct("d")

#: The domain of the hosts' names, without a name service.
DOMAIN = ".chaos.test"
#: Seconds between two checks of a lookup that hangs.
_LOOKUP_PAUSE = 0.02

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


def _sabotage_store(wrap: Callable[[Store], _Sabotaged]) -> None:
    real = sqlite.open_store

    async def open_store(directory: Path) -> Any:
        return wrap(await real(directory))

    sqlite.open_store = open_store


def _use_half_hosts() -> None:
    """Use a changed hosts file immediately, also if it ends in the middle of a line, which counts as no mistake."""
    real = registry.parse_hosts
    watched_file.SETTLE_SECONDS = 0.0
    registry.parse_hosts = lambda *arguments: replace_fields(real(*arguments), is_cut=False, rejected=())


def _block_on_log() -> None:
    """Have each log call wait until stderr has accepted its event."""
    real = logging.Logger.handle

    def handle(self: logging.Logger, record: logging.LogRecord) -> None:
        os.write(2, b"\n")
        real(self, record)

    logging.Logger.handle = handle  # type: ignore[method-assign]


SABOTAGES: dict[str, Callable[[], None]] = {
    "drop-record": partial(_sabotage_store, DropRecord),
    "start-twice": partial(_sabotage_store, StartTwice),
    "leak-slot": partial(_sabotage_store, LeakSlot),
    "forget-request": partial(_sabotage_store, ForgetRequest),
    "half-hosts": _use_half_hosts,
    "block-on-log": _block_on_log,
}


def _clock(file: Path) -> Callable[[], float]:
    with file.open("rb") as opened:
        shared = mmap.mmap(opened.fileno(), CLOCK.size, prot=mmap.PROT_READ)

    def wall() -> float:
        (wrong,) = CLOCK.unpack_from(shared)
        return time.time() + float(wrong)

    return wall


def _name_service(lookups: Path) -> Callable[..., Any]:
    real = socket.getaddrinfo

    def getaddrinfo(name: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(name, str) and name.endswith(DOMAIN):
            while (lookups / name).exists():
                time.sleep(_LOOKUP_PAUSE)
            name = "127.0.0.1"
        return real(name, *arguments, **options)

    return getaddrinfo


def main(clock: str, lookups: str, sabotage: str, *arguments: str) -> int:
    """Run harpcallerd."""
    if sabotage != "none":
        SABOTAGES[sabotage]()
    socket.getaddrinfo = _name_service(Path(lookups))
    from harpcaller import daemon as program  # not before: it takes `open_store` when it is imported

    program.run = partial(program.run, wall=_clock(Path(clock)))
    return cli.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
