"""The records of a job for one client, then its end; or the end alone. Both wait without a task.

The owner requests items as fast as the client reads them, and is notified when there may be a further item. A client
that does not read therefore needs only the memory of a number, and of the records that all followers share.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

from harp.protocol.dispatcher import Continue
from harp.protocol.ends import End
from harp_daemon.outcome import Outcome
from harpcaller.model.jobs import Job, Records
from harpcaller.notifier import Notifier, RecordBatch
from harpcaller.store import UnknownJob
from harpcaller.store.sqlite import Store

T = TypeVar("T")
_BATCH_BYTES = 64 * 1024  #: Approximate number of bytes of records in one read from the store.


class _JobState(NamedTuple):
    """The part of a job that a stream needs, so that its payloads are not in memory while the client reads."""

    records: int
    has_ended: bool
    end: End | None  # only when all records were returned


class RecordStream:
    """The stored and, while it waits, the future records of a job, in batches of limited size, then its end.

    It starts with record `since`, which may be in the future, or with the `recent` newest stored records. With `wait`
    it waits until the job has ended; otherwise the last item for a job that has not ended is `Continue`. `on_ready` is
    called when `next_item` may return an item or raise, never within `next_item`. With `first_read` the job is first
    read by it; if it raises, `next_item` does.
    """

    def __init__(
        self,
        job_id: str,
        since: int | None,
        recent: int | None,
        wait: bool,
        store: Store,
        notifier: Notifier,
        on_ready: Callable[[], None],
        first_read: Awaitable[Job] | None = None,
    ) -> None:
        self._job_id = job_id
        self._next = since or 0
        self._recent = recent
        self._wait = wait
        self._store = store
        self._notifier = notifier
        self._on_ready = on_ready
        self._job: _JobState | None = None
        self._batch: RecordBatch | None = None  # the next item, if it was read from the store
        self._error: BaseException | None = None
        self._reads = 0
        self.on_closed: Callable[[], object] | None = None  #: Called once when the stream waits no longer.
        self._subscription = notifier.subscribe(job_id, self._on_published) if wait else None
        self._read(store.get_job(job_id) if first_read is None else first_read, self._on_job)

    def next_item(self) -> RecordBatch | End | Continue | None:
        """Return the next item; None: `on_ready` will be called. Raises `UnknownJob` or `StorageError`."""
        if self._error is not None:
            raise self._error
        job = self._job
        if job is None or self._reads:
            return None
        newest = None if self._subscription is None else self._subscription.newest
        in_memory, self._batch = self._batch or newest, None
        # Without `wait`, the stream ends with the records that were stored when the job was read.
        batch = in_memory.part(self._next, sys.maxsize if self._wait else job.records) if in_memory else None
        if batch is not None:
            self._next = batch.next
            return batch
        if self._next < (job.records if newest is None else max(job.records, newest.next)):
            self._read(self._store.read_records(self._job_id, self._next, _BATCH_BYTES), self._on_batch)
            return None
        if job.end is not None:
            return job.end
        if job.has_ended:
            self._read_job()  # to get its end
            return None
        return None if self._wait else Continue()

    def put_back(self, item: RecordBatch | End | Continue) -> None:
        """Discard the last item of `next_item`; the next call reads it from the store and returns it again."""
        if isinstance(item, RecordBatch):
            self._next = item.first
        elif self._job is not None:
            self._job = self._job._replace(end=None)

    def stop_waiting(self) -> None:
        """End the stream after the records, and the end, that are stored now."""
        if self._wait:
            self.close()
            self._read_job()

    def close(self) -> None:
        """End the subscription; no further item is requested."""
        self._wait = False
        self._batch = None
        if self._job is not None:
            self._job = self._job._replace(end=None)
        if self._subscription is not None:
            self._subscription = None
            self._notifier.unsubscribe(self._job_id, self._on_published)
            if self.on_closed is not None:
                self.on_closed()

    @property
    def is_read(self) -> bool:
        """Whether it is known if the job exists, and if the client may read it: `error` says so."""
        return self._job is not None or self._error is not None

    @property
    def error(self) -> BaseException | None:
        """What `next_item` will raise."""
        return self._error

    @property
    def next(self) -> int:
        """The number of the record that is returned next."""
        return self._next

    @property
    def final_count(self) -> int | None:
        """The number of records of a job that had ended when it was read; None: it had not, or was not read."""
        return self._job.records if self._job is not None and self._job.has_ended else None

    @property
    def is_waiting(self) -> bool:
        """Whether it waits until the job has ended."""
        return self._wait

    def fail(self, error: Exception) -> None:
        """Let `next_item` raise this error."""
        self._error = error
        self._on_ready()

    def _on_published(self, ended: bool) -> None:
        if ended:  # its last records may not be published yet
            self._read_job()
        else:
            self._on_ready()

    def _read_job(self) -> None:
        self._read(self._store.get_job(self._job_id), self._on_job)

    def _on_job(self, job: Job) -> None:
        previous = self._job
        if previous is None and self._recent is not None:
            self._next = max(0, job.records - self._recent)
        # Reads may complete in another order.
        if previous is None or job.end is not None or (not previous.has_ended and job.records >= previous.records):
            end = None if self._next < job.records else job.end
            self._job = _JobState(job.records, job.end is not None, end)

    def _on_batch(self, records: Records) -> None:
        if records:
            self._batch = RecordBatch(self._next, records)
        else:
            self._error = UnknownJob(self._job_id)  # pruned during the read

    def _read(self, reading: Awaitable[T], use: Callable[[T], None]) -> None:
        """Read from the store; `next_item` returns None until then."""
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

        asyncio.ensure_future(reading).add_done_callback(on_read)


def wait_for_end(
    job_id: str, is_active: bool, store: Store, notifier: Notifier, first_read: Awaitable[Job] | None = None
) -> Outcome[End]:
    """Return a future of the end of a job. Cancelling the future ends the wait.

    The store is not read for a job that `is_active`, because its end will be published, nor for one of the latest ends.
    With `first_read` the job is first read by it, in any case; the future raises what it raises.
    """
    result: Outcome[End] = Outcome(asyncio.get_running_loop())
    if first_read is None and (end := notifier.find_end(job_id)) is not None:
        result.set_result(end)
        return result
    is_permitted, is_published = first_read is None, False

    def read_job(reading: Awaitable[Job]) -> None:
        asyncio.ensure_future(reading).add_done_callback(on_read)

    def on_read(read: asyncio.Future[Job]) -> None:
        nonlocal is_permitted
        error = None if read.cancelled() else read.exception()
        if read.cancelled() or result.done():
            return
        if error is not None:
            result.set_exception(error)
            return
        is_permitted = True
        if (end := read.result().end) is not None:
            result.set_result(end)
        elif is_published:
            on_published(True)

    def on_published(ended: bool) -> None:
        nonlocal is_published
        if not ended or result.done():
            return
        if not is_permitted:
            is_published = True
        elif subscription.end is not None:
            result.set_result(subscription.end)
        else:
            is_published = False
            read_job(store.get_job(job_id))

    subscription = notifier.subscribe(job_id, on_published)

    def on_done(_: Outcome[End]) -> None:
        nonlocal read_job
        notifier.unsubscribe(job_id, on_published)
        del read_job  # the functions refer to each other and to the end, which would wait for the garbage collector

    result.add_done_callback(on_done)
    if first_read is not None or not is_active:
        read_job(store.get_job(job_id) if first_read is None else first_read)
    return result
