"""The messages between harpd and those who call it: values, their lines, and which may follow which.

Sans-IO, as `harp.protocol.requests`. A *tied* call ends with its connection. A *kept* call has an id that its
caller gave it: it outlives the connection, and its caller may attach to it again. All that has to do with kept calls
is said only to those who asked for it.

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
    reject_unknown_keys,
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

#: The most bytes of a receipt or of evidence.
_MAX_REPORT_BYTES = 1024 * 1024


# Requests.


@dataclass(frozen=True, slots=True)
class Request:
    """Call a procedure.

    Attributes:
        procedure: its name.
        arguments: an array (positional) or an object (named).
        user: who calls.
        password: the user's password.
        call: how the call is to be kept; None: it is tied to the connection.
        keep: whether the connection is to be kept for another request.
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
    """Go on with a kept call: its records from number `since` on, then its end."""

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
        check(is_count(self.since), f"since: expected an integer from 0 on, got {self.since!r}")


@dataclass(frozen=True, slots=True)
class ListCalls:
    """Ask which kept calls of this owner there are.

    To a harpd that does not know the question it looks like the call of a procedure that does not exist.
    """

    owner: str = field(repr=False)
    user: str
    password: str = field(repr=False)
    keep_alive: bool = False

    def __post_init__(self) -> None:
        check_name("calls", self.owner)


AnyRequest: TypeAlias = Request | Attach | ListCalls


def encode_request(request: AnyRequest) -> bytes:
    """The request's line, line feed included. Raises `NotJSON` when the arguments have no form in JSON."""
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
    """Read a request's line, given without its line feed.

    Raises:
        ProtocolError: of type ``parse_error``, ``invalid_protocol`` or ``invalid_request``.
    """
    members = decode_object(line, decoder)
    _check_version(members)
    if "attach" in members:
        reject_unknown_keys(members, ("harp", "attach", "owner", "secret", "since", "auth", "keep_alive"))
        call, owner, secret = (required_string(members, key) for key in ("attach", "owner", "secret"))
        return Attach(
            call, owner, secret, _required_value(members, "since"), *_credentials(members), _decode_keep_alive(members)
        )
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
    keep = member_value(members, "keep_alive") if "keep_alive" in members else False
    check(isinstance(keep, bool), "keep_alive: expected true or false")
    return bool(keep)


def _credentials(members: JSONObject) -> tuple[str, str]:
    auth = members.nested_object("auth") if "auth" in members else None
    check(auth is not None, "auth: expected an object with user and password")
    assert auth is not None
    reject_unknown_keys(auth, ("user", "password"))
    return required_string(auth, "user"), required_string(auth, "password")


def _required_value(members: JSONObject, key: str) -> Any:
    check(key in members, f"{key}: missing")
    return member_value(members, key)


def _check_version(members: JSONObject) -> None:
    version = member_value(members, "harp") if "harp" in members else None
    if type(version) is not int or version != VERSION:
        raise ProtocolError(f"harp: expected {VERSION}, got {version!r}", "invalid_protocol")


# What harpd says.


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """The procedure exists and the call is under way.

    Attributes:
        stream_result: whether records will come.
        call: the terms of a kept call; None: the call is tied, whatever was asked for.
        keep: seconds for which the connection waits for another request after the call; None: it is closed.
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
    """The records that follow were made at `time` (Unix seconds)."""

    time: float

    def __post_init__(self) -> None:
        check_time("at", self.time)


@dataclass(frozen=True, slots=True)
class StopReport:
    """What was done to stop the call, an object; the later one counts."""

    report: Payload

    def __post_init__(self) -> None:
        _check_report("stop_report", self.report)
        found = _held(self.report).get("survivors", [])
        known = isinstance(found, list) and all(isinstance(one, dict) and is_count(one.get("pid")) for one in found)
        check(known, "stop_report.survivors: expected an array of objects with a pid")

    @property
    def survivors(self) -> list[int]:
        """The pids of the processes that survive."""
        return [int(one["pid"]) for one in _held(self.report).get("survivors", [])]


@dataclass(frozen=True, slots=True)
class ExitInfo:
    """How the call's process ended, an object."""

    info: Payload

    def __post_init__(self) -> None:
        _check_report("exit_info", self.info)


def _check_report(key: str, report: Payload) -> None:
    check(is_container(report, (dict,)), f"{key}: expected an object")
    longest = isinstance(report, Raw) and len(report) > _MAX_REPORT_BYTES
    check(not longest, f"{key}: expected at most {_MAX_REPORT_BYTES} bytes")


def _held(report: Payload) -> Mapping[str, Any]:
    """A receipt's value. Raises `ProtocolError`."""
    try:
        found: Mapping[str, Any] = loads(report) if isinstance(report, Raw) else report
    except InvalidJSON as error:
        raise ProtocolError(f"receipt: {error}") from error
    return found


@dataclass(frozen=True, slots=True)
class CallList:
    """The owner's kept calls, and the incarnation of the warden that starts new ones; `keep` as above."""

    calls: tuple[str, ...]
    instance: str
    keep_alive: float | None = None

    def __post_init__(self) -> None:
        _check_keep_alive(self.keep_alive)
        for number, call in enumerate(self.calls):
            check_id(f"calls[{number}]", call)
        check_name("instance", self.instance)


def _check_keep_alive(keep: object) -> None:
    check(keep is None or is_seconds(keep), f"keep_alive: expected a positive number of seconds, got {keep!r}")


Message: TypeAlias = (
    Acknowledgement | Record | RecordTime | Heartbeat | StopReport | ExitInfo | CallList | Returned | Raised | Failed
)


def encode_message(message: Message) -> bytes:
    """The line of what harpd says, line feed included. Raises `NotJSON` when a payload has no form in JSON."""
    match message:
        case Acknowledgement(stream_result, call, keep):
            members = Envelope(harp=VERSION, stream_result=stream_result)
            if call is not None:
                members["call"] = encode_terms(call)
            if keep is not None:
                members["keep_alive"] = keep
        case Record(data):
            return closing.record(dumps(data))
        case RecordTime(time):
            members = Envelope(at=time)
        case Heartbeat(at):
            members = Envelope(heartbeat=at)
        case StopReport(receipt):
            members = Envelope(stop_report=receipt)
        case ExitInfo(evidence):
            members = Envelope(exit_info=evidence)
        case CallList(calls, warden, keep):
            members = Envelope(harp=VERSION, calls=calls, instance=warden)
            if keep is not None:
                members["keep_alive"] = keep
        case Failed():
            members = Envelope(harp=VERSION, **encode_end(message))
        case _:
            members = encode_end(message)
    return bytes(dumps(members)) + b"\n"


def decode_message(line: bytes, decoder: Decoder = decode_values) -> Message:
    """Read a line of what harpd says. Raises `ProtocolError`."""
    members = decode_object(line, decoder)
    kinds = [kind for kind in _MESSAGES if kind in members]
    check(len(kinds) == 1, "not a message of harpd" if not kinds else f"both {' and '.join(kinds)}")
    return _MESSAGES[kinds[0]](members)


def _decode_acknowledgement(members: JSONObject) -> Acknowledgement:
    _check_version(members)
    return Acknowledgement(
        member_value(members, "stream_result"),
        decode_terms(members, GrantedTerms),
        _optional_value(members, "keep_alive"),
    )


def _decode_call_list(members: JSONObject) -> CallList:
    _check_version(members)
    calls = member_value(members, "calls")
    check(isinstance(calls, list), "calls: expected an array")
    return CallList(tuple(calls), required_string(members, "instance"), _optional_value(members, "keep_alive"))


def _optional_value(members: JSONObject, key: str) -> Any:
    return member_value(members, key) if key in members else None


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


# What may follow what.


class Phase(Enum):
    """Where an exchange stands. The first three: by what was asked."""

    SENT = "waiting for the acknowledgement"
    SENT_RESUMABLE = "waiting for the acknowledgement of a kept call"
    SENT_ATTACH = "waiting for the acknowledgement of an attach"
    SENT_LIST = "waiting for the list of calls"
    RUNNING = "waiting for the result"
    STREAMING = "waiting for records or the result"
    RESUMABLE_RUNNING = "waiting for the result of a kept call"
    RESUMABLE_STREAMING = "waiting for records or the result of a kept call"
    RESUMABLE_ENDING = "waiting for the result, its evidence given"
    RESUMABLE_ENDED = "waiting for the close of a kept call"
    CLOSED = "closed"


def _closing(phase: Phase) -> dict[type, Phase]:
    return dict.fromkeys((Returned, Raised, Failed), phase)


def _resumable(phase: Phase) -> dict[type, Phase]:
    """What may come in every phase of a kept call, and leaves the phase as it is."""
    return dict.fromkeys((Heartbeat, StopReport), phase)


_REPLIED = MappingProxyType({Acknowledgement: Phase.RUNNING, Failed: Phase.CLOSED})

#: What may come in which phase, and the phase after it. What is not listed here is a protocol error.
#: The acknowledgement itself says more: see `_ACKNOWLEDGED`.
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

#: Which acknowledgements may come in which phase: whether of a kept call.
_MAY_BE_RESUMABLE: Mapping[Phase, frozenset[bool]] = MappingProxyType(
    {
        Phase.SENT: frozenset({False}),
        Phase.SENT_RESUMABLE: frozenset({False, True}),  # a harpd of the field knows tied calls only
        Phase.SENT_ATTACH: frozenset({True}),
    }
)

#: The phase after an acknowledgement, by whether the call is kept and whether it streams.
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
    """What harpd may say after one request: reads line after line, and knows when nothing more may come.

    Args:
        decoder: decides whether payloads come as values or as `Raw` text.
        request: what was sent; None: a request for a tied call.
    """

    def __init__(self, decoder: Decoder = decode_values, request: AnyRequest | None = None) -> None:
        self._decoder = decoder
        #: Where the exchange stands.
        self.phase = _first_phase(request)
        #: Seconds for which the connection then waits for another request; None: harpd closes it.
        self.keep_alive: float | None = None

    @property
    def end_received(self) -> bool:
        """Whether the closing line, a refusal or the list has come. A receipt may still follow a kept call's end."""
        return self.phase in (Phase.CLOSED, Phase.RESUMABLE_ENDED)

    @property
    def finished(self) -> bool:
        """Whether the last message has come. Never so for a kept call: it is over when harpd closes."""
        return self.phase is Phase.CLOSED

    @property
    def is_streaming(self) -> bool:
        """Whether the next messages may be records, after which it stands where it does."""
        return self.phase in (Phase.STREAMING, Phase.RESUMABLE_STREAMING)

    def read_records(self, lines: Iterable[bytes]) -> list[Payload]:
        """The records that the first lines are, while they are written as harpd's calls write them.

        That is quicker than `message`, which is for the line after them.
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
        """Read the next message. Raises `ProtocolError` for anything that may not come now."""
        message = decode_message(line, self._decoder)
        following = TRANSITIONS[self.phase].get(type(message))
        if following is None:
            raise ProtocolError(f"{type(message).__name__} came while {self.phase.value}")
        if isinstance(message, Acknowledgement):
            kept = message.call is not None
            if kept not in _MAY_BE_RESUMABLE[self.phase]:
                came = "kept" if kept else "tied"
                raise ProtocolError(f"acknowledgement of a {came} call came while {self.phase.value}")
            following = _ACKNOWLEDGED[kept, message.stream_result]
        if isinstance(message, (Acknowledgement, CallList)):
            self.keep_alive = message.keep_alive
        elif isinstance(message, Failed) and following is Phase.CLOSED:
            self.keep_alive = None  # whoever says so closes
        self.phase = following
        return message
