"""Writes a job's records to the store in batches: records received during a commit go into the next one.

The caller bounds the buffer: it checks `over_soft_limit` and waits for `flush`. If the store fails, the write is
retried.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from harp.protocol.json_text import Raw
from harpcaller.model.jobs import Job, Records
from harpcaller.runs.context import RunContext

log = logging.getLogger(__name__)

#: Bytes of buffered records above which the caller should stop reading.
_SOFT_LIMIT = 1024 * 1024

#: Maximum bytes, beside the longest record, that a host sends for a resumable call without an ack.
_HARD_LIMIT = 8 * 1024 * 1024

#: Bytes that a buffered record needs beside its contents.
_RECORD_OVERHEAD = 64


class RecordWriter:
    """A writer of one job's records, from the first that is not stored.

    `on_stored` is called with the number of stored records after each batch.
    """

    def __init__(self, job: Job, context: RunContext, on_stored: Callable[[int], None]) -> None:
        self._job_id = job.id
        self._context = context
        self._on_stored = on_stored
        self._values: list[Raw] = []
        self._timestamps: list[float] = []
        self._bytes = 0
        self._longest = 0
        self._in_flight = 0
        self._task: asyncio.Task[None] | None = None
        #: Number of records that are stored, or dropped after the end of the job.
        self.count = job.records
        #: Whether the job has ended, so that further records are dropped.
        self.closed = False

    @property
    def over_soft_limit(self) -> bool:
        """Whether the caller should wait for `flush` before it adds more."""
        return self._bytes > _SOFT_LIMIT

    @property
    def over_hard_limit(self) -> bool:
        """Whether more is buffered than a host may send without an ack."""
        return self._bytes - self._longest > _HARD_LIMIT

    @property
    def next_number(self) -> int:
        """The number of the next record."""
        return self.count + self._in_flight + len(self._values)

    def add_records(self, records: Sequence[Raw], timestamp: float) -> None:
        """Buffer the next records, at least one, with the Unix time at which they were made."""
        if self.closed:
            self.count += len(records)  # dropped, but acked to the host
            return
        self._values += records
        self._timestamps += [timestamp] * len(records)
        sizes = [len(record) for record in records]
        self._bytes += sum(sizes) + _RECORD_OVERHEAD * len(sizes)
        self._longest = max(self._longest, *sizes)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._store_batches())

    async def flush(self) -> None:
        """Wait until all buffered records are stored."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def close_at(self, number: int) -> None:
        """Drop all further records; the next one has this number. Call `flush` before."""
        self.closed = True
        self.count = number

    def cancel(self) -> None:
        """Drop the buffered records."""
        if self._task is not None:
            self._task.cancel()

    async def _store_batches(self) -> None:
        try:
            while self._values and not self.closed:
                batch = Records(self._values, self._timestamps)
                self._clear_buffer()
                self._in_flight = len(batch)
                append = partial(self._context.store.append_records, self._job_id, self.count, batch)
                appended = await self._context.retry_until_stored(self._job_id, append)
                self._in_flight = 0
                if appended:
                    self._context.notifier.publish_records(self._job_id, self.count, batch)
                    self.count += len(batch)
                    self._on_stored(self.count)
                else:
                    self._close(len(batch))
        except Exception:
            log.exception("cannot store records: internal error", extra={"job": self._job_id})
            self._close(self._in_flight)

    def _close(self, dropped: int) -> None:
        """Drop the buffered records and all further ones."""
        self.closed = True
        self.count += dropped + len(self._values)
        self._clear_buffer()
        self._in_flight = 0
        self._on_stored(self.count)

    def _clear_buffer(self) -> None:
        self._values, self._timestamps, self._bytes, self._longest = [], [], 0, 0
