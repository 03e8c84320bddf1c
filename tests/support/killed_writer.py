"""Program: adds and starts jobs and appends records without end; prints what the store has confirmed.

Killed in mid-write by tests/store/test_sqlite_faults.py. Lines: ``job ID`` and ``records ID COUNT``.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path

from harp.protocol.jsontext import Raw
from harpcaller.store.sqlite import SQLiteStore, open_store
from support.jobs import new_job


def confirmed(*words: object) -> None:
    print(*words, flush=True)


async def submit(store: SQLiteStore) -> None:
    while True:
        job = new_job(queue={}, concurrency=2, arguments=Raw(b'["' + b"x" * 3000 + b'"]'))
        await store.add_job(job, 1.0)
        confirmed("job", job.id)


async def stream(store: SQLiteStore) -> None:
    job = new_job()
    await store.add_job(job, 1.0)
    confirmed("job", job.id)
    while job.id not in [claimed.id for claimed in await store.claim_jobs(1.0, 1000, 1000)]:
        pass
    for first in itertools.count(0, 3):
        assert await store.append_records(job.id, first, [Raw(b"%d" % n) for n in range(first, first + 3)])
        confirmed("records", job.id, first + 3)


async def main(directory: Path) -> None:
    store = await open_store(directory)
    await asyncio.gather(stream(store), *(submit(store) for _ in range(5)))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
