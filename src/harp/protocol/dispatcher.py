"""The messages between client and dispatcher: values, their lines, and which may follow which.

Sans-IO: nothing here touches a socket. Each message is a frozen value that is valid once it is made.
Whatever bytes come, the outcome is a message or a `ProtocolError`.

Spec: docs/protocol.md, Client and dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned, decode_end, encode_end
from harp.protocol.fields import check, is_container, is_count, is_seconds, opened, string, value, within
from harp.protocol.jsontext import Envelope, Members, Opener, Payload, dumps, open_decoded

__all__ = [
    "Call",
    "Cancel",
    "Continue",
    "Exchange",
    "FollowStream",
    "GetResult",
    "GetStatus",
    "NoResult",
    "Packet",
    "Queue",
    "ReadStream",
    "Reply",
    "Request",
    "Status",
    "Submitted",
    "WasCancelled",
    "decode_reply",
    "decode_request",
    "encode_reply",
    "encode_request",
]

VERSION = 1


@dataclass(frozen=True, slots=True)
class Queue:
    """The queue a call waits in: `name` is a JSON object, `concurrency` how many of its jobs may run at once."""

    name: Payload
    concurrency: int = 1

    def __post_init__(self) -> None:
        check(is_container(self.name, (dict,)), "queue.name: expected an object")
        check(
            is_count(self.concurrency) and self.concurrency > 0,
            f"queue.concurrency: expected a positive integer, got {self.concurrency!r}",
        )


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
            check(isinstance(name, str) and name != "", f"{key}: expected a name, got {name!r}")
        check(is_container(self.arguments, (list, dict)), "arguments: expected an array or an object")
        for key, limit in (("timeout", self.timeout), ("max_exec_time", self.max_exec_time)):
            check(
                limit is None or is_seconds(limit),
                f"{key}: expected a positive number of seconds, got {limit!r}",
            )


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel a job."""

    job: str


@dataclass(frozen=True, slots=True)
class GetResult:
    """Ask for a job's end result; with `wait`, once it has one."""

    job: str
    wait: bool = True

    def __post_init__(self) -> None:
        check(isinstance(self.wait, bool), "wait: expected true or false")


@dataclass(frozen=True, slots=True)
class GetStatus:
    """Ask for a job's status."""

    job: str


@dataclass(frozen=True, slots=True)
class _Stream:
    """Ask for a job's records: from number `since` on, or the `recent` newest of those collected."""

    job: str
    since: int | None = None
    recent: int | None = None

    def __post_init__(self) -> None:
        for key, number in (("since", self.since), ("recent", self.recent)):
            check(number is None or is_count(number), f"{key}: expected an integer from 0 on, got {number!r}")
        check(self.since is None or self.recent is None, "since and recent exclude each other")


class FollowStream(_Stream):
    """Ask for a job's records, those to come too, until it ends. Neither number given: ``recent: 0``."""

    __slots__ = ()


class ReadStream(_Stream):
    """Ask for a job's records collected so far. Neither number given: ``since: 0``."""

    __slots__ = ()


Request: TypeAlias = Call | Cancel | GetResult | GetStatus | FollowStream | ReadStream


def encode_request(request: Request) -> bytes:
    """The request's line, line feed included. Raises `NotJSON` when a payload has no form in JSON."""
    members: dict[str, Any]
    match request:
        case Call(queue=queue):
            members = {
                "host": request.host,
                "procedure": request.procedure,
                "arguments": request.arguments,
                "timeout": request.timeout,
                "max_exec_time": request.max_exec_time,
                "queue": queue and Envelope(name=queue.name, concurrency=queue.concurrency),
                "info": request.info,
            }
        case Cancel(job):
            members = {"cancel": job}
        case GetResult(job, wait):
            members = {"get_result": job, "wait": wait}
        case GetStatus(job):
            members = {"get_status": job}
        case FollowStream(job, since, recent):
            members = {"follow_stream": job, "since": since, "recent": recent}
        case ReadStream(job, since, recent):
            members = {"read_stream": job, "since": since, "recent": recent}
    return _line({"harpcaller": VERSION, **members})


def decode_request(line: bytes, opener: Opener = open_decoded) -> Request:
    """Read a request's line.

    Args:
        line: the line without its line feed.
        opener: decides whether payloads come as values or as `Raw` text.

    Raises:
        ProtocolError: always of type ``invalid_request``, as the dispatcher has no other.
    """
    members = opened(line, opener)
    version = value(members, "harpcaller") if "harpcaller" in members else None
    check(type(version) is int and version == VERSION, f"harpcaller: expected {VERSION}, got {version!r}")
    kinds = [kind for kind in _REQUESTS if kind in members]
    check(len(kinds) == 1, f"expected exactly one of {', '.join(_REQUESTS)}")
    keys, decode = _REQUESTS[kinds[0]]
    within(members, ("harpcaller", kinds[0], *keys))
    return decode(members)


def _optional(members: Members, key: str) -> Any:
    return value(members, key) if key in members else None


def _decode_call(members: Members) -> Call:
    check("arguments" in members, "arguments: missing")
    return Call(
        string(members, "host"),
        string(members, "procedure"),
        members.payload("arguments"),
        _optional(members, "timeout"),
        _optional(members, "max_exec_time"),
        _decode_queue(members),
        members.payload("info") if "info" in members else None,
    )


def _decode_queue(members: Members) -> Queue | None:
    if "queue" not in members or value(members, "queue") is None:
        return None
    queue = members.members("queue")
    check(queue is not None and "name" in queue, "queue: expected an object with a name")
    assert queue is not None
    within(queue, ("name", "concurrency"))
    concurrency = _optional(queue, "concurrency")
    return Queue(queue.payload("name"), 1 if concurrency is None else concurrency)


def _decode_result(members: Members) -> GetResult:
    wait = _optional(members, "wait")
    return GetResult(string(members, "get_result"), True if wait is None else wait)


_STREAM_KEYS = ("since", "recent")

#: The key that tells the request, the keys that may stand beside it, and how it is read.
_REQUESTS: Mapping[str, tuple[tuple[str, ...], Callable[[Members], Request]]] = MappingProxyType(
    {
        "procedure": (("host", "arguments", "timeout", "max_exec_time", "queue", "info"), _decode_call),
        "cancel": ((), lambda m: Cancel(string(m, "cancel"))),
        "get_result": (("wait",), _decode_result),
        "get_status": ((), lambda m: GetStatus(string(m, "get_status"))),
        "follow_stream": (
            _STREAM_KEYS,
            lambda m: FollowStream(string(m, "follow_stream"), _optional(m, "since"), _optional(m, "recent")),
        ),
        "read_stream": (
            _STREAM_KEYS,
            lambda m: ReadStream(string(m, "read_stream"), _optional(m, "since"), _optional(m, "recent")),
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job is on stable storage under this id."""

    job_id: str


@dataclass(frozen=True, slots=True)
class WasCancelled:
    """The reply to a cancel: whether the job was stopped by it."""

    cancelled: bool


@dataclass(frozen=True, slots=True)
class NoResult:
    """The job has not ended yet."""


@dataclass(frozen=True, slots=True)
class Status:
    """What was asked for, and when it was submitted, started and ended (Unix seconds, None: not yet)."""

    host: str
    procedure: str
    arguments: Payload
    submit: int
    start: int | None
    end: int | None
    info: Payload


@dataclass(frozen=True, slots=True)
class Packet:
    """A record of the stream; `number` counts from 0."""

    number: int
    data: Payload


@dataclass(frozen=True, slots=True)
class Continue:
    """The records end here for now; the job runs on."""


Reply: TypeAlias = Submitted | WasCancelled | NoResult | Status | Packet | Continue | End


def encode_reply(reply: Reply) -> bytes:
    """The reply's line, line feed included."""
    match reply:
        case Submitted(job_id):
            return _line({"harpcaller": VERSION, "job_id": job_id})
        case WasCancelled(cancelled):
            return _line({"cancelled": cancelled})
        case NoResult():
            return _line({"no_result": True})
        case Status():
            call = Envelope(host=reply.host, procedure=reply.procedure, arguments=reply.arguments)
            time = Envelope(submit=reply.submit, start=reply.start, end=reply.end)
            return bytes(dumps(Envelope(call=call, time=time, info=reply.info))) + b"\n"
        case Packet(number, data):
            return bytes(dumps(Envelope(packet=number, data=data))) + b"\n"
        case Continue():
            return _line({"continue": True})
        case _:
            return bytes(dumps(encode_end(reply))) + b"\n"


def decode_reply(line: bytes, request: Request, opener: Opener = open_decoded) -> Reply:
    """Read a reply's line, given the request that it answers.

    Raises:
        ProtocolError: not a reply, or none that may follow this request.
    """
    members = opened(line, opener)
    kinds = [kind for kind in _REPLIES if kind in members]
    check(len(kinds) == 1, "not a reply of the protocol" if not kinds else f"both {' and '.join(kinds)}")
    kind = kinds[0]
    if kind == "cancelled" and isinstance(request, Cancel):
        flag = value(members, kind)
        check(isinstance(flag, bool), "cancelled: expected true or false")
        return WasCancelled(flag)
    reply = _REPLIES[kind](members)
    check(type(reply) in MAY_FOLLOW[type(request)], f"a reply with {kind!r} does not answer this request")
    return reply


def _decode_status(members: Members) -> Status:
    call = members.members("call")
    time = members.members("time") if "time" in members else None
    if call is None or time is None or "arguments" not in call:
        check(False, "status: expected call and time as objects, with the call's arguments")
    assert call is not None
    assert time is not None
    times = [_optional(time, key) for key in ("submit", "start", "end")]
    submit, start, end = times
    check(_is_time(submit), "time.submit: expected an integer")
    check(all(moment is None or _is_time(moment) for moment in times), "time: expected integers or null")
    info = members.payload("info") if "info" in members else None
    return Status(string(call, "host"), string(call, "procedure"), call.payload("arguments"), submit, start, end, info)


def _is_time(moment: object) -> bool:
    return isinstance(moment, int) and not isinstance(moment, bool)


def _decode_packet(members: Members) -> Packet:
    number = value(members, "packet")
    check(is_count(number), f"packet: expected an integer from 0 on, got {number!r}")
    check("data" in members, "data: missing")
    return Packet(number, members.payload("data"))


def _flag(kind: str, reply: Reply) -> Callable[[Members], Reply]:
    def decode(members: Members) -> Reply:
        check(value(members, kind) is True, f"{kind}: expected true")
        return reply

    return decode


_REPLIES: Mapping[str, Callable[[Members], Reply]] = MappingProxyType(
    {
        "job_id": lambda m: Submitted(string(m, "job_id")),
        "no_result": _flag("no_result", NoResult()),
        "result": lambda m: decode_end("result", m),
        "exception": lambda m: decode_end("exception", m),
        "cancelled": lambda m: decode_end("cancelled", m),
        "error": lambda m: decode_end("error", m),
        "call": _decode_status,
        "packet": _decode_packet,
        "continue": _flag("continue", Continue()),
    }
)

_ENDS = frozenset({Returned, Raised, Failed, Cancelled})

#: Which replies may follow which request. What is not listed here is a protocol error.
MAY_FOLLOW: Mapping[type, frozenset[type]] = MappingProxyType(
    {
        Call: frozenset({Submitted, Failed}),
        Cancel: frozenset({WasCancelled, Failed}),
        GetResult: _ENDS | {NoResult},
        GetStatus: frozenset({Status, Failed}),
        FollowStream: _ENDS | {Packet},
        ReadStream: _ENDS | {Packet, Continue},
    }
)


class Exchange:
    """One request and its replies: reads line after line, and knows when nothing more may come.

    Args:
        request: the request that was sent.
        opener: decides whether payloads come as values or as `Raw` text.
    """

    def __init__(self, request: Request, opener: Opener = open_decoded) -> None:
        self._request = request
        self._opener = opener
        self._next = getattr(request, "since", None)
        #: Whether the last reply has come.
        self.finished = False

    def reply(self, line: bytes) -> Reply:
        """Read the next reply. Raises `ProtocolError` for anything that may not come now."""
        check(not self.finished, "data after the last reply")
        reply = decode_reply(line, self._request, self._opener)
        if isinstance(reply, Packet):
            check(
                self._next is None or reply.number == self._next,
                f"packet {reply.number}: expected number {self._next}",
            )
            self._next = reply.number + 1
        else:
            self.finished = True
        return reply


def _line(members: Mapping[str, Any]) -> bytes:
    """One line; members that are None are left out."""
    return bytes(dumps(Envelope({k: v for k, v in members.items() if v is not None}))) + b"\n"
