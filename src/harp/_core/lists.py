"""Lists of a dispatcher's jobs, hosts and queues: their items as frozen values, and reading a list page by page.

Each page is one request and one reply, so a list holds no connection between two pages. A page is requested when its
first item is. The cursor of a page is valid for any dispatcher with the same store: after an interruption, the same
page is requested again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

from harp._core.connections import Steps
from harp._core.retry import ReconnectPolicy, closed_without_reply, unsupported_by_peer
from harp._core.values import refusal_of
from harp.errors import CommunicationError, HarpException, NotSupported
from harp.protocol import dispatcher as protocol
from harp.protocol.dispatcher import HostsListed, JobsCounted, JobsListed, ListRequest, QueuesListed, Refused
from harp.protocol.schema import ProtocolError, check

T = TypeVar("T")

#: How the refusal of a dispatcher begins that does not know a request.
_UNKNOWN_REQUEST = "expected exactly one of "
_INVALID = frozenset({"invalid_request", "invalid_filter", "invalid_cursor"})


@dataclass(frozen=True, slots=True)
class JobSummary:
    """A job in a list. Times are Unix seconds with fractions. Spec: docs/client-api.md, Lists."""

    id: str
    state: str  #: queued, running, returned, raised, failed or cancelled.
    host: str
    procedure: str
    queue_id: str | None  #: The id of its queue in filters.
    queue: str | None  #: The name of its queue, as JSON text.
    owner: str | None  #: The principal that submitted it; None: it was submitted before HARP stored owners.
    submitted: float | None
    started: float | None
    ended: float | None
    records: int  #: The number of stored records.
    end_type: str | None  #: The type of its error, or the class of its exception.
    end_message: str | None  #: The beginning of the message.
    stop: str | None  #: Whether its host has confirmed that it was stopped: see `RemoteCall.details`.
    holds_slot: bool
    unreachable_since: float | None  #: Since when its host cannot be reached while it runs.
    arguments_preview: str  #: The beginning of the JSON text of its arguments.
    info_preview: str
    rerun_of: str | None  #: The id of the job that it repeats.
    can: tuple[str, ...]  #: What this client may do with it: read, cancel, rerun, release.
    _row: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class HostSummary:
    """A host of the dispatcher's registry. Spec: docs/client-api.md, Lists."""

    name: str
    address: str
    port: int
    state: str  #: up, down or unknown.
    since: float | None  #: Since when it is down.
    running: int  #: The number of jobs that hold a slot on it.
    queued: int
    limit: int | None  #: The maximum number of jobs that may hold a slot on it.
    error: str | None  #: Why the last start on it failed.
    _row: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class QueueSummary:
    """A queue that has jobs which are queued or hold a slot. Spec: docs/client-api.md, Lists."""

    id: str  #: Its id in filters.
    name: str  #: Its name as JSON text.
    concurrency: int
    running: int  #: The number of its jobs that hold a slot.
    queued: int
    oldest_submit: float | None  #: The submission of its oldest queued job.
    _row: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ValueCount:
    """The number of jobs with one value."""

    value: str | None
    count: int
    more: bool = False  #: There are more jobs than were counted.


@dataclass(frozen=True, slots=True)
class JobCounts:
    """Numbers of jobs by the values of state, host or another key. Spec: docs/client-api.md, Lists."""

    by: Mapping[str, tuple[ValueCount, ...]]
    exact: bool  #: Whether no number may be too small.
    at: float | None  #: When the jobs were counted.


# Decoding. A dispatcher may omit what it does not know, and add keys.

_Types = type | tuple[type, ...]
_NONE = type(None)
_TIME = (int, float, _NONE)
_TEXT = (str, _NONE)


def _member(row: Mapping[str, Any], path: str, types: _Types, default: Any) -> Any:
    """Return the member at a path; the default if it is absent. Raise `ProtocolError` if its type is another one."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None:
        check(default is not ..., f"{path}: missing")
        return default
    is_number_like = isinstance(value, bool) and (types is int or types is _TIME)
    check(isinstance(value, types) and not is_number_like, f"{path}: a value of another type than expected")
    return float(value) if types is _TIME else value


#: Of each attribute: the path of its member, its types, and the default; ``...``: the member is required.
_Layout = Mapping[str, tuple[str, _Types, Any]]
_JOB: _Layout = {
    "id": ("job", str, ...),
    "state": ("state", str, ...),
    "host": ("host", str, ...),
    "procedure": ("procedure", str, ...),
    "queue_id": ("queue.id", _TEXT, None),
    "queue": ("queue.name", _TEXT, None),
    "owner": ("owner", _TEXT, None),
    "submitted": ("time.submit", _TIME, None),
    "started": ("time.start", _TIME, None),
    "ended": ("time.end", _TIME, None),
    "records": ("records", int, 0),
    "end_type": ("end_type", _TEXT, None),
    "end_message": ("end_message", _TEXT, None),
    "stop": ("stop", _TEXT, None),
    "holds_slot": ("holds_slot", bool, False),
    "unreachable_since": ("unreachable_since", _TIME, None),
    "arguments_preview": ("arguments_preview", str, ""),
    "info_preview": ("info_preview", str, ""),
    "rerun_of": ("rerun_of", _TEXT, None),
    "can": ("can", list, ()),
}
_HOST: _Layout = {
    "name": ("name", str, ...),
    "address": ("address", str, ""),
    "port": ("port", int, 0),
    "state": ("state", str, "unknown"),
    "since": ("since", _TIME, None),
    "running": ("running", int, 0),
    "queued": ("queued", int, 0),
    "limit": ("limit", (int, _NONE), None),
    "error": ("error", _TEXT, None),
}
_QUEUE: _Layout = {
    "id": ("id", str, ...),
    "name": ("name", str, ...),
    "concurrency": ("concurrency", int, 1),
    "running": ("running", int, 0),
    "queued": ("queued", int, 0),
    "oldest_submit": ("oldest_submit", _TIME, None),
}


def _parse_rows(key: str, kind: Callable[..., T], layout: _Layout, rows: Sequence[Any]) -> tuple[T, ...]:
    found = []
    for index, row in enumerate(rows):
        check(isinstance(row, dict), f"{key}[{index}]: expected an object")
        try:
            members = {name: _member(row, *rule) for name, rule in layout.items()}
            if "can" in members:
                members["can"] = tuple(each for each in members["can"] if isinstance(each, str))
            found.append(kind(**members, _row=row))
        except ProtocolError as error:
            raise ProtocolError(f"{key}[{index}].{error}") from error
    return tuple(found)


def parse_items(reply: JobsListed | HostsListed | QueuesListed) -> Any:
    """Return a reply with values instead of objects. Raise `ProtocolError`, which names the invalid member."""
    match reply:
        case JobsListed(jobs):
            return replace(reply, jobs=_parse_rows("jobs", JobSummary, _JOB, jobs))
        case HostsListed(hosts):
            return replace(reply, hosts=_parse_rows("hosts", HostSummary, _HOST, hosts))
        case QueuesListed(queues):
            return replace(reply, queues=_parse_rows("queues", QueueSummary, _QUEUE, queues))


def parse_counts(reply: JobsCounted) -> JobCounts:
    """Return the counts of a reply. Raise `ProtocolError`, which names the invalid member."""
    found: dict[str, tuple[ValueCount, ...]] = {}
    for key, counts in _member(reply.counts, "by", dict, ...).items():
        check(isinstance(counts, list), f"counts.by.{key}: expected an array")
        found[key] = tuple(_parse_count(f"counts.by.{key}[{index}]", each) for index, each in enumerate(counts))
    return JobCounts(found, _member(reply.counts, "exact", bool, False), _member(reply.counts, "at", _TIME, None))


def _parse_count(where: str, counted: Any) -> ValueCount:
    check(isinstance(counted, dict), f"{where}: expected an object")
    try:
        number, more = _member(counted, "count", int, ...), _member(counted, "more", bool, False)
        return ValueCount(_member(counted, "value", _TEXT, None), number, more)
    except ProtocolError as error:
        raise ProtocolError(f"{where}.{error}") from error


def explain_refusal(error: HarpException, feature: str) -> HarpException:
    """Return the exception for an error of a request that older dispatchers do not know, or whose filter is invalid."""
    kind, message = getattr(error, "type", None), getattr(error, "message", "")
    if isinstance(error, CommunicationError) and closed_without_reply(error):
        return unsupported_by_peer(error, feature)
    if kind == "invalid_request" and message.startswith(_UNKNOWN_REQUEST):
        return NotSupported(f"the dispatcher is too old for {feature}")
    return HarpException(message) if kind in _INVALID else error


class ListBase(Generic[T]):
    """The items of a list; its pages are requested as they are needed.

    `dispatcher` is a `CallerBase`; `limit` is the maximum number of items, None: all. Between two pages the dispatcher
    may be unreachable for as long as its option `reconnect` allows.
    """

    def __init__(self, dispatcher: Any, request: ListRequest, limit: int | None) -> None:
        self._dispatcher = dispatcher
        self._request = request
        self._remaining = limit
        self._items: deque[T] = deque()
        self._ended = limit == 0
        self._failure: HarpException | None = None
        self._is_first = True
        self._policy = ReconnectPolicy(dispatcher._reconnect, dispatcher._on_outage)
        #: The cursor with which a list continues after the pages that were requested; None: at its beginning, or its
        #: end.
        self.cursor: str | None = request.cursor
        #: Called before each page but the first.
        self._on_next_page: Callable[[], None] = lambda: None
        #: The number of jobs that the dispatcher has examined for this list, and the submission of the last one.
        self.examined = 0
        self.searched_to: float | None = None

    def _end(self) -> None:
        """End the iteration early."""
        self._ended = True
        self._items.clear()

    def _next_items(self) -> Steps[tuple[T, ...]]:
        """Return the next item in a tuple, which is empty at the end."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        while not self._items:
            if self._ended:
                return ()
            try:
                yield from self._read_page()
            except HarpException as error:
                self._failure = error
                raise
        return (self._items.popleft(),)

    def _read_page(self) -> Steps[None]:
        most = protocol.DEFAULT_LISTED if self._remaining is None else min(self._remaining, protocol.MAX_LISTED)
        request = replace(self._request, limit=most, cursor=self.cursor)
        if not self._is_first:
            self._on_next_page()
        reply: Any = None
        while reply is None:
            try:
                reply, _ = yield from self._dispatcher._send(request, self._policy)
                if isinstance(reply, Refused):
                    reply, refusal = None, refusal_of(reply)
                    raise refusal
            except HarpException as error:
                if self._is_first or getattr(error, "type", None) in _INVALID:
                    raise explain_refusal(error, "lists") from error.__cause__
                now = self._dispatcher._now()
                yield self._dispatcher._sleep(self._policy.next_pause(error, now))
        self._is_first = False
        self._policy.end_outage()
        items: Sequence[T] = getattr(reply, fields(reply)[0].name)
        self._items += items
        if self._remaining is not None:
            self._remaining -= len(items)
        self.cursor = reply.next
        self._ended = reply.next is None or self._remaining == 0
        if isinstance(reply, JobsListed):
            self.examined += reply.examined
            self.searched_to = reply.searched_to
