"""The messages between harpd and its callers, as values and as lines, and the messages that each phase allows.

Sans-IO, as `harp.protocol.requests`. A *connection-bound* call ends with its connection. A *resumable* call has an id
from its caller: it continues without a connection, and its caller may attach to it again. Messages about resumable
calls are sent only to callers that requested one.

Spec: docs/protocol.md, harpd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, TypeAlias

from harp.protocol import call_output as closing
from harp.protocol.call_output import VERSION
from harp.protocol.ends import Cancelled, Failed, Raised, Returned, decode_end, encode_end
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
from harp.protocol.json_text import (
    Decoder,
    Envelope,
    InvalidJSON,
    JSONObject,
    Payload,
    Raw,
    decode_values,
    dumps,
    loads,
)
from harp.protocol.resumable import (
    MAX_COMMAND_BYTES,
    Ack,
    Command,
    GrantedTerms,
    Heartbeat,
    Release,
    RequestedTerms,
    StopCall,
    check_id,
    check_name,
    check_time,
    decode_command,
    decode_heartbeat,
    decode_terms,
    encode_command,
    encode_terms,
)
from harp.protocol.strict_json import decode_enclosed

__all__ = [
    "MAX_COMMAND_BYTES",
    "Ack",
    "Acknowledgement",
    "AnyRequest",
    "Attach",
    "CallList",
    "Command",
    "ExitInfo",
    "GrantedTerms",
    "Heartbeat",
    "ListCalls",
    "Message",
    "Record",
    "RecordTime",
    "Release",
    "ReplyReader",
    "Request",
    "RequestedTerms",
    "StopCall",
    "StopReport",
    "decode_command",
    "decode_message",
    "decode_request",
    "encode_command",
    "encode_message",
    "encode_request",
]

_NO_PROCEDURE_NAME = "-"

#: Maximum length of a stop report and of exit info in bytes.
_MAX_REPORT_BYTES = 1024 * 1024


# Requests.


@dataclass(frozen=True, slots=True)
class Request:
    """Call a procedure.

    Attributes:
        procedure: its name.
        arguments: an array (positional) or an object (named).
        user: the user that calls.
        password: the user's password.
        call: the requested terms of a resumable call; None: the call is bound to the connection.
        keep_alive: whether the connection is to be kept for another request.
    """

    procedure: str
    arguments: Payload
    user: str
    password: str = field(repr=False)
    call: RequestedTerms | None = None
    keep_alive: bool = False

    def __post_init__(self) -> None:
        check(
            isinstance(self.procedure, str) and self.procedure != "",
            f"procedure: expected a name, got {self.procedure!r}",
        )
        check(is_container(self.arguments, (list, dict)), "arguments: expected an array or an object")


@dataclass(frozen=True, slots=True)
class Attach:
    """Attach to a resumable call: get its records from number `since` on, then its end."""

    call: str
    owner: str = field(repr=False)
    secret: str = field(repr=False)
    since: int
    user: str
    password: str = field(repr=False)
    keep_alive: bool = False

    def __post_init__(self) -> None:
        check_id("attach", self.call)
        check_name("owner", self.owner)
        check_name("secret", self.secret)
        check(is_count(self.since), f"since: expected an integer of at least 0, got {self.since!r}")


@dataclass(frozen=True, slots=True)
class ListCalls:
    """List the resumable calls of an owner.

    A legacy harpd reads this request as a call of a procedure that does not exist.
    """

    owner: str = field(repr=False)
    user: str
    password: str = field(repr=False)
    keep_alive: bool = False

    def __post_init__(self) -> None:
        check_name("calls", self.owner)


AnyRequest: TypeAlias = Request | Attach | ListCalls


def encode_request(request: AnyRequest) -> bytes:
    """Return the request's line with its line feed. Raises `NotJSON` if the arguments have no form in JSON."""
    members = Envelope(harp=VERSION)
    match request:
        case Request(call=call):
            members |= {"procedure": request.procedure, "arguments": request.arguments}
        case Attach():
            call = None
            members |= {"attach": request.call, "owner": request.owner}
            members |= {"secret": request.secret, "since": request.since}
        case ListCalls(owner):
            call = None
            members |= {"procedure": _NO_PROCEDURE_NAME, "arguments": (), "calls": owner}
    members["auth"] = Envelope(user=request.user, password=request.password)
    if call is not None:
        members["call"] = encode_terms(call)
    if request.keep_alive:
        members["keep_alive"] = True
    return bytes(dumps(members)) + b"\n"


def decode_request(line: bytes, decoder: Decoder = decode_values) -> AnyRequest:
    """Return the request of a line without its line feed.

    Raises:
        ProtocolError: of type ``parse_error``, ``invalid_protocol`` or ``invalid_request``.
    """
    members = decode_object(line, decoder)
    _check_version(members)
    if "attach" in members:
        reject_unknown_keys(members, ("harp", "attach", "owner", "secret", "since", "auth", "keep_alive"))
        call, owner, secret = (required_string(members, key) for key in ("attach", "owner", "secret"))
        check("since" in members, "since: missing")
        since = member_value(members, "since")
        return Attach(call, owner, secret, since, *_credentials(members), _decode_keep_alive(members))
    if "calls" in members:
        reject_unknown_keys(members, ("harp", "procedure", "arguments", "calls", "auth", "keep_alive"))
        return ListCalls(required_string(members, "calls"), *_credentials(members), _decode_keep_alive(members))
    reject_unknown_keys(members, ("harp", "procedure", "arguments", "auth", "call", "keep_alive"))
    check("arguments" in members, "arguments: missing")
    credentials = _credentials(members)
    procedure, arguments = required_string(members, "procedure"), members.payload("arguments")
    return Request(
        procedure, arguments, *credentials, decode_terms(members, RequestedTerms), _decode_keep_alive(members)
    )


def _decode_keep_alive(members: JSONObject) -> bool:
    keep_alive = member_value(members, "keep_alive") if "keep_alive" in members else False
    check(isinstance(keep_alive, bool), "keep_alive: expected true or false")
    return bool(keep_alive)


def _credentials(members: JSONObject) -> tuple[str, str]:
    auth = required_object(members, "auth", "an object with user and password")
    reject_unknown_keys(auth, ("user", "password"))
    return required_string(auth, "user"), required_string(auth, "password")


def _check_version(members: JSONObject) -> None:
    version = member_value(members, "harp") if "harp" in members else None
    if type(version) is not int or version != VERSION:
        raise ProtocolError(f"harp: expected {VERSION}, got {version!r}", "invalid_protocol")


# Messages of harpd.


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """The acknowledgement: the procedure exists and the call has started.

    Attributes:
        stream_result: whether records follow.
        call: the terms of a resumable call; None: the call is bound to the connection, whatever was requested.
        keep_alive: seconds that the connection waits for another request after the call; None: it is closed.
    """

    stream_result: bool
    call: GrantedTerms | None = None
    keep_alive: float | None = None

    def __post_init__(self) -> None:
        check(isinstance(self.stream_result, bool), "stream_result: expected true or false")
        _check_keep_alive(self.keep_alive)


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a streamed result."""

    data: Payload


@dataclass(frozen=True, slots=True)
class RecordTime:
    """The timestamp of the records that follow (Unix seconds)."""

    time: float

    def __post_init__(self) -> None:
        check_time("at", self.time)


@dataclass(frozen=True, slots=True)
class StopReport:
    """The stop report of the call, an object; a later one replaces it."""

    report: Payload

    def __post_init__(self) -> None:
        _check_report("stop_report", self.report)
        found = _report_value(self.report).get("survivors", [])
        known = isinstance(found, list) and all(isinstance(one, dict) and is_count(one.get("pid")) for one in found)
        check(known, "stop_report.survivors: expected an array of objects with a pid")

    @property
    def survivors(self) -> list[int]:
        """The pids of the surviving processes."""
        return [int(one["pid"]) for one in _report_value(self.report).get("survivors", [])]


@dataclass(frozen=True, slots=True)
class ExitInfo:
    """The exit info of the call's process, an object."""

    info: Payload

    def __post_init__(self) -> None:
        _check_report("exit_info", self.info)


def _check_report(key: str, report: Payload) -> None:
    check(is_container(report, (dict,)), f"{key}: expected an object")
    longest = isinstance(report, Raw) and len(report) > _MAX_REPORT_BYTES
    check(not longest, f"{key}: expected at most {_MAX_REPORT_BYTES} bytes")


def _report_value(report: Payload) -> Mapping[str, Any]:
    """Return the value of a stop report. Raises `ProtocolError`."""
    try:
        found: Mapping[str, Any] = loads(report) if isinstance(report, Raw) else report
    except InvalidJSON as error:
        raise ProtocolError(f"stop_report: {error}") from error
    return found


@dataclass(frozen=True, slots=True)
class CallList:
    """The owner's resumable calls, and the instance id of the supervisor that starts new ones."""

    calls: tuple[str, ...]
    instance: str
    keep_alive: float | None = None

    def __post_init__(self) -> None:
        _check_keep_alive(self.keep_alive)
        for number, call in enumerate(self.calls):
            check_id(f"calls[{number}]", call)
        check_name("instance", self.instance)


def _check_keep_alive(seconds: object) -> None:
    valid = seconds is None or is_seconds(seconds)
    check(valid, f"keep_alive: expected a positive number of seconds, got {seconds!r}")


Message: TypeAlias = (
    Acknowledgement | Record | RecordTime | Heartbeat | StopReport | ExitInfo | CallList | Returned | Raised | Failed
)


def encode_message(message: Message) -> bytes:
    """Return the message's line with its line feed. Raises `NotJSON` if a payload has no form in JSON."""
    match message:
        case Acknowledgement(stream_result, call, keep_alive):
            members = Envelope(harp=VERSION, stream_result=stream_result)
            if call is not None:
                members["call"] = encode_terms(call)
            if keep_alive is not None:
                members["keep_alive"] = keep_alive
        case Record(data):
            return closing.record(dumps(data))
        case RecordTime(time):
            members = Envelope(at=time)
        case Heartbeat(time):
            members = Envelope(heartbeat=time)
        case StopReport(report):
            members = Envelope(stop_report=report)
        case ExitInfo(info):
            members = Envelope(exit_info=info)
        case CallList(calls, instance, keep_alive):
            members = Envelope(harp=VERSION, calls=calls, instance=instance)
            if keep_alive is not None:
                members["keep_alive"] = keep_alive
        case Failed():
            members = Envelope(harp=VERSION, **encode_end(message))
        case _:
            members = encode_end(message)
    return bytes(dumps(members)) + b"\n"


def decode_message(line: bytes, decoder: Decoder = decode_values) -> Message:
    """Return the message of a line. Raises `ProtocolError`."""
    members = decode_object(line, decoder)
    kinds = [kind for kind in _MESSAGES if kind in members]
    check(len(kinds) == 1, "not a message of harpd" if not kinds else f"both {' and '.join(kinds)}")
    return _MESSAGES[kinds[0]](members)


def _decode_acknowledgement(members: JSONObject) -> Acknowledgement:
    _check_version(members)
    return Acknowledgement(
        member_value(members, "stream_result"),
        decode_terms(members, GrantedTerms),
        optional_value(members, "keep_alive"),
    )


def _decode_call_list(members: JSONObject) -> CallList:
    _check_version(members)
    calls = member_value(members, "calls")
    check(isinstance(calls, list), "calls: expected an array")
    return CallList(tuple(calls), required_string(members, "instance"), optional_value(members, "keep_alive"))


def _decode_failed(members: JSONObject) -> Failed:
    _check_version(members)
    end = decode_end("error", members)
    assert isinstance(end, Failed)
    return end


def _decode_end(kind: str) -> Callable[[JSONObject], Message]:
    def decode(members: JSONObject) -> Message:
        end = decode_end(kind, members)
        assert not isinstance(end, Cancelled)
        return end

    return decode


_MESSAGES: Mapping[str, Callable[[JSONObject], Message]] = MappingProxyType(
    {
        "stream_result": _decode_acknowledgement,
        "stream": lambda m: Record(m.payload("stream")),
        "at": lambda m: RecordTime(member_value(m, "at")),
        "heartbeat": decode_heartbeat,
        "stop_report": lambda m: StopReport(m.payload("stop_report")),
        "exit_info": lambda m: ExitInfo(m.payload("exit_info")),
        "calls": _decode_call_list,
        "result": _decode_end("result"),
        "exception": _decode_end("exception"),
        "error": _decode_failed,
    }
)


# Phases.


class Phase(Enum):
    """The phase of an exchange. The first four depend on the request."""

    SENT = "waiting for the acknowledgement"
    SENT_RESUMABLE = "waiting for the acknowledgement of a resumable call"
    SENT_ATTACH = "waiting for the acknowledgement of an attach"
    SENT_LIST = "waiting for the list of calls"
    RUNNING = "waiting for the result"
    STREAMING = "waiting for records or the result"
    RESUMABLE_RUNNING = "waiting for the result of a resumable call"
    RESUMABLE_STREAMING = "waiting for records or the result of a resumable call"
    RESUMABLE_ENDING = "waiting for the result, after its exit info"
    RESUMABLE_ENDED = "waiting for the close of a resumable call"
    CLOSED = "closed"


def _closing(phase: Phase) -> dict[type, Phase]:
    return dict.fromkeys((Returned, Raised, Failed), phase)


def _resumable(phase: Phase) -> dict[type, Phase]:
    """Return the transitions of messages that every phase of a resumable call allows; the phase stays."""
    return dict.fromkeys((Heartbeat, StopReport), phase)


_REPLIED = MappingProxyType({Acknowledgement: Phase.RUNNING, Failed: Phase.CLOSED})

#: The messages that each phase allows, and the phase after each. All others are protocol errors.
#: The phase after an acknowledgement depends on its content: see `_ACKNOWLEDGED`.
TRANSITIONS: Mapping[Phase, Mapping[type, Phase]] = MappingProxyType(
    {
        Phase.SENT: _REPLIED,
        Phase.SENT_RESUMABLE: _REPLIED,
        Phase.SENT_ATTACH: _REPLIED,
        Phase.SENT_LIST: {CallList: Phase.CLOSED, Failed: Phase.CLOSED},
        Phase.RUNNING: _closing(Phase.CLOSED),
        Phase.STREAMING: {Record: Phase.STREAMING, **_closing(Phase.CLOSED)},
        Phase.RESUMABLE_RUNNING: {
            **_resumable(Phase.RESUMABLE_RUNNING),
            ExitInfo: Phase.RESUMABLE_ENDING,
            **_closing(Phase.RESUMABLE_ENDED),
        },
        Phase.RESUMABLE_STREAMING: {
            **_resumable(Phase.RESUMABLE_STREAMING),
            RecordTime: Phase.RESUMABLE_STREAMING,
            Record: Phase.RESUMABLE_STREAMING,
            ExitInfo: Phase.RESUMABLE_ENDING,
            **_closing(Phase.RESUMABLE_ENDED),
        },
        Phase.RESUMABLE_ENDING: {**_resumable(Phase.RESUMABLE_ENDING), **_closing(Phase.RESUMABLE_ENDED)},
        Phase.RESUMABLE_ENDED: _resumable(Phase.RESUMABLE_ENDED),
        Phase.CLOSED: {},
    }
)

#: The acknowledgements that each phase allows, by whether they are of a resumable call.
_MAY_BE_RESUMABLE: Mapping[Phase, frozenset[bool]] = MappingProxyType(
    {
        Phase.SENT: frozenset({False}),
        Phase.SENT_RESUMABLE: frozenset({False, True}),  # a legacy harpd has connection-bound calls only
        Phase.SENT_ATTACH: frozenset({True}),
    }
)

#: The phase after an acknowledgement, by whether the call is resumable and whether it streams.
_ACKNOWLEDGED: Mapping[tuple[bool, bool], Phase] = MappingProxyType(
    {
        (False, False): Phase.RUNNING,
        (False, True): Phase.STREAMING,
        (True, False): Phase.RESUMABLE_RUNNING,
        (True, True): Phase.RESUMABLE_STREAMING,
    }
)


def _first_phase(request: AnyRequest | None) -> Phase:
    match request:
        case Attach():
            return Phase.SENT_ATTACH
        case ListCalls():
            return Phase.SENT_LIST
        case Request(call=RequestedTerms()):
            return Phase.SENT_RESUMABLE
        case _:
            return Phase.SENT


class ReplyReader:
    """The reader of harpd's messages after one request.

    Args:
        decoder: decides whether payloads are values or `Raw` text.
        request: the request that was sent; None: a request for a connection-bound call.
    """

    def __init__(self, decoder: Decoder = decode_values, request: AnyRequest | None = None) -> None:
        self._decoder = decoder
        #: The phase of the exchange.
        self.phase = _first_phase(request)
        #: Seconds that the connection waits for another request after the last message; None: harpd closes it.
        self.keep_alive: float | None = None

    @property
    def end_received(self) -> bool:
        """Whether the closing line, an error or the list was read. A stop report may follow a resumable call's end."""
        return self.phase in (Phase.CLOSED, Phase.RESUMABLE_ENDED)

    @property
    def finished(self) -> bool:
        """Whether the last message was read. Always false for a resumable call, which ends when harpd closes."""
        return self.phase is Phase.CLOSED

    @property
    def is_streaming(self) -> bool:
        """Whether the next messages may be records."""
        return self.phase in (Phase.STREAMING, Phase.RESUMABLE_STREAMING)

    def read_records(self, lines: Iterable[bytes]) -> list[Payload]:
        """Return the data of the first lines that are records as HARP's harpd writes them.

        This is faster than `read_message`, which reads the line after them.
        """
        found: list[Payload] = []
        if self.is_streaming:
            for line in lines:
                value = decode_enclosed(line, closing.RECORD_PREFIX)
                if value is None:
                    break
                found += value
        return found

    def read_message(self, line: bytes) -> Message:
        """Return the next message. Raises `ProtocolError` if it is not allowed now."""
        message = decode_message(line, self._decoder)
        following = TRANSITIONS[self.phase].get(type(message))
        if following is None:
            raise ProtocolError(f"{type(message).__name__} received while {self.phase.value}")
        if isinstance(message, Acknowledgement):
            resumable = message.call is not None
            if resumable not in _MAY_BE_RESUMABLE[self.phase]:
                kind = "resumable" if resumable else "connection-bound"
                raise ProtocolError(f"acknowledgement of a {kind} call received while {self.phase.value}")
            following = _ACKNOWLEDGED[resumable, message.stream_result]
        if isinstance(message, (Acknowledgement, CallList)):
            self.keep_alive = message.keep_alive
        elif isinstance(message, Failed) and following is Phase.CLOSED:
            self.keep_alive = None  # harpd closes after an error
        self.phase = following
        return message
