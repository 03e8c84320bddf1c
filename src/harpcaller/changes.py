"""The change feed: which jobs have changed, for those who keep a list of jobs up to date. In memory.

Theory of operation. The feed numbers the committed changes and keeps, for each of the jobs that changed last, only the
number of its latest change: a reader that knows the state at a number reads the jobs that changed after it again. The
numbers start anew with each dispatcher, so a reader also names the `boot` that it has its number from.

A `Subscription` delivers the rows of jobs to one reader, at most four times a second; less often, if that would take
too much time from the jobs. All subscriptions share one read of the store; subscriptions of the same client rights and
the same filter share the text. A reader that does not read loses the events that wait for it, and gets a reset: then it
asks for its list again. It delays nobody.

The numbers tell how many jobs change, also to a client that may list a few of them. So a position leaves the process
encrypted, as the id of an event, and `ChangeFeed.sign` makes tags of lists that show nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence, Set
from enum import StrEnum
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

from harp.protocol.json_text import Raw, dumps
from harpcaller.cursors import Cursors, InvalidCursor
from harpcaller.model.changes import Change
from harpcaller.model.jobs import JobSummary

log = logging.getLogger(__name__)

_EVENT_ID = re.compile(r"([0-9a-f]{1,16})-([A-Za-z0-9_-]{1,100})", re.ASCII)
_MAX_JOBS = 10_000  #: Number of jobs whose latest change is kept; each needs about 200 bytes.
_INTERVAL = 0.25  #: Minimum seconds between two events about jobs.
_LONG_INTERVAL = 4.0  #: The same while many readers follow many changes.
_SHARE = 0.04  #: Share of the processor that events may take before the interval becomes longer.
#: Approximate costs in seconds: of a row that is read and encoded, of an event that is sent, of each of its bytes, and
#: of the list that its reader asks for if it has not all changes.
_ROW_COST, _EVENT_COST, _BYTE_COST, _LIST_COST = 60e-6, 30e-6, 2e-9, 300e-6
_DELAY = 0.02  #: Seconds from a change to its event, so that changes that come together are one event.
_PAGE = 500  #: Maximum number of jobs in one read of the store, and in one step of the event loop.
_MAX_ROWS = 200  #: Maximum number of rows, and of ids, in an event.
#: Number of readers from which an event without all changes has no row: they ask for their lists again in any case.
_MANY_READERS = 20
_MAX_WAITING = 256 * 1024  #: Maximum bytes of the events that wait for one reader.


class Reset(StrEnum):
    """Why a reader has to ask for everything again."""

    GAP = "gap"  # more jobs have changed since its number than the feed keeps
    SLOW = "slow"  # it has not read the events
    RESTART = "restart"  # its number is of another dispatcher
    ACCESS = "access"  # the rules of access have changed


class Position(NamedTuple):
    """A place in the feed."""

    boot: str
    number: int


class Event:
    """An event for readers: its name, its data as JSON, and the position up to which they then know all."""

    __slots__ = ("_text", "data", "name", "position")

    def __init__(self, name: str, data: Raw, position: Position) -> None:
        self.name = name
        self.data = data
        self.position = position
        self._text: tuple[object, bytes] | None = None  # the last one

    def encode(self, encoder: Callable[[Event, str], bytes], event_id_of: Callable[[Position], str]) -> bytes:
        """Return the text of the event with its id. Readers of the same kind share it."""
        if self._text is None or self._text[0] is not encoder:
            self._text = encoder, encoder(self, event_id_of(self.position))
        return self._text[1]


class ChangeFeed:
    """The numbers of the latest changes. `record` observes the store."""

    def __init__(self) -> None:
        self.boot = secrets.token_hex(4)  #: Differs after each start.
        self.number = 0  #: The number of changes.
        self._key = secrets.token_bytes(32)
        self._cursors = Cursors(self._key)
        self._numbers: OrderedDict[str, int] = OrderedDict()  # of the latest change, by job; the earliest first
        self._forgotten = 0  # the latest change of a job that is not kept
        self._wake: Callable[[], object] | None = None

    def record(self, changes: Sequence[Change]) -> None:
        """Give numbers to committed changes."""
        self.touch([change.job_id for change in changes])

    def touch(self, job_ids: Sequence[str]) -> None:
        """Give numbers to changes of these jobs, which need not be stored: such as an outage of a host."""
        numbers, number = self._numbers, self.number
        for job_id in job_ids:
            number += 1
            if job_id in numbers:
                numbers.move_to_end(job_id)
            numbers[job_id] = number
        self.number = number
        while len(numbers) > _MAX_JOBS:
            self._forgotten = numbers.popitem(last=False)[1]
        if self._wake is not None:
            self._wake()

    def on_change(self, wake: Callable[[], object] | None) -> None:
        """Call a function after changes; with None, no more."""
        self._wake = wake

    @property
    def position(self) -> Position:
        """The position after the last change."""
        return Position(self.boot, self.number)

    def encode_position(self, position: Position) -> str:
        """Return the id of an event, from which only this feed can read the position."""
        return f"{position.boot}-{self._cursors.encode(position.number, position.boot)}"

    def decode_position(self, event_id: str) -> Position | None:
        """Return the position in the id of an event; None if no feed has made it. That of another feed has number 0."""
        found = _EVENT_ID.fullmatch(event_id)
        if found is None:
            return None
        boot, cursor = found[1], found[2]
        if boot != self.boot:
            return Position(boot, 0)
        try:
            return Position(boot, self._cursors.decode(cursor, boot))
        except InvalidCursor:
            return None

    def sign(self, question: str) -> str:
        """Return a text that differs for another question, and after each change of a job."""
        text = f"{self.number} {question}".encode("utf-8", "surrogatepass")
        return blake2b(text, key=self._key, digest_size=12).hexdigest()

    def changed_since(self, number: int) -> list[tuple[str, int]] | None:
        """Return the jobs that changed after a number, each with its latest change, the latest first.

        None: not all of them are kept, or the number is not of this feed.
        """
        if not self._forgotten <= number <= self.number:
            return None
        changed = []
        for item in reversed(self._numbers.items()):
            if item[1] <= number:
                break
            changed.append(item)
        return changed


#: Returns the text of a row, of a summary and of the rights to the job.
RowWriter: TypeAlias = Callable[[JobSummary, tuple[str, ...]], Raw]


class View(NamedTuple):
    """What one or more readers see of the jobs. Readers with an equal `key` see the same."""

    key: Hashable
    #: Returns what may be done with a job; None: it may not be seen.
    rights: Callable[[JobSummary], tuple[str, ...] | None]
    #: Returns which of these jobs fit the reader's filter, by their ids.
    select: Callable[[Sequence[JobSummary]], Awaitable[Set[str]]]
    #: Whether a job that does not fit the filter may have fitted it before.
    may_have_fitted: Callable[[JobSummary], bool]
    #: Whether `rights` needs no subject: every job may be seen, so that a deleted one may be named.
    sees_all: bool
    fits_all: bool  #: Whether, besides, every job fits the filter, so that changes can be counted without a read.
    write: RowWriter  #: Views with the same function share the text.


class Subscription:
    """The events for one reader. It calls `on_ready` when `next_event` may return another one."""

    def __init__(self, feed: LiveJobs, view: View, on_ready: Callable[[], object]) -> None:
        self.view = view
        self.known = feed.changes.number  #: The change up to which the reader knows all, or will when it has read.
        self.received = self.known  #: The change up to which the reader has got the events.
        self.is_closed = False  #: Whether no further event follows those that wait.
        self._feed = feed
        self._on_ready = on_ready
        self._events: deque[Event] = deque()
        self._size = 0

    def next_event(self) -> Event | None:
        """Return the next event; None: `on_ready` will be called."""
        if not self._events:
            return None
        event = self._events.popleft()
        self._size -= len(event.data)
        self.received = event.position.number
        return event

    def add(self, event: Event) -> None:
        """Add an event; a reader with too many of them loses them all."""
        self._size += len(event.data)
        if self._size > _MAX_WAITING and self._events:
            self.reset(Reset.SLOW)
            return
        self._events.append(event)
        self._on_ready()

    def reset(self, reason: Reset) -> None:
        """Let the reader ask for everything again."""
        self._feed.count_reset(reason)
        self._events.clear()
        data = dumps({"reason": reason.value})
        self._size = len(data)
        self.known = self._feed.changes.number
        self._events.append(Event("reset", data, self._feed.changes.position))
        self._on_ready()

    def close(self) -> None:
        """End the subscription."""
        self._feed.unsubscribe(self)


class LiveJobs:
    """The subscriptions to jobs.

    `read` returns the summaries of jobs by id, and with True also what decides about rights to them.
    """

    def __init__(
        self, changes: ChangeFeed, read: Callable[[Sequence[str], bool], Awaitable[Sequence[JobSummary]]]
    ) -> None:
        self.changes = changes
        self.resets: dict[Reset, int] = dict.fromkeys(Reset, 0)  #: How many resets readers got, by reason.
        self._read = read
        self._subscriptions: dict[Subscription, None] = {}
        self._watchers: dict[str | None, list[Callable[[], object]]] = {}
        self._told = changes.number  # the change up to which the watchers were called
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._last_at = float("-inf")
        self._interval = _INTERVAL

    # Readers.

    def subscribe(self, view: View, after: Position | None, on_ready: Callable[[], object]) -> Subscription:
        """Return a subscription to the changes after a position, or to later ones."""
        self._start()
        subscription = Subscription(self, view, on_ready)
        self._subscriptions[subscription] = None
        if after is None:
            return subscription
        if after.boot != self.changes.boot:
            subscription.reset(Reset.RESTART)
        elif self.changes.changed_since(after.number) is None:
            subscription.reset(Reset.GAP)
        else:
            subscription.known = subscription.received = after.number
            self._schedule()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Remove a subscription."""
        self._subscriptions.pop(subscription, None)
        self._stop_if_unused()

    def watch(self, job_id: str | None, on_change: Callable[[], object]) -> Callable[[], None]:
        """Call a function after changes of a job, or of any job; return a function that ends it."""

        def end() -> None:
            watchers = self._watchers.get(job_id, [])
            if on_change in watchers:
                watchers.remove(on_change)
            if not watchers:
                self._watchers.pop(job_id, None)
            self._stop_if_unused()

        self._start()
        self._watchers.setdefault(job_id, []).append(on_change)
        return end

    def expel_all(self) -> None:
        """End all subscriptions after a change of the rules of access: their readers have to subscribe again."""
        for subscription in list(self._subscriptions):
            subscription.is_closed = True
            subscription.reset(Reset.ACCESS)
            self.unsubscribe(subscription)
        for on_change in self._watchers.get(None, ())[:]:
            on_change()

    @property
    def subscribers(self) -> int:
        """The number of subscriptions."""
        return len(self._subscriptions)

    def count_reset(self, reason: Reset) -> None:
        """Count a reset."""
        self.resets[reason] += 1

    def close(self) -> None:
        """Deliver nothing more."""
        self._subscriptions.clear()
        self._watchers.clear()
        self._stop_if_unused()
        if self._task is not None:
            self._task.cancel()

    # Ticks.

    def _start(self) -> None:
        if not self._watchers:
            self._told = self.changes.number
        self.changes.on_change(self._schedule)

    def _stop_if_unused(self) -> None:
        if self._subscriptions or self._watchers:
            return
        self.changes.on_change(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        """Deliver soon."""
        if self._timer is None and self._task is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time() + _DELAY, self._last_at + self._interval), self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._last_at = asyncio.get_running_loop().time()
        self._call_watchers()
        self._task = asyncio.create_task(self._deliver())
        self._task.add_done_callback(self._on_delivered)

    def _on_delivered(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("cannot read changed jobs", exc_info=error)
            for subscription in list(self._subscriptions):
                subscription.reset(Reset.GAP)
        number = self.changes.number
        if (self._watchers and self._told < number) or any(each.known < number for each in self._subscriptions):
            self._schedule()

    def _call_watchers(self) -> None:
        changed, self._told = self.changes.changed_since(self._told), self.changes.number
        jobs = list(self._watchers) if changed is None else [None, *(job_id for job_id, _ in changed)]
        for job_id in jobs:
            for on_change in self._watchers.get(job_id, ())[:]:
                on_change()

    async def _deliver(self) -> None:
        """Send each reader what has changed since it was last told."""
        until = self.changes.position
        groups: dict[tuple[Hashable, int], _Group] = {}
        for subscription in list(self._subscriptions):
            if subscription.known < until.number:
                key = subscription.view.key, subscription.known
                group = groups.get(key) or groups.setdefault(key, _Group(subscription.view, subscription.known))
                group.members.append(subscription)
        for key, group in list(groups.items()):
            if self.changes.changed_since(group.known) is None:
                del groups[key]
                for subscription in group.members:
                    subscription.reset(Reset.GAP)
        if not groups:
            return
        changed = self.changes.changed_since(min(group.known for group in groups.values())) or []
        needs_subjects = not all(group.view.sees_all for group in groups.values())
        for group in groups.values():
            group.limit_rows(changed)
        cost = 0.0
        for start in range(0, len(changed), _PAGE):
            page = changed[start : start + _PAGE]
            reading = [group for group in groups.values() if not group.count(page)]
            if not reading:
                continue
            summaries = {each.id: each for each in await self._read([job_id for job_id, _ in page], needs_subjects)}
            encoded: dict[Hashable, Raw] = {}
            for group in reading:
                await self._add_page(group, page, summaries, encoded)
                await asyncio.sleep(0)
            cost += len(encoded) * _ROW_COST
        for group in groups.values():
            event = group.make_event(until)
            if event is not None:
                of_event = _EVENT_COST + len(event.data) * _BYTE_COST + (_LIST_COST if group.more else 0.0)
                cost += len(group.members) * of_event
            for subscription in group.members:
                # It may have got a reset meanwhile: then its reader asks for everything again.
                if subscription in self._subscriptions and subscription.known == group.known:
                    subscription.known = until.number
                    if event is not None:
                        subscription.add(event)
        self._interval = min(max(_INTERVAL, cost / _SHARE), _LONG_INTERVAL)

    async def _add_page(
        self,
        group: _Group,
        page: Sequence[tuple[str, int]],
        summaries: Mapping[str, JobSummary],
        encoded: dict[Hashable, Raw],
    ) -> None:
        """Add jobs that have changed, the latest first, to the event of a group."""
        view = group.view
        seen: dict[str, tuple[JobSummary, tuple[str, ...]]] = {}
        for job_id, number in page:
            if number <= group.known:
                break
            if (summary := summaries.get(job_id)) is None:  # deleted: who might see it cannot be decided any more
                if view.sees_all:
                    group.add_left(job_id)
            elif (rights := view.rights(summary)) is not None:
                seen[job_id] = summary, rights
        fitting = await view.select([summary for summary, _ in seen.values()]) if seen else frozenset()
        for job_id, (summary, rights) in seen.items():
            if job_id not in fitting:
                if view.may_have_fitted(summary):
                    group.add_left(job_id)
            elif len(group.rows) >= group.most:
                group.more += 1
            else:
                key = view.write, job_id, rights
                row = encoded.get(key)
                if row is None:
                    row = encoded[key] = view.write(summary, rights)
                group.rows.append(row)


class _Group:
    """Subscriptions of readers that see the same and know the same, and the parts of their next event."""

    def __init__(self, view: View, known: int) -> None:
        self.view = view
        self.known = known
        self.members: list[Subscription] = []
        self.rows: list[Raw] = []
        self.left: list[str] = []
        self.more = 0  # number of further changes
        self.most = _MAX_ROWS  # maximum number of rows

    def limit_rows(self, changed: Sequence[tuple[str, int]]) -> None:
        """Let the event have no rows if it is for many readers, and there are more changes than it may have rows."""
        if self.view.fits_all and len(self.members) > _MANY_READERS:
            first_not_shown = changed[_MAX_ROWS : _MAX_ROWS + 1]
            if first_not_shown and first_not_shown[0][1] > self.known:
                self.most = 0

    def count(self, page: Sequence[tuple[str, int]]) -> bool:
        """Count these changes as further ones, without a read, if they need not be looked at; return whether."""
        if not self.view.fits_all or len(self.rows) < self.most:
            return False
        self.more += sum(number > self.known for _, number in page)
        return True

    def add_left(self, job_id: str) -> None:
        """Add a job that does not fit any more."""
        if len(self.left) < _MAX_ROWS:
            self.left.append(job_id)
        else:
            self.more += 1

    def make_event(self, position: Position) -> Event | None:
        """Return the event; None: there is nothing to tell."""
        if not (self.rows or self.left or self.more):
            return None
        if self.more and len(self.members) > _MANY_READERS:
            self.more += len(self.rows)
            self.rows.clear()
        data = b'{"rows":[%b],"left":%b,"more":%d}' % (b",".join(self.rows), dumps(self.left), self.more)
        return Event("jobs", Raw(data), position)
