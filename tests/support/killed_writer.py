"""Program: adds, starts and cancels jobs and appends records forever; prints every confirmed verb.

Killed in mid-write by tests/store/test_sqlite_faults.py. Lines: ``job ID``, ``records ID COUNT``,
``cancelled ID`` and ``finalized ID``.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path

from harp.protocol.json_text import Raw
from harpcaller.model.jobs import JobMetadata, State, StopState
from harpcaller.store.sqlite import Store, open_store
from support.jobs import new_job, records


def confirmed(*words: object) -> None:
    print(*words, flush=True)


async def submit(store: Store) -> None:
    while True:
        job = new_job(queue={}, concurrency=2, arguments=Raw(b'["' + b"x" * 3000 + b'"]'))
        await store.add_job(job, 1.0)
        confirmed("job", job.id)


async def start(store: Store) -> str:
    job = new_job()
    await store.add_job(job, 1.0)
    confirmed("job", job.id)
    while (await store.get_job(job.id)).state is State.QUEUED:
        await store.claim_jobs(1.0, 1000, 1000)
    return job.id


async def stream(store: Store) -> None:
    job_id = await start(store)
    for first in itertools.count(0, 3):
        assert await store.append_records(job_id, first, records(b"%d" % n for n in range(first, first + 3)))
        confirmed("records", job_id, first + 3)


async def cancel(store: Store) -> None:
    while True:
        job_id = await start(store)
        await store.cancel_job(job_id, 2.0, Raw(b'{"why":"cancel"}'))
        confirmed("cancelled", job_id)
        assert await store.finalize_stop(
            job_id, StopState.CONFIRMED, metadata=JobMetadata(stop_report=Raw(b'{"survivors":[]}'))
        )
        confirmed("finalized", job_id)


async def main(directory: Path) -> None:
    store = await open_store(directory)
    await asyncio.gather(stream(store), cancel(store), *(submit(store) for _ in range(5)))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
