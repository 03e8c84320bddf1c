"""Live changes of jobs and of their numbers, as server-sent events or as JSON Lines. Spec: docs/http-api.md, Events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any

from msgspec import Meta
from starlette.responses import Response

from harp import __version__
from harp.protocol.json_text import Raw, dumps
from harpcaller.access import AccessDenied
from harpcaller.acting import ActingAs
from harpcaller.changes import Event, Position, Reset, RowWriter, Subscription
from harpcaller.http.authentication import repeat_authentication
from harpcaller.http.jobs import QueueNames
from harpcaller.http.lists import JobFilterQuery, encode_counts
from harpcaller.http.operations import Answer, APIRequest, Operation
from harpcaller.http.problems import Problem
from harpcaller.http.streaming import ACCESS, EVENTS, JSON_LINES, RETRY, StreamResponse
from harpcaller.job_rows import write_row, write_row_as_text
from harpcaller.model.job_filters import JobFilter
from harpcaller.store import StorageError

TOPICS = ("jobs", "counts")

_COUNT_EVERY = 1.0  #: Minimum seconds between two events with numbers of jobs.


class EventsQuery(JobFilterQuery, frozen=True, kw_only=True, rename={"from_": "from"}):
    """The parameters of `follow_events`."""

    topics: Annotated[str, Meta(description=f"Topics, separated by commas: {', '.join(TOPICS)}.")] = "jobs"
    payloads: QueueNames = "raw"


def _encode_event(event: Event, event_id: str) -> bytes:
    data = event.data.replace(b"\r", b" ")
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (event_id.encode(), event.name.encode(), data)


def _encode_line(event: Event, event_id: str) -> bytes:
    data = event.data.replace(b"\r", b" ")
    return b'{"event":"%b","id":"%b","data":%b}\n' % (event.name.encode(), event_id.encode(), data)


class EventSource:
    """The events for one client: first ``hello``, then those of its topics."""

    def __init__(
        self,
        acting: ActingAs,
        wanted: JobFilter,
        topics: frozenset[str],
        after: Position | None,
        as_lines: bool,
        write: RowWriter,
    ) -> None:
        self.on_ready: Callable[[], object] = lambda: None
        self.heartbeat = b"\n" if as_lines else b": hb\n\n"
        self.is_done = False
        self._acting = acting
        self._encoder = _encode_line if as_lines else _encode_event
        self._subscription: Subscription | None = None
        self._counts: Counts | None = None
        if "jobs" in topics:
            self._subscription = acting.watch_jobs(wanted, after, self._wake, write)
        if "counts" in topics:
            self._counts = Counts(acting, wanted, self._wake)
        self._stop_watching = acting.watch_changes(None, self._check)
        hello = {"boot": acting.position.boot, "version": __version__, "now": time.time()}
        # A client that connects again before it has received what it missed must not skip it.
        known = acting.position if after is None else after
        self._hello: Event | None = Event("hello", dumps(hello), known)
        self._start = b"" if as_lines else RETRY
        self._last: bytes | None = None
        self._returned: bytes | None = None  # the last part, which was put back

    def next_part(self) -> bytes | None:
        """See `Source`."""
        part, self._returned = self._returned, None
        self._last = self._make_part() if part is None else part
        return self._last

    def _make_part(self) -> bytes | None:
        if self._hello is not None:
            hello, self._hello = self._hello, None
            return self._start + self._encode(hello)
        if self._subscription is not None:
            if (event := self._subscription.next_event()) is not None:
                return self._encode(event)
            if self._subscription.is_closed:
                self.is_done = True
                return None
        elif not self._acting.is_current:
            return self.interrupt(ACCESS)
        if self._counts is not None and (data := self._counts.take()) is not None:
            return self._encode(Event("counts", data, self._known))
        return None

    def _encode(self, event: Event) -> bytes:
        return event.encode(self._encoder, self._acting.event_ids.encode_position)

    @property
    def _known(self) -> Position:
        """The position up to which the client knows all."""
        position = self._acting.position
        return position if self._subscription is None else Position(position.boot, self._subscription.received)

    def put_back(self) -> None:
        """See `Source`."""
        self._returned = self._last

    def interrupt(self, reason: str) -> bytes:
        """See `Source`."""
        self.is_done = True
        data = dumps({"reason": (Reset.ACCESS if reason == ACCESS else Reset.RESTART).value})
        return self._encode(Event("reset", data, self._known))

    def close(self) -> None:
        """See `Source`."""
        self._stop_watching()
        if self._subscription is not None:
            self._subscription.close()
        if self._counts is not None:
            self._counts.close()

    def _wake(self) -> None:
        self.on_ready()

    def _check(self) -> None:
        """Handle that jobs, or the rules of access, have changed."""
        if self._counts is not None:
            self._counts.renew()
        if not self._acting.is_current:
            self.on_ready()


class Counts:
    """The numbers of jobs by state, as `count_jobs` has them, at most once a second, when they have changed."""

    def __init__(self, acting: ActingAs, wanted: JobFilter, on_ready: Callable[[], object]) -> None:
        self._acting = acting
        self._wanted = wanted
        self._on_ready = on_ready
        self._changed_at = 0.0  # Unix time of the last change
        self._is_outdated = False  # whether they changed after they were counted
        self._counted_at = float("-inf")  # time of the loop
        self._by: Any = None
        self._data: Raw | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.renew()

    def take(self) -> Raw | None:
        """Return new numbers once."""
        data, self._data = self._data, None
        return data

    def renew(self) -> None:
        """Count again soon."""
        self._changed_at = time.time()
        self._schedule()

    def close(self) -> None:
        """Count no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _schedule(self) -> None:
        if self._timer is None and self._task is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._counted_at + _COUNT_EVERY), self._begin)

    def _begin(self) -> None:
        self._timer = None
        self._counted_at = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._count())
        self._task.add_done_callback(self._on_counted)

    async def _count(self) -> None:
        try:
            counts = await self._acting.count_jobs(self._wanted, ("state",))
        except (StorageError, AccessDenied):
            return  # they are counted again after the next change, unless the response ends
        if counts.by != self._by:
            self._by = counts.by
            self._data = dumps(encode_counts(counts))
            self._on_ready()
        self._is_outdated = counts.at <= self._changed_at  # a shared answer may be older than the change

    def _on_counted(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if self._is_outdated and not task.cancelled():
            self._is_outdated = False
            self._schedule()


async def follow_events(request: APIRequest) -> Response:
    """Answer with changes as they come."""
    query: EventsQuery = request.query
    topics = frozenset(query.topics.split(","))
    for topic in topics:
        if topic not in TOPICS:
            raise Problem("invalid_request", f"topics: expected some of {', '.join(TOPICS)}, got {topic[:100]!r}")
    wanted = query.parse(time.time())
    after = None
    if (text := request.headers.get("last-event-id")) and (
        after := request.acting.event_ids.decode_position(text)
    ) is None:
        raise Problem("invalid_request", "Last-Event-ID: expected the id of an event")
    accepted = request.headers.get("accept", "")
    as_lines = JSON_LINES in accepted and EVENTS not in accepted
    write = write_row_as_text if query.payloads == "text" else write_row
    admitted = request.service.streams.admit(request.client, "events")
    try:
        source = EventSource(request.acting, wanted, topics, after, as_lines, write)
    except BaseException:
        admitted.release()
        raise
    media_type = JSON_LINES if as_lines else EVENTS
    return StreamResponse(admitted, source, media_type, repeat_authentication(request))


OPERATIONS = (
    Operation(
        method="GET",
        path="/events",
        operation_id="follow_events",
        summary="Follow changes of jobs",
        description="""\
Server-sent events, or with `Accept: application/jsonl` lines `{"event":NAME,"id":ID,"data":ANY}`: `hello` first,
then `jobs` (at most four a second: rows that fit the filter, ids of jobs that do not fit any more, and the number of
further changes that were left out), `counts` (at most one a second), and `reset` when the client has to ask for its
list again. A client that connects again with `Last-Event-ID` misses nothing, or gets `reset`.
""",
        handler=follow_events,
        query=EventsQuery,
        action="list",
        headers={"Last-Event-ID": "the id of the last event that was received"},
        responses={200: Answer("the events", None, EVENTS, other_media_types=(JSON_LINES,))},
    ),
)
