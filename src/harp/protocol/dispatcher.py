"""The requests of clients to a dispatcher, its replies, and the table of the replies to each request.

Sans-IO: this module uses no socket. Each message is a frozen value that is validated when it is created. Any bytes
give a message or a `ProtocolError`.

Additions to version 1 are opt-in: a request is a `SubmitMany`, or one for a list, or has ``start_within``,
``request_id``, ``wait`` (of a cancel), ``timed``, ``auth`` or ``keep_alive``, only if its caller uses the feature. Only
the replies to these requests have ``job_ids``, ``jobs``, ``counts``, ``hosts``, ``queues``, ``stop``, ``time``,
``refused``, ``retry_after`` or ``keep_alive``.

Spec: docs/protocol.md, Client and dispatcher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Annotated, Any, ClassVar, NamedTuple, TypeAlias

from harp.protocol.ends import CALL_ENDS, Cancelled, End, Failed, Raised, Returned
from harp.protocol.json_text import InvalidJSON, JSONObject, Raw, decode_enclosed, decode_values, dumps
from harp.protocol.schema import (
    MAX_NAME,
    Arguments,
    Count,
    Decoder,
    Integer,
    Kind,
    Name,
    Null,
    ObjectPayload,
    Payload,
    ProtocolError,
    Seconds,
    SecondsOrZero,
    WireObject,
    check,
    decode_as,
    decode_object,
    decode_payload,
    encode_members,
    encode_object,
    is_count,
    is_object,
    member_value,
    only_kind,
    quote,
    reject_unknown_keys,
    required_object,
)

VERSION = 1
#: Maximum number of calls in a `SubmitMany`: one transaction of the dispatcher. Other writes wait for it.
MAX_CALLS = 10_000
#: Maximum length in bytes of a request line that a dispatcher accepts, unless it is configured otherwise.
MAX_LINE = 16 * 1024 * 1024
#: Maximum length of the name of a queue in bytes of JSON.
MAX_QUEUE_NAME = 4096
#: Maximum length of a request id in characters.
MAX_REQUEST_ID = 200
#: Maximum length of a token in characters.
MAX_TOKEN = 200


def is_request_id(value: object) -> bool:
    """Return whether it is a text of 1 to `MAX_REQUEST_ID` characters."""
    return isinstance(value, str) and 0 < len(value) <= MAX_REQUEST_ID


_POSITIVE = Kind(lambda number: is_count(number) and number > 0, "a positive integer, got {!r}")


def decode_queue(members: JSONObject, key: str) -> Queue:
    """Return the queue of a call; for a `Kind`. Raises `ProtocolError`."""
    expected = "an object with a name"
    queue = required_object(members, key, expected)
    check("name" in queue, f"{key}: expected {expected}")
    unknown = queue.keys() - {"name", "concurrency"}
    check(not unknown, f"{key}: unknown key {', '.join(sorted(unknown))}")
    return decode_as(Queue, queue)


def _is_queue_name(name: Payload) -> bool:
    return is_object(name) and not (isinstance(name, Raw) and len(name) > MAX_QUEUE_NAME)


_QUEUE_NAME = Kind(_is_queue_name, f"an object of at most {MAX_QUEUE_NAME} bytes", decode=decode_payload)


class Queue(WireObject):
    """The queue of a call: `name` is a JSON object, `concurrency` the maximum number of running jobs."""

    PATH = "queue."
    name: Annotated[Payload, _QUEUE_NAME]
    concurrency: Annotated[int, _POSITIVE] = 1


def _are_strings(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


def _are_pointers(values: Any) -> bool:
    return _are_strings(values) and len(values) <= MAX_SECRETS


#: Maximum number of secret values of a call.
MAX_SECRETS = 20
SECRETS = Kind(_are_pointers, f"an array of at most {MAX_SECRETS} JSON pointers")
_REQUEST_ID = Kind(is_request_id, f"1 to {MAX_REQUEST_ID} characters", is_text=True)


class Call(WireObject):
    """Submit a job. `arguments` is an array (positional) or an object (named); limits are in seconds.

    All calls with one `request_id` are one job. `secrets` are JSON pointers to the values in `arguments` that the
    dispatcher stores encrypted, and never shows.
    """

    host: Name
    procedure: Name
    arguments: Arguments
    timeout: Seconds | None = None
    max_exec_time: Seconds | None = None
    queue: Annotated[Queue | None, Kind(decode=decode_queue, encode=encode_object)] = None
    info: Payload = None
    start_within: SecondsOrZero | None = None
    request_id: Annotated[str | None, _REQUEST_ID] = None
    secrets: Annotated[Sequence[str] | None, SECRETS] = None


def decode_calls(members: JSONObject, key: str) -> list[Call]:
    """Return the calls of an array of objects; for a `Kind`. Raises `ProtocolError`."""
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


#: An upper bound for the bytes of a `SubmitMany` around its calls.
_ENVELOPE_BYTES = 100


class SubmitMany(WireObject):
    """Submit jobs, all or none; the reply has their ids in this order. A call may be encoded already.

    `secrets`: the calls may have secret values. A dispatcher that cannot encrypt them refuses the request.
    """

    calls: Annotated[Sequence[Call | Raw], "submit_many", Kind(decode=decode_calls, encode=_encode_calls)]
    secrets: bool = False


def submit_in_parts(calls: Sequence[Call]) -> Iterator[SubmitMany]:
    """Yield the fewest requests that submit these calls within `MAX_CALLS` and `MAX_LINE`, at least one."""
    has_secrets = any(call.secrets for call in calls)
    part: list[Raw] = []
    size = _ENVELOPE_BYTES
    for call in calls:
        encoded = encode_object(call)
        size += len(encoded) + 1
        if part and (size > MAX_LINE or len(part) == MAX_CALLS):
            yield SubmitMany(part, has_secrets)
            part, size = [], _ENVELOPE_BYTES + len(encoded) + 1
        part.append(encoded)
    yield SubmitMany(part, has_secrets)


def _decode_job_id(members: JSONObject, key: str) -> str:
    payload = members.payload(key)
    if isinstance(payload, Raw) and len(payload) > _MAX_JOB_ID:
        return payload[:MAX_NAME].decode("ascii", "replace")
    job_id = members.value(key)
    return job_id if isinstance(job_id, str) else dumps(job_id).decode()


#: Maximum bytes of a job id that is decoded. No job has a longer one.
_MAX_JOB_ID = 6 * MAX_NAME
#: A job id. Legacy clients also send other values, for example null: their text is an id that no job has.
_JOB_ID = Kind(decode=_decode_job_id)


class Cancel(WireObject):
    """Cancel a job; with `wait`, the dispatcher replies when the stop of its processes has succeeded or failed."""

    job: Annotated[str, "cancel", _JOB_ID]
    wait: bool = False


class GetResult(WireObject):
    """Get a job's end result; with `wait`, the dispatcher replies when the job has ended."""

    job: Annotated[str, "get_result", _JOB_ID]
    wait: bool = True


class GetStatus(WireObject):
    """Get a job's status."""

    job: Annotated[str, "get_status", _JOB_ID]


class GetDetails(WireObject):
    """Get all details of a job."""

    job: Annotated[str, "get_details", _JOB_ID]


class _Stream(WireObject):
    """Get records from number `since` on, or the `recent` newest stored records; `timed`: with their timestamps."""

    job: str
    since: Count | None = None
    recent: Count | None = None
    timed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.since is None or self.recent is None, "since and recent exclude each other")


class FollowStream(_Stream):
    """Get a job's stored and future records until it ends. The default is ``recent: 0``."""

    job: Annotated[str, "follow_stream", _JOB_ID]


class ReadStream(_Stream):
    """Get a job's stored records. The default is ``since: 0``."""

    job: Annotated[str, "read_stream", _JOB_ID]


#: Maximum number of jobs, hosts or queues in one reply, and how many there are unless the request has a limit.
MAX_LISTED, DEFAULT_LISTED = 500, 100
#: Maximum number of counted jobs of each value.
MAX_COUNTED = 10_000
#: Maximum lengths of a filter and of a cursor in characters.
MAX_FILTER, MAX_CURSOR = 4096, 1024
#: What jobs can be counted by.
COUNTED_BY = ("state", "host", "procedure", "queue", "owner", "end_type")


def _is_text(most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= most


def _is_from_1(most: int) -> Callable[[Any], bool]:
    return lambda number: is_count(number) and 0 < number <= most


def _are_counted_by(values: Any) -> bool:
    return _are_strings(values) and 0 < len(values) == len(set(values)) and set(values) <= set(COUNTED_BY)


_FILTER = Kind(_is_text(MAX_FILTER), f"a text of at most {MAX_FILTER} characters", is_text=True)
_CURSOR = Kind(_is_text(MAX_CURSOR), f"a text of at most {MAX_CURSOR} characters", is_text=True)
_LISTED = Kind(_is_from_1(MAX_LISTED), f"an integer from 1 to {MAX_LISTED}, got {{!r}}")
_MOST = Kind(_is_from_1(MAX_COUNTED), f"an integer from 1 to {MAX_COUNTED}, got {{!r}}")
_BY = Kind(_are_counted_by, f"an array of some of {', '.join(COUNTED_BY)}")


class ListJobs(WireObject):
    """List the jobs that match a filter in the search language, the newest first; ``""`` matches every job.

    `cursor` continues the list after an earlier reply.
    """

    filter: Annotated[str, "list_jobs", _FILTER]
    oldest_first: bool = False
    limit: Annotated[int | None, _LISTED] = None
    cursor: Annotated[str | None, _CURSOR] = None


class CountJobs(WireObject):
    """Count the jobs that match a filter by their states or other values, up to `most` of each value."""

    filter: Annotated[str, "count_jobs", _FILTER]
    by: Annotated[Sequence[str], _BY]
    most: Annotated[int | None, _MOST] = None


class ListHosts(WireObject):
    """List the hosts of the registry by name; `text` is a part of the name, ``""`` any."""

    text: Annotated[str, "list_hosts", _FILTER]
    limit: Annotated[int | None, _LISTED] = None
    cursor: Annotated[str | None, _CURSOR] = None


class ListQueues(WireObject):
    """List the queues that have jobs; `text` is a part of the name, ``""`` any."""

    text: Annotated[str, "list_queues", _FILTER]
    limit: Annotated[int | None, _LISTED] = None
    cursor: Annotated[str | None, _CURSOR] = None


ListRequest: TypeAlias = ListJobs | ListHosts | ListQueues
Request: TypeAlias = (
    Call
    | SubmitMany
    | Cancel
    | GetResult
    | GetStatus
    | GetDetails
    | FollowStream
    | ReadStream
    | ListJobs
    | CountJobs
    | ListHosts
    | ListQueues
)

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
    "list_jobs": ListJobs,
    "count_jobs": CountJobs,
    "list_hosts": ListHosts,
    "list_queues": ListQueues,
}


def encode_request(request: Request, keep_alive: bool = False, token: str | None = None) -> bytes:
    """Return the request's line; `keep_alive` requests that the connection stays open. Raises `NotJSON`.

    `token` proves who the client is.
    """
    auth = b"" if token is None else b',"auth":{"token":%b}' % dumps(token)
    return b'{"harpcaller":1,%b%b%b}\n' % (encode_members(request), auth, b',"keep_alive":true' if keep_alive else b"")


class Received(NamedTuple):
    """A request, and the members of its line that are about the connection."""

    request: Request
    keep_alive: bool  #: Whether the client requests keep-alive.
    token: str | None  #: The token of the client; None: the request has no `auth`.

    def __repr__(self) -> str:
        return f"Received({self.request!r}, keep_alive={self.keep_alive}, ...)"  # a token must not reach a log


def decode_request(line: bytes, decoder: Decoder = decode_values) -> Received:
    """Return the request of a line. Raises `ProtocolError`."""
    members = decode_object(line, decoder)
    version = member_value(members, "harpcaller")
    check(type(version) is int and version == VERSION, f"harpcaller: expected {VERSION}, got {quote(version)}")
    expected = f"expected exactly one of {', '.join(_REQUESTS)}"
    kind = _REQUESTS[only_kind(_REQUESTS, members, expected, expected)]
    keep_alive = member_value(members, "keep_alive")
    check(keep_alive is None or isinstance(keep_alive, bool), "keep_alive: expected true or false")
    token = _decode_token(members) if "auth" in members and not members.is_null("auth") else None
    request = decode_as(kind, members, other_keys=("harpcaller", "keep_alive", "auth"))
    return Received(request, bool(keep_alive), token)


def _decode_token(members: JSONObject) -> str:
    """Return the token in `auth`. The errors do not quote it."""
    auth = required_object(members, "auth", "an object with a token", values_only=True)
    reject_unknown_keys(auth, ("token",))
    token = member_value(auth, "token")
    if not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN:
        raise ProtocolError(f"auth.token: expected 1 to {MAX_TOKEN} characters")
    return token


# Replies.

#: Maximum Unix time: a larger integer may not be representable as a float.
_MAX_TIME = 2**53


class Submitted(WireObject):
    """The job is on stable storage under this id."""

    job_id: str


class SubmittedMany(WireObject):
    """The jobs are on stable storage under these ids."""

    job_ids: Annotated[Sequence[str], Kind(_are_strings, "an array of strings")]


class WasCancelled(WireObject):
    """The reply to a cancel: whether the request stopped the job.

    `stop` is the outcome for its processes, an object with `state` and `stop_report`; None if there were none, or if
    the request did not wait for it.
    """

    cancelled: bool
    stop: ObjectPayload | None = None


class NoResult(WireObject):
    """The job has not ended."""

    CONSTANTS: ClassVar = {"no_result": True}


class Status(WireObject):
    """The call of a job, and the times of its submission, start and end (Unix seconds; None: not yet)."""

    host: Annotated[str, "call.host"]
    procedure: Annotated[str, "call.procedure"]
    arguments: Annotated[Payload, "call.arguments"]
    submit: Annotated[Integer, "time.submit"]
    start: Annotated[Integer | None, "time.start", Null.SENT] = None
    end: Annotated[Integer | None, "time.end", Null.SENT] = None
    info: Annotated[Payload, Null.SENT] = None


class Details(WireObject):
    """All details of a job, an object; docs/protocol.md lists its keys."""

    details: ObjectPayload


def _decode_time(members: JSONObject, key: str) -> float:
    time = members.value(key)
    if type(time) not in (int, float) or not -_MAX_TIME < time < _MAX_TIME:
        raise ProtocolError(f"{key}: expected Unix seconds, got {quote(time)}")
    return float(time)


class Packet(WireObject):
    """A record of the stream; `number` counts from 0; `time` is its timestamp (Unix seconds), None if not requested."""

    number: Annotated[Count, "packet"]
    data: Payload
    time: Annotated[float | None, Kind(decode=_decode_time), Null.REJECTED] = None


def _is_array(payload: Payload) -> bool:
    return payload.startswith(b"[") if isinstance(payload, Raw) else isinstance(payload, (list, tuple))


#: A payload that is an array.
_ARRAY = Kind(_is_array, "an array", decode=decode_payload)
_TIME = Kind(decode=_decode_time)


class JobsListed(WireObject):
    """Jobs of a list, as objects; docs/protocol.md lists their keys.

    `next` is the cursor of the next request; None: the list is complete. It may have no job and a `next`: a request
    examines a limited number of jobs, `examined`. `searched_to` is the time of submission of the last examined job.
    """

    jobs: Annotated[Payload, _ARRAY]
    next: Annotated[str | None, _CURSOR, Null.SENT] = None
    examined: Count = 0
    searched_to: Annotated[float | None, _TIME, Null.SENT] = None


class JobsCounted(WireObject):
    """Numbers of jobs, an object; docs/protocol.md lists its keys."""

    counts: ObjectPayload


class HostsListed(WireObject):
    """Hosts, as objects; docs/protocol.md lists their keys. `next` is the cursor of the next request."""

    hosts: Annotated[Payload, _ARRAY]
    next: Annotated[str | None, _CURSOR, Null.SENT] = None


class QueuesListed(WireObject):
    """Queues, as objects; docs/protocol.md lists their keys. `next` is the cursor of the next request."""

    queues: Annotated[Payload, _ARRAY]
    next: Annotated[str | None, _CURSOR, Null.SENT] = None


class Continue(WireObject):
    """The last stored record was sent; the job still runs."""

    CONSTANTS: ClassVar = {"continue": True}


#: The types of errors with which a dispatcher refuses a request. A job's end may have one of them, too, because harpd
#: chooses the types of its errors. The member `data` distinguishes them: only an end has it, possibly null.
REFUSALS = frozenset({"too_many_connections", "internal_error", "invalid_request", "storage_error", "invalid_jobid"})
#: The types of errors with which a dispatcher refuses a request without permission. Ends of jobs have these types, too,
#: also from a legacy dispatcher, without `data`: the member `refused` distinguishes them. Only a client that has sent
#: `auth`, or has a certificate, gets it.
ACCESS_REFUSALS = frozenset({"auth_error", "access_denied", "rate_limited"})


class Refused(WireObject):
    """The dispatcher refuses the request. This does not describe the job.

    `retry_after` is the number of seconds until another attempt can succeed; `refused` marks `ACCESS_REFUSALS`.
    """

    type: Annotated[str, "error.type"]
    message: Annotated[str, "error.message"]
    data: Annotated[Payload, "error.data"] = None
    retry_after: Annotated[SecondsOrZero | None, "error.retry_after"] = None
    refused: Annotated[bool, "error.refused"] = False


Reply: TypeAlias = (
    Submitted
    | SubmittedMany
    | WasCancelled
    | NoResult
    | Status
    | Details
    | Packet
    | Continue
    | JobsListed
    | JobsCounted
    | HostsListed
    | QueuesListed
    | Refused
    | End
)

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
    "jobs": JobsListed,
    "counts": JobsCounted,
    "hosts": HostsListed,
    "queues": QueuesListed,
}

_ENDS = frozenset({Returned, Raised, Failed, Cancelled})

#: The replies that each request may have. All others are protocol errors.
MAY_FOLLOW: Mapping[type, frozenset[type]] = {
    Call: frozenset({Submitted, Refused}),
    SubmitMany: frozenset({SubmittedMany, Refused}),
    Cancel: frozenset({WasCancelled, Refused}),
    GetResult: _ENDS | {NoResult, Refused},
    GetStatus: frozenset({Status, Refused}),
    GetDetails: frozenset({Details, Refused}),
    FollowStream: _ENDS | {Packet, Refused},
    ReadStream: _ENDS | {Packet, Continue, Refused},
    ListJobs: frozenset({JobsListed, Refused}),
    CountJobs: frozenset({JobsCounted, Refused}),
    ListHosts: frozenset({HostsListed, Refused}),
    ListQueues: frozenset({QueuesListed, Refused}),
}


def encode_reply(reply: Reply, keep_alive: float | None = None) -> bytes:
    """Return the line of a reply. `keep_alive`: seconds for which the connection stays open; None: it is closed."""
    if isinstance(reply, Packet):
        return encode_packets(reply.number, [dumps(reply.data)], None if reply.time is None else [reply.time])
    if isinstance(reply, Failed) and reply.data is None and reply.type in REFUSALS:
        reply = Failed(reply.type, reply.message, Raw(b"null"))
    version = b'"harpcaller":1,' if isinstance(reply, (Submitted, SubmittedMany)) else b""
    granted = b"" if keep_alive is None else b',"keep_alive":' + dumps(keep_alive)
    return b"{%b%b%b}\n" % (version, encode_members(reply), granted)


def encode_packets(first: int, values: Sequence[bytes], times: Sequence[float] | None = None) -> bytes:
    """Return the lines of consecutive packets from the number `first` on. Optimised: a stream may have millions."""
    if times is None:
        return b"".join([b'{"packet":%d,"data":%b}\n' % numbered for numbered in enumerate(values, first)])
    packets = zip(count(first), map(dumps, times), values, strict=False)
    return b"".join([b'{"packet":%d,"time":%b,"data":%b}\n' % packet for packet in packets])


#: The member `keep_alive` as the last one of a line. In a string or a nested object, further text follows: a quote or a
#: brace. So a search at the end of the line is enough.
_KEEP_ALIVE = re.compile(rb',[ \t]*"keep_alive"[ \t]*:[ \t]*([0-9]+(?:\.[0-9]+)?)[ \t]*}[ \t\r]*\Z')
_KEEP_ALIVE_BYTES = 64


def parse_keep_alive(line: bytes) -> float | None:
    """Return for how many seconds the connection stays open after this reply; None if it is closed."""
    found = _KEEP_ALIVE.search(line, max(0, len(line) - _KEEP_ALIVE_BYTES))
    return float(found[1]) if found else None


def decode_reply(line: bytes, request: Request) -> Reply:
    """Return the reply to a request from its line. Raises `ProtocolError` if it is not one, or not to this request."""
    members = decode_object(line, decode_values)
    key = only_kind(_REPLIES, members, "not a reply of the protocol")
    kind: type[Reply] = WasCancelled if key == "cancelled" and isinstance(request, Cancel) else _REPLIES[key]
    if kind is Failed and _is_refusal(members, request):
        kind = Refused
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


def _is_refusal(members: JSONObject, request: Request) -> bool:
    """Return whether an error refuses the request; otherwise it is a job's end."""
    if Failed not in MAY_FOLLOW[type(request)]:
        return True
    error = required_object(members, "error")
    if member_value(error, "refused") is True:
        return True
    return "data" not in error and member_value(error, "type") in REFUSALS


class ReplyReader:
    """The reader of the replies to one request."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._next = getattr(request, "since", None)
        #: Whether the last reply was read.
        self.finished = False

    def read_packets(self, lines: Iterable[bytes]) -> list[Payload]:
        """Return the data of the first lines that are packets without times; this is faster than `read_reply`."""
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
