"""The store on one SQLite file: every verb goes to the thread that writes or to one of those that read."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from harp.protocol.ends import End
from harp.protocol.json_text import Raw
from harpcaller.model.jobs import NO_FACTS, Facts, Identity, Job, JobDetails, NewJob, Records, State, Stop
from harpcaller.store import QueueStatus
from harpcaller.store.sqlite import pruning, reads, writes
from harpcaller.store.sqlite.file import FILE_NAME, connect, lock, prepare, storage_errors
from harpcaller.store.sqlite.readers import Readers
from harpcaller.store.sqlite.writer import Writer

__all__ = ["SQLiteStore", "open_store"]

# How many reads run at once. They hold Python's lock for most of their time: more would not be faster.
_READERS = 4


async def open_store(directory: Path) -> SQLiteStore:
    """Open the store in a directory; make either if it is missing. Takes no longer for many old jobs.

    Args:
        directory: where the file `FILE_NAME` lies; private to this user when it is made here.

    Raises:
        StorageError: another store has it open; the file is not ours or of a newer version, and stays untouched;
            or it can't be made, read or written.
    """
    return await asyncio.to_thread(SQLiteStore, directory, asyncio.get_running_loop())


class SQLiteStore:
    """A `harpcaller.store.Store`. Made by `open_store`; its verbs are called in the loop it was made in.

    A verb whose awaiter is cancelled may happen all the same.
    """

    def __init__(self, directory: Path, loop: asyncio.AbstractEventLoop) -> None:
        path = directory / FILE_NAME
        self._closing = False
        self._lock = lock(directory)
        try:
            prepare(path)
            with storage_errors(path):
                self._readers = Readers(path, _READERS)
                try:
                    self._writer = Writer(path, connect(path), loop)
                except BaseException:
                    self._readers.join()
                    raise
        except BaseException:
            os.close(self._lock)
            raise

    async def add_job(self, job: NewJob, now: float) -> None:
        """See `Store.add_job`."""
        await self._writer.run(writes.add_jobs, (job,), now)

    async def add_jobs(self, jobs: Sequence[NewJob], now: float) -> None:
        """See `Store.add_jobs`."""
        await self._writer.run(writes.add_jobs, jobs, now)

    async def claim_jobs(self, now: float, limit: int, host_concurrency: int) -> list[Job]:
        """See `Store.claim_jobs`."""
        return await self._writer.run_last(writes.claim_jobs, now, limit, host_concurrency)

    async def append_records(self, job_id: str, first: int, records: Records) -> bool:
        """See `Store.append_records`."""
        return await self._writer.run(writes.append_records, job_id, first, records)

    async def finish_job(
        self,
        job_id: str,
        end: End,
        now: float,
        *,
        stop: Stop | None = None,
        keep_slot: bool = False,
        facts: Facts = NO_FACTS,
    ) -> bool:
        """See `Store.finish_job`."""
        return await self._writer.run(writes.finish_job, job_id, end, now, stop=stop, keep_slot=keep_slot, facts=facts)

    async def cancel_job(self, job_id: str, now: float, stopped: Raw | None = None) -> State | None:
        """See `Store.cancel_job`."""
        return await self._writer.run(writes.cancel_job, job_id, now, stopped)

    async def cancel_queue(self, queue: Raw, now: float, stopped: Raw | None = None) -> list[tuple[str, State]]:
        """See `Store.cancel_queue`."""
        return await self._writer.run(writes.cancel_queue, queue, now, stopped)

    async def settle_stop(self, job_id: str, stop: Stop, *, keep_slot: bool = False, facts: Facts = NO_FACTS) -> bool:
        """See `Store.settle_stop`."""
        return await self._writer.run(writes.settle_stop, job_id, stop, keep_slot=keep_slot, facts=facts)

    async def note_facts(self, job_id: str, facts: Facts) -> bool:
        """See `Store.note_facts`."""
        return await self._writer.run(writes.note_facts, job_id, facts)

    async def release_slot(self, job_id: str) -> bool:
        """See `Store.release_slot`."""
        return await self._writer.run(writes.release_slot, job_id)

    async def held_jobs(self) -> list[Job]:
        """See `Store.held_jobs`."""
        return await self._readers.run(reads.held_jobs)

    async def get_job(self, job_id: str) -> Job:
        """See `Store.get_job`."""
        return await self._readers.run(reads.get_job, job_id)

    async def get_details(self, job_id: str) -> JobDetails:
        """See `Store.get_details`."""
        return await self._readers.run(reads.get_details, job_id)

    async def read_records(self, job_id: str, first: int, most_bytes: int) -> Records:
        """See `Store.read_records`."""
        return await self._readers.run(reads.read_records, job_id, first, most_bytes)

    async def identity(self) -> Identity:
        """See `Store.identity`."""
        return await self._readers.run(reads.identity)

    async def list_jobs(
        self,
        *,
        ended: bool = False,
        host: str | None = None,
        queue: Raw | None = None,
        newest_first: bool = False,
        after: int | None = None,
        limit: int = 1000,
    ) -> list[tuple[int, Job]]:
        """See `Store.list_jobs`."""
        return await self._readers.run(
            reads.list_jobs,
            ended=ended,
            host=host,
            queue=queue,
            newest_first=newest_first,
            after=after,
            limit=limit,
        )

    async def list_queues(self) -> list[QueueStatus]:
        """See `Store.list_queues`."""
        return await self._readers.run(reads.list_queues)

    async def prune_jobs(self, ended_before: float, limit: int) -> int:
        """See `Store.prune_jobs`. Works in small steps, each a transaction; what others ask for goes between them."""
        pruned = 0
        while deleted := await self._writer.run(pruning.delete_jobs, ended_before, limit - pruned):
            pruned += deleted
        while await self._writer.run(pruning.delete_leftover_records):
            pass
        while await self._writer.run(pruning.give_back_space):
            pass
        if pruned:
            await self._readers.run(pruning.checkpoint)
        return pruned

    async def close(self) -> None:
        """See `Store.close`. Closing again does nothing."""
        if not self._closing:
            self._closing = True
            self._writer.stop()
            self._readers.stop()
            await asyncio.to_thread(self._join)

    def _join(self) -> None:
        self._writer.join()
        self._readers.join()
        os.close(self._lock)
