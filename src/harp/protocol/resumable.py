"""What only kept calls have: the terms asked for and given, and what their caller says while they run.

Sans-IO. `harp.protocol.harpd` gives all of it on, beside the messages that every call has.

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
    required_string,
)
from harp.protocol.json_text import Envelope, JSONObject, decode_values, dumps

#: The most bytes of an order's line, its line feed not counted.
MAX_COMMAND_BYTES = 4096
#: The most characters of a name that a caller gives, and of the reason of a stop.
_MAX_NAME_LENGTH, _MAX_REASON_LENGTH = 200, 100
#: The most seconds that can be asked for: thirty years; and the last moment, Unix seconds, that can be said.
_MAX_SECONDS, _MAX_TIME = 1e9, 1e12
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def check_id(key: str, id_: object) -> None:
    """Refuse what is not the id of a kept call. Raises `ProtocolError` that names the key."""
    check(isinstance(id_, str) and _UUID.fullmatch(id_) is not None, f"{key}: expected a UUID in lower case")


def check_name(key: str, name: object, max_length: int = _MAX_NAME_LENGTH) -> None:
    """Refuse what is not a string, empty or too long. Raises `ProtocolError` that names the key."""
    # The name is not shown: it may be a secret.
    check(
        isinstance(name, str) and 0 < len(name) <= max_length,
        f"{key}: expected a string of 1 to {max_length} characters",
    )


def _check_seconds(key: str, seconds: object) -> None:
    known = is_seconds(seconds) and seconds <= _MAX_SECONDS  # type: ignore[operator]
    check(known, f"{key}: expected a positive number of seconds, at most {_MAX_SECONDS:.0f}")


def check_time(key: str, seconds: object) -> None:
    """Refuse what is not a number of seconds from 0 on. Raises `ProtocolError` that names the key."""
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    check(number and 0 <= seconds <= _MAX_TIME, f"{key}: expected a number of seconds from 0 on")  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class RequestedTerms:
    """What a caller asks for that wants its call kept.

    Attributes:
        id: the call's id, a UUID in lower case, never used before.
        owner: who may list the call: the caller's own id.
        secret: who may attach to it.
        warden: the incarnation of the warden that shall run it; another one refuses it.
        disconnect_timeout: seconds that it may run without contact.
        result_ttl: seconds for which its end is kept without contact.
        timeout: seconds allowed between two records, or the last and the end.
        max_exec_time: seconds allowed from its start to its end.
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
    """What a caller gets that wants its call kept.

    Attributes:
        warden: the incarnation of the warden that has the call.
        disconnect_timeout: seconds that the call may run without contact; at most what was asked for.
        result_ttl: seconds for which its end is kept without contact; at most what was asked for.
        kill_grace: seconds between two steps of ending the call.
        elapsed: seconds since the call's start.
        records: how many records there are so far.
    """

    instance: str
    disconnect_timeout: float
    result_ttl: float
    kill_grace: float
    elapsed: float
    records: int

    def __post_init__(self) -> None:
        check_name("call.warden", self.instance)
        for key in ("disconnect_timeout", "result_ttl", "kill_grace"):
            _check_seconds(f"call.{key}", getattr(self, key))
        check_time("call.elapsed", self.elapsed)
        check(is_count(self.records), f"call.records: expected an integer from 0 on, got {self.records!r}")


T = TypeVar("T", RequestedTerms, GrantedTerms)


def encode_terms(terms: RequestedTerms | GrantedTerms) -> dict[str, Any]:
    """The object under ``call``."""
    return {key: getattr(terms, key) for key in terms.__dataclass_fields__}


def decode_terms(members: JSONObject, kind: type[T]) -> T | None:
    """Read the object under ``call``, of the kind that is asked for; None when there is none.

    Raises:
        ProtocolError: it is not what it should be.
    """
    if "call" not in members:
        return None
    found = members.nested_object("call")
    check(found is not None, "call: expected an object")
    assert found is not None
    keys = tuple(kind.__dataclass_fields__)
    reject_unknown_keys(found, keys)
    for key in keys:
        check(key in found, f"call.{key}: missing")
    return kind(**{key: member_value(found, key) for key in keys})


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """I am here: what the caller of a kept call says every few seconds, and harpd's answer.

    `at` is harpd's time, in seconds since the call's start: in its answer now; from the caller the last one that it has
    heard, from the acknowledgement or an answer. So harpd knows up to when its words have certainly arrived, however
    long the caller's were on their way: a line that comes late proves no contact that is not there.
    """

    time: float

    def __post_init__(self) -> None:
        check_time("heartbeat", self.time)


def decode_heartbeat(members: JSONObject) -> Heartbeat:
    """Read ``{"heartbeat":SECONDS}``, which both sides say. Raises `ProtocolError`."""
    return Heartbeat(member_value(members, "heartbeat"))


@dataclass(frozen=True, slots=True)
class Ack:
    """The records below number `count` are on stable storage: harpd may forget them."""

    count: int

    def __post_init__(self) -> None:
        check(is_count(self.count), f"ack: expected an integer from 0 on, got {self.count!r}")


@dataclass(frozen=True, slots=True)
class StopCall:
    """Stop the call; `why` in a word, `by` whom, if that is known."""

    why: str
    by: str | None = None

    def __post_init__(self) -> None:
        check_name("stop.why", self.why, _MAX_REASON_LENGTH)
        if self.by is not None:
            check_name("stop.by", self.by)


@dataclass(frozen=True, slots=True)
class Release:
    """The call's end is on stable storage: harpd may forget the call."""


Command: TypeAlias = Ack | Heartbeat | StopCall | Release


def encode_command(command: Command) -> bytes:
    """The order's line, line feed included; at most `MAX_COMMAND_BYTES` bytes long without it."""
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
    """Read an order's line, given without its line feed.

    Raises:
        ProtocolError: of type ``parse_error`` or ``invalid_request``.
    """
    members = decode_object(line, decode_values)
    kinds = [kind for kind in _COMMANDS if kind in members]
    check(len(kinds) == 1, f"expected exactly one of {', '.join(_COMMANDS)}")
    reject_unknown_keys(members, kinds)
    return _COMMANDS[kinds[0]](members)


def _decode_stop(members: JSONObject) -> StopCall:
    stop = members.nested_object("stop")
    check(stop is not None, "stop: expected an object")
    assert stop is not None
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
