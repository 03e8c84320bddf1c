"""The description of messages, and the only encoder and decoder for all of them.

A message is a dataclass derived from `WireObject`, which nobody changes. The annotation of a field has the kind of its
value and the path of its member on the wire, if its name differs. A field with a default is optional:

    class Attach(WireObject):
        call: Annotated[str, "attach"]      # {"attach": ...}
        since: Count                        # {"since": ...}
        user: Annotated[str, "auth.user"]   # {"auth": {"user": ...}}
        keep_alive: bool = False            # {"keep_alive": true}, or no member

An optional member is not sent while it has its default None or False, and a received null is its default; `Null` has
the exceptions. Members are sent in the order in which the class defines them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from operator import attrgetter
from typing import (
    Annotated,
    Any,
    ClassVar,
    NamedTuple,
    Self,
    TypeAlias,
    TypeVar,
    dataclass_transform,
    get_args,
    get_type_hints,
)

from harp.protocol.json_text import MAX_DEPTH, InvalidJSON, JSONObject, Raw, dumps, exceeds_depth

#: A payload: any JSON value, or its text as `Raw`.
Payload: TypeAlias = Any

#: A decoder of the object that a line is. Raises `InvalidJSON`.
Decoder: TypeAlias = Callable[[bytes], JSONObject]

#: Maximum length in characters of a name (of a host, a procedure or a user), and of the message of a `ProtocolError`.
MAX_NAME, _MAX_MESSAGE = 255, 1000

_TYPE_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
}


class ProtocolError(ValueError):
    """Data that is not a message of the protocol, or a message that is not allowed now.

    `type` is the error type on the wire: ``parse_error``, ``invalid_protocol`` or ``invalid_request``. `message` names
    the invalid member; a long one, which quotes data, is cut.
    """

    def __init__(self, message: str, type: str = "invalid_request") -> None:
        if len(message) > _MAX_MESSAGE:
            message = f"{message[:_MAX_MESSAGE]}..."
        super().__init__(message)
        self.type = type
        self.message = message


def check(condition: bool, message: str) -> None:
    """Raise `ProtocolError` unless the condition is true."""
    if not condition:
        raise ProtocolError(message)


def decode_object(line: bytes, decoder: Decoder) -> JSONObject:
    """Decode a line that must be an object. Raises `ProtocolError`, of type ``parse_error`` if it is not JSON."""
    try:
        return decoder(line)
    except InvalidJSON as error:
        is_json = str(error).startswith(("expected an object", "repeated key"))
        raise ProtocolError(str(error), "invalid_request" if is_json else "parse_error") from error


def member_value(members: JSONObject, key: str, default: Any = None) -> Any:
    """Return the value of a member. Raises `ProtocolError` if it is a number that Python cannot represent."""
    try:
        return members.value(key) if key in members else default
    except InvalidJSON as error:
        raise ProtocolError(f"{key}: {error}") from error


def required_object(
    members: JSONObject, key: str, expected: str = "an object", values_only: bool = False
) -> JSONObject:
    """Return a member that must be an object. Raises `ProtocolError`. `values_only`, without payloads, is faster."""
    try:
        nested = members.nested_object(key, values_only) if key in members else None
    except InvalidJSON as error:
        raise ProtocolError(f"{key}: {error}") from error
    if nested is None:
        raise ProtocolError(f"{key}: expected {expected}")
    return nested


def required_string(members: JSONObject, key: str) -> str:
    """Return the value of a member that must be a string. Raises `ProtocolError`."""
    check(key in members, f"{key}: missing")
    return check_string(key, member_value(members, key))


def check_string(key: str, value: Any) -> str:
    """Return the value of a member. Raises `ProtocolError` if it is not a string."""
    if not isinstance(value, str):
        raise ProtocolError(f"{key}: expected a string, got {_TYPE_NAMES.get(type(value), 'an object')}")
    return value


def reject_unknown_keys(members: JSONObject, *known: Iterable[str]) -> None:
    """Raise `ProtocolError` if there are members whose key is not in `known`."""
    if unknown := set(members).difference(*known):
        raise ProtocolError(f"unknown key {', '.join(sorted(unknown))}")


def is_count(number: object) -> bool:
    """Return whether it is an integer of at least 0; true and false are not."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def is_seconds(number: object) -> bool:
    """Return whether it is a positive finite number; true and false are not."""
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf


def is_seconds_or_zero(number: object) -> bool:
    """Return whether it is a finite number of at least 0; true and false are not."""
    return is_seconds(number) or (number == 0 and not isinstance(number, bool))


def is_object(payload: Payload) -> bool:
    """Return whether a payload is an object."""
    return payload.startswith(b"{") if isinstance(payload, Raw) else isinstance(payload, dict)


def is_arguments(payload: Payload) -> bool:
    """Return whether a payload is an array or an object."""
    return payload.startswith((b"[", b"{")) if isinstance(payload, Raw) else isinstance(payload, (list, tuple, dict))


def quote(value: Any) -> str:
    """Return a received value for an error. Python needs quadratic time to write arrays of many levels."""
    return _TYPE_NAMES.get(type(value), "an object") if isinstance(value, (list, dict)) and value else repr(value)


class _Quoted(NamedTuple):
    """A value that is quoted by ``{!r}``."""

    value: Any

    def __repr__(self) -> str:
        return quote(self.value)


class Null(Enum):
    """A rule for null in an optional member, other than the usual one."""

    REJECTED = "a received null is invalid"
    SENT = "the default None is sent as null"


class Kind(NamedTuple):
    """A kind of value, for the annotation of a field."""

    is_valid: Callable[[Any], bool] | None = None  # whether a value other than the default is valid; None: it is
    expected: str = ""  # the expectation in the error; with ``{!r}``, it quotes the value
    is_text: bool = False  # whether a received value must be a string, before `is_valid` checks it
    decode: Callable[[JSONObject, str], Any] | None = None  # returns the value of a member; None: the member's value
    encode: Callable[[Any], Any] | None = None  # returns what `dumps` writes for a value; None: the value


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class WireObject:
    """A message, or an object in a message; each subclass is a dataclass that validates its fields.

    Type checkers refuse to change a message. At run time, and for the methods below, functions of each class would be
    compiled: half a millisecond for each of the fifty classes, whenever a program starts.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    #: Members that are always sent. A received message must have those that are true.
    CONSTANTS: ClassVar[Mapping[str, Any]] = {}
    #: The path of the object in its message, with a dot at the end; for errors.
    PATH: ClassVar[str] = ""
    _layout: ClassVar[_Layout]

    def __init_subclass__(cls) -> None:
        dataclass(repr=False, eq=False)(cls)
        cls._layout = _UnreadLayout()  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.repr]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[Any, ...]:
        return tuple([getattr(self, each.name) for each in fields(self)])

    def __post_init__(self) -> None:
        for name, label, is_valid, expected, default in self._layout.checks:
            value = getattr(self, name)
            if value is not default and not is_valid(value):
                raise ProtocolError(f"{label}: expected {expected.format(_Quoted(value))}")

    @classmethod
    def of_valid(cls, values: Mapping[str, Any]) -> Self:
        """Return a message with values that were checked already, by the names of its fields; others are defaults."""
        message = object.__new__(cls)
        message.__dict__.update(values)
        return message


T = TypeVar("T", bound=WireObject)


def encode_members(message: WireObject) -> bytes:
    """Return the members of a message as JSON text, without the braces around them. Raises `NotJSON`."""
    layout = message._layout
    texts = [layout.constants] if layout.constants else []
    for section in layout.sections:
        found = []
        for name, label, omitted, encode in section.written:
            value = getattr(message, name)
            if value is not omitted:
                if encode is not None and value is not None:
                    value = encode(value)
                found.append(label + (value if type(value) is Raw else dumps(value)))
        if not section.key:
            texts += found
        elif found:
            texts.append(b"%b{%b}" % (section.label, b",".join(found)))
    return b",".join(texts)


def encode_object(message: WireObject) -> Raw:
    """Return a message as the text of an object. Raises `NotJSON` if a payload has no form in JSON."""
    return Raw(b"{%b}" % encode_members(message))


def decode_as(
    kind: type[T], members: JSONObject, other_keys: Iterable[str] | None = (), ignored: Collection[str] = ()
) -> T:
    """Return an object as a message of a kind. Raises `ProtocolError` if it is not a valid one.

    Beside the keys of the message, `other_keys` are allowed; None: every key is. The `ignored` fields get their
    default.
    """
    layout = kind._layout
    if other_keys is not None and not members.keys() <= layout.keys:
        reject_unknown_keys(members, layout.keys, other_keys)
    values = {}
    key = ""
    try:
        for key in layout.flags:
            check(members.value(key) is True, f"{key}: expected true")
        for section in layout.sections:
            source = members
            if section.key:
                source = required_object(members, section.key, section.expected, section.values_only)
                if other_keys is not None and not source.keys() <= section.keys:
                    reject_unknown_keys(source, section.keys)
            for member in section.members:
                key, decode = member.key, member.kind.decode
                if key not in source or member.name in ignored:
                    if not member.is_optional:
                        raise ProtocolError(f"{kind.PATH}{key}: missing")
                elif not (member.null_is_default and source.is_null(key)):
                    value = source.value(key) if decode is None else decode(source, key)
                    if member.kind.is_text and type(value) is not str:
                        check_string(key, value)
                    values[member.name] = value
    except InvalidJSON as error:
        raise ProtocolError(f"{key}: {error}") from error
    create: Callable[..., T] = kind
    return create(**values)


class _Member(NamedTuple):
    """A field of a message and its member; `label` is its name as JSON, with a colon."""

    name: str
    key: str
    label: bytes
    kind: Kind
    is_optional: bool
    null_is_default: bool
    omitted: object  # the value with which the member is not sent


class _Section(NamedTuple):
    """Successive fields that are members of one object: of the message, or of its member `key`."""

    key: str
    label: bytes
    members: tuple[_Member, ...]
    written: tuple[tuple[str, bytes, object, Callable[[Any], Any] | None], ...]  # name, label, omitted, encode
    keys: frozenset[str]
    expected: str  # the expectation in errors
    values_only: bool  # whether no member is a payload


class _UnreadLayout:
    """The layout of a message that no program has needed yet: most programs need few of them."""

    def __get__(self, _: WireObject | None, owner: type[WireObject]) -> _Layout:
        owner._layout = layout = _read_layout(owner)
        return layout


class _Layout(NamedTuple):
    """The layout of a message, read from its annotations once."""

    sections: tuple[_Section, ...]
    keys: frozenset[str]
    constants: bytes  # the members that are always sent, as JSON
    flags: tuple[str, ...]  # those of them that a received message must have
    checks: tuple[tuple[str, str, Callable[[Any], bool], str, object], ...]  # field, label, check, default


def _read_layout(message: type[WireObject]) -> _Layout:
    sections: list[tuple[str, list[_Member]]] = []
    checks = []
    hints = get_type_hints(message, include_extras=True)
    for each in fields(message):
        parts = tuple(_parts(hints[each.name]))
        path = next((part for part in parts if isinstance(part, str)), each.name)
        section, _, key = path.rpartition(".")
        default, kind = each.default, _kind(parts)
        omits_default = (default is None or default is False) and Null.SENT not in parts
        member = _Member(
            name=each.name,
            key=key,
            label=dumps(key) + b":",
            kind=kind,
            is_optional=default is not MISSING,
            null_is_default=default is not MISSING and Null.REJECTED not in parts,
            omitted=default if omits_default else MISSING,
        )
        if not sections or sections[-1][0] != section:
            sections.append((section, []))
        sections[-1][1].append(member)
        if kind.is_valid is not None:
            checks.append((each.name, message.PATH + path, kind.is_valid, kind.expected, default))
    constants = message.CONSTANTS
    own_keys = {section or member.key for section, members in sections for member in members}
    return _Layout(
        sections=tuple(_section(key, members) for key, members in sections),
        keys=frozenset(own_keys.union(constants)),
        constants=b",".join([b"%b:%b" % (dumps(key), dumps(value)) for key, value in constants.items()]),
        flags=tuple(key for key, value in constants.items() if value is True),
        checks=tuple(checks),
    )


def _section(key: str, members: list[_Member]) -> _Section:
    required = [member.key for member in members if not member.is_optional]
    return _Section(
        key=key,
        label=dumps(key) + b":",
        members=tuple(members),
        written=tuple((member.name, member.label, member.omitted, member.kind.encode) for member in members),
        keys=frozenset(member.key for member in members),
        expected=f"an object with {' and '.join(required)}",
        values_only=all(member.kind.decode is None for member in members),
    )


def _parts(hint: Any) -> Iterator[Any]:
    """Yield a type and its parts: the types of a union, the type and the notes of an annotation."""
    yield hint
    for part in get_args(hint):
        yield from _parts(part)


def _kind(parts: Iterable[Any]) -> Kind:
    for part in parts:
        if isinstance(part, Kind):
            return part
    for part in parts:
        if part in _KINDS:
            return _KINDS[part]
        if isinstance(part, type) and issubclass(part, WireObject):
            return _object_kind(part)
    raise TypeError("a field of a message has a type without a kind")


def _object_kind(message: type[WireObject]) -> Kind:
    """Return the kind of an object without payloads. All its members are sent, under their own names."""
    names = [each.name for each in fields(message)]
    return Kind(
        decode=lambda members, key: decode_as(message, required_object(members, key, values_only=True)),
        encode=lambda value: dict(zip(names, attrgetter(*names)(value), strict=True)),
    )


def _is_sendable_count(number: Any) -> bool:
    # `repr` raises ValueError if it has more digits than Python writes: it has no form in JSON then.
    return is_count(number) and bool(repr(number))


def decode_payload(members: JSONObject, key: str) -> Payload:
    """Return a member as a payload; for a `Kind`. Raises `ProtocolError`: it is nested deeper than a payload may be."""
    payload = members.payload(key)
    if type(payload) is Raw:
        check(not exceeds_depth(payload), f"{key}: nested deeper than {MAX_DEPTH}")
    return payload


#: The kinds of fields whose type has no `Kind`.
_KINDS: Mapping[Any, Kind] = {
    str: Kind(is_text=True),
    bool: Kind(lambda value: isinstance(value, bool), "true or false"),
    Any: Kind(decode=decode_payload),
}

#: A name of 1 to `MAX_NAME` characters.
Name: TypeAlias = Annotated[
    str,
    Kind(
        lambda name: isinstance(name, str) and 0 < len(name) <= MAX_NAME,
        f"a name of 1 to {MAX_NAME} characters, got {{!r}}",
        is_text=True,
    ),
]
Integer: TypeAlias = Annotated[int, Kind(lambda value: type(value) is int, "an integer")]
Count: TypeAlias = Annotated[int, Kind(_is_sendable_count, "an integer of at least 0, got {!r}")]
Seconds: TypeAlias = Annotated[float, Kind(is_seconds, "a positive number of seconds, got {!r}")]
SecondsOrZero: TypeAlias = Annotated[float, Kind(is_seconds_or_zero, "a number of seconds of at least 0, got {!r}")]
#: A payload that is an object.
ObjectPayload: TypeAlias = Annotated[Payload, Kind(is_object, "an object", decode=decode_payload)]
#: The arguments of a call: an array (positional) or an object (named).
Arguments: TypeAlias = Annotated[Payload, Kind(is_arguments, "an array or an object", decode=decode_payload)]


def only_kind(kinds: Mapping[str, object], members: JSONObject, none: str, several: str = "") -> str:
    """Return the single key of `kinds` that an object has.

    Otherwise raise `ProtocolError`: `none` if it has no such key, `several` if it has two or more; if `several` is
    empty, the error names them in their order.
    """
    found = kinds.keys() & members.keys()
    if len(found) != 1:
        raise ProtocolError(several or f"both {' and '.join(sorted(found, key=list(kinds).index))}" if found else none)
    return found.pop()
