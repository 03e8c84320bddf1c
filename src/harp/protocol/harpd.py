"""The messages between harpd and its callers, as values and as lines, and the messages that each phase allows.

Sans-IO, as `harp.protocol.requests`. A *connection-bound* call ends with its connection. A *resumable* call has an id
from its caller: it continues without a connection, and its caller may attach to it again. Messages about resumable
calls are sent only to callers that requested one.

Spec: docs/protocol.md, harpd.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, ClassVar, TypeAlias

from harp.protocol.call_output import RECORD_PREFIX, VERSION, encode_record
from harp.protocol.ends import CALL_ENDS, Failed, Raised, Returned
from harp.protocol.fields import (
    Decoder,
    Payload,
    ProtocolError,
    check,
    decode_object,
    is_container,
    is_count,
    member_value,
    required_string,
)
from harp.protocol.json_text import InvalidJSON, JSONObject, Raw, decode_enclosed, decode_values, dumps, loads
from harp.protocol.schema import (
    Arguments,
    Count,
    Kind,
    Name,
    Null,
    Seconds,
    WireObject,
    decode_as,
    decode_payload,
    encode_members,
    only_kind,
)

#: Maximum length of a command's line in bytes, without its line feed.
MAX_COMMAND_BYTES = 4096
#: Maximum length in characters of a name from a caller, and of the reason of a stop.
_MAX_NAME_LENGTH, _MAX_REASON_LENGTH = 200, 100
#: Maximum duration in seconds (thirty years), and maximum time in Unix seconds.
_MAX_SECONDS, _MAX_TIME = 1e9, 1e12
#: Maximum length of a stop report and of exit info in bytes.
_MAX_REPORT_BYTES = 1024 * 1024
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _expect_text(max_length: int) -> Callable[[str, Any], None]:
    def check_text(label: str, text: Any) -> None:
        if not isinstance(text, str) or not 0 < len(text) <= max_length:
            # The error does not quote the text: it may be a secret.
            raise ProtocolError(f"{label}: expected a string of 1 to {max_length} characters")

    return check_text


def _check_duration(label: str, seconds: Any) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= _MAX_SECONDS:
        raise ProtocolError(f"{label}: expected a positive number of seconds, at most {_MAX_SECONDS:.0f}")


def _check_time(label: str, seconds: Any) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= _MAX_TIME:
        raise ProtocolError(f"{label}: expected a number of seconds of at least 0")


def _check_id(label: str, id_: Any) -> None:
    if not isinstance(id_, str) or _UUID.fullmatch(id_) is None:
        raise ProtocolError(f"{label}: expected a UUID in lower case")


_check_name = _expect_text(_MAX_NAME_LENGTH)

#: The members of terms. `_ShortName` is a name elsewhere: there, a value that is not a string has another error.
_TermsId: TypeAlias = Annotated[str, Kind(_check_id)]
_TermsName: TypeAlias = Annotated[str, Kind(_check_name)]
_Duration: TypeAlias = Annotated[float, Kind(_check_duration)]
_Time: TypeAlias = Annotated[float, Kind(_check_time)]
_ShortName: TypeAlias = Annotated[str, Kind(_check_name, required_string)]
_User: TypeAlias = Annotated[str, "auth.user"]
_Password: TypeAlias = Annotated[str, "auth.password"]
_KeepAlive: TypeAlias = Annotated[bool, Null.REJECTED]


# Requests.


@dataclass(frozen=True, slots=True)
class RequestedTerms(WireObject):
    """The terms of a resumable call that its caller requests.

    Attributes:
        id: the call's id, a UUID in lower case that was never used before.
        owner: the caller's own id, which lists the call.
        secret: the call's secret, which attaches to it.
        instance: the instance id of the supervisor that is to run the call; another supervisor rejects it.
        disconnect_timeout: maximum seconds that the call runs without contact.
        result_ttl: seconds that harpd holds the end of the call without contact.
        timeout: maximum seconds between two records, or between the last record and the end.
        max_exec_time: maximum seconds from start to end.
    """

    PATH = "call."
    id: _TermsId
    owner: _TermsName = field(repr=False)
    secret: _TermsName = field(repr=False)
    instance: _TermsName
    disconnect_timeout: _Duration
    result_ttl: _Duration
    timeout: _Duration
    max_exec_time: _Duration


@dataclass(frozen=True, slots=True)
class GrantedTerms(WireObject):
    """The terms of a resumable call that harpd grants.

    Attributes:
        instance: the instance id of the supervisor that runs the call.
        disconnect_timeout: maximum seconds that the call runs without contact; at most the requested value.
        result_ttl: seconds that harpd holds the end of the call without contact; at most the requested value.
        kill_grace: seconds between two signals of a stop.
        elapsed: seconds since the call's start.
        records: number of records so far.
    """

    PATH = "call."
    instance: _TermsName
    disconnect_timeout: _Duration
    result_ttl: _Duration
    kill_grace: _Duration
    elapsed: _Time
    records: Count


@dataclass(frozen=True, slots=True)
class Request(WireObject):
    """Call a procedure.

    Attributes:
        procedure: its name.
        arguments: an array (positional) or an object (named).
        user: the user that calls.
        password: the user's password.
        call: the requested terms of a resumable call; None: the call is bound to the connection.
        keep_alive: whether the connection is to be kept for another request.
    """

    procedure: Name
    arguments: Arguments
    user: _User
    password: _Password = field(repr=False)
    call: Annotated[RequestedTerms | None, Null.REJECTED] = None
    keep_alive: _KeepAlive = False


@dataclass(frozen=True, slots=True)
class Attach(WireObject):
    """Attach to a resumable call: get its records from number `since` on, then its end."""

    call: Annotated[str, "attach", Kind(_check_id, required_string)]
    owner: _ShortName = field(repr=False)
    secret: _ShortName = field(repr=False)
    since: Count
    user: _User
    password: _Password = field(repr=False)
    keep_alive: _KeepAlive = False


@dataclass(frozen=True, slots=True)
class ListCalls(WireObject):
    """List the resumable calls of an owner.

    A legacy harpd reads this request as a call of a procedure that does not exist.
    """

    CONSTANTS: ClassVar = {"procedure": "-", "arguments": ()}
    owner: Annotated[_ShortName, "calls"] = field(repr=False)
    user: _User
    password: _Password = field(repr=False)
    keep_alive: _KeepAlive = False


AnyRequest: TypeAlias = Request | Attach | ListCalls


def encode_request(request: AnyRequest) -> bytes:
    """Return the request's line with its line feed. Raises `NotJSON` if the arguments have no form in JSON."""
    return b'{"harp":1,%b}\n' % encode_members(request)


class StartEncoder:
    """An encoder of starts that differ in their jobs only: what they share is checked and encoded once.

    Args:
        shared: a start of a resumable call. Its procedure, arguments, id, secret and limits are not used.
    """

    def __init__(self, shared: Request) -> None:
        terms = "owner", "instance", "disconnect_timeout", "result_ttl"
        self._terms = dumps({name: getattr(shared.call, name) for name in terms})[1:-1]
        auth = dumps({"user": shared.user, "password": shared.password})
        self._request = b'"auth":%b%b' % (auth, b',"keep_alive":true' if shared.keep_alive else b"")

    def encode(
        self, procedure: str, arguments: Raw, call_id: str, secret: str, timeout: float, max_exec_time: float
    ) -> bytes:
        """Return the line of a start with its line feed."""
        job = call_id.encode(), secret.encode(), dumps(timeout), dumps(max_exec_time)
        call = b'%b,"id":"%b","secret":"%b","timeout":%b,"max_exec_time":%b' % (self._terms, *job)
        members = self._request, call, dumps(procedure), arguments
        return b'{"harp":1,%b,"call":{%b},"procedure":%b,"arguments":%b}\n' % members


def decode_request(line: bytes, decoder: Decoder = decode_values) -> AnyRequest:
    """Return the request of a line without its line feed.

    Raises:
        ProtocolError: of type ``parse_error``, ``invalid_protocol`` or ``invalid_request``.
    """
    members = decode_object(line, decoder)
    _check_version(members)
    kind: type[AnyRequest] = Attach if "attach" in members else ListCalls if "calls" in members else Request
    check(kind is not Request or "arguments" in members, "arguments: missing")
    return decode_as(kind, members, other_keys=("harp",))


def _check_version(members: JSONObject) -> None:
    try:
        version = members.value("harp") if "harp" in members else None
    except InvalidJSON as error:
        raise ProtocolError(f"harp: {error}") from error
    if type(version) is not int or version != VERSION:
        raise ProtocolError(f"harp: expected {VERSION}, got {version!r}", "invalid_protocol")


# The caller's commands to a resumable call.


@dataclass(frozen=True, slots=True)
class Heartbeat(WireObject):
    """A heartbeat, which the caller of a resumable call sends every few seconds, or harpd's reply to it.

    `time` is harpd's time in seconds since the call's start: harpd sends its current time; the caller echoes the latest
    time that it has received, in the acknowledgement or in a heartbeat. So harpd knows a time up to which the caller
    has received from it, even if the heartbeat itself was delayed.
    """

    time: Annotated[_Time, "heartbeat"]


@dataclass(frozen=True, slots=True)
class Ack(WireObject):
    """The records with numbers below `count` are on stable storage: harpd may discard them."""

    count: Annotated[Count, "ack"]


@dataclass(frozen=True, slots=True)
class StopCall(WireObject):
    """Stop the call; `why` is a word for the reason, `by` the user or address that requested it, if known."""

    why: Annotated[str, "stop.why", Kind(_expect_text(_MAX_REASON_LENGTH), required_string)]
    by: Annotated[_ShortName | None, "stop.by", Null.REJECTED] = None


@dataclass(frozen=True, slots=True)
class Release(WireObject):
    """The call's end is on stable storage: harpd may discard the call."""

    CONSTANTS: ClassVar = {"release": True}


Command: TypeAlias = Ack | Heartbeat | StopCall | Release

#: The commands, by the key that identifies each.
_COMMANDS: Mapping[str, type[Command]] = {"ack": Ack, "heartbeat": Heartbeat, "stop": StopCall, "release": Release}


def encode_command(command: Command) -> bytes:
    """Return the command's line with its line feed; without it, at most `MAX_COMMAND_BYTES` bytes long."""
    return b"{%b}\n" % encode_members(command)


_RELEASE = encode_command(Release())[:-1]


def decode_command(line: bytes) -> Command:
    """Return the command of a line without its line feed.

    Raises:
        ProtocolError: of type ``parse_error`` or ``invalid_request``.
    """
    if line == _RELEASE:  # each call's last one
        return Release()
    members = decode_object(line, decode_values)
    expected = f"expected exactly one of {', '.join(_COMMANDS)}"
    command: Command = decode_as(_COMMANDS[only_kind(_COMMANDS, members, expected, expected)], members)
    return command


# Messages of harpd.


@dataclass(frozen=True, slots=True)
class Acknowledgement(WireObject):
    """The acknowledgement: the procedure exists and the call has started.

    Attributes:
        stream_result: whether records follow.
        call: the terms of a resumable call; None: the call is bound to the connection, whatever was requested.
        keep_alive: seconds that the connection waits for another request after the call; None: it is closed.
    """

    stream_result: bool
    call: Annotated[GrantedTerms | None, Null.REJECTED] = None
    keep_alive: Seconds | None = None


@dataclass(frozen=True, slots=True)
class Record(WireObject):
    """A record of a streamed result."""

    data: Annotated[Payload, "stream"]


@dataclass(frozen=True, slots=True)
class RecordTime(WireObject):
    """The timestamp of the records that follow (Unix seconds)."""

    time: Annotated[_Time, "at"]


def _check_report(label: str, report: Payload) -> None:
    check(is_container(report, (dict,)), f"{label}: expected an object")
    too_long = isinstance(report, Raw) and len(report) > _MAX_REPORT_BYTES
    check(not too_long, f"{label}: expected at most {_MAX_REPORT_BYTES} bytes")


def _check_stop_report(label: str, report: Payload) -> None:
    _check_report(label, report)
    survivors = _survivors(report)
    known = isinstance(survivors, list) and all(isinstance(one, dict) and is_count(one.get("pid")) for one in survivors)
    check(known, f"{label}.survivors: expected an array of objects with a pid")


def _survivors(report: Payload) -> Any:
    try:
        return (loads(report) if isinstance(report, Raw) else report).get("survivors", [])
    except InvalidJSON as error:
        raise ProtocolError(f"stop_report: {error}") from error


@dataclass(frozen=True, slots=True)
class StopReport(WireObject):
    """The stop report of the call, an object; a later one replaces it."""

    report: Annotated[Payload, "stop_report", Kind(_check_stop_report, decode_payload)]

    @property
    def survivors(self) -> list[int]:
        """The pids of the surviving processes."""
        return [int(one["pid"]) for one in _survivors(self.report)]


@dataclass(frozen=True, slots=True)
class ExitInfo(WireObject):
    """The exit info of the call's process, an object."""

    info: Annotated[Payload, "exit_info", Kind(_check_report, decode_payload)]


def _decode_ids(members: JSONObject, key: str) -> tuple[str, ...]:
    calls = member_value(members, key)
    check(isinstance(calls, list), f"{key}: expected an array")
    return tuple(calls)


def _check_ids(label: str, calls: tuple[str, ...]) -> None:
    for number, call in enumerate(calls):
        _check_id(f"{label}[{number}]", call)


@dataclass(frozen=True, slots=True)
class CallList(WireObject):
    """The owner's resumable calls, and the instance id of the supervisor that starts new ones."""

    calls: Annotated[tuple[str, ...], Kind(_check_ids, _decode_ids)]
    instance: _ShortName
    keep_alive: Seconds | None = None


Message: TypeAlias = (
    Acknowledgement | Record | RecordTime | Heartbeat | StopReport | ExitInfo | CallList | Returned | Raised | Failed
)

#: The messages, by the key that identifies each.
_MESSAGES: Mapping[str, type[Message]] = {
    "stream_result": Acknowledgement,
    "stream": Record,
    "at": RecordTime,
    "heartbeat": Heartbeat,
    "stop_report": StopReport,
    "exit_info": ExitInfo,
    "calls": CallList,
    **CALL_ENDS,
}

#: The messages that have the version.
_VERSIONED = (Acknowledgement, CallList, Failed)


def encode_message(message: Message) -> bytes:
    """Return the message's line with its line feed. Raises `NotJSON` if a payload has no form in JSON."""
    if isinstance(message, Record):
        return encode_record(dumps(message.data))
    return (b'{"harp":1,%b}\n' if isinstance(message, _VERSIONED) else b"{%b}\n") % encode_members(message)


def encode_exit_info(info: Raw) -> bytes:
    """Return the line of an `ExitInfo` whose text is known to be an object of limited size."""
    return b'{"exit_info":%b}\n' % info


def decode_message(line: bytes, decoder: Decoder = decode_values) -> Message:
    """Return the message of a line. Raises `ProtocolError`."""
    members = decode_object(line, decoder)
    kind = _MESSAGES[only_kind(_MESSAGES, members, "not a message of harpd")]
    if issubclass(kind, _VERSIONED):
        _check_version(members)
    message: Message = decode_as(kind, members, None)
    return message


# Phases.


class Phase(Enum):
    """The phase of an exchange. The first four depend on the request."""

    __hash__ = object.__hash__  # that of Enum is written in Python, and phases are looked up for each message

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


_REPLIED: Mapping[type, Phase] = {Acknowledgement: Phase.RUNNING, Failed: Phase.CLOSED}

#: The messages that each phase allows, and the phase after each. All others are protocol errors.
#: The phase after an acknowledgement depends on its content: see `_ACKNOWLEDGED`.
TRANSITIONS: Mapping[Phase, Mapping[type, Phase]] = {
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

#: Acknowledgements that answer another request, by phase and whether they are of a resumable call. In SENT_RESUMABLE
#: both kinds are allowed: a legacy harpd has connection-bound calls only.
_UNREQUESTED = frozenset({(Phase.SENT, True), (Phase.SENT_ATTACH, False)})

#: The phase after an acknowledgement, by whether the call is resumable and whether it streams.
_ACKNOWLEDGED: Mapping[tuple[bool, bool], Phase] = {
    (False, False): Phase.RUNNING,
    (False, True): Phase.STREAMING,
    (True, False): Phase.RESUMABLE_RUNNING,
    (True, True): Phase.RESUMABLE_STREAMING,
}


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
                value = decode_enclosed(line, RECORD_PREFIX)
                if value is None:
                    break
                found += value
        return found

    def read_message(self, line: bytes) -> Message:
        """Return the next message. Raises `ProtocolError` if it is not allowed now."""
        message = decode_message(line, self._decoder)
        self.accept(message)
        return message

    def accept(self, message: Message) -> None:
        """Count a decoded message as the next one. Raises `ProtocolError` if it is not allowed now."""
        following = TRANSITIONS[self.phase].get(type(message))
        if following is None:
            raise ProtocolError(f"{type(message).__name__} received while {self.phase.value}")
        if isinstance(message, Acknowledgement):
            resumable = message.call is not None
            if (self.phase, resumable) in _UNREQUESTED:
                kind = "resumable" if resumable else "connection-bound"
                raise ProtocolError(f"acknowledgement of a {kind} call received while {self.phase.value}")
            following = _ACKNOWLEDGED[resumable, message.stream_result]
        if isinstance(message, (Acknowledgement, CallList)):
            self.keep_alive = message.keep_alive
        elif isinstance(message, Failed) and following is Phase.CLOSED:
            self.keep_alive = None  # harpd closes after an error
        self.phase = following
