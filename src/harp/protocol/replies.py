"""The replies of a dispatcher to a client, as values and as lines, and the replies that each request may have.

Sans-IO, as `harp.protocol.requests`, which has the requests. Spec: docs/protocol.md, Client and dispatcher.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Any, ClassVar, TypeAlias

from harp.protocol.ends import CALL_ENDS, Cancelled, End, Failed, Raised, Returned
from harp.protocol.fields import Payload, ProtocolError, check, decode_object
from harp.protocol.json_text import JSONObject, Raw, decode_enclosed, decode_values, dumps
from harp.protocol.requests import (
    Call,
    Cancel,
    FollowStream,
    GetDetails,
    GetResult,
    GetStatus,
    ReadStream,
    Request,
    SubmitMany,
)
from harp.protocol.schema import (
    Count,
    Integer,
    Kind,
    Null,
    ObjectPayload,
    WireObject,
    decode_as,
    encode_members,
    only_kind,
)

#: Maximum time: larger integers may have no float.
_MAX_TIME = 2**53


@dataclass(frozen=True, slots=True)
class Submitted(WireObject):
    """The job is on stable storage under this id."""

    job_id: str


def _are_strings(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


@dataclass(frozen=True, slots=True)
class SubmittedMany(WireObject):
    """The jobs are on stable storage under these ids."""

    job_ids: Annotated[Sequence[str], Kind(_are_strings, "an array of strings")]


@dataclass(frozen=True, slots=True)
class WasCancelled(WireObject):
    """The reply to a cancel: whether the request stopped the job.

    `stop` is the outcome for its processes, an object with `state` and `stop_report`; None if there were none, or if
    the request did not wait for it.
    """

    cancelled: bool
    stop: ObjectPayload | None = None


@dataclass(frozen=True, slots=True)
class NoResult(WireObject):
    """The job has not ended yet."""

    CONSTANTS: ClassVar = {"no_result": True}


@dataclass(frozen=True, slots=True)
class Status(WireObject):
    """The call of a job, and the times of its submission, start and end (Unix seconds; None: not yet)."""

    host: Annotated[str, "call.host"]
    procedure: Annotated[str, "call.procedure"]
    arguments: Annotated[Payload, "call.arguments"]
    submit: Annotated[Integer, "time.submit"]
    start: Annotated[Integer | None, "time.start", Null.SENT] = None
    end: Annotated[Integer | None, "time.end", Null.SENT] = None
    info: Annotated[Payload, Null.SENT] = None


@dataclass(frozen=True, slots=True)
class Details(WireObject):
    """All details of a job, an object; docs/protocol.md lists its keys."""

    details: ObjectPayload


def _decode_time(members: JSONObject, key: str) -> float:
    time = members.value(key)
    if type(time) not in (int, float) or not -_MAX_TIME < time < _MAX_TIME:
        raise ProtocolError(f"{key}: expected Unix seconds, got {time!r}")
    return float(time)


@dataclass(frozen=True, slots=True)
class Packet(WireObject):
    """A record of the stream; `number` counts from 0; `time` is its timestamp (Unix seconds), None if not requested."""

    number: Annotated[Count, "packet"]
    data: Payload
    time: Annotated[float | None, Kind(decode=_decode_time), Null.REJECTED] = None


@dataclass(frozen=True, slots=True)
class Continue(WireObject):
    """The last stored record was sent; the job still runs."""

    CONSTANTS: ClassVar = {"continue": True}


Reply: TypeAlias = Submitted | SubmittedMany | WasCancelled | NoResult | Status | Details | Packet | Continue | End

#: The replies, by the key that identifies each. In the reply to a `Cancel`, ``cancelled`` is of `WasCancelled`.
_REPLIES: Mapping[str, type[Reply]] = {
    "job_id": Submitted,
    "job_ids": SubmittedMany,
    "no_result": NoResult,
    **CALL_ENDS,
    "cancelled": Cancelled,
    "call": Status,
    "details": Details,
    "packet": Packet,
    "continue": Continue,
}

_ENDS = frozenset({Returned, Raised, Failed, Cancelled})

#: The replies that each request may have. All others are protocol errors.
MAY_FOLLOW: Mapping[type, frozenset[type]] = {
    Call: frozenset({Submitted, Failed}),
    SubmitMany: frozenset({SubmittedMany, Failed}),
    Cancel: frozenset({WasCancelled, Failed}),
    GetResult: _ENDS | {NoResult},
    GetStatus: frozenset({Status, Failed}),
    GetDetails: frozenset({Details, Failed}),
    FollowStream: _ENDS | {Packet},
    ReadStream: _ENDS | {Packet, Continue},
}


def encode_reply(reply: Reply, keep_alive: float | None = None) -> bytes:
    """Return the reply's line with its line feed.

    `keep_alive` is for how many seconds the connection waits for another request; None: it is closed.
    """
    if isinstance(reply, Packet):
        return encode_packets(reply.number, [dumps(reply.data)], None if reply.time is None else [reply.time])
    version = b'"harpcaller":1,' if isinstance(reply, (Submitted, SubmittedMany)) else b""
    kept = b"" if keep_alive is None else b',"keep_alive":' + dumps(keep_alive)
    return b"{%b%b%b}\n" % (version, encode_members(reply), kept)


def encode_packets(first: int, values: Sequence[Raw], times: Sequence[float] | None = None) -> bytes:
    """Return the lines of consecutive packets from the number `first` on. Fast, because there may be many.

    Each packet has one of the `values` as its data, and one of the `times` (Unix seconds) if they were requested.
    """
    if times is None:
        return b"".join([b'{"packet":%d,"data":%b}\n' % numbered for numbered in enumerate(values, first)])
    packets = zip(count(first), map(dumps, times), values, strict=False)
    return b"".join([b'{"packet":%d,"time":%b,"data":%b}\n' % packet for packet in packets])


#: The member `keep_alive` as the last one of a line. In a string or a nested object, the same text would be followed by
#: more: a quote or a brace. So a search at the end of the line is enough.
_KEEP_ALIVE = re.compile(rb',[ \t]*"keep_alive"[ \t]*:[ \t]*([0-9]+(?:\.[0-9]+)?)[ \t]*}[ \t\r]*\Z')
_KEEP_ALIVE_BYTES = 64


def parse_keep_alive(line: bytes) -> float | None:
    """Return for how many seconds the connection stays open after this reply; None if it is closed."""
    found = _KEEP_ALIVE.search(line, max(0, len(line) - _KEEP_ALIVE_BYTES))
    return float(found[1]) if found else None


def decode_reply(line: bytes, request: Request) -> Reply:
    """Return the reply to a request, of a line without its line feed.

    Raises:
        ProtocolError: it is not a reply, or not to this request.
    """
    members = decode_object(line, decode_values)
    key = only_kind(_REPLIES, members, "not a reply of the protocol")
    kind: type[Reply] = WasCancelled if key == "cancelled" and isinstance(request, Cancel) else _REPLIES[key]
    if kind not in MAY_FOLLOW[type(request)]:
        raise ProtocolError(f"a reply with {key!r} does not answer this request")
    timed = isinstance(request, (FollowStream, ReadStream)) and request.timed
    if timed and kind is Packet and "time" not in members:
        raise ProtocolError("time: missing, though the request is timed")
    # A key that was not requested has no meaning.
    ignored = () if timed or getattr(request, "wait", False) else ("time", "stop")
    reply: Reply = decode_as(kind, members, None, ignored)
    if isinstance(reply, SubmittedMany) and isinstance(request, SubmitMany):
        check(len(reply.job_ids) == len(request.calls), f"{len(reply.job_ids)} job ids for {len(request.calls)} calls")
    return reply


class ReplyReader:
    """The reader of the replies to one request."""

    def __init__(self, request: Request) -> None:
        self._request = request
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
        reply = decode_reply(line, self._request)
        if isinstance(reply, Packet):
            is_next = self._next is None or reply.number == self._next
            check(is_next, f"packet {reply.number}: expected number {self._next}")
            self._next = reply.number + 1
        else:
            self.finished = True
        return reply
