"""Notification of clients that wait for a job: in memory, after the commit, without polling.

A notification only wakes subscribers; the state is in the store. A subscriber subscribes, then reads the store: later
commits are notified, so it misses no change. A notification carries the newest records, so that followers that are up
to date neither read them from the store nor encode them again. It also carries the end, which never changes. So the
latest short ends stay in memory: many clients submit all of their jobs before they ask for the first result, and a read
of the store costs as much as a third of a small job.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

from harp.protocol.dispatcher import encode_packets
from harp.protocol.ends import Cancelled, End, Returned
from harpcaller.model.jobs import Records
from harpcaller.model.latest import Latest

log = logging.getLogger(__name__)

_STEP = 50  #: Number of subscribers that are called in one turn of the event loop: 1 ms.
_ENDS, _MAX_END = 2500, 1000  #: Number of ends in memory, and maximum bytes of the payload of each.
#: A function that is called at each notification, with True if the job has ended.
Subscriber: TypeAlias = Callable[[bool], None]


class RecordBatch:
    """Consecutive records, at least one, numbered from `first`, with their encoded texts, which all followers share."""

    def __init__(self, first: int, records: Records) -> None:
        self.first = first
        self.records = records
        self._texts: dict[object, bytes] = {}

    @property
    def next(self) -> int:
        """The number after the last record."""
        return self.first + len(self.records)

    def part(self, first: int, end: int) -> RecordBatch | None:
        """Return the records from number `first` to before number `end`; None if the batch does not have the first."""
        if not self.first <= first < min(end, self.next):
            return None
        if first == self.first and end >= self.next:
            return self
        part = slice(first - self.first, end - self.first)
        return RecordBatch(first, Records(self.records.values[part], self.records.timestamps[part]))

    def lines(self, timed: bool) -> bytes:
        """Return the lines for a follower; with `timed`, each has the time of its record."""
        lines = self._texts.get(timed)
        if lines is None:
            timestamps = self.records.timestamps if timed else None
            lines = self._texts[timed] = encode_packets(self.first, self.records.values, timestamps)
        return lines

    def encode(self, encoder: Callable[[int, Records], bytes]) -> bytes:
        """Return the text that `encoder` makes of the number of the first record and the records. It is called once."""
        text = self._texts.get(encoder)
        if text is None:
            text = self._texts[encoder] = encoder(self.first, self.records)
        return text


class Subscription:
    """The notifications of one job, for all its subscribers.

    Many subscribers are called in several turns of the event loop. What is published before the last one was called
    calls the remaining ones first, so that each can use the records in memory.
    """

    def __init__(self) -> None:
        self.end: End | None = None  # if a notification carried it
        self.newest: RecordBatch | None = None  # of the last notification that carried records
        self.subscribers: dict[Subscriber, None] = {}
        self._uncalled: deque[Subscriber] = deque()
        self._ended = False  # in the notification in progress
        self._is_scheduled = False

    def call_remaining(self) -> None:
        """Complete the notification in progress."""
        self._call(len(self._uncalled))

    def notify(self, ended: bool) -> None:
        """Call the subscribers."""
        self._ended = ended
        self._uncalled.extend(self.subscribers)
        self._call_some()

    def _call_some(self) -> None:
        self._call(_STEP)
        if self._uncalled and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._is_scheduled = False
        self._call_some()

    def _call(self, count: int) -> None:
        for _ in range(min(count, len(self._uncalled))):
            subscriber = self._uncalled.popleft()
            if subscriber in self.subscribers:
                try:
                    subscriber(self._ended)
                except Exception:
                    log.exception("notification failed: internal error")


class Notifier:
    """The jobs with subscribers, and the latest ends. Any other job needs no memory."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, Subscription] = {}
        self._ends: Latest[End] = Latest(_ENDS)  # by job

    @property
    def subscribers(self) -> Iterator[Subscriber]:
        """All subscribers."""
        for subscription in self._subscriptions.values():
            yield from subscription.subscribers

    def subscribe(self, job_id: str, subscriber: Subscriber) -> Subscription:
        """Call a subscriber at each notification of a job, until `unsubscribe` is called."""
        subscription = self._subscriptions.get(job_id) or self._subscriptions.setdefault(job_id, Subscription())
        subscription.subscribers[subscriber] = None
        return subscription

    def unsubscribe(self, job_id: str, subscriber: Subscriber) -> None:
        """Remove a subscriber."""
        subscribers = self._subscriptions[job_id].subscribers
        del subscribers[subscriber]
        if not subscribers:
            del self._subscriptions[job_id]

    def publish_records(self, job_id: str, first: int, records: Records) -> None:
        """Notify the subscribers that records numbered from `first` are committed."""
        if subscription := self._subscriptions.get(job_id):
            subscription.call_remaining()
            subscription.newest = RecordBatch(first, records)
            subscription.notify(ended=False)

    def publish_end(self, job_id: str, end: End | None = None) -> None:
        """Notify the subscribers that the job's end or the outcome of its stop is committed.

        Without `end`, the subscribers read it from the store.
        """
        if end is not None and _is_short(end):
            self._ends[job_id] = end
        if subscription := self._subscriptions.get(job_id):
            subscription.call_remaining()
            subscription.end = end or subscription.end
            subscription.notify(ended=True)

    def find_end(self, job_id: str) -> End | None:
        """Return the end of a job if it is one of the latest."""
        return self._ends.get(job_id)

    def forget_ends(self) -> None:
        """Forget the latest ends, because jobs were deleted."""
        self._ends.clear()


def _is_short(end: End) -> bool:
    if isinstance(end, Cancelled):
        return True
    size = len(end.result) if isinstance(end, Returned) else len(end.message) + len(end.data or b"")
    return size <= _MAX_END
