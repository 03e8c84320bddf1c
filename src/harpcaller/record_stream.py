"""The records of a job for one client, then its end; and the end alone. Both wait without a task.

The owner takes items as fast as the client reads them, and is notified when there may be another one. So a client that
does not read holds nothing here but a number, and the records that all followers share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from harp.protocol.ends import End
from harp.protocol.replies import Continue
from harpcaller.model.jobs import Job, Records
from harpcaller.notifier import Notifier, RecordBatch
from harpcaller.store import Store, UnknownJob

T = TypeVar("T")

#: Approximate number of bytes of records in one read from the store.
_BATCH_BYTES = 64 * 1024


class RecordStream:
    """The stored and, while it waits, the future records of a job, in batches of limited size, then its end.

    Args:
        job_id: the job.
        since: number of the first record; it may be in the future. Not together with `recent`.
        recent: number of the newest stored records to begin with.
        wait: whether to wait until the job has ended; otherwise the last item is `Continue` if it has not.
        store: the store.
        notifier: publishes records and the end.
        on_ready: called when `take` may return an item or raise, never within `take`.
    """

    __slots__ = (
        "_batch",
        "_error",
        "_job",
        "_job_id",
        "_next",
        "_notifier",
        "_on_ready",
        "_reads",
        "_recent",
        "_store",
        "_subscription",
        "_wait",
    )

    def __init__(
        self,
        job_id: str,
        since: int | None,
        recent: int | None,
        wait: bool,
        store: Store,
        notifier: Notifier,
        on_ready: Callable[[], None],
    ) -> None:
        self._job_id = job_id
        self._next = since or 0
        self._recent = recent
        self._wait = wait
        self._store = store
        self._notifier = notifier
        self._on_ready = on_ready
        self._job: Job | None = None
        self._batch: RecordBatch | None = None  # was read from the store, and is not taken yet
        self._error: BaseException | None = None
        self._reads = 0
        self._subscription = notifier.subscribe(job_id, self._on_published) if wait else None
        self._read_job()

    def take(self) -> RecordBatch | End | Continue | None:
        """Return the next item; None: `on_ready` will be called.

        Raises:
            UnknownJob: the job is unknown, or was pruned meanwhile.
            StorageError: the store failed.
        """
        if self._error is not None:
            raise self._error
        job = self._job
        if job is None or self._reads:
            return None
        batch, self._batch = self._batch or self._newest(), None
        if batch is not None and not self._wait and batch.next > job.records:
            batch = batch.first_records(job.records - batch.first)
        if batch is not None:
            self._next = batch.next
            return batch
        if self._next < self._last(job):
            self._read(lambda: self._store.read_records(self._job_id, self._next, _BATCH_BYTES), self._on_batch)
            return None
        if job.end is not None:
            return job.end
        return None if self._wait else Continue()

    def stop_waiting(self) -> None:
        """End with the records and the end that are stored now."""
        if self._wait:
            self._wait = False
            self.close()
            self._read_job()

    def close(self) -> None:
        """End the subscription; no further item is taken."""
        if self._subscription is not None:
            self._subscription = None
            self._notifier.unsubscribe(self._job_id, self._on_published)

    def _newest(self) -> RecordBatch | None:
        return None if self._subscription is None else self._subscription.newest_from(self._next)

    def _last(self, job: Job) -> int:
        """Return the number of known records: no more than were stored when the job was read, unless it waits."""
        newest = None if self._subscription is None else self._subscription.newest
        return job.records if newest is None else max(job.records, newest.next)

    def _on_published(self, ended: bool) -> None:
        if ended:  # its last records may not be published yet
            self._read_job()
        else:
            self._on_ready()

    def _read_job(self) -> None:
        self._read(lambda: self._store.get_job(self._job_id), self._on_job)

    def _on_job(self, job: Job) -> None:
        known = self._job
        if known is None and self._recent is not None:
            self._next = max(0, job.records - self._recent)
        # Reads may be completed in another order.
        if known is None or job.end is not None or (known.end is None and job.records >= known.records):
            self._job = job

    def _on_batch(self, records: Records) -> None:
        if records:
            self._batch = RecordBatch(self._next, records)
        else:
            self._error = UnknownJob(self._job_id)  # pruned during the read

    def _read(self, verb: Callable[[], Awaitable[T]], use: Callable[[T], None]) -> None:
        """Read from the store; `take` returns nothing meanwhile."""
        self._reads += 1

        def on_read(read: asyncio.Future[T]) -> None:
            self._reads -= 1
            if read.cancelled():
                return
            if (error := read.exception()) is not None:
                self._error = error
            else:
                use(read.result())
            if not self._reads:
                self._on_ready()

        _call(verb).add_done_callback(on_read)


def _call(verb: Callable[[], Awaitable[T]]) -> asyncio.Future[T]:
    """Call a verb of the store; an exception is raised by the future only."""
    try:
        return asyncio.ensure_future(verb())
    except Exception as error:  # noqa: BLE001 - the one who waits gets it
        failed: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        failed.set_exception(error)
        return failed


class EndWaiter:
    """Waits for the end of a job.

    Args:
        job_id: the job.
        wait: whether to wait until it has ended.
        is_active: whether it runs here, so that its end will be published: then the store is not read.
        store: the store.
        notifier: publishes the end.
    """

    def __init__(self, job_id: str, wait: bool, is_active: bool, store: Store, notifier: Notifier) -> None:
        self._job_id = job_id
        self._wait = wait
        self._store = store
        self._notifier = notifier
        self._subscription = notifier.subscribe(job_id, self._on_published)
        #: The end, or None if the job has not ended. Cancelling it ends the wait.
        self.result: asyncio.Future[End | None] = asyncio.get_running_loop().create_future()
        self.result.add_done_callback(self._on_done)
        if not (wait and is_active):
            self._read_job()

    def _read_job(self) -> None:
        _call(lambda: self._store.get_job(self._job_id)).add_done_callback(self._on_read)

    def _on_read(self, read: asyncio.Future[Job]) -> None:
        error = None if read.cancelled() else read.exception()
        if read.cancelled() or self.result.done():
            return
        if error is not None:
            self.result.set_exception(error)
        elif (end := read.result().end) is not None or not self._wait:
            self.result.set_result(end)

    def _on_published(self, ended: bool) -> None:
        if not ended or self.result.done():
            return
        if self._subscription.end is not None:
            self.result.set_result(self._subscription.end)
        else:
            self._read_job()

    def _on_done(self, _: object) -> None:
        self._notifier.unsubscribe(self._job_id, self._on_published)
