"""The operations that list queues and hosts. They change nothing, and have no password and no user of a host.

A request looks at a limited number of queues or hosts: a page may have fewer than `limit`, or none, although there are
more.

Spec: docs/http-api.md, Queues and hosts.
"""

from __future__ import annotations

import base64
import binascii
import re
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from starlette.responses import Response

from harp.protocol.json_text import Envelope, Raw, loads
from harpcaller.access.policy import Action, Target
from harpcaller.cursors import InvalidCursor
from harpcaller.host_states import HostState
from harpcaller.http.jobs import QueueNames, show_payload
from harpcaller.http.operations import (
    TAG,
    TAG_HEADER,
    UNCHANGED,
    Answer,
    APIRequest,
    Operation,
    json_array,
    tagged_response,
)
from harpcaller.http.problems import Problem
from harpcaller.model.lanes import queue_id, queue_lane
from harpcaller.store import QueueSummary

_MOST = 500  #: Maximum number of queues or hosts in a page.
_LOOKED_AT = 1000  #: Maximum number of hosts that one request looks at.
_QUEUE_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_MAX_NAME = 4096  #: Maximum characters of a queue's name in a query.

Text = Annotated[str, Meta(max_length=255, description="only those with this text in their name, in any case")]
Limit = Annotated[int, Meta(ge=1, le=_MOST)]
CursorText = Annotated[str, Meta(max_length=1000, description="`next` of the page before")]


class QueuesQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `list_queues`."""

    name: (
        Annotated[str, Meta(max_length=_MAX_NAME, description="only the queue with this name, a JSON object")] | None
    ) = None
    q: Text | None = None
    state: (
        Annotated[
            Literal["busy", "full", "idle"],
            Meta(description="some of its jobs hold a slot; no slot is free; no job holds one"),
        ]
        | None
    ) = None
    limit: Limit = 100
    cursor: CursorText | None = None
    payloads: QueueNames = "raw"


class QueueQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `get_queue`."""

    payloads: QueueNames = "raw"


class HostsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of `list_hosts`."""

    q: Text | None = None
    state: Annotated[Literal["up", "down", "unknown"], Meta(description="only hosts in this state")] | None = None
    limit: Limit = 100
    cursor: CursorText | None = None


async def list_queues(request: APIRequest) -> Response:
    """Answer with queues, in the order in which they got their first job."""
    query = request.query
    if query.name is not None:
        name = loads(query.name.encode())
        if not isinstance(name, dict):
            raise Problem("invalid_request", "name: expected a JSON object")
        found = await request.acting.get_queue(queue_id(queue_lane(Raw(query.name.encode()))))
        queues, following = [] if found is None else [found], None
    else:
        fits, wanted = partial(_fits, query), " ".join(filter(None, (query.q, query.state)))
        queues, following = await request.acting.find_queues(query.limit, query.cursor, wanted, fits)
    shown = Envelope(queues=json_array([_show_queue(queue, query.payloads) for queue in queues]), next=following)
    return tagged_response(request, shown)


def _fits(query: QueuesQuery, queue: QueueSummary) -> bool:
    text = queue.name.decode("utf-8", "replace")
    if query.q is not None and query.q.lower() not in text.lower():
        return False
    match query.state:
        case "busy":
            return queue.running > 0
        case "full":
            return queue.running >= queue.concurrency
        case "idle":
            return queue.running == 0
        case _:
            return True


async def get_queue(request: APIRequest) -> Response:
    """Answer with one queue."""
    queue_id = request.path["queue"]
    queue = await request.acting.get_queue(queue_id) if _QUEUE_ID.fullmatch(queue_id) else None
    if queue is None:
        raise Problem("not_found", "there is no such queue; one without queued and running jobs is forgotten")
    return tagged_response(request, _show_queue(queue, request.query.payloads))


def _show_queue(queue: QueueSummary, form: str) -> Envelope:
    return Envelope(
        id=queue.id,
        name=show_payload(queue.name, form),
        concurrency=queue.concurrency,
        running=queue.running,
        queued=queue.queued,
        oldest_submit=queue.oldest,
    )


async def list_hosts(request: APIRequest) -> Response:
    """Answer with hosts, in the order of their names."""
    query, acting = request.query, request.acting
    text = "" if query.q is None else query.q.lower()
    after = "" if query.cursor is None else _decode_cursor(query.cursor)
    names = acting.find_host_names(text, after)
    looked_at = [*islice(names, query.limit if query.state is None else _LOOKED_AT)]
    shown: list[HostState] = []
    for state in await acting.describe_hosts(looked_at, " ".join(filter(None, (query.q, query.state)))):
        if query.state is None or state.reachability == query.state:
            shown.append(state)
        if len(shown) == query.limit:
            break
    last = shown[-1].host.hostname if len(shown) == query.limit else looked_at[-1] if looked_at else ""
    has_more = (looked_at and last != looked_at[-1]) or next(names, None) is not None
    following = _encode_cursor(last) if has_more else None
    may_list_all = acting.decide(Action.LIST, Target()).allowed
    registry = _show_registry(acting.describe_registry()) if may_list_all else {}
    hosts = [show_host(state) for state in shown]
    without_ages = [
        {key: value for key, value in source.items() if key != "age"} if isinstance(source, dict) else source
        for source in registry.values()
    ]
    return tagged_response(
        request, Envelope(hosts=hosts, next=following, registry=registry), [hosts, following, without_ages]
    )


async def get_host(request: APIRequest) -> Response:
    """Answer with one host."""
    found = await request.acting.describe_hosts([request.path["host"]])
    if not found:
        raise Problem("not_found", "there is no such host")
    return tagged_response(request, Envelope(show_host(found[0])))


def show_host(state: HostState) -> dict[str, Any]:
    """Return the object `Host`. It has no payload, so that many are encoded fast."""
    error = state.last_error
    return {
        "name": state.host.hostname,
        "address": state.host.address,
        "port": state.host.port,
        "state": str(state.reachability),
        "since": state.since,
        "checked": state.checked,
        "contact": state.contact,
        "running": state.running,
        "queued": state.queued,
        "limit": state.limit,
        "outages": state.outages,
        "error": state.error,
        "last_error": None if error is None else {"at": error[0], "text": error[1]},
        "next_attempt": state.next_attempt,
        "daemon": None if state.daemon is None else dict(state.daemon),
        "rtt": None if state.round_trip is None else round(state.round_trip, 6),
        "clock_skew": None if state.clock_skew is None else round(state.clock_skew, 3),
        "certificate": None if state.certificate_end is None else {"not_after": state.certificate_end},
        "source": state.source,
    }


def _show_registry(described: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the hosts registry, with the sources by their settings."""
    return {key: value for key, value in described.items() if key != "hosts"} | {"count": described["hosts"]}


def _encode_cursor(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode("utf-8", "surrogatepass")).decode().rstrip("=")


def _decode_cursor(cursor: str) -> str:
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        return base64.b64decode(padded, b"-_", validate=True).decode("utf-8", "surrogatepass")
    except (UnicodeError, binascii.Error) as error:
        raise InvalidCursor("expected a cursor of this list") from error


_NUMBER_OR_NULL = {"type": ["number", "null"]}
QUEUE = {
    "type": "object",
    "required": ["id", "name", "concurrency", "running", "queued", "oldest_submit"],
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        "name": {"type": ["object", "string"]},
        "concurrency": {"type": "integer"},
        "running": {"type": "integer", "description": "jobs that hold a slot"},
        "queued": {"type": "integer"},
        "oldest_submit": {**_NUMBER_OR_NULL, "description": "when its first queued job was submitted"},
    },
}
HOST = {
    "type": "object",
    "required": ["name", "address", "port", "state", "running", "queued"],
    "properties": {
        "name": {"type": "string"},
        "address": {"type": "string"},
        "port": {"type": "integer"},
        "state": {
            "enum": ["up", "down", "unknown"],
            "description": "whether the latest connection for a job succeeded; a host is asked only for jobs",
        },
        "since": {**_NUMBER_OR_NULL, "description": "since when it is down"},
        "checked": {**_NUMBER_OR_NULL, "description": "the latest contact or failure; null for clients of own jobs"},
        "contact": {**_NUMBER_OR_NULL, "description": "the latest contact; null for clients of own jobs"},
        "running": {"type": "integer", "description": "jobs that hold a slot"},
        "queued": {"type": "integer"},
        "limit": {"type": "integer", "description": "maximum number of running calls"},
        "outages": {"type": "integer", "description": "calls without contact"},
        "error": {"type": ["string", "null"], "description": "why it is down"},
        "last_error": {"type": ["object", "null"], "description": "time and text of the latest failure"},
        "next_attempt": {**_NUMBER_OR_NULL, "description": "when a failing host is tried again"},
        "daemon": {
            "type": ["object", "null"],
            "description": "what its harpd supports: whether it keeps calls without a connection, its features, and "
            "its version; null: an older one, which does not send it",
        },
        "rtt": {
            **_NUMBER_OR_NULL,
            "description": "seconds from the latest heartbeat to the reply; null: no call has been long enough for one",
        },
        "clock_skew": {
            **_NUMBER_OR_NULL,
            "description": "seconds by which its clock is ahead, at least; negative: behind; null: no call has ended",
        },
        "certificate": {
            "type": ["object", "null"],
            "description": "`not_after`: when the certificate of the latest connection ends; null: no connection yet",
        },
        "source": {"type": ["string", "null"], "description": "the setting that it is from"},
    },
}


def _page_of(key: str, item: dict[str, Any], **more: Any) -> dict[str, Any]:
    properties = {key: {"type": "array", "items": item}, "next": {"type": ["string", "null"]}, **more}
    return {"type": "object", "required": [*properties], "properties": properties}


OPERATIONS = (
    Operation(
        method="GET",
        path="/queues",
        operation_id="list_queues",
        summary="List the queues with queued or running jobs",
        handler=list_queues,
        query=QueuesQuery,
        action="list",
        problems=("invalid_cursor",),
        headers=TAG_HEADER,
        responses={
            200: Answer("queues, and the cursor of the next page", _page_of("queues", QUEUE), headers=TAG),
            304: UNCHANGED,
        },
    ),
    Operation(
        method="GET",
        path="/queues/{queue}",
        operation_id="get_queue",
        summary="Get a queue by its id",
        handler=get_queue,
        query=QueueQuery,
        action="list",
        problems=("not_found",),
        headers=TAG_HEADER,
        responses={200: Answer("the queue", QUEUE, headers=TAG), 304: UNCHANGED},
    ),
    Operation(
        method="GET",
        path="/hosts",
        operation_id="list_hosts",
        summary="List the hosts, and whether they accept starts",
        handler=list_hosts,
        query=HostsQuery,
        action="list",
        problems=("invalid_cursor",),
        headers=TAG_HEADER,
        responses={
            200: Answer(
                "hosts, and the cursor of the next page",
                _page_of("hosts", HOST, registry={"type": "object"}),
                headers=TAG,
            ),
            304: UNCHANGED,
        },
    ),
    Operation(
        method="GET",
        path="/hosts/{host}",
        operation_id="get_host",
        summary="Get a host",
        handler=get_host,
        action="list",
        problems=("not_found",),
        headers=TAG_HEADER,
        responses={200: Answer("the host", HOST, headers=TAG), 304: UNCHANGED},
    ),
)
