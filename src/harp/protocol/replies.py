"""The replies of a dispatcher to a client, as values and as lines, and the replies that each request may have.

Sans-IO, as `harp.protocol.requests`, which has the requests. Spec: docs/protocol.md, Client and dispatcher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import TypeAlias

from harp.protocol.ends import Cancelled, End, Failed, Raised, Returned, decode_end, encode_end
from harp.protocol.fields import (
    check,
    decode_object,
    is_container,
    is_count,
    member_value,
    optional_value,
    required_object,
    required_string,
)
from harp.protocol.json_text import Decoder, Envelope, JSONObject, Payload, Raw, decode_values, dumps
from harp.protocol.requests import (
    VERSION,
    Call,
    Cancel,
    FollowStream,
    GetDetails,
    GetResult,
    GetStatus,
    ReadStream,
    Request,
    SubmitMany,
    encode_line,
)
from harp.protocol.strict_json import decode_enclosed


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
    """The reply to a cancel: whether the request stopped the job.

    `stop` is the outcome for its processes, an object with `state` and `stop_report`; None if there were none, or if
    the request did not wait for it.
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
    """The call of a job, and the times of its submission, start and end (Unix seconds; None: not yet)."""

    host: str
    procedure: str
    arguments: Payload
    submit: int
    start: int | None
    end: int | None
    info: Payload


@dataclass(frozen=True, slots=True)
class Details:
    """All details of a job, an object; docs/protocol.md lists its keys."""

    details: Payload

    def __post_init__(self) -> None:
        check(is_container(self.details, (dict,)), "details: expected an object")


@dataclass(frozen=True, slots=True)
class Packet:
    """A record of the stream; `number` counts from 0; `time` is its timestamp (Unix seconds), None if not requested."""

    number: int
    data: Payload
    time: float | None = None


@dataclass(frozen=True, slots=True)
class Continue:
    """The last stored record was sent; the job still runs."""


Reply: TypeAlias = Submitted | SubmittedMany | WasCancelled | NoResult | Status | Details | Packet | Continue | End


def encode_reply(reply: Reply, keep_alive: float | None = None) -> bytes:
    """Return the reply's line with its line feed.

    Args:
        reply: the reply.
        keep_alive: seconds for which the connection waits for another request; None: it is closed.
    """
    line = _reply_line(reply)
    return line if keep_alive is None else b'%b,"keep_alive":%b}\n' % (line[:-2], dumps(keep_alive))


def encode_packets(first: int, values: Sequence[Raw], times: Sequence[float] | None = None) -> bytes:
    """Return the lines of consecutive packets. Fast, because there may be many.

    Args:
        first: the number of the first packet.
        values: the data of each.
        times: the timestamp of each (Unix seconds); None if not requested.
    """
    if times is None:
        return b"".join([b'{"packet":%d,"data":%b}\n' % numbered for numbered in enumerate(values, first)])
    packets = zip(count(first), times, values, strict=False)
    return b"".join([b'{"packet":%d,"time":%b,"data":%b}\n' % (at, dumps(made), data) for at, made, data in packets])


#: The member is the last one of a line. A string or an object of the reply that ended in the same text would be
#: followed by more. Only the end of a line is searched.
_KEEP_ALIVE = re.compile(rb',[ \t]*"keep_alive"[ \t]*:[ \t]*([0-9]+(?:\.[0-9]+)?)[ \t]*}[ \t\r]*\Z')


_KEEP_ALIVE_BYTES = 64


def parse_keep_alive(line: bytes) -> float | None:
    """Return for how many seconds the connection stays open after this reply; None if it is closed."""
    found = _KEEP_ALIVE.search(line, max(0, len(line) - _KEEP_ALIVE_BYTES))
    return float(found[1]) if found else None


def _reply_line(reply: Reply) -> bytes:
    match reply:
        case Submitted(job_id):
            return encode_line({"harpcaller": VERSION, "job_id": job_id})
        case SubmittedMany(job_ids):
            return encode_line({"harpcaller": VERSION, "job_ids": job_ids})
        case WasCancelled(cancelled, stop):
            return encode_line({"cancelled": cancelled, "stop": stop})
        case NoResult():
            return encode_line({"no_result": True})
        case Status():
            call = Envelope(host=reply.host, procedure=reply.procedure, arguments=reply.arguments)
            times = Envelope(submit=reply.submit, start=reply.start, end=reply.end)
            return bytes(dumps(Envelope(call=call, time=times, info=reply.info))) + b"\n"
        case Details(details):
            return encode_line({"details": details})
        case Packet(number, data, None):
            return bytes(dumps(Envelope(packet=number, data=data))) + b"\n"
        case Packet(number, data, time):
            return bytes(dumps(Envelope(packet=number, time=time, data=data))) + b"\n"
        case Continue():
            return encode_line({"continue": True})
        case _:
            return bytes(dumps(encode_end(reply))) + b"\n"


def decode_reply(line: bytes, request: Request, decoder: Decoder = decode_values) -> Reply:
    """Return the reply of a line.

    Args:
        line: the line without its line feed.
        request: the request that it answers.
        decoder: decides whether payloads are values or `Raw` text.

    Raises:
        ProtocolError: it is not a reply, or not to this request.
    """
    members = decode_object(line, decoder)
    kinds = [kind for kind in _REPLIES if kind in members]
    check(len(kinds) == 1, "not a reply of the protocol" if not kinds else f"both {' and '.join(kinds)}")
    kind = kinds[0]
    reply = _REPLIES[kind](members, request)
    check(type(reply) in MAY_FOLLOW[type(request)], f"a reply with {kind!r} does not answer this request")
    return reply


def _decode_job_ids(members: JSONObject, request: Request) -> Reply:
    job_ids = member_value(members, "job_ids")
    are_strings = isinstance(job_ids, list) and all(isinstance(job_id, str) for job_id in job_ids)
    check(are_strings, "job_ids: expected an array of strings")
    if isinstance(request, SubmitMany):
        check(len(job_ids) == len(request.calls), f"{len(job_ids)} job ids for {len(request.calls)} calls")
    return SubmittedMany(job_ids)


def _decode_cancelled(members: JSONObject, request: Request) -> Reply:
    if not isinstance(request, Cancel):
        return decode_end("cancelled", members)
    flag = member_value(members, "cancelled")
    check(isinstance(flag, bool), "cancelled: expected true or false")
    stop = members.payload("stop") if request.wait and "stop" in members else None
    return WasCancelled(flag, None if stop == b"null" else stop)


def _decode_status(members: JSONObject, request: Request) -> Status:
    call, time = required_object(members, "call"), required_object(members, "time")
    check("arguments" in call, "call.arguments: missing")
    times = [optional_value(time, key) for key in ("submit", "start", "end")]
    submit, start, end = times
    check(_is_time(submit), "time.submit: expected an integer")
    check(all(moment is None or _is_time(moment) for moment in times), "time: expected integers or null")
    info = members.payload("info") if "info" in members else None
    return Status(
        required_string(call, "host"),
        required_string(call, "procedure"),
        call.payload("arguments"),
        submit,
        start,
        end,
        info,
    )


def _is_time(moment: object) -> bool:
    return isinstance(moment, int) and not isinstance(moment, bool)


def _decode_packet(members: JSONObject, request: Request) -> Packet:
    number = member_value(members, "packet")
    check(is_count(number), f"packet: expected an integer of at least 0, got {number!r}")
    check("data" in members, "data: missing")
    timed = isinstance(request, (FollowStream, ReadStream)) and request.timed
    return Packet(number, members.payload("data"), _decode_time(members) if timed else None)


def _decode_time(members: JSONObject) -> float:
    check("time" in members, "time: missing, though the records were to have one")
    moment = member_value(members, "time")
    in_range = isinstance(moment, (int, float)) and not isinstance(moment, bool) and abs(moment) < _MAX_TIME
    check(in_range, f"time: expected Unix seconds, got {moment!r}")
    return float(moment)


#: Maximum time: larger integers may have no float.
_MAX_TIME = 2**53


def _decode_end(kind: str) -> Callable[[JSONObject, Request], Reply]:
    return lambda members, request: decode_end(kind, members)


def _decode_flag(kind: str, reply: Reply) -> Callable[[JSONObject, Request], Reply]:
    def decode(members: JSONObject, request: Request) -> Reply:
        check(member_value(members, kind) is True, f"{kind}: expected true")
        return reply

    return decode


#: For each reply: its distinguishing key, and its decoder, which gets the request.
_REPLIES: Mapping[str, Callable[[JSONObject, Request], Reply]] = MappingProxyType(
    {
        "job_id": lambda m, _: Submitted(required_string(m, "job_id")),
        "job_ids": _decode_job_ids,
        "no_result": _decode_flag("no_result", NoResult()),
        "result": _decode_end("result"),
        "exception": _decode_end("exception"),
        "cancelled": _decode_cancelled,
        "error": _decode_end("error"),
        "call": _decode_status,
        "details": lambda m, _: Details(m.payload("details")),
        "packet": _decode_packet,
        "continue": _decode_flag("continue", Continue()),
    }
)

_ENDS = frozenset({Returned, Raised, Failed, Cancelled})

#: The replies that each request may have. All others are protocol errors.
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


class ReplyReader:
    """The reader of the replies to one request.

    Args:
        request: the request that was sent.
        decoder: decides whether payloads are values or `Raw` text.
    """

    def __init__(self, request: Request, decoder: Decoder = decode_values) -> None:
        self._request = request
        self._decoder = decoder
        self._next = getattr(request, "since", None)
        #: Whether the last reply was read.
        self.finished = False

    def read_packets(self, lines: Iterable[bytes]) -> list[Payload]:
        """Return the data of the first lines that are packets as `encode_packets` writes them without times.

        This is faster than `read_reply`, which reads the line after them.
        """
        found: list[Payload] = []
        if self._next is not None and not self.finished:
            for line in lines:
                value = decode_enclosed(line, b'{"packet":%d,"data":' % self._next)
                if value is None:
                    break
                found += value
                self._next += 1
        return found

    def read_reply(self, line: bytes) -> Reply:
        """Return the next reply. Raises `ProtocolError` if it is not allowed now."""
        check(not self.finished, "data after the last reply")
        reply = decode_reply(line, self._request, self._decoder)
        if isinstance(reply, Packet):
            check(
                self._next is None or reply.number == self._next,
                f"packet {reply.number}: expected number {self._next}",
            )
            self._next = reply.number + 1
        else:
            self.finished = True
        return reply
