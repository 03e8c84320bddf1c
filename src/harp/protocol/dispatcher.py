"""The messages between client and dispatcher: values, their lines, and which may follow which.

Sans-IO: nothing here touches a socket. Each message is a frozen value that is valid once it is made.
Whatever bytes come, the outcome is a message or a `ProtocolError`.

What version 1 does not have is opt-in: a request is a `SubmitMany`, or carries ``wait`` (of a cancel), ``timed`` or
``keep``, only when its caller asked for it, and only the replies to such a request carry ``job_ids``, ``stop``,
``time`` or ``keep``.

Spec: docs/protocol.md, Client and dispatcher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import Any, TypeAlias

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned, decode_end, encode_end
from harp.protocol.fields import ProtocolError, check, is_container, is_count, is_seconds, opened, string, value, within
from harp.protocol.jsontext import Envelope, InvalidJSON, Members, Opener, Payload, Raw, dumps, open_decoded
from harp.protocol.strictjson import enclosed

__all__ = [
    "Call",
    "Cancel",
    "Continue",
    "Details",
    "Exchange",
    "FollowStream",
    "GetDetails",
    "GetResult",
    "GetStatus",
    "NoResult",
    "Packet",
    "Queue",
    "ReadStream",
    "Reply",
    "Request",
    "Status",
    "SubmitMany",
    "Submitted",
    "SubmittedMany",
    "WasCancelled",
    "decode_asking",
    "decode_reply",
    "decode_request",
    "encode_call",
    "encode_packets",
    "encode_reply",
    "encode_request",
    "granted",
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
class SubmitMany:
    """Submit jobs, all or none; their ids come in this order."""

    calls: Sequence[Call]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel a job; with `wait`, the reply comes once it is settled whether its processes are gone."""

    job: str
    wait: bool = False

    def __post_init__(self) -> None:
        check(isinstance(self.wait, bool), "wait: expected true or false")


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
class GetDetails:
    """Ask for all that is known of a job."""

    job: str


@dataclass(frozen=True, slots=True)
class _Stream:
    """Ask for a job's records: from number `since` on, or the `recent` newest of those collected.

    With `timed`, each comes with the time it was made.
    """

    job: str
    since: int | None = None
    recent: int | None = None
    timed: bool = False

    def __post_init__(self) -> None:
        for key, number in (("since", self.since), ("recent", self.recent)):
            check(number is None or is_count(number), f"{key}: expected an integer from 0 on, got {number!r}")
        check(self.since is None or self.recent is None, "since and recent exclude each other")
        check(isinstance(self.timed, bool), "timed: expected true or false")


class FollowStream(_Stream):
    """Ask for a job's records, those to come too, until it ends. Neither number given: ``recent: 0``."""

    __slots__ = ()


class ReadStream(_Stream):
    """Ask for a job's records collected so far. Neither number given: ``since: 0``."""

    __slots__ = ()


Request: TypeAlias = Call | SubmitMany | Cancel | GetResult | GetStatus | GetDetails | FollowStream | ReadStream


def encode_request(request: Request, keep: bool = False) -> bytes:
    """The request's line, line feed included. Raises `NotJSON` when a payload has no form in JSON.

    Args:
        request: the request.
        keep: whether its connection is to wait for another one after the reply.
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
    return _line({"harpcaller": VERSION, **members, "keep": keep or None})


def encode_call(call: Call) -> Raw:
    """A call as it stands in a `SubmitMany`. Raises `NotJSON` when a payload has no form in JSON."""
    return dumps(_present(_call_members(call)))


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


def decode_request(line: bytes, opener: Opener = open_decoded) -> Request:
    """Read a request's line, as `decode_asking` does."""
    return decode_asking(line, opener)[0]


def decode_asking(line: bytes, opener: Opener = open_decoded) -> tuple[Request, bool]:
    """Read a request's line, and whether its connection is to wait for another one.

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
    within(members, ("harpcaller", kinds[0], *keys, "keep"))
    keep = _flag(members, "keep", False)
    check(isinstance(keep, bool), "keep: expected true or false")
    return decode(members), keep


def _optional(members: Members, key: str) -> Any:
    return value(members, key) if key in members else None


def _flag(members: Members, key: str, absent: bool) -> Any:
    """A member that may be missing or null; that it is true or false is checked by the message."""
    flag = _optional(members, key)
    return absent if flag is None else flag


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


def _decode_many(members: Members) -> SubmitMany:
    elements = members.elements("submit_many")
    check(elements is not None, "submit_many: expected an array")
    assert elements is not None
    calls: list[Call] = []
    try:
        for call in elements:
            check(call is not None, "expected an object")
            assert call is not None
            within(call, ("procedure", *_CALL_KEYS))
            calls.append(_decode_call(call))
    except (ProtocolError, InvalidJSON) as error:
        raise ProtocolError(f"submit_many[{len(calls)}]: {error}") from error
    return SubmitMany(calls)


def _decode_queue(members: Members) -> Queue | None:
    if "queue" not in members or value(members, "queue") is None:
        return None
    try:
        queue = members.members("queue")
    except InvalidJSON as error:
        raise ProtocolError(f"queue: {error}") from error
    check(queue is not None and "name" in queue, "queue: expected an object with a name")
    assert queue is not None
    within(queue, ("name", "concurrency"))
    concurrency = _optional(queue, "concurrency")
    return Queue(queue.payload("name"), 1 if concurrency is None else concurrency)


def _decode_stream(kind: str, request: type[FollowStream] | type[ReadStream]) -> Callable[[Members], Request]:
    def decode(members: Members) -> Request:
        since, recent = _optional(members, "since"), _optional(members, "recent")
        return request(string(members, kind), since, recent, _flag(members, "timed", False))

    return decode


_CALL_KEYS = ("host", "arguments", "timeout", "max_exec_time", "queue", "info")
_STREAM_KEYS = ("since", "recent", "timed")

#: The key that tells the request, the keys that may stand beside it, and how it is read.
_REQUESTS: Mapping[str, tuple[tuple[str, ...], Callable[[Members], Request]]] = MappingProxyType(
    {
        "procedure": (_CALL_KEYS, _decode_call),
        "submit_many": ((), _decode_many),
        "cancel": (("wait",), lambda m: Cancel(string(m, "cancel"), _flag(m, "wait", False))),
        "get_result": (("wait",), lambda m: GetResult(string(m, "get_result"), _flag(m, "wait", True))),
        "get_status": ((), lambda m: GetStatus(string(m, "get_status"))),
        "get_details": ((), lambda m: GetDetails(string(m, "get_details"))),
        "follow_stream": (_STREAM_KEYS, _decode_stream("follow_stream", FollowStream)),
        "read_stream": (_STREAM_KEYS, _decode_stream("read_stream", ReadStream)),
    }
)


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job is on stable storage under this id."""

    job_id: str


@dataclass(frozen=True, slots=True)
class SubmittedMany:
    """The jobs are on stable storage under these ids."""

    job_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class WasCancelled:
    """The reply to a cancel: whether the job was stopped by it.

    `stop` is how the stop of its processes turned out, an object with `state` and `receipt`; None when there were none,
    or when nobody waited for it.
    """

    cancelled: bool
    stop: Payload = None

    def __post_init__(self) -> None:
        check(self.stop is None or is_container(self.stop, (dict,)), "stop: expected an object")


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
class Details:
    """All that is known of a job, an object: its keys are listed in docs/protocol.md."""

    details: Payload

    def __post_init__(self) -> None:
        check(is_container(self.details, (dict,)), "details: expected an object")


@dataclass(frozen=True, slots=True)
class Packet:
    """A record of the stream; `number` counts from 0, `time` is when it was made (Unix seconds, None: nobody asked)."""

    number: int
    data: Payload
    time: float | None = None


@dataclass(frozen=True, slots=True)
class Continue:
    """The records end here for now; the job runs on."""


Reply: TypeAlias = Submitted | SubmittedMany | WasCancelled | NoResult | Status | Details | Packet | Continue | End


def encode_reply(reply: Reply, keep: float | None = None) -> bytes:
    """The reply's line, line feed included.

    Args:
        reply: the reply.
        keep: for how many seconds its connection waits for another request; None: it is closed.
    """
    line = _reply_line(reply)
    return line if keep is None else b'%b,"keep":%b}\n' % (line[:-2], dumps(keep))


def encode_packets(first: int, values: Sequence[Raw], times: Sequence[float] | None = None) -> bytes:
    """The lines of many packets, without a step for each member, as there may be many.

    Args:
        first: the number of the first.
        values: their data.
        times: when each was made (Unix seconds); None: nobody asked.
    """
    if times is None:
        return b"".join([b'{"packet":%d,"data":%b}\n' % numbered for numbered in enumerate(values, first)])
    packets = zip(count(first), times, values, strict=False)
    return b"".join([b'{"packet":%d,"time":%b,"data":%b}\n' % (at, dumps(made), data) for at, made, data in packets])


#: What is granted is a line's last member: a string or an object of the reply's own ends in more than this.
#: It is looked for in the end of a line only.
_GRANTED = re.compile(rb',[ \t]*"keep"[ \t]*:[ \t]*([0-9]+(?:\.[0-9]+)?)[ \t]*}[ \t\r]*\Z')


_GRANTED_BYTES = 64


def granted(line: bytes) -> float | None:
    """The seconds for which the connection waits after this line, a reply to a request that asked for it; or None."""
    found = _GRANTED.search(line, max(0, len(line) - _GRANTED_BYTES))
    return float(found[1]) if found else None


def _reply_line(reply: Reply) -> bytes:
    match reply:
        case Submitted(job_id):
            return _line({"harpcaller": VERSION, "job_id": job_id})
        case SubmittedMany(job_ids):
            return _line({"harpcaller": VERSION, "job_ids": job_ids})
        case WasCancelled(cancelled, stop):
            return _line({"cancelled": cancelled, "stop": stop})
        case NoResult():
            return _line({"no_result": True})
        case Status():
            call = Envelope(host=reply.host, procedure=reply.procedure, arguments=reply.arguments)
            times = Envelope(submit=reply.submit, start=reply.start, end=reply.end)
            return bytes(dumps(Envelope(call=call, time=times, info=reply.info))) + b"\n"
        case Details(details):
            return _line({"details": details})
        case Packet(number, data, None):
            return bytes(dumps(Envelope(packet=number, data=data))) + b"\n"
        case Packet(number, data, time):
            return bytes(dumps(Envelope(packet=number, time=time, data=data))) + b"\n"
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
    reply = _REPLIES[kind](members, request)
    check(type(reply) in MAY_FOLLOW[type(request)], f"a reply with {kind!r} does not answer this request")
    return reply


def _decode_job_ids(members: Members, request: Request) -> Reply:
    job_ids = value(members, "job_ids")
    are_strings = isinstance(job_ids, list) and all(isinstance(job_id, str) for job_id in job_ids)
    check(are_strings, "job_ids: expected an array of strings")
    if isinstance(request, SubmitMany):
        check(len(job_ids) == len(request.calls), f"{len(job_ids)} job ids for {len(request.calls)} calls")
    return SubmittedMany(job_ids)


def _decode_cancelled(members: Members, request: Request) -> Reply:
    if not isinstance(request, Cancel):
        return decode_end("cancelled", members)
    flag = value(members, "cancelled")
    check(isinstance(flag, bool), "cancelled: expected true or false")
    stop = members.payload("stop") if request.wait and "stop" in members else None
    return WasCancelled(flag, None if stop == b"null" else stop)


def _decode_status(members: Members, request: Request) -> Status:
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


def _decode_packet(members: Members, request: Request) -> Packet:
    number = value(members, "packet")
    check(is_count(number), f"packet: expected an integer from 0 on, got {number!r}")
    check("data" in members, "data: missing")
    timed = isinstance(request, _Stream) and request.timed
    return Packet(number, members.payload("data"), _decode_moment(members) if timed else None)


def _decode_moment(members: Members) -> float:
    check("time" in members, "time: missing, though the records were to have one")
    moment = value(members, "time")
    in_range = isinstance(moment, (int, float)) and not isinstance(moment, bool) and abs(moment) < _LAST_MOMENT
    check(in_range, f"time: expected Unix seconds, got {moment!r}")
    return float(moment)


#: Times beyond this are none, and not every integer beyond it has a float.
_LAST_MOMENT = 2**53


def _decode_end(kind: str) -> Callable[[Members, Request], Reply]:
    return lambda members, request: decode_end(kind, members)


def _sign(kind: str, reply: Reply) -> Callable[[Members, Request], Reply]:
    def decode(members: Members, request: Request) -> Reply:
        check(value(members, kind) is True, f"{kind}: expected true")
        return reply

    return decode


#: The key that tells the reply, and how it is read, given the request that it answers.
_REPLIES: Mapping[str, Callable[[Members, Request], Reply]] = MappingProxyType(
    {
        "job_id": lambda m, _: Submitted(string(m, "job_id")),
        "job_ids": _decode_job_ids,
        "no_result": _sign("no_result", NoResult()),
        "result": _decode_end("result"),
        "exception": _decode_end("exception"),
        "cancelled": _decode_cancelled,
        "error": _decode_end("error"),
        "call": _decode_status,
        "details": lambda m, _: Details(m.payload("details")),
        "packet": _decode_packet,
        "continue": _sign("continue", Continue()),
    }
)

_ENDS = frozenset({Returned, Raised, Failed, Cancelled})

#: Which replies may follow which request. What is not listed here is a protocol error.
MAY_FOLLOW: Mapping[type, frozenset[type]] = MappingProxyType(
    {
        Call: frozenset({Submitted, Failed}),
        SubmitMany: frozenset({SubmittedMany, Failed}),
        Cancel: frozenset({WasCancelled, Failed}),
        GetResult: _ENDS | {NoResult},
        GetStatus: frozenset({Status, Failed}),
        GetDetails: frozenset({Details, Failed}),
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

    def packets(self, lines: Iterable[bytes]) -> list[Payload]:
        """The data of the first lines, while they are packets just as `encode_packets` writes them without times.

        That is quicker than `reply`, which is for the line after them.
        """
        found: list[Payload] = []
        if self._next is not None and not self.finished:
            for line in lines:
                value = enclosed(line, b'{"packet":%d,"data":' % self._next)
                if value is None:
                    break
                found += value
                self._next += 1
        return found

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
    return bytes(dumps(_present(members))) + b"\n"


def _present(members: Mapping[str, Any]) -> Envelope:
    return Envelope({key: member for key, member in members.items() if member is not None})
