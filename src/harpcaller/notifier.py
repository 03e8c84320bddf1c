"""Notification of clients that wait for a job: in memory, after the commit, without polling.

A notification only wakes; the store holds the state. A subscriber gets the event, then reads the store, then waits
for the event. Everything that is committed after its read sets the event that it holds, so nothing is missed. Each
event is used once. A notification carries the newest records, so that followers that are up to date neither read them
from the store nor encode them again, and it carries the end, which never changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harp.protocol.ends import End
from harp.protocol.replies import encode_packets
from harpcaller.model.jobs import Records


class RecordBatch:
    """Consecutive records with their encoded lines, which all followers share.

    Args:
        first: number of the first record.
        records: the records, at least one.
    """

    __slots__ = ("_lines", "first", "records")

    def __init__(self, first: int, records: Records) -> None:
        self.first = first
        self.records = records
        self._lines: dict[bool, bytes] = {}

    @property
    def next(self) -> int:
        """The number after the last record."""
        return self.first + len(self.records)

    def lines(self, timed: bool) -> bytes:
        """Return the lines for a follower; with `timed`, each has the time of its record."""
        lines = self._lines.get(timed)
        if lines is None:
            timestamps = self.records.timestamps if timed else None
            lines = self._lines[timed] = encode_packets(self.first, self.records.values, timestamps)
        return lines


class Subscription:
    """The notifications of one job, for all its subscribers.

    Attributes:
        changed: set at the next notification of any kind.
        ended: set at the next notification of an end.
        end: the job's end, if a notification carried it.
        newest: the records of the last notification that carried records.
        subscribers: number of subscribers.
        on_end: called at each notification of an end.
    """

    __slots__ = ("changed", "end", "ended", "newest", "on_end", "subscribers")

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.ended = asyncio.Event()
        self.end: End | None = None
        self.subscribers = 0
        self.newest: RecordBatch | None = None
        self.on_end: list[Callable[[], None]] = []

    def newest_from(self, first: int) -> RecordBatch | None:
        """Return the records from number `first` on, if the last notification carried them."""
        newest = self.newest
        if newest is None or not newest.first <= first < newest.next:
            return None
        if newest.first == first:
            return newest
        skipped, records = first - newest.first, newest.records
        return RecordBatch(first, Records(records.values[skipped:], records.timestamps[skipped:]))

    def notify(self) -> None:
        """Wake the subscribers that wait for any change."""
        self.changed.set()
        self.changed = asyncio.Event()


class Notifier:
    """The jobs with subscribers. A job without a subscriber costs nothing."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, Subscription] = {}

    @contextmanager
    def subscribe(self, job_id: str) -> Iterator[Subscription]:
        """Subscribe to a job while the context lasts."""
        subscription = self.add(job_id)
        try:
            yield subscription
        finally:
            self.remove(job_id)

    def add(self, job_id: str) -> Subscription:
        """Subscribe to a job, until `remove` is called."""
        subscription = self._subscriptions.get(job_id)
        if subscription is None:
            subscription = self._subscriptions[job_id] = Subscription()
        subscription.subscribers += 1
        return subscription

    def remove(self, job_id: str) -> None:
        """End one subscription to a job."""
        subscription = self._subscriptions[job_id]
        subscription.subscribers -= 1
        if not subscription.subscribers:
            del self._subscriptions[job_id]

    def publish_records(self, job_id: str, first: int, records: Records) -> None:
        """Notify the subscribers that records numbered from `first` are committed."""
        if subscription := self._subscriptions.get(job_id):
            subscription.newest = RecordBatch(first, records)
            subscription.notify()

    def publish_end(self, job_id: str, end: End | None = None) -> None:
        """Notify the subscribers that the job's end or the outcome of its stop is committed.

        Without `end` they read it from the store.
        """
        if subscription := self._subscriptions.get(job_id):
            subscription.end = end or subscription.end
            subscription.ended.set()
            subscription.ended = asyncio.Event()
            subscription.notify()
            for callback in subscription.on_end.copy():
                callback()
