"""Writes a job's records to the store in batches: records received during a commit go into the next one.

The caller bounds the buffer: it stops reading when the buffer `is_full`, until it `is_empty`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from harpcaller.model.jobs import Job, Records
from harpcaller.runs.context import RunContext

log = logging.getLogger(__name__)

_BOUND_LIMIT = 1024 * 1024  #: Maximum bytes of buffered records of a connection-bound call.
_RESUMABLE_LIMIT = 8 * 1024 * 1024  #: The same of a resumable call, without its longest record.
_BATCH_BYTES = 256 * 1024  #: Bytes of a batch without its last record: other writes of the store wait for its commit.
_RECORD_OVERHEAD = 64  #: Bytes that a buffered record needs in addition to its contents.
_TIME_BYTES = 12  #: Bytes of a time in the store.


class RecordWriter:
    """A writer of one job's records; `on_stored` is called with the number of stored records after each batch.

    All records together, with their times, have at most `max_bytes` bytes in the store. Those that do not fit, and all
    that follow, are discarded.
    """

    def __init__(self, job: Job, context: RunContext, on_stored: Callable[[int], None]) -> None:
        self._job_id = job.id
        self._context = context
        self._on_stored = on_stored
        self._values: list[bytes] = []
        self._timestamps: list[float] = []
        self._bytes = 0
        self._longest = 0
        self._in_flight = 0
        self._when_empty: Callable[[], None] | None = None
        self.count = job.records  #: Number of records that are stored, or were discarded after the end of the job.
        self.size = 0  #: Bytes of the records of this run; the run adds those of earlier runs.
        of_all, of_rule = context.config.max_record_bytes, job.max_record_bytes
        self.max_bytes = of_all if of_rule is None else min(of_all, of_rule)
        self.is_exceeded = False  #: Whether records did not fit.
        self._discarded = 0  # number of these records
        self.closed = False  #: Whether the job has ended, so that further records are discarded.

    @property
    def is_empty(self) -> bool:
        """Whether all records are stored."""
        return not (self._in_flight or self._values)

    @property
    def next_number(self) -> int:
        """The number of the next record."""
        return self.count + self._in_flight + len(self._values) + self._discarded

    def is_full(self, resumable: bool) -> bool:
        """Return whether the caller should stop reading until the buffer is empty."""
        return self._bytes - self._longest > _RESUMABLE_LIMIT if resumable else self._bytes > _BOUND_LIMIT

    def add_records(self, records: Sequence[bytes], timestamp: float) -> None:
        """Buffer the next records, at least one, with the Unix time of their creation."""
        if self.closed:
            self.count += len(records)  # discarded, but acknowledged to the host
            return
        sizes = [*map(len, records)]
        total = sum(sizes)
        size = total + len(sizes) + _TIME_BYTES  # a line feed separates two records
        if self.is_exceeded or self.size + size > self.max_bytes:
            self.is_exceeded = True
            self._discarded += len(records)
            return
        self._values += records
        self._timestamps += [timestamp] * len(records)
        self.size += size
        self._bytes += total + _RECORD_OVERHEAD * len(sizes)
        self._longest = max(self._longest, *sizes)
        if not self._in_flight:
            self._store_batch()

    def when_empty(self, action: Callable[[], None]) -> None:
        """Run an action as soon as all buffered records are stored; it replaces the previous action."""
        if self.is_empty:
            action()
        else:
            self._when_empty = action

    def close(self, next_number: int) -> None:
        """Discard all buffered and future records; `next_number` is the number of the next record."""
        self.closed = True
        self.count, self._discarded = next_number, 0
        self._values, self._timestamps, self._bytes = [], [], 0

    def abandon(self) -> None:
        """Discard the buffered records, and the action of `when_empty`."""
        self.close(self.count)
        self._when_empty = None

    def _store_batch(self) -> None:
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
        self._in_flight = count
        append = partial(self._context.store.append_records, self._job_id, self.count, batch)
        on_stored, on_error = partial(self._on_appended, batch), partial(self._on_error, batch)
        self._context.writes.retry_until_stored(self._job_id, append, on_stored, on_error)

    def _on_error(self, batch: Records, error: Exception) -> None:
        log.error("cannot store records: internal error", exc_info=error, extra={"job": self._job_id})
        self._on_appended(batch, appended=False)

    def _on_appended(self, batch: Records, appended: bool) -> None:
        self._in_flight = 0
        if not appended:
            self.close(self.count + len(batch) + len(self._values))
        else:
            self._context.notifier.publish_records(self._job_id, self.count, batch)
            self.count += len(batch)
            if self._values:
                self._store_batch()
        self._on_stored(self.count)
        if self._when_empty is not None and self.is_empty:
            action, self._when_empty = self._when_empty, None
            action()
