"""The messages between harpd and those who call it: values, their lines, and which may follow which.

Sans-IO, as `harp.protocol.dispatcher`.

Spec: docs/protocol.md, harpd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

from harp.protocol.ends import Cancelled, Failed, Raised, Returned, decode_end, encode_end
from harp.protocol.fields import ProtocolError, check, is_container, opened, string, value, within
from harp.protocol.jsontext import Envelope, Members, Opener, Payload, dumps, open_decoded

__all__ = [
    "Acknowledgement",
    "Exchange",
    "Message",
    "Record",
    "Request",
    "decode_message",
    "decode_request",
    "encode_message",
    "encode_request",
]

VERSION = 1


@dataclass(frozen=True, slots=True)
class Request:
    """Call a procedure. `arguments` is an array (positional) or an object (named)."""

    procedure: str
    arguments: Payload
    user: str
    password: str = field(repr=False)

    def __post_init__(self) -> None:
        check(
            isinstance(self.procedure, str) and self.procedure != "",
            f"procedure: expected a name, got {self.procedure!r}",
        )
        check(is_container(self.arguments, (list, dict)), "arguments: expected an array or an object")


def encode_request(request: Request) -> bytes:
    """The request's line, line feed included. Raises `NotJSON` when the arguments have no form in JSON."""
    auth = Envelope(user=request.user, password=request.password)
    members = Envelope(harp=VERSION, procedure=request.procedure, arguments=request.arguments, auth=auth)
    return bytes(dumps(members)) + b"\n"


def decode_request(line: bytes, opener: Opener = open_decoded) -> Request:
    """Read a request's line, given without its line feed.

    Raises:
        ProtocolError: of type ``parse_error``, ``invalid_protocol`` or ``invalid_request``.
    """
    members = opened(line, opener)
    _check_version(members)
    within(members, ("harp", "procedure", "arguments", "auth"))
    check("arguments" in members, "arguments: missing")
    auth = members.members("auth") if "auth" in members else None
    check(auth is not None, "auth: expected an object with user and password")
    assert auth is not None
    within(auth, ("user", "password"))
    return Request(
        string(members, "procedure"),
        members.payload("arguments"),
        string(auth, "user"),
        string(auth, "password"),
    )


def _check_version(members: Members) -> None:
    version = value(members, "harp") if "harp" in members else None
    if type(version) is not int or version != VERSION:
        raise ProtocolError(f"harp: expected {VERSION}, got {version!r}", "invalid_protocol")


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """The procedure exists and the call is under way; `stream_result`: whether records will come."""

    stream_result: bool

    def __post_init__(self) -> None:
        check(isinstance(self.stream_result, bool), "stream_result: expected true or false")


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a streamed result."""

    data: Payload


Message: TypeAlias = Acknowledgement | Record | Returned | Raised | Failed


def encode_message(message: Message) -> bytes:
    """The line of what harpd says, line feed included. Raises `NotJSON` when a payload has no form in JSON."""
    match message:
        case Acknowledgement(stream_result):
            members = Envelope(harp=VERSION, stream_result=stream_result)
        case Record(data):
            members = Envelope(stream=data)
        case Failed():
            members = Envelope(harp=VERSION, **encode_end(message))
        case _:
            members = encode_end(message)
    return bytes(dumps(members)) + b"\n"


def decode_message(line: bytes, opener: Opener = open_decoded) -> Message:
    """Read a line of what harpd says. Raises `ProtocolError`."""
    members = opened(line, opener)
    kinds = [kind for kind in _MESSAGES if kind in members]
    check(len(kinds) == 1, "not a message of harpd" if not kinds else f"both {' and '.join(kinds)}")
    return _MESSAGES[kinds[0]](members)


def _decode_acknowledgement(members: Members) -> Acknowledgement:
    _check_version(members)
    return Acknowledgement(value(members, "stream_result"))


def _decode_failed(members: Members) -> Failed:
    _check_version(members)
    end = decode_end("error", members)
    assert isinstance(end, Failed)
    return end


def _decode_end(kind: str) -> Callable[[Members], Message]:
    def decode(members: Members) -> Message:
        end = decode_end(kind, members)
        assert not isinstance(end, Cancelled)
        return end

    return decode


_MESSAGES: Mapping[str, Callable[[Members], Message]] = MappingProxyType(
    {
        "stream_result": _decode_acknowledgement,
        "stream": lambda m: Record(m.payload("stream")),
        "result": _decode_end("result"),
        "exception": _decode_end("exception"),
        "error": _decode_failed,
    }
)


class Phase(Enum):
    """Where an exchange stands."""

    SENT = "waiting for the acknowledgement"
    RUNNING = "waiting for the result"
    STREAMING = "waiting for records or the result"
    CLOSED = "closed"


_CLOSING = dict.fromkeys((Returned, Raised, Failed), Phase.CLOSED)

#: What may come in which phase, and the phase after it. What is not listed here is a protocol error.
NEXT: Mapping[Phase, Mapping[type, Phase]] = MappingProxyType(
    {
        Phase.SENT: {Acknowledgement: Phase.RUNNING, Failed: Phase.CLOSED},
        Phase.RUNNING: _CLOSING,
        Phase.STREAMING: {Record: Phase.STREAMING, **_CLOSING},
        Phase.CLOSED: {},
    }
)


class Exchange:
    """What harpd may say after one request: reads line after line, and knows when nothing more may come.

    Args:
        opener: decides whether payloads come as values or as `Raw` text.
    """

    def __init__(self, opener: Opener = open_decoded) -> None:
        self._opener = opener
        #: Where the exchange stands.
        self.phase = Phase.SENT

    @property
    def finished(self) -> bool:
        """Whether the last message has come."""
        return self.phase is Phase.CLOSED

    def message(self, line: bytes) -> Message:
        """Read the next message. Raises `ProtocolError` for anything that may not come now."""
        message = decode_message(line, self._opener)
        following = NEXT[self.phase].get(type(message))
        if following is None:
            raise ProtocolError(f"{type(message).__name__} came while {self.phase.value}")
        streams = isinstance(message, Acknowledgement) and message.stream_result
        self.phase = Phase.STREAMING if streams else following
        return message
