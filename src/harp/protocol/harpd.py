"""The messages between harpd and its callers, as values and as lines, and the messages that each phase allows.

Sans-IO, as `harp.protocol.dispatcher`. A *connection-bound* call ends with its connection. A *resumable* call has an id
from its caller: it continues without a connection, and its caller may attach to it again. Messages about resumable
calls are sent only to callers that requested one.

Spec: docs/protocol.md, harpd.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from enum import Enum
from functools import lru_cache
from typing import Annotated, Any, ClassVar, TypeAlias

from harp.protocol.call_output import RECORD_PREFIX, VERSION
from harp.protocol.ends import CALL_ENDS, Failed, Raised, Returned
from harp.protocol.json_text import InvalidJSON, JSONObject, Raw, decode_enclosed, decode_values, dumps, loads
from harp.protocol.schema import (
    MAX_NAME,
    Arguments,
    Count,
    Decoder,
    Kind,
    Name,
    Null,
    Payload,
    ProtocolError,
    Seconds,
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
)

#: Maximum length of a command's line in bytes, without its line feed.
MAX_COMMAND_BYTES = 4096
#: Maximum duration in seconds (thirty years), and maximum time in Unix seconds.
_MAX_SECONDS, _MAX_TIME = 1e9, 1e12
#: Maximum length of a message in bytes, unless it is a record, an end, a list of calls or exit info.
MAX_MESSAGE_BYTES = 64 * 1024
#: Maximum length of exit info in bytes.
_MAX_EXIT_INFO_BYTES = 1024 * 1024
#: Maximum length of a password in characters: checking it takes time.
_MAX_PASSWORD = 4096
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ID_IN_ARRAY = re.compile(rb'"(%b)"' % _UUID.pattern.encode())


def _text(max_length: int) -> Kind:
    # The error does not quote the text: it may be a secret.
    return Kind(
        lambda text: isinstance(text, str) and 0 < len(text) <= max_length,
        f"a string of 1 to {max_length} characters",
    )


def _limited(max_length: int) -> Kind:
    return Kind(lambda text: len(text) <= max_length, f"a string of at most {max_length} characters", is_text=True)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _UUID.fullmatch(value) is not None


def _object_of(max_length: int) -> Kind:
    return Kind(
        lambda report: is_object(report) and not (isinstance(report, Raw) and len(report) > max_length),
        f"an object of at most {max_length} bytes",
        decode=decode_payload,
    )


_ID, _TEXT, _NAMED = Kind(_is_id, "a UUID in lower case"), _text(200), _text(255)
#: A feature that harpd announces in the list of calls: a start may have the member `caller`.
CALLER = "caller"
#: Another one: a start may have the member `secrets`.
SECRETS = "secrets"
#: Maximum number of secret values of a call.
MAX_SECRETS = 20

#: Members of terms. `_Text` is a name elsewhere: there, a value that is not a string has another error.
_TermsText: TypeAlias = Annotated[str, _TEXT]
_Duration: TypeAlias = Annotated[
    float,
    Kind(
        lambda value: type(value) in (int, float) and 0 < value <= _MAX_SECONDS,
        f"a positive number of seconds, at most {_MAX_SECONDS:.0f}",
    ),
]
_Time: TypeAlias = Annotated[
    float,
    Kind(lambda value: type(value) in (int, float) and 0 <= value <= _MAX_TIME, "a number of seconds of at least 0"),
]
_Text: TypeAlias = Annotated[str, _TEXT._replace(is_text=True)]
_User: TypeAlias = Annotated[str, "auth.user", _limited(MAX_NAME)]
_Password: TypeAlias = Annotated[str, "auth.password", _limited(_MAX_PASSWORD)]
_KeepAlive: TypeAlias = Annotated[bool, Null.REJECTED]


# Requests.


class RequestedTerms(WireObject):
    """The terms of a resumable call that its caller requests."""

    PATH = "call."
    id: Annotated[str, _ID]  # was never used before
    owner: _TermsText = field(repr=False)  # the caller's own id, which lists the call
    secret: _TermsText = field(repr=False)  # attaches to the call
    instance: _TermsText  # the instance id of the supervisor that must run the call; others reject it
    disconnect_timeout: _Duration  # maximum seconds that the call runs without contact
    result_ttl: _Duration  # seconds for which harpd stores the end of the call without contact
    timeout: _Duration  # maximum seconds between two records, or between the last record and the end
    max_exec_time: _Duration  # maximum seconds from start to end


class GrantedTerms(WireObject):
    """The terms of a resumable call that harpd grants."""

    PATH = "call."
    instance: _TermsText  # the instance id of the supervisor that runs the call
    disconnect_timeout: _Duration  # at most the requested value
    result_ttl: _Duration  # at most the requested value
    kill_grace: _Duration  # seconds between two signals of a stop
    elapsed: _Time  # seconds since the call's start
    records: Count  # present number of records


class Caller(WireObject):
    """For whom a dispatcher sends a call. It is sent only to a harpd that has announced `CALLER` among its features."""

    PATH = "caller."
    principal: Annotated[str | None, _NAMED, Null.REJECTED] = None  # the dispatcher's client, as it was proven
    job: Annotated[str | None, _ID, Null.REJECTED] = None  # the id of the job
    address: Annotated[str | None, _NAMED, Null.REJECTED] = None  # that of the client


def _are_pointers(values: Any) -> bool:
    return _are_texts(values) and len(values) <= MAX_SECRETS


_SECRETS = Kind(_are_pointers, f"an array of at most {MAX_SECRETS} JSON pointers")


class Request(WireObject):
    """Call a procedure. Without `call`, the call is bound to the connection."""

    procedure: Name
    arguments: Arguments
    user: _User
    password: _Password = field(repr=False)
    call: Annotated[RequestedTerms | None, Null.REJECTED] = None
    keep_alive: _KeepAlive = False  # whether the connection is to wait for another request
    caller: Annotated[Caller | None, Null.REJECTED] = None
    secrets: Annotated[Sequence[str] | None, _SECRETS] = None  # JSON pointers to values that are not logged


class Attach(WireObject):
    """Attach to a resumable call: get its records from number `since` on, then its end."""

    call: Annotated[str, "attach", _ID._replace(is_text=True)]
    owner: _Text = field(repr=False)
    secret: _Text = field(repr=False)
    since: Count
    user: _User
    password: _Password = field(repr=False)
    keep_alive: _KeepAlive = False


class ListCalls(WireObject):
    """List the resumable calls of an owner. To a legacy harpd, it is a call of a procedure that does not exist."""

    CONSTANTS: ClassVar = {"procedure": "-", "arguments": ()}
    owner: Annotated[_Text, "calls"] = field(repr=False)
    user: _User
    password: _Password = field(repr=False)
    keep_alive: _KeepAlive = False


AnyRequest: TypeAlias = Request | Attach | ListCalls


def encode_request(request: AnyRequest) -> bytes:
    """Return the request's line with its line feed. Raises `NotJSON` if the arguments have no form in JSON."""
    return b'{"harp":1,%b}\n' % encode_members(request)


class StartEncoder:
    """An encoder of starts that differ in their jobs only: the members of `shared` are checked and encoded once."""

    def __init__(self, shared: Request) -> None:
        terms = "owner", "instance", "disconnect_timeout", "result_ttl"
        self._terms = dumps({name: getattr(shared.call, name) for name in terms})[1:-1]
        auth = dumps({"user": shared.user, "password": shared.password})
        self._request = b'"auth":%b%b' % (auth, b',"keep_alive":true' if shared.keep_alive else b"")

    def encode(
        self,
        procedure: str,
        arguments: Raw,
        call_id: str,
        secret: str,
        timeout: float,
        max_exec_time: float,
        caller: Caller | None = None,
        secrets: Sequence[str] = (),
    ) -> bytes:
        """Return the line of a start with its line feed."""
        job = call_id.encode(), secret.encode(), dumps(timeout), dumps(max_exec_time)
        call = b'%b,"id":"%b","secret":"%b","timeout":%b,"max_exec_time":%b' % (self._terms, *job)
        of_job = b"" if caller is None else b',"caller":%b' % encode_object(caller)
        if secrets:
            of_job += b',"secrets":%b' % dumps(secrets)
        members = self._request, call, of_job, dumps(procedure), arguments
        return b'{"harp":1,%b,"call":{%b}%b,"procedure":%b,"arguments":%b}\n' % members


def decode_request(line: bytes, decoder: Decoder = decode_values) -> AnyRequest:
    """Return the request of a line. Raises `ProtocolError`; its type is that of the rejection."""
    members = decode_object(line, decoder)
    _check_version(members)
    kind: type[AnyRequest] = Attach if "attach" in members else ListCalls if "calls" in members else Request
    return decode_as(kind, members, other_keys=("harp",))


def _check_version(members: JSONObject) -> None:
    version = member_value(members, "harp")
    if type(version) is not int or version != VERSION:
        raise ProtocolError(f"harp: expected {VERSION}, got {quote(version)}", "invalid_protocol")


# The caller's commands to a resumable call.


class Heartbeat(WireObject):
    """A heartbeat, which the caller of a resumable call sends every few seconds, or harpd's reply to it.

    `time` is in seconds since the call's start: harpd sends its current time; the caller echoes the latest time that it
    has received, so that a delayed heartbeat does not count as contact.
    """

    time: Annotated[_Time, "heartbeat"]


class Ack(WireObject):
    """The records with numbers below `count` are on stable storage: harpd may discard them."""

    count: Annotated[Count, "ack"]


class StopCall(WireObject):
    """Stop the call; `why` is a word for the reason, `by` the user or address that requested it, or None."""

    why: Annotated[str, "stop.why", _text(100)._replace(is_text=True)]
    by: Annotated[_Text | None, "stop.by", Null.REJECTED] = None


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
    """Return the command of a line. Raises `ProtocolError` of type ``parse_error`` or ``invalid_request``."""
    if line == _RELEASE:  # each call's last one
        return Release()
    members = decode_object(line, decode_values)
    expected = f"expected exactly one of {', '.join(_COMMANDS)}"
    command: Command = decode_as(_COMMANDS[only_kind(_COMMANDS, members, expected, expected)], members)
    return command


# Messages of harpd.


class Acknowledgement(WireObject):
    """The acknowledgement: the procedure exists and the call has started. Without `call`, it is connection-bound."""

    stream_result: bool  # whether records follow
    call: Annotated[GrantedTerms | None, Null.REJECTED] = None
    keep_alive: Seconds | None = None  # for which the connection waits for another request; None: it is closed


class Record(WireObject):
    """A record of a streamed result."""

    data: Annotated[Payload, "stream"]


class RecordTime(WireObject):
    """The timestamp of the records that follow (Unix seconds)."""

    time: Annotated[_Time, "at"]


class StopReport(WireObject):
    """The stop report of the call, an object; a later one replaces it."""

    report: Annotated[Payload, "stop_report", _object_of(MAX_MESSAGE_BYTES)]

    def __post_init__(self) -> None:
        super().__post_init__()
        survivors = self._survivors()
        valid = isinstance(survivors, list) and all(
            isinstance(one, dict) and is_count(one.get("pid")) for one in survivors
        )
        check(valid, "stop_report.survivors: expected an array of objects with a pid")

    @property
    def survivors(self) -> list[int]:
        """The pids of the surviving processes."""
        return [int(one["pid"]) for one in self._survivors()]

    def _survivors(self) -> Any:
        try:
            report = loads(self.report) if isinstance(self.report, Raw) else self.report
        except InvalidJSON as error:
            raise ProtocolError(f"stop_report: {error}") from error
        return report.get("survivors", [])


class ExitInfo(WireObject):
    """The exit info of the call's process, an object."""

    info: Annotated[Payload, "exit_info", _object_of(_MAX_EXIT_INFO_BYTES)]


def _are_ids(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(map(_is_id, values))


def _are_texts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


def _decode_ids(members: JSONObject, key: str) -> Any:
    payload = members.payload(key)
    if not isinstance(payload, Raw):
        return payload
    # The array was decoded before: in it, only white space and commas can be between two strings.
    found = _ID_IN_ARRAY.findall(payload)
    others = _ID_IN_ARRAY.sub(b"", payload).translate(None, b" \t\r\n,")
    return [one.decode() for one in found] if others == b"[]" else None


class CallList(WireObject):
    """The owner's resumable calls, and the instance id of the supervisor that starts new calls.

    `version` is that of the harpd, if it sends it.
    """

    calls: Annotated[Sequence[str], Kind(_are_ids, "an array of UUIDs in lower case", decode=_decode_ids)]
    instance: _Text
    keep_alive: Seconds | None = None
    features: Annotated[Sequence[str] | None, Kind(_are_texts, "an array of strings")] = None  # that harpd supports
    version: Annotated[_Text | None, Null.REJECTED] = None


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

#: How HARP's harpd begins an acknowledgement and a result; and the most bytes of an acknowledgement that is remembered.
_ACKNOWLEDGEMENT, _RESULT, _MAX_REMEMBERED = b'{"harp":1,"stream_result":', b'{"result":', 512
#: The messages that may be long.
_LONG = frozenset({Record, Returned, Raised, Failed, CallList, ExitInfo})
#: The messages that have the version.
_VERSIONED = (Acknowledgement, CallList, Failed)


def encode_message(message: Message) -> bytes:
    """Return the message's line with its line feed. Raises `NotJSON` if a payload has no form in JSON."""
    return (b'{"harp":1,%b}\n' if isinstance(message, _VERSIONED) else b"{%b}\n") % encode_members(message)


def encode_exit_info(info: Raw) -> bytes:
    """Return the line of an `ExitInfo` from checked text."""
    return b'{"exit_info":%b}\n' % info


def decode_message(line: bytes, decoder: Decoder = decode_values) -> Message:
    """Return the message of a line. Raises `ProtocolError`."""
    if line.startswith(_ACKNOWLEDGEMENT) and len(line) <= _MAX_REMEMBERED:
        return _decode_acknowledgement(line, decoder)
    if decoder is decode_values and (found := decode_enclosed(line, _RESULT)) is not None:
        return Returned(*found)
    return _decode_message(line, decoder)


@lru_cache(maxsize=64)  # the acknowledgements of a host are equal for nearly all of its calls
def _decode_acknowledgement(line: bytes, decoder: Decoder) -> Message:
    return _decode_message(line, decoder)


def _decode_message(line: bytes, decoder: Decoder) -> Message:
    members = decode_object(line, decoder)
    kind = _MESSAGES[only_kind(_MESSAGES, members, "not a message of harpd")]
    if len(line) > MAX_MESSAGE_BYTES and kind not in _LONG:
        raise ProtocolError(f"a message of this kind has at most {MAX_MESSAGE_BYTES} bytes, got {len(line)}")
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


def _ends(following: Phase) -> dict[type, Phase]:
    return dict.fromkeys((Returned, Raised, Failed), following)


def _any_time(phase: Phase, *records: type) -> dict[type, Phase]:
    """Return the messages of a resumable call that do not change its phase."""
    return dict.fromkeys((Heartbeat, StopReport, *records), phase)


_REPLIED: Mapping[type, Phase] = {Acknowledgement: Phase.RUNNING, Failed: Phase.CLOSED}
_RESUMABLE_END: Mapping[type, Phase] = {ExitInfo: Phase.RESUMABLE_ENDING, **_ends(Phase.RESUMABLE_ENDED)}

#: The messages that each phase allows, and the phase after each. All others are protocol errors.
#: The phase after an acknowledgement depends on its content: see `_ACKNOWLEDGED`.
TRANSITIONS: Mapping[Phase, Mapping[type, Phase]] = {
    Phase.SENT: _REPLIED,
    Phase.SENT_RESUMABLE: _REPLIED,
    Phase.SENT_ATTACH: _REPLIED,
    Phase.SENT_LIST: {CallList: Phase.CLOSED, Failed: Phase.CLOSED},
    Phase.RUNNING: _ends(Phase.CLOSED),
    Phase.STREAMING: {Record: Phase.STREAMING, **_ends(Phase.CLOSED)},
    Phase.RESUMABLE_RUNNING: {**_any_time(Phase.RESUMABLE_RUNNING), **_RESUMABLE_END},
    Phase.RESUMABLE_STREAMING: {**_any_time(Phase.RESUMABLE_STREAMING, RecordTime, Record), **_RESUMABLE_END},
    Phase.RESUMABLE_ENDING: {**_any_time(Phase.RESUMABLE_ENDING), **_ends(Phase.RESUMABLE_ENDED)},
    Phase.RESUMABLE_ENDED: _any_time(Phase.RESUMABLE_ENDED),
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


#: The phases in which the next messages may be records.
STREAMING = (Phase.STREAMING, Phase.RESUMABLE_STREAMING)
#: The phases in which no message may be long: a host that has not acknowledged the call.
_SHORT_PHASES = frozenset({Phase.SENT, Phase.SENT_RESUMABLE, Phase.SENT_ATTACH})


class ReplyReader:
    """The reader of harpd's messages after one request, which determines the first phase."""

    def __init__(self, decoder: Decoder = decode_values, phase: Phase = Phase.SENT) -> None:
        self._decoder = decoder
        #: The phase of the exchange.
        self.phase = phase
        #: Seconds that the connection waits for another request after the last message; None: harpd closes it.
        self.keep_alive: float | None = None

    @property
    def expects_short(self) -> bool:
        """Whether the next message has at most `MAX_MESSAGE_BYTES`."""
        return self.phase in _SHORT_PHASES

    @property
    def is_streaming(self) -> bool:
        """Whether the next messages may be records."""
        return self.phase in STREAMING

    def read_records(self, lines: Iterable[bytes]) -> list[Payload]:
        """Return the data of the first lines that are records of HARP's harpd; this is faster than `read_message`."""
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
