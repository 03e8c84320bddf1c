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

from harp.protocol.fields import check, is_count, is_seconds, opened, string, value, within
from harp.protocol.json_text import Envelope, Members, dumps, open_decoded

__all__ = [
    "LONGEST_ORDER",
    "Alive",
    "CallTerms",
    "Done",
    "KeptTerms",
    "Order",
    "StopCall",
    "Stored",
    "check_id",
    "check_moment",
    "check_name",
    "decode_alive",
    "decode_order",
    "decode_terms",
    "encode_order",
    "encode_terms",
]

#: The most bytes of an order's line, its line feed not counted.
LONGEST_ORDER = 4096
#: The most characters of a name that a caller gives, and of the reason of a stop.
_LONGEST_NAME, _LONGEST_REASON = 200, 100
#: The most seconds that can be asked for: thirty years; and the last moment, Unix seconds, that can be said.
_LONGEST_TIME, _LAST_MOMENT = 1e9, 1e12
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def check_id(key: str, id_: object) -> None:
    """Refuse what is not the id of a kept call. Raises `ProtocolError` that names the key."""
    check(isinstance(id_, str) and _UUID.fullmatch(id_) is not None, f"{key}: expected a UUID in lower case")


def check_name(key: str, name: object, most: int = _LONGEST_NAME) -> None:
    """Refuse what is not a string, empty or too long. Raises `ProtocolError` that names the key."""
    # The name is not shown: it may be a secret.
    check(isinstance(name, str) and 0 < len(name) <= most, f"{key}: expected a string of 1 to {most} characters")


def _check_seconds(key: str, seconds: object) -> None:
    known = is_seconds(seconds) and seconds <= _LONGEST_TIME  # type: ignore[operator]
    check(known, f"{key}: expected a positive number of seconds, at most {_LONGEST_TIME:.0f}")


def check_moment(key: str, seconds: object) -> None:
    """Refuse what is not a number of seconds from 0 on. Raises `ProtocolError` that names the key."""
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    check(number and 0 <= seconds <= _LAST_MOMENT, f"{key}: expected a number of seconds from 0 on")  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class CallTerms:
    """What a caller asks for that wants its call kept.

    Attributes:
        id: the call's id, a UUID in lower case, never used before.
        owner: who may list the call: the caller's own id.
        secret: who may attach to it.
        warden: the incarnation of the warden that shall run it; another one refuses it.
        keep_running: seconds that it may run without contact.
        linger: seconds for which its end is kept without contact.
        timeout: seconds allowed between two records, or the last and the end.
        max_exec_time: seconds allowed from its start to its end.
    """

    id: str
    owner: str = field(repr=False)
    secret: str = field(repr=False)
    warden: str
    keep_running: float
    linger: float
    timeout: float
    max_exec_time: float

    def __post_init__(self) -> None:
        check_id("call.id", self.id)
        for key in ("owner", "secret", "warden"):
            check_name(f"call.{key}", getattr(self, key))
        for key in ("keep_running", "linger", "timeout", "max_exec_time"):
            _check_seconds(f"call.{key}", getattr(self, key))


@dataclass(frozen=True, slots=True)
class KeptTerms:
    """What a caller gets that wants its call kept.

    Attributes:
        warden: the incarnation of the warden that has the call.
        keep_running: seconds that the call may run without contact; at most what was asked for.
        linger: seconds for which its end is kept without contact; at most what was asked for.
        kill_grace: seconds between two steps of ending the call.
        elapsed: seconds since the call's start.
        records: how many records there are so far.
    """

    warden: str
    keep_running: float
    linger: float
    kill_grace: float
    elapsed: float
    records: int

    def __post_init__(self) -> None:
        check_name("call.warden", self.warden)
        for key in ("keep_running", "linger", "kill_grace"):
            _check_seconds(f"call.{key}", getattr(self, key))
        check_moment("call.elapsed", self.elapsed)
        check(is_count(self.records), f"call.records: expected an integer from 0 on, got {self.records!r}")


T = TypeVar("T", CallTerms, KeptTerms)


def encode_terms(terms: CallTerms | KeptTerms) -> dict[str, Any]:
    """The object under ``call``."""
    return {key: getattr(terms, key) for key in terms.__dataclass_fields__}


def decode_terms(members: Members, kind: type[T]) -> T | None:
    """Read the object under ``call``, of the kind that is asked for; None when there is none.

    Raises:
        ProtocolError: it is not what it should be.
    """
    if "call" not in members:
        return None
    found = members.members("call")
    check(found is not None, "call: expected an object")
    assert found is not None
    keys = tuple(kind.__dataclass_fields__)
    within(found, keys)
    for key in keys:
        check(key in found, f"call.{key}: missing")
    return kind(**{key: value(found, key) for key in keys})


@dataclass(frozen=True, slots=True)
class Alive:
    """I am here: what the caller of a kept call says every few seconds, and harpd's answer.

    `at` is harpd's time, in seconds since the call's start: in its answer now; from the caller the last one that it has
    heard, from the acknowledgement or an answer. So harpd knows up to when its words have certainly arrived, however
    long the caller's were on their way: a line that comes late proves no contact that is not there.
    """

    at: float

    def __post_init__(self) -> None:
        check_moment("alive", self.at)


def decode_alive(members: Members) -> Alive:
    """Read ``{"alive":SECONDS}``, which both sides say. Raises `ProtocolError`."""
    return Alive(value(members, "alive"))


@dataclass(frozen=True, slots=True)
class Stored:
    """The records below number `count` are on stable storage: harpd may forget them."""

    count: int

    def __post_init__(self) -> None:
        check(is_count(self.count), f"stored: expected an integer from 0 on, got {self.count!r}")


@dataclass(frozen=True, slots=True)
class StopCall:
    """Stop the call; `why` in a word, `by` whom, if that is known."""

    why: str
    by: str | None = None

    def __post_init__(self) -> None:
        check_name("stop.why", self.why, _LONGEST_REASON)
        if self.by is not None:
            check_name("stop.by", self.by)


@dataclass(frozen=True, slots=True)
class Done:
    """The call's end is on stable storage: harpd may forget the call."""


Order: TypeAlias = Stored | Alive | StopCall | Done


def encode_order(order: Order) -> bytes:
    """The order's line, line feed included; at most `LONGEST_ORDER` bytes long without it."""
    match order:
        case Stored(count):
            members = Envelope(stored=count)
        case Alive(at):
            members = Envelope(alive=at)
        case StopCall(why, by):
            members = Envelope(stop={"why": why} if by is None else {"why": why, "by": by})
        case Done():
            members = Envelope(done=True)
    return bytes(dumps(members)) + b"\n"


def decode_order(line: bytes) -> Order:
    """Read an order's line, given without its line feed.

    Raises:
        ProtocolError: of type ``parse_error`` or ``invalid_request``.
    """
    members = opened(line, open_decoded)
    kinds = [kind for kind in _ORDERS if kind in members]
    check(len(kinds) == 1, f"expected exactly one of {', '.join(_ORDERS)}")
    within(members, kinds)
    return _ORDERS[kinds[0]](members)


def _decode_stop(members: Members) -> StopCall:
    stop = members.members("stop")
    check(stop is not None, "stop: expected an object")
    assert stop is not None
    within(stop, ("why", "by"))
    return StopCall(string(stop, "why"), string(stop, "by") if "by" in stop else None)


def _decode_done(members: Members) -> Done:
    check(value(members, "done") is True, "done: expected true")
    return Done()


_ORDERS: Mapping[str, Callable[[Members], Order]] = MappingProxyType(
    {
        "stored": lambda m: Stored(value(m, "stored")),
        "alive": decode_alive,
        "stop": _decode_stop,
        "done": _decode_done,
    }
)
