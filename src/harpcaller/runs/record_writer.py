"""A job's records on their way into the store, in batches: what came during a commit goes into the next.

What waits for the store is bounded by whoever adds: it looks at `full` and waits. While the store fails, records wait
and are tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from harp.protocol.json_text import Raw
from harpcaller.model.jobs import Records
from harpcaller.notifier import News
from harpcaller.store import StorageError, Store

__all__ = ["PendingWrites", "RecordWriter", "retry_until_stored"]

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds until a write is tried again that the store failed to do.
_RETRY_DELAY = 1.0

#: Bytes of records that may wait for the store.
_SOFT_LIMIT = 1024 * 1024

#: As many and one record more is what a host sends ahead by itself of a kept call, however short its records are.
_HARD_LIMIT = 8 * 1024 * 1024

#: What a waiting record costs beside its bytes.
_RECORD_OVERHEAD = 64


class PendingWrites:
    """How many runs have something that the store does not take at the moment."""

    def __init__(self) -> None:
        self.count = 0


class RecordWriter:
    """Stores the records of one job, from the first that is not stored on.

    Args:
        job_id: the job.
        count: how many of its records are stored.
        store: where they go.
        news: who follows is told there.
        trouble: counts what the store does not take.
        on_stored: called with the number of stored records whenever there are more.
    """

    def __init__(
        self,
        job_id: str,
        count: int,
        store: Store,
        news: News,
        pending_writes: PendingWrites,
        on_stored: Callable[[int], None],
    ) -> None:
        self._job_id = job_id
        self._store = store
        self._news = news
        self._pending_writes = pending_writes
        self._on_stored = on_stored
        self._values: list[Raw] = []
        self._made: list[float] = []
        self._bytes = 0
        self._longest = 0
        self._in_flight = 0
        self._task: asyncio.Task[None] | None = None
        #: How many are stored, or dropped because the store takes no more of them.
        self.count = count
        #: Whether the store takes no more of them: the job has ended.
        self.closed = False

    @property
    def over_soft_limit(self) -> bool:
        """Whether so much waits that no more should be added."""
        return self._bytes > _SOFT_LIMIT

    @property
    def over_hard_limit(self) -> bool:
        """Whether more waits than a host sends ahead that keeps to the protocol."""
        return self._bytes - self._longest > _HARD_LIMIT

    @property
    def next_number(self) -> int:
        """The number of the record to come."""
        return self.count + self._in_flight + len(self._values)

    def add_records(self, records: Sequence[Raw], made: float) -> None:
        """Take the next records, one or more, made at this time; Unix seconds."""
        if self.closed:
            self.count += len(records)  # dropped, which is as good as stored to the host
            return
        self._values += records
        self._made += [made] * len(records)
        sizes = [len(record) for record in records]
        self._bytes += sum(sizes) + _RECORD_OVERHEAD * len(sizes)
        self._longest = max(self._longest, *sizes)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._store_batches())

    async def flush(self) -> None:
        """Wait until nothing waits."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def close_at(self, number: int) -> None:
        """Take no more of them; the next to come has this number. Nothing waits: see `stored`."""
        self.closed = True
        self.count = number

    def cancel(self) -> None:
        """Drop what waits still."""
        if self._task is not None:
            self._task.cancel()

    async def _store_batches(self) -> None:
        try:
            while self._values and not self.closed:
                batch = Records(self._values, self._made)
                self._clear_buffer()
                self._in_flight = len(batch)
                append = partial(self._store.append_records, self._job_id, self.count, batch)
                taken = await retry_until_stored(self._pending_writes, self._job_id, append)
                self._in_flight = 0
                if taken:
                    self._news.records(self._job_id, self.count, batch)
                    self.count += len(batch)
                    self._on_stored(self.count)
                else:
                    self._close(len(batch))
        except Exception:
            log.exception("records lost by a fault of the dispatcher", extra={"job": self._job_id})
            self._close(self._in_flight)

    def _close(self, dropped: int) -> None:
        """Take no more records, and drop those that wait."""
        self.closed = True
        self.count += dropped + len(self._values)
        self._clear_buffer()
        self._in_flight = 0
        self._on_stored(self.count)

    def _clear_buffer(self) -> None:
        self._values, self._made, self._bytes, self._longest = [], [], 0, 0


async def retry_until_stored(pending_writes: PendingWrites, job_id: str, write: Callable[[], Awaitable[T]]) -> T:
    """Write, again and again until the store can."""
    failing = False
    try:
        while True:
            try:
                return await write()
            except StorageError as error:
                if not failing:
                    about = {"job": job_id, "error": str(error)}
                    log.error("what a call brought can't be stored, trying again", extra=about)
                    pending_writes.count += 1
                    failing = True
            await asyncio.sleep(_RETRY_DELAY)
    finally:
        pending_writes.count -= failing
