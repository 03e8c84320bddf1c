"""The messages of resumable calls only: the requested and granted terms, and the caller's commands to a running call.

Sans-IO. `harp.protocol.harpd` exports them again, beside the messages of all calls.

Spec: docs/protocol.md, harpd.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from harp.protocol.fields import (
    check,
    decode_object,
    is_count,
    is_seconds,
    member_value,
    reject_unknown_keys,
    required_object,
    required_string,
)
from harp.protocol.json_text import Envelope, JSONObject, decode_values, dumps

#: Maximum length of a command's line in bytes, without its line feed.
MAX_COMMAND_BYTES = 4096
#: Maximum length in characters of a name from a caller, and of the reason of a stop.
_MAX_NAME_LENGTH, _MAX_REASON_LENGTH = 200, 100
#: Maximum duration in seconds (thirty years), and maximum time in Unix seconds.
_MAX_SECONDS, _MAX_TIME = 1e9, 1e12
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def check_id(key: str, id_: object) -> None:
    """Raise `ProtocolError` with the key unless it is the id of a resumable call."""
    check(isinstance(id_, str) and _UUID.fullmatch(id_) is not None, f"{key}: expected a UUID in lower case")


def check_name(key: str, name: object, max_length: int = _MAX_NAME_LENGTH) -> None:
    """Raise `ProtocolError` with the key unless it is a string, not empty and not too long."""
    # The message does not quote the name: it may be a secret.
    check(
        isinstance(name, str) and 0 < len(name) <= max_length,
        f"{key}: expected a string of 1 to {max_length} characters",
    )


def _check_seconds(key: str, seconds: object) -> None:
    known = is_seconds(seconds) and seconds <= _MAX_SECONDS  # type: ignore[operator]
    check(known, f"{key}: expected a positive number of seconds, at most {_MAX_SECONDS:.0f}")


def check_time(key: str, seconds: object) -> None:
    """Raise `ProtocolError` with the key unless it is a number of seconds of at least 0."""
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    check(number and 0 <= seconds <= _MAX_TIME, f"{key}: expected a number of seconds of at least 0")  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class RequestedTerms:
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

    id: str
    owner: str = field(repr=False)
    secret: str = field(repr=False)
    instance: str
    disconnect_timeout: float
    result_ttl: float
    timeout: float
    max_exec_time: float

    def __post_init__(self) -> None:
        check_id("call.id", self.id)
        for key in ("owner", "secret", "instance"):
            check_name(f"call.{key}", getattr(self, key))
        for key in ("disconnect_timeout", "result_ttl", "timeout", "max_exec_time"):
            _check_seconds(f"call.{key}", getattr(self, key))


@dataclass(frozen=True, slots=True)
class GrantedTerms:
    """The terms of a resumable call that harpd grants.

    Attributes:
        instance: the instance id of the supervisor that runs the call.
        disconnect_timeout: maximum seconds that the call runs without contact; at most the requested value.
        result_ttl: seconds that harpd holds the end of the call without contact; at most the requested value.
        kill_grace: seconds between two signals of a stop.
        elapsed: seconds since the call's start.
        records: number of records so far.
    """

    instance: str
    disconnect_timeout: float
    result_ttl: float
    kill_grace: float
    elapsed: float
    records: int

    def __post_init__(self) -> None:
        check_name("call.instance", self.instance)
        for key in ("disconnect_timeout", "result_ttl", "kill_grace"):
            _check_seconds(f"call.{key}", getattr(self, key))
        check_time("call.elapsed", self.elapsed)
        check(is_count(self.records), f"call.records: expected an integer of at least 0, got {self.records!r}")


T = TypeVar("T", RequestedTerms, GrantedTerms)


def encode_terms(terms: RequestedTerms | GrantedTerms) -> dict[str, Any]:
    """Return the object for the key ``call``."""
    return {key: getattr(terms, key) for key in terms.__dataclass_fields__}


def decode_terms(members: JSONObject, kind: type[T]) -> T | None:
    """Return the terms under the key ``call``; None if the key is missing.

    Raises:
        ProtocolError: the terms are not valid.
    """
    if "call" not in members:
        return None
    found = required_object(members, "call")
    keys = tuple(kind.__dataclass_fields__)
    reject_unknown_keys(found, keys)
    for key in keys:
        check(key in found, f"call.{key}: missing")
    return kind(**{key: member_value(found, key) for key in keys})


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A heartbeat, which the caller of a resumable call sends every few seconds, or harpd's reply to it.

    `time` is harpd's time in seconds since the call's start: harpd sends its current time; the caller echoes the latest
    time that it has received, in the acknowledgement or in a heartbeat. So harpd knows a time up to which the caller
    has received from it, even if the heartbeat itself was delayed.
    """

    time: float

    def __post_init__(self) -> None:
        check_time("heartbeat", self.time)


def decode_heartbeat(members: JSONObject) -> Heartbeat:
    """Return the heartbeat of a line ``{"heartbeat":SECONDS}``, which both sides send. Raises `ProtocolError`."""
    return Heartbeat(member_value(members, "heartbeat"))


@dataclass(frozen=True, slots=True)
class Ack:
    """The records with numbers below `count` are on stable storage: harpd may discard them."""

    count: int

    def __post_init__(self) -> None:
        check(is_count(self.count), f"ack: expected an integer of at least 0, got {self.count!r}")


@dataclass(frozen=True, slots=True)
class StopCall:
    """Stop the call; `why` is a word for the reason, `by` the user or address that requested it, if known."""

    why: str
    by: str | None = None

    def __post_init__(self) -> None:
        check_name("stop.why", self.why, _MAX_REASON_LENGTH)
        if self.by is not None:
            check_name("stop.by", self.by)


@dataclass(frozen=True, slots=True)
class Release:
    """The call's end is on stable storage: harpd may discard the call."""


Command: TypeAlias = Ack | Heartbeat | StopCall | Release


def encode_command(command: Command) -> bytes:
    """Return the command's line with its line feed; without it, at most `MAX_COMMAND_BYTES` bytes long."""
    match command:
        case Ack(count):
            members = Envelope(ack=count)
        case Heartbeat(at):
            members = Envelope(heartbeat=at)
        case StopCall(why, by):
            members = Envelope(stop={"why": why} if by is None else {"why": why, "by": by})
        case Release():
            members = Envelope(release=True)
    return bytes(dumps(members)) + b"\n"


def decode_command(line: bytes) -> Command:
    """Return the command of a line without its line feed.

    Raises:
        ProtocolError: of type ``parse_error`` or ``invalid_request``.
    """
    members = decode_object(line, decode_values)
    kinds = [kind for kind in _COMMANDS if kind in members]
    check(len(kinds) == 1, f"expected exactly one of {', '.join(_COMMANDS)}")
    reject_unknown_keys(members, kinds)
    return _COMMANDS[kinds[0]](members)


def _decode_stop(members: JSONObject) -> StopCall:
    stop = required_object(members, "stop")
    reject_unknown_keys(stop, ("why", "by"))
    return StopCall(required_string(stop, "why"), required_string(stop, "by") if "by" in stop else None)


def _decode_release(members: JSONObject) -> Release:
    check(member_value(members, "release") is True, "release: expected true")
    return Release()


_COMMANDS: Mapping[str, Callable[[JSONObject], Command]] = MappingProxyType(
    {
        "ack": lambda m: Ack(member_value(m, "ack")),
        "heartbeat": decode_heartbeat,
        "stop": _decode_stop,
        "release": _decode_release,
    }
)
