"""Who waits for news of a job, and how they are woken: in memory, after the commit, without polling.

News only wakes; the store is the truth. A watcher takes the event, then reads the store, then waits for the
event: whatever is committed after its reading sets the event that it holds, so nothing is missed. Events are
used once. The newest records come along, so that a thousand followers who are up to date need not read them
from the store, nor have their lines made for each; and so does an end, which stays what it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from harp.protocol.ends import End
from harp.protocol.replies import encode_packets
from harpcaller.model.jobs import Records

__all__ = ["Notifier", "RecordBatch", "Subscription"]


class RecordBatch:
    """Records on their way to followers, who share the lines.

    Args:
        first: the number of the first.
        records: they; one at least.
    """

    __slots__ = ("_lines", "first", "records")

    def __init__(self, first: int, records: Records) -> None:
        self.first = first
        self.records = records
        self._lines: dict[bool, bytes] = {}

    @property
    def next(self) -> int:
        """The number that follows the last."""
        return self.first + len(self.records)

    def lines(self, timed: bool) -> bytes:
        """The lines for a follower; `timed`: each with the time at which the record was made."""
        lines = self._lines.get(timed)
        if lines is None:
            values, made = self.records.values, self.records.timestamps
            lines = self._lines[timed] = encode_packets(self.first, values, made if timed else None)
        return lines


class Subscription:
    """A job that somebody watches.

    Attributes:
        changed: set at the next news of any kind.
        ended: set at the next news of an end.
        end: the job's end, if it came with news; None: the store knows.
    """

    __slots__ = ("_newest", "changed", "end", "ended", "watchers")

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.ended = asyncio.Event()
        self.end: End | None = None
        self.watchers = 0
        self._newest: RecordBatch | None = None

    def newest_from(self, first: int) -> RecordBatch | None:
        """The records from number `first` on, if they came with the last news."""
        newest = self._newest
        if newest is None or not newest.first <= first < newest.next:
            return None
        if newest.first == first:
            return newest
        skipped, records = first - newest.first, newest.records
        return RecordBatch(first, Records(records.values[skipped:], records.timestamps[skipped:]))

    def publish_records(self, first: int, records: Records) -> None:
        """Wake those who wait for records."""
        self._newest = RecordBatch(first, records)
        self.changed.set()
        self.changed = asyncio.Event()

    def publish_end(self, end: End | None) -> None:
        """Wake all who wait."""
        self.end = end or self.end
        self.ended.set()
        self.ended = asyncio.Event()
        self.changed.set()
        self.changed = asyncio.Event()


class Notifier:
    """The jobs that somebody watches. What nobody watches costs nothing."""

    def __init__(self) -> None:
        self._topics: dict[str, Subscription] = {}

    @contextmanager
    def subscribe(self, job_id: str) -> Iterator[Subscription]:
        """Watch a job for as long as the context lasts."""
        subscription = self._topics.setdefault(job_id, Subscription())
        subscription.watchers += 1
        try:
            yield subscription
        finally:
            subscription.watchers -= 1
            if not subscription.watchers:
                del self._topics[job_id]

    def publish_records(self, job_id: str, first: int, records: Records) -> None:
        """Tell the watchers that records numbered from `first` are committed."""
        if subscription := self._topics.get(job_id):
            subscription.publish_records(first, records)

    def publish_end(self, job_id: str, end: End | None = None) -> None:
        """Tell the watchers that the job's end, or how its stop turned out, is committed.

        Args:
            job_id: the job.
            end: its end, as it is stored; None: they read it from the store.
        """
        if subscription := self._topics.get(job_id):
            subscription.publish_end(end)
