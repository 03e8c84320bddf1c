"""The store: domain verbs that accept and return jobs, never SQL or rows, on one SQLite file.

Every verb is one guarded statement or one short transaction, and returns whether it had an effect. The first committed
end of a job wins. `now` is an argument, Unix seconds with fractions: no verb reads a clock. Every verb may raise
`StorageError`; then it had no effect, and the store works again as soon as the cause is removed. A verb starts when it
is called, even if the caller does not await it, and may complete after its awaiter is cancelled.

One thread writes, several threads read:

- `file` creates, recognizes, locks and migrates the file, and maps the errors of SQLite.
- `writer` is the thread that writes: all verbs that are called during a commit are part of the next commit.
- `reserve` is disk space for pruning on a full disk.
- `writes` and `reads` are the verbs on a connection; their SQL is in ``queries.sql``.
- `searches` finds jobs by a filter, and `counting` counts them; `finding` decides how.
- `active` has the lanes and slots of the active jobs in memory, so that writes need not read rows.
- `staging` stores many jobs of one request, all or none, in short transactions.
- `rows` converts jobs, metadata and records to columns and back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial, wraps
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Concatenate, ParamSpec, TypeVar

from msgspec.structs import replace

from harp_daemon.outcome import Outcome
from harpcaller.model.changes import Change
from harpcaller.model.job_filters import JobFilter
from harpcaller.model.jobs import JobDetails, NewJob, Subject
from harpcaller.store import LimitReached, StorageError, UnknownJob
from harpcaller.store.measurements import StoreMeasurements
from harpcaller.store.sqlite import counting, reads, searches
from harpcaller.store.sqlite.checkpoints import copy_log
from harpcaller.store.sqlite.file import FILE_NAME, connect, lock, prepare, storage_errors
from harpcaller.store.sqlite.staging import STEP_JOBS, check_calls, encode_jobs, join_rows, split
from harpcaller.store.sqlite.writer import Writer
from harpcaller.store.sqlite.writes import Writes, insert_staged_jobs

__all__ = ["FILE_NAME", "Store", "open_store"]

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", asyncio.Future[Any], Outcome[Any])

_RETRY_DELAY = 1.0  # Seconds until a failed step of staged jobs is repeated.
_READERS = 4  # Reading threads and connections. They need Python's lock most of the time: more would not be faster.

_COUNTED_AT_ONCE = 10_000  # Queued jobs that are counted in the loop's thread: in 0.4 ms.


async def open_store(directory: Path) -> Store:
    """Open the store in a directory; create the file, and a private directory, if they do not exist.

    The time does not depend on the number of ended jobs. Raises `StorageError` if another store has it open, or the
    file cannot be created, read or written, is not HARP's, or has a newer schema. Such a file is not changed.
    """
    return await asyncio.to_thread(Store, directory, asyncio.get_running_loop())


def _writes(
    verb: Callable[Concatenate[Writes, P], T], last: bool = False
) -> Callable[Concatenate[Store, P], Outcome[T]]:
    """Return a method that runs a verb in the writing thread; with `last`, after the others of its batch."""

    @wraps(verb)
    def method(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> Outcome[T]:
        if self._closed:
            return self._refuse(Outcome(asyncio.get_running_loop()))
        return self._writer.run(verb, last, args, kwargs)

    return method


def _reads(
    verb: Callable[Concatenate[sqlite3.Connection, P], T], in_turn: bool = False
) -> Callable[Concatenate[Store, P], asyncio.Future[T]]:
    """Return a method that runs a verb in a reading thread, which never waits for the writer.

    With `in_turn` it is one thread for all: in several, short reads of many rows wait for Python's lock at each row.
    """

    @wraps(verb)
    def method(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        if self._closed:
            return self._refuse(loop.create_future())
        read = lambda db: verb(db, *args, **kwargs)  # noqa: E731
        if self.measurements is not None:
            read = self._measured(verb.__name__, read, self.measurements)
        return loop.run_in_executor(self._thread if in_turn else self._threads, self._read, loop, read)

    return method


class Store:
    """The verbs, with contracts in `writes` and `reads`. They are called in the loop of `open_store`."""

    def __init__(self, directory: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.path = path = (directory / FILE_NAME).absolute()  #: The file.
        self.sqlite_version = sqlite3.sqlite_version
        self._closed = False
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-page-reader")
        self._idle_readers: SimpleQueue[sqlite3.Connection] = SimpleQueue()
        with ExitStack() as stack:
            stack.callback(os.close, lock(directory))
            if copied_jobs := prepare(path):
                log.warning("restored store has queued jobs", extra={"file": str(path), "jobs": copied_jobs})
            with storage_errors(path):
                for _ in range(_READERS):
                    self._idle_readers.put(stack.enter_context(closing(connect(path, query_only=True))))
                with closing(connect(path)) as connection:
                    insert_staged_jobs(connection)
                self._writer = Writer(path, connect(path), loop)
            self._resources = stack.pop_all()
        self._bulk = asyncio.Lock()  # held by the call of `add_jobs` that is being executed
        # The request ids and the owners of its jobs while these are staged.
        self._staged_ids: frozenset[str] = frozenset()
        self._staged_owners: frozenset[str | None] = frozenset()

    claim_jobs = _writes(Writes.claim_jobs, last=True)
    requeue_job = _writes(Writes.requeue_job)
    fail_waiting = _writes(Writes.fail_waiting)
    append_records = _writes(Writes.append_records)
    finish_job = _writes(Writes.finish_job)
    cancel_job = _writes(Writes.cancel_job)
    cancel_queue = _writes(Writes.cancel_queue)
    finalize_stop = _writes(Writes.finalize_stop)
    update_metadata = _writes(Writes.update_metadata)
    set_prune_time = _writes(Writes.set_prune_time)
    list_slot_holders = _reads(reads.list_slot_holders)
    list_ended_since = _reads(reads.list_ended_since)
    get_job = _reads(reads.get_job)
    find_subjects = _reads(reads.find_subjects)
    get_permitted_job = _reads(reads.get_permitted_job)
    get_details = _reads(reads.get_details)
    get_permitted_details = _reads(reads.get_permitted_details)
    read_records = _reads(reads.read_records)
    search_records = _reads(reads.search_records)
    get_identity = _reads(reads.get_identity)
    list_jobs = _reads(reads.list_jobs)
    list_queues = _reads(reads.list_queues)
    _find_jobs = _reads(searches.find_jobs)
    _list_all = _reads(searches.find_jobs, in_turn=True)
    get_summaries = _reads(searches.get_summaries)
    select_jobs = _reads(searches.select_jobs)
    count_jobs = _reads(counting.count_jobs)
    job_statistics = _reads(counting.job_statistics)
    find_queues = _reads(reads.find_queues)
    count_open_of_hosts = _reads(reads.count_open_of_hosts)
    get_prune_time = _reads(reads.get_prune_time)
    check_writable = _writes(Writes.check_writable)
    read_gauges = _reads(reads.read_gauges)
    count_stored = _reads(reads.count_stored)

    _add_job = _writes(Writes.add_job)
    _add_jobs = _writes(Writes.add_jobs)
    _check_request_ids = _writes(Writes.check_request_ids)
    _stage_part = _writes(Writes.stage_part)
    _stage_jobs = _writes(Writes.stage_jobs)
    _discard_staged_parts = _writes(Writes.discard_staged_parts)
    _insert_staged = _writes(Writes.insert_staged)
    _delete_jobs = _writes(Writes.delete_jobs)
    _delete_orphaned_records = _writes(Writes.delete_orphaned_records)
    _delete_request_ids = _writes(Writes.delete_request_ids)
    _release_free_pages = _writes(Writes.release_free_pages)
    _copy_log = _reads(copy_log)

    @property
    def measurements(self) -> StoreMeasurements | None:
        """What is measured; None: nothing."""
        return self._writer.measurements

    def measure(self) -> StoreMeasurements:
        """Begin to measure; return the measurements."""
        self._writer.measurements = measurements = StoreMeasurements()
        return measurements

    @property
    def committed_at(self) -> float:
        """Monotonic time of the last commit; infinite and negative before the first one."""
        return self._writer.committed_at

    def find_pause(self, seconds: float) -> float:
        """Return for how many seconds a flood pauses after it has used `seconds`: 0 if nobody else submits jobs."""
        return self._writer.find_pause(seconds)

    def observe(self, observer: Callable[[Sequence[Change]], object]) -> Callable[[], None]:
        """Call a function after each later commit with the changes of jobs in it; return a function that ends it.

        Every change reaches it once, in the order of the commits, before the verb that made the change returns. It is
        called in the loop and must be fast.
        """
        return self._writer.observe(observer)

    def call_before_commits(self, function: Callable[[], object]) -> None:
        """Call a function in the writing thread before each later transaction. It must raise nothing.

        What was done in the loop before a verb was called is done before the transaction of this verb.
        """
        self._writer.before_commit = function

    def add_job(self, job: NewJob, now: float) -> asyncio.Future[str] | Outcome[str]:
        """Store a queued job as `Writes.add_job` does."""
        is_limited = job.max_queued is not None and job.owner in self._staged_owners  # those jobs are not counted yet
        if is_limited or job.request_id in self._staged_ids:
            return asyncio.ensure_future(self._add_job_after_bulk(job, now))
        return self._add_job(job, now)

    async def _add_job_after_bulk(self, job: NewJob, now: float) -> str:
        async with self._bulk:
            return await self._add_job(job, now)

    async def add_jobs(
        self, jobs: Sequence[NewJob], now: float, request_claim: Callable[[], object] = lambda: None
    ) -> list[str]:
        """Store queued jobs in this order, all or none; return their ids in the same order, as `add_job` does.

        One call is executed at a time. Many jobs are staged, so that other verbs do not wait for all of them: the first
        ones may be claimed before this returns. If a step fails after the jobs were stored, it is repeated.
        `request_claim` is called before the transaction that inserts them, or after each one that inserts some.
        """
        async with self._bulk:
            if len(jobs) <= STEP_JOBS:
                request_claim()
                return await self._add_jobs(jobs, now)
            return await self._add_in_steps(split(jobs), now, request_claim)

    async def _add_in_steps(
        self, parts: Sequence[Sequence[NewJob]], now: float, request_claim: Callable[[], object]
    ) -> list[str]:
        with_ids = [[job for job in part if job.request_id is not None] for part in parts]
        self._staged_ids = frozenset(job.request_id or "" for checked in with_ids for job in checked)
        self._staged_owners = frozenset(job.owner for part in parts for job in part)
        try:
            calls: dict[tuple[str, str], tuple[str, bytes]] = {}
            again: set[str] = set()
            for checked in filter(None, with_ids):
                check_calls(checked, calls)
                again |= await self._check_request_ids(checked)
            limited = [job for part in parts for job in part if job.max_queued is not None and job.id not in again]
            rows = []
            for part in parts:
                rows.append(encode_jobs(part))
                await asyncio.sleep(0)
            steps = await self._stage(rows, limited, now)
            if limited:  # they are checked
                parts = [[replace(job, max_queued=None) for job in part] for part in parts]
            ids: list[str] = []
            for step, part in zip(steps, parts, strict=True):
                ids += await self._insert_step(step, part, now)
                request_claim()
            return ids
        finally:
            self._staged_ids = frozenset()
            self._staged_owners = frozenset()

    async def _stage(self, rows: Sequence[bytes], limited: Sequence[NewJob], now: float) -> list[int]:
        """Store the rows, all or none, in several transactions; return the numbers of their steps."""
        *parts, last = join_rows(rows)
        steps: list[int] = []
        try:
            for part in parts:
                steps += await self._stage_part(part)
            return steps + await self._stage_jobs(last, limited, now, steps)
        except (StorageError, LimitReached):
            if steps:
                with suppress(StorageError):  # they are also deleted when the store is opened
                    await self._discard_staged_parts()
            raise

    async def _insert_step(self, step: int, jobs: Sequence[NewJob], now: float) -> list[str]:
        while True:
            try:
                return await self._insert_staged(step, jobs, now)
            except StorageError as error:
                if self._closed:
                    raise
                log.error("cannot insert staged jobs; retrying", extra={"reason": str(error)})
                await asyncio.sleep(_RETRY_DELAY)

    def find_jobs(
        self, wanted: JobFilter, *, permits: Callable[[Subject], bool] | None = None, **options: Any
    ) -> asyncio.Future[searches.Found]:
        """Return the jobs that fit a filter as `searches.find_jobs` does."""
        is_short = wanted == JobFilter() and permits is None
        return (self._list_all if is_short else self._find_jobs)(wanted, permits=permits, **options)

    def get_new_details(self, job_id: str) -> JobDetails | None:
        """Return what `get_details` does for a job with short payloads that was just submitted, in the loop's thread.

        All that is read was just written, so it is in memory; a thread would cost twice as much. None: there are too
        many queued jobs to count, all connections are in use, or there is an error, which `get_details` raises.
        """
        read: Callable[[sqlite3.Connection], JobDetails]
        read = partial(reads.get_details, job_id=job_id, most=_COUNTED_AT_ONCE)
        if self.measurements is not None:
            read = self._measured("get_details", read, self.measurements)
        try:
            connection = self._idle_readers.get_nowait()
        except Empty:
            return None
        try:
            details = read(connection)
        except (sqlite3.Error, UnknownJob):
            return None
        finally:
            self._idle_readers.put(connection)
        waiting = details.queue_position
        return None if waiting is not None and waiting.position >= _COUNTED_AT_ONCE else details

    async def prune_jobs(self, ended_before: float, limit: int) -> int:
        """Delete up to `limit` jobs that ended before a time, with their records; return how many were deleted.

        On a full disk more jobs may be deleted. A job that holds a slot is not deleted. Each step is a short
        transaction, so that other verbs do not wait for all steps.
        """
        pruned = 0
        while pruned < limit and (deleted := await self._delete_jobs(ended_before, limit - pruned)):
            pruned += deleted
        while await self._delete_orphaned_records():
            pass
        while await self._release_free_pages():
            pass
        if pruned:
            await self._copy_log()
        return pruned

    async def forget_request_ids(self, submitted_before: float) -> None:
        """Delete the request ids that were submitted before a time, in short transactions."""
        while await self._delete_request_ids(submitted_before):
            pass

    async def close(self) -> None:
        """Complete the called verbs, then close the store. A second call has no effect."""
        if not self._closed:
            self._closed = True
            self._writer.stop()
            await asyncio.to_thread(self._join)

    def _join(self) -> None:
        self._writer.join()
        self._threads.shutdown()
        self._thread.shutdown()
        self._resources.close()

    def _refuse(self, closed: F) -> F:
        closed.set_exception(StorageError(f"{self.path}: the store is closed"))
        return closed

    def _measured(
        self, name: str, verb: Callable[[sqlite3.Connection], T], measurements: StoreMeasurements
    ) -> Callable[[sqlite3.Connection], T]:
        """Return a verb that is measured in its thread, without the wait for a connection."""

        def measured(db: sqlite3.Connection) -> T:
            began_at, failed = time.monotonic(), False
            try:
                return verb(db)
            except sqlite3.Error:
                failed = True
                raise
            finally:
                measurements.record_read(name, time.monotonic() - began_at, failed)

        return measured

    def _read(self, loop: asyncio.AbstractEventLoop, verb: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._idle_readers.get()
        try:
            with storage_errors(self.path):
                return verb(connection)
        finally:
            try:
                # In the turn of the loop that uses the result: few results, which may be long, wait for a busy loop.
                loop.call_soon_threadsafe(self._idle_readers.put, connection)
            except RuntimeError:  # the loop is closed
                self._idle_readers.put(connection)
