"""The requests of a client to a dispatcher, as values and as lines. `harp.protocol.replies` has the replies.

Sans-IO: nothing here touches a socket. Each message is a frozen value that is validated when it is created. Any bytes
give a message or a `ProtocolError`.

Additions to version 1 are opt-in: a request is a `SubmitMany`, or has ``wait`` (of a cancel), ``timed`` or
``keep_alive``, only if its caller uses the feature. Only the replies to such a request have ``job_ids``, ``stop``,
``time`` or ``keep_alive``.

Spec: docs/protocol.md, Client and dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from harp.protocol.fields import (
    ProtocolError,
    check,
    decode_object,
    is_container,
    is_count,
    is_seconds,
    member_value,
    optional_value,
    reject_unknown_keys,
    required_object,
    required_string,
)
from harp.protocol.json_text import Decoder, Envelope, InvalidJSON, JSONObject, Payload, Raw, decode_values, dumps

VERSION = 1


@dataclass(frozen=True, slots=True)
class Queue:
    """The queue of a call: `name` is a JSON object, `concurrency` the maximum number of its jobs that run at once."""

    name: Payload
    concurrency: int = 1

    def __post_init__(self) -> None:
        check(is_container(self.name, (dict,)), "queue.name: expected an object")
        if not (is_count(self.concurrency) and self.concurrency > 0):
            raise ProtocolError(f"queue.concurrency: expected a positive integer, got {self.concurrency!r}")


@dataclass(frozen=True, slots=True)
class Call:
    """Submit a job. `arguments` is an array (positional) or an object (named); limits are in seconds."""

    host: str
    procedure: str
    arguments: Payload
    timeout: float | None = None
    max_exec_time: float | None = None
    queue: Queue | None = None
    info: Payload = None

    def __post_init__(self) -> None:
        for key, name in (("host", self.host), ("procedure", self.procedure)):
            if not (isinstance(name, str) and name):
                raise ProtocolError(f"{key}: expected a name, got {name!r}")
        check(is_container(self.arguments, (list, dict)), "arguments: expected an array or an object")
        for key, limit in (("timeout", self.timeout), ("max_exec_time", self.max_exec_time)):
            if not (limit is None or is_seconds(limit)):
                raise ProtocolError(f"{key}: expected a positive number of seconds, got {limit!r}")


@dataclass(frozen=True, slots=True)
class SubmitMany:
    """Submit jobs, all or none; the reply has their ids in this order."""

    calls: Sequence[Call]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel a job; with `wait`, the reply comes when the stop of its processes has succeeded or failed."""

    job: str
    wait: bool = False

    def __post_init__(self) -> None:
        check(isinstance(self.wait, bool), "wait: expected true or false")


@dataclass(frozen=True, slots=True)
class GetResult:
    """Get a job's end result; with `wait`, the dispatcher replies when the job has ended."""

    job: str
    wait: bool = True

    def __post_init__(self) -> None:
        check(isinstance(self.wait, bool), "wait: expected true or false")


@dataclass(frozen=True, slots=True)
class GetStatus:
    """Get a job's status."""

    job: str


@dataclass(frozen=True, slots=True)
class GetDetails:
    """Get all details of a job."""

    job: str


@dataclass(frozen=True, slots=True)
class _Stream:
    """Get a job's records: from number `since` on, or the `recent` newest of the stored ones.

    With `timed`, each record has its timestamp.
    """

    job: str
    since: int | None = None
    recent: int | None = None
    timed: bool = False

    def __post_init__(self) -> None:
        for key, number in (("since", self.since), ("recent", self.recent)):
            check(number is None or is_count(number), f"{key}: expected an integer of at least 0, got {number!r}")
        check(self.since is None or self.recent is None, "since and recent exclude each other")
        check(isinstance(self.timed, bool), "timed: expected true or false")


class FollowStream(_Stream):
    """Get a job's stored and future records until it ends. The default is ``recent: 0``."""

    __slots__ = ()


class ReadStream(_Stream):
    """Get a job's stored records. The default is ``since: 0``."""

    __slots__ = ()


Request: TypeAlias = Call | SubmitMany | Cancel | GetResult | GetStatus | GetDetails | FollowStream | ReadStream


def encode_request(request: Request, keep_alive: bool = False) -> bytes:
    """Return the request's line with its line feed. Raises `NotJSON` if a payload has no form in JSON.

    Args:
        request: the request.
        keep_alive: whether the connection is to wait for another request after the reply.
    """
    members: dict[str, Any]
    match request:
        case Call():
            members = _call_members(request)
        case SubmitMany(calls):
            members = {"submit_many": Raw(b"[" + b",".join(map(encode_call, calls)) + b"]")}
        case Cancel(job, wait):
            members = {"cancel": job, "wait": wait or None}
        case GetResult(job, wait):
            members = {"get_result": job, "wait": wait}
        case GetStatus(job):
            members = {"get_status": job}
        case GetDetails(job):
            members = {"get_details": job}
        case FollowStream(job, since, recent, timed):
            members = {"follow_stream": job, "since": since, "recent": recent, "timed": timed or None}
        case ReadStream(job, since, recent, timed):
            members = {"read_stream": job, "since": since, "recent": recent, "timed": timed or None}
    return encode_line({"harpcaller": VERSION, **members, "keep_alive": keep_alive or None})


def encode_call(call: Call) -> Raw:
    """Return a call as an element of a `SubmitMany`. Raises `NotJSON` if a payload has no form in JSON."""
    return dumps(_without_none(_call_members(call)))


def _call_members(call: Call) -> dict[str, Any]:
    queue = call.queue
    return {
        "host": call.host,
        "procedure": call.procedure,
        "arguments": call.arguments,
        "timeout": call.timeout,
        "max_exec_time": call.max_exec_time,
        "queue": queue and Envelope(name=queue.name, concurrency=queue.concurrency),
        "info": call.info,
    }


def decode_request(line: bytes, decoder: Decoder = decode_values) -> Request:
    """Return the request of a line; see `decode_request_line`."""
    return decode_request_line(line, decoder)[0]


def decode_request_line(line: bytes, decoder: Decoder = decode_values) -> tuple[Request, bool]:
    """Return the request of a line, and whether the client wants to keep the connection for another one.

    Args:
        line: the line without its line feed.
        decoder: decides whether payloads are values or `Raw` text.

    Raises:
        ProtocolError: the line is not a request.
    """
    members = decode_object(line, decoder)
    version = member_value(members, "harpcaller") if "harpcaller" in members else None
    check(type(version) is int and version == VERSION, f"harpcaller: expected {VERSION}, got {version!r}")
    kinds = [kind for kind in _REQUESTS if kind in members]
    check(len(kinds) == 1, f"expected exactly one of {', '.join(_REQUESTS)}")
    keys, decode = _REQUESTS[kinds[0]]
    reject_unknown_keys(members, ("harpcaller", kinds[0], *keys, "keep_alive"))
    keep = _optional_flag(members, "keep_alive", False)
    check(isinstance(keep, bool), "keep_alive: expected true or false")
    return decode(members), keep


def _optional_flag(members: JSONObject, key: str, absent: bool) -> Any:
    """Return a member, or `absent` if it is missing or null. The message checks that it is true or false."""
    flag = optional_value(members, key)
    return absent if flag is None else flag


def _decode_call(members: JSONObject) -> Call:
    check("arguments" in members, "arguments: missing")
    return Call(
        required_string(members, "host"),
        required_string(members, "procedure"),
        members.payload("arguments"),
        optional_value(members, "timeout"),
        optional_value(members, "max_exec_time"),
        _decode_queue(members),
        members.payload("info") if "info" in members else None,
    )


def _decode_many(members: JSONObject) -> SubmitMany:
    elements = members.nested_objects("submit_many")
    check(elements is not None, "submit_many: expected an array")
    assert elements is not None
    calls: list[Call] = []
    try:
        for call in elements:
            check(call is not None, "expected an object")
            assert call is not None
            reject_unknown_keys(call, ("procedure", *_CALL_KEYS))
            calls.append(_decode_call(call))
    except (ProtocolError, InvalidJSON) as error:
        raise ProtocolError(f"submit_many[{len(calls)}]: {error}") from error
    return SubmitMany(calls)


def _decode_queue(members: JSONObject) -> Queue | None:
    if "queue" not in members or member_value(members, "queue") is None:
        return None
    queue = required_object(members, "queue", "an object with a name")
    check("name" in queue, "queue: expected an object with a name")
    reject_unknown_keys(queue, ("name", "concurrency"))
    concurrency = optional_value(queue, "concurrency")
    return Queue(queue.payload("name"), 1 if concurrency is None else concurrency)


def _decode_stream(kind: str, request: type[FollowStream] | type[ReadStream]) -> Callable[[JSONObject], Request]:
    def decode(members: JSONObject) -> Request:
        since, recent = optional_value(members, "since"), optional_value(members, "recent")
        return request(required_string(members, kind), since, recent, _optional_flag(members, "timed", False))

    return decode


_CALL_KEYS = ("host", "arguments", "timeout", "max_exec_time", "queue", "info")
_STREAM_KEYS = ("since", "recent", "timed")

#: For each request: its distinguishing key, the other keys, and its decoder.
_REQUESTS: Mapping[str, tuple[tuple[str, ...], Callable[[JSONObject], Request]]] = MappingProxyType(
    {
        "procedure": (_CALL_KEYS, _decode_call),
        "submit_many": ((), _decode_many),
        "cancel": (("wait",), lambda m: Cancel(required_string(m, "cancel"), _optional_flag(m, "wait", False))),
        "get_result": (
            ("wait",),
            lambda m: GetResult(required_string(m, "get_result"), _optional_flag(m, "wait", True)),
        ),
        "get_status": ((), lambda m: GetStatus(required_string(m, "get_status"))),
        "get_details": ((), lambda m: GetDetails(required_string(m, "get_details"))),
        "follow_stream": (_STREAM_KEYS, _decode_stream("follow_stream", FollowStream)),
        "read_stream": (_STREAM_KEYS, _decode_stream("read_stream", ReadStream)),
    }
)


def encode_line(members: Mapping[str, Any]) -> bytes:
    """Return an object as a line; members that are None are left out."""
    return bytes(dumps(_without_none(members))) + b"\n"


def _without_none(members: Mapping[str, Any]) -> Envelope:
    return Envelope({key: member for key, member in members.items() if member is not None})
