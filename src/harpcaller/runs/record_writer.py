"""Writes a job's records to the store in batches: records received during a commit go into the next one.

The caller bounds the buffer: it checks `over_soft_limit` and stops reading until the buffer `is_empty`.
"""

from __future__ import annotations

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

#: Bytes of a batch, beside its last record: all other writes of the store wait for its commit.
_BATCH_BYTES = 1024 * 1024

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
        self._when_empty: Callable[[], None] | None = None
        #: Number of records that are stored, or dropped after the end of the job.
        self.count = job.records
        #: Whether the job has ended, so that further records are dropped.
        self.closed = False

    @property
    def over_soft_limit(self) -> bool:
        """Whether the caller should stop reading until the buffer is empty."""
        return self._bytes > _SOFT_LIMIT

    @property
    def over_hard_limit(self) -> bool:
        """Whether more is buffered than a host may send without an ack."""
        return self._bytes - self._longest > _HARD_LIMIT

    @property
    def is_empty(self) -> bool:
        """Whether all records are stored."""
        return not (self._in_flight or self._values)

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
        sizes = [*map(len, records)]
        self._bytes += sum(sizes) + _RECORD_OVERHEAD * len(sizes)
        self._longest = max(self._longest, *sizes)
        if not self._in_flight:
            self._store_batch()

    def when_empty(self, action: Callable[[], None]) -> None:
        """Run an action as soon as all buffered records are stored: at once, or later; it replaces an earlier one."""
        if self.is_empty:
            action()
        else:
            self._when_empty = action

    def close_at(self, number: int) -> None:
        """Drop all further records; the next one has this number."""
        self._drop_buffer()
        self.closed = True
        self.count = number

    def abandon(self) -> None:
        """Drop the buffered records, and do not call `on_stored` any more."""
        self._drop_buffer()
        self._when_empty = None
        self._on_stored = _ignore

    def _store_batch(self) -> None:
        batch = self._take_batch()
        self._in_flight = len(batch)
        append = partial(self._context.store.append_records, self._job_id, self.count, batch)
        self._context.writes.begin(self._job_id, append, partial(self._on_appended, batch), self._on_error)

    def _take_batch(self) -> Records:
        """Remove the records of the next batch from the buffer, and return them."""
        count, size = len(self._values), self._bytes
        if size > _BATCH_BYTES:
            count = size = 0
            while size <= _BATCH_BYTES and count < len(self._values):
                size += len(self._values[count]) + _RECORD_OVERHEAD
                count += 1
        batch = Records(self._values[:count], self._timestamps[:count])
        self._values, self._timestamps = self._values[count:], self._timestamps[count:]
        self._bytes -= size
        if not self._values:
            self._longest = 0
        return batch

    def _on_appended(self, batch: Records, appended: bool) -> None:
        self._in_flight = 0
        if appended:
            self._context.notifier.publish_records(self._job_id, self.count, batch)
            self.count += len(batch)
            if self._values:
                self._store_batch()
        else:
            self._close(len(batch))
        self._report()

    def _on_error(self, error: Exception) -> None:
        log.error("cannot store records: internal error", exc_info=error, extra={"job": self._job_id})
        in_flight, self._in_flight = self._in_flight, 0
        self._close(in_flight)
        self._report()

    def _report(self) -> None:
        self._on_stored(self.count)
        if self._when_empty is not None and self.is_empty:
            action, self._when_empty = self._when_empty, None
            action()

    def _close(self, dropped: int) -> None:
        """Drop the buffered records and all further ones."""
        self.closed = True
        self.count += dropped + len(self._values)
        self._drop_buffer()

    def _drop_buffer(self) -> None:
        self._values, self._timestamps, self._bytes, self._longest = [], [], 0, 0


def _ignore(_: int) -> None:
    pass
