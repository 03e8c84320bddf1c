"""The requests of a client to a dispatcher, as values and as lines. `harp.protocol.replies` has the replies.

Sans-IO: nothing here touches a socket. Each message is a frozen value that is validated when it is created. Any bytes
give a message or a `ProtocolError`.

Additions to version 1 are opt-in: a request is a `SubmitMany`, or has ``wait`` (of a cancel), ``timed`` or
``keep_alive``, only if its caller uses the feature. Only the replies to such a request have ``job_ids``, ``stop``,
``time`` or ``keep_alive``.

Spec: docs/protocol.md, Client and dispatcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from harp.protocol.fields import (
    Decoder,
    Payload,
    ProtocolError,
    check,
    decode_object,
    is_count,
    member_value,
    required_object,
)
from harp.protocol.json_text import InvalidJSON, JSONObject, Raw, decode_values
from harp.protocol.schema import (
    Arguments,
    Count,
    Kind,
    Name,
    ObjectPayload,
    Seconds,
    WireObject,
    decode_as,
    encode_members,
    encode_object,
    only_kind,
)

VERSION = 1

#: Maximum number of calls in a `SubmitMany`: one transaction of the dispatcher, for which others wait.
MAX_CALLS = 10_000

#: Maximum length in bytes of a request line that a dispatcher accepts, unless it is configured otherwise.
MAX_LINE = 16 * 1024 * 1024


_POSITIVE = Kind(lambda number: is_count(number) and number > 0, "a positive integer, got {!r}")


def _decode_queue(members: JSONObject, key: str) -> Queue:
    expected = "an object with a name"
    queue = required_object(members, key, expected)
    check("name" in queue, f"{key}: expected {expected}")
    return decode_as(Queue, queue)


@dataclass(frozen=True, slots=True)
class Queue(WireObject):
    """The queue of a call: `name` is a JSON object, `concurrency` the maximum number of its jobs that run at once."""

    PATH = "queue."
    name: ObjectPayload
    concurrency: Annotated[int, _POSITIVE] = 1


@dataclass(frozen=True, slots=True)
class Call(WireObject):
    """Submit a job. `arguments` is an array (positional) or an object (named); limits are in seconds."""

    host: Name
    procedure: Name
    arguments: Arguments
    timeout: Seconds | None = None
    max_exec_time: Seconds | None = None
    queue: Annotated[Queue | None, Kind(decode=_decode_queue, encode=encode_object)] = None
    info: Payload = None


def _decode_calls(members: JSONObject, key: str) -> list[Call]:
    elements = members.nested_objects(key)
    if elements is None:
        raise ProtocolError(f"{key}: expected an array")
    calls: list[Call] = []
    try:
        for call in elements:
            if len(calls) == MAX_CALLS:
                raise ProtocolError(f"expected at most {MAX_CALLS} calls")
            if call is None:
                raise ProtocolError("expected an object")
            calls.append(decode_as(Call, call))
    except (ProtocolError, InvalidJSON) as error:
        raise ProtocolError(f"{key}[{len(calls)}]: {error}") from error
    return calls


def _encode_calls(calls: Sequence[Call | Raw]) -> Raw:
    return Raw(b"[" + b",".join([call if isinstance(call, Raw) else encode_object(call) for call in calls]) + b"]")


#: More bytes than a request of many calls has beside them.
_ENVELOPE_BYTES = 100


@dataclass(frozen=True, slots=True)
class SubmitMany(WireObject):
    """Submit jobs, all or none; the reply has their ids in this order. A call may be encoded already."""

    calls: Annotated[Sequence[Call | Raw], "submit_many", Kind(decode=_decode_calls, encode=_encode_calls)]


def submit_in_parts(calls: Sequence[Call]) -> Iterator[SubmitMany]:
    """Yield the fewest requests that submit these calls within `MAX_CALLS` and `MAX_LINE`, at least one.

    A call that alone is too long is a request of its own.
    """
    part: list[Raw] = []
    size = _ENVELOPE_BYTES
    for call in calls:
        encoded = encode_object(call)
        size += len(encoded) + 1
        if part and (size > MAX_LINE or len(part) == MAX_CALLS):
            yield SubmitMany(part)
            part, size = [], _ENVELOPE_BYTES + len(encoded) + 1
        part.append(encoded)
    yield SubmitMany(part)


@dataclass(frozen=True, slots=True)
class Cancel(WireObject):
    """Cancel a job; with `wait`, the reply comes when the stop of its processes has succeeded or failed."""

    job: Annotated[str, "cancel"]
    wait: bool = False


@dataclass(frozen=True, slots=True)
class GetResult(WireObject):
    """Get a job's end result; with `wait`, the dispatcher replies when the job has ended."""

    job: Annotated[str, "get_result"]
    wait: bool = True


@dataclass(frozen=True, slots=True)
class GetStatus(WireObject):
    """Get a job's status."""

    job: Annotated[str, "get_status"]


@dataclass(frozen=True, slots=True)
class GetDetails(WireObject):
    """Get all details of a job."""

    job: Annotated[str, "get_details"]


@dataclass(frozen=True, slots=True)
class _Stream(WireObject):
    """Get a job's records: from number `since` on, or the `recent` newest of the stored ones.

    With `timed`, each record has its timestamp.
    """

    job: str
    since: Count | None = None
    recent: Count | None = None
    timed: bool = False

    def __post_init__(self) -> None:
        WireObject.__post_init__(self)
        check(self.since is None or self.recent is None, "since and recent exclude each other")


@dataclass(frozen=True, slots=True)
class FollowStream(_Stream):
    """Get a job's stored and future records until it ends. The default is ``recent: 0``."""

    job: Annotated[str, "follow_stream"]


@dataclass(frozen=True, slots=True)
class ReadStream(_Stream):
    """Get a job's stored records. The default is ``since: 0``."""

    job: Annotated[str, "read_stream"]


Request: TypeAlias = Call | SubmitMany | Cancel | GetResult | GetStatus | GetDetails | FollowStream | ReadStream

#: The requests, by the key that identifies each.
_REQUESTS: Mapping[str, type[Request]] = {
    "procedure": Call,
    "submit_many": SubmitMany,
    "cancel": Cancel,
    "get_result": GetResult,
    "get_status": GetStatus,
    "get_details": GetDetails,
    "follow_stream": FollowStream,
    "read_stream": ReadStream,
}


def encode_request(request: Request, keep_alive: bool = False) -> bytes:
    """Return the request's line with its line feed. Raises `NotJSON` if a payload has no form in JSON.

    `keep_alive` is whether the connection is to wait for another request after the reply.
    """
    return b'{"harpcaller":1,%b%b}\n' % (encode_members(request), b',"keep_alive":true' if keep_alive else b"")


def decode_request(line: bytes, decoder: Decoder = decode_values) -> tuple[Request, bool]:
    """Return the request of a line without its line feed, and whether the client requests keep-alive.

    Raises:
        ProtocolError: the line is not a request.
    """
    members = decode_object(line, decoder)
    version = member_value(members, "harpcaller")
    check(type(version) is int and version == VERSION, f"harpcaller: expected {VERSION}, got {version!r}")
    expected = f"expected exactly one of {', '.join(_REQUESTS)}"
    kind = _REQUESTS[only_kind(_REQUESTS, members, expected, expected)]
    keep_alive = member_value(members, "keep_alive")
    check(keep_alive is None or isinstance(keep_alive, bool), "keep_alive: expected true or false")
    return decode_as(kind, members, other_keys=("harpcaller", "keep_alive")), bool(keep_alive)
