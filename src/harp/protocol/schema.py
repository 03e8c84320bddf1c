"""The description of messages, and the only encoder and decoder for all of them.

A message is a frozen dataclass derived from `WireObject`. The annotation of a field has the kind of its value and the
path of its member on the wire, if that is not the field's name. A field with a default is optional:

    class Attach(WireObject):
        call: Annotated[str, "attach"]      # {"attach": ...}
        since: Count                        # {"since": ...}
        user: Annotated[str, "auth.user"]   # {"auth": {"user": ...}}
        keep_alive: bool = False            # {"keep_alive": true}, or no member

An optional member is not sent while it has its default None or False, and a received null is its default; `Null` has
the exceptions. Members are sent in the order of the fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from typing import Annotated, Any, ClassVar, NamedTuple, TypeAlias, TypeVar, get_args, get_type_hints

from harp.protocol.fields import (
    Payload,
    ProtocolError,
    check,
    is_container,
    is_count,
    is_seconds,
    member_value,
    reject_unknown_keys,
    required_object,
    required_string,
)
from harp.protocol.json_text import Envelope, JSONObject, dumps


class Null(Enum):
    """A rule for null in an optional member, other than the usual one."""

    REJECTED = "a received null is invalid"
    SENT = "the default None is sent as null"


class Kind(NamedTuple):
    """A kind of value, for the annotation of a field.

    Attributes:
        check: gets the member's path and a value, and raises `ProtocolError` for an invalid one.
        decode: returns the value of a member of an object; gets the object and the key.
        encode: returns the form of a value in an `Envelope`; None: the value itself.
    """

    check: Callable[[str, Any], None] | None = None
    decode: Callable[[JSONObject, str], Any] = member_value
    encode: Callable[[Any], Any] | None = None


class WireObject:
    """A message, or an object in a message; it is validated when it is created."""

    __slots__ = ()

    #: Members that are always sent. A received message must have those that are true.
    CONSTANTS: ClassVar[Mapping[str, Any]] = {}
    #: The path of the object in its message, with a dot at the end; for errors.
    PATH: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, label, check_value, default in _LAYOUTS[type(self)].checks:
            value = getattr(self, name)
            if value is not default:
                check_value(label, value)


T = TypeVar("T", bound=WireObject)


def encode_object(message: WireObject) -> Envelope:
    """Return a message as an object."""
    found = Envelope(message.CONSTANTS)
    for member in _LAYOUTS[type(message)].members:
        value = getattr(message, member.name)
        if value is member.omitted:
            continue
        target = found.setdefault(member.section, Envelope()) if member.section else found
        encode = member.kind.encode
        target[member.key] = value if encode is None or value is None else encode(value)
    return found


def decode_as(
    kind: type[T], members: JSONObject, other_keys: Iterable[str] | None = (), ignored: Iterable[str] = ()
) -> T:
    """Return an object as a message of a kind.

    Args:
        kind: the class of the message.
        members: the object.
        other_keys: keys that are allowed although they are not of the message; None: every key is allowed.
        ignored: fields that get their default, whatever was received.

    Raises:
        ProtocolError: the object is not a valid message of this kind.
    """
    layout = _LAYOUTS[kind]
    objects = {"": members}
    if other_keys is not None:
        reject_unknown_keys(members, layout.keys[""], other_keys)
    for key, constant in kind.CONSTANTS.items():
        check(constant is not True or member_value(members, key) is True, f"{key}: expected true")
    values = {}
    for name, section, key, field_kind, is_optional, null_is_default, _ in layout.members:
        if section not in objects:
            objects[section] = required_object(members, section, layout.expected[section])
            if other_keys is not None:
                reject_unknown_keys(objects[section], layout.keys[section])
        source = objects[section]
        if key not in source or name in ignored:
            if not is_optional:
                raise ProtocolError(f"{kind.PATH}{key}: missing")
        elif not (null_is_default and source.is_null(key)):
            values[name] = field_kind.decode(source, key)
    create: Callable[..., T] = kind
    return create(**values)


class _Member(NamedTuple):
    """A field of a message and its member: `key` of the object `section`, or of the message itself if that is empty."""

    name: str
    section: str
    key: str
    kind: Kind
    is_optional: bool
    null_is_default: bool
    omitted: object


class _Layout(NamedTuple):
    """The layout of a message.

    Attributes:
        members: its members.
        keys: the keys of each section.
        expected: each section as text, for errors.
        checks: the arguments of the check of each field that has one: field, label, check, default.
    """

    members: tuple[_Member, ...]
    keys: Mapping[str, set[str]]
    expected: Mapping[str, str]
    checks: tuple[tuple[str, str, Callable[[str, Any], None], object], ...]


class _Layouts(dict[type[WireObject], _Layout]):
    """The layouts of messages; each is read from the annotations when it is needed first."""

    def __missing__(self, message: type[WireObject]) -> _Layout:
        layout = self[message] = _read_layout(message)
        return layout


_LAYOUTS = _Layouts()


def _read_layout(message: type[WireObject]) -> _Layout:
    members, checks = [], []
    keys: dict[str, set[str]] = {"": set(message.CONSTANTS)}
    hints = get_type_hints(message, include_extras=True)
    for field in fields(message):  # type: ignore[arg-type]  # every message is a dataclass
        parts = tuple(_parts(hints[field.name]))
        path = next((part for part in parts if isinstance(part, str)), field.name)
        section, _, key = path.rpartition(".")
        keys[""].add(section or key)
        keys.setdefault(section, set()).add(key)
        default, kind = field.default, _kind(parts)
        omits_default = (default is None or default is False) and Null.SENT not in parts
        member = _Member(
            name=field.name,
            section=section,
            key=key,
            kind=kind,
            is_optional=default is not MISSING,
            null_is_default=default is not MISSING and Null.REJECTED not in parts,
            omitted=default if omits_default else MISSING,
        )
        members.append(member)
        if kind.check is not None:
            checks.append((field.name, message.PATH + path, kind.check, default))
    expected = {}
    for section in keys:
        required = [member.key for member in members if member.section == section and not member.is_optional]
        expected[section] = f"an object with {' and '.join(required)}"
    return _Layout(tuple(members), keys, expected, tuple(checks))


def _parts(hint: Any) -> Iterator[Any]:
    """Yield a type, and what it consists of: the types of a union, the type and the notes of an annotation."""
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
    """Return the kind of an object without payloads: a dict is encoded faster than an `Envelope`."""
    return Kind(
        decode=lambda members, key: decode_as(message, required_object(members, key)),
        encode=lambda value: dict(encode_object(value)),
    )


def expect(expected: str, is_valid: Callable[[Any], bool], quote: bool = False) -> Callable[[str, Any], None]:
    """Return a check of a `Kind`.

    Args:
        expected: the end of the error ``PATH: expected ...``.
        is_valid: returns whether a value is valid.
        quote: whether the error has the value; not for secrets and long values.
    """

    def check_value(label: str, value: Any) -> None:
        if not is_valid(value):
            raise ProtocolError(f"{label}: expected {expected}" + (f", got {value!r}" if quote else ""))

    return check_value


def decode_payload(members: JSONObject, key: str) -> Payload:
    """Return a member as a payload; for a `Kind`."""
    return members.payload(key)


def _check_count(label: str, number: Any) -> None:
    shown = repr(number)  # ValueError: it has more digits than Python writes, so it has no form in JSON
    check(is_count(number), f"{label}: expected an integer of at least 0, got {shown}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


#: The kinds of fields whose type has no `Kind`.
_KINDS: Mapping[Any, Kind] = {
    str: Kind(decode=required_string),
    bool: Kind(expect("true or false", lambda value: isinstance(value, bool))),
    Any: Kind(decode=decode_payload),
}

#: A name that is not empty.
Name: TypeAlias = Annotated[
    str, Kind(expect("a name", lambda name: isinstance(name, str) and name != "", quote=True), required_string)
]
Integer: TypeAlias = Annotated[int, Kind(expect("an integer", _is_integer))]
Count: TypeAlias = Annotated[int, Kind(_check_count)]
Seconds: TypeAlias = Annotated[float, Kind(expect("a positive number of seconds", is_seconds, quote=True))]
#: A payload that is an object.
ObjectPayload: TypeAlias = Annotated[
    Payload, Kind(expect("an object", lambda value: is_container(value, (dict,))), decode_payload)
]
#: The arguments of a call: an array (positional) or an object (named).
Arguments: TypeAlias = Annotated[
    Payload, Kind(expect("an array or an object", lambda value: is_container(value, (list, dict))), decode_payload)
]


def is_number(value: Any, low: float, high: float) -> bool:
    """Return whether a value is a number from `low` to `high`; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def encode_line(members: Envelope) -> bytes:
    """Return an object as a line with its line feed. Raises `NotJSON` if a payload has no form in JSON."""
    return bytes(dumps(members)) + b"\n"


def only_kind(kinds: Mapping[str, object], members: JSONObject, none: str, several: str = "") -> str:
    """Return the one key that is in an object.

    Args:
        kinds: the keys, in the order of the error.
        members: the object.
        none: the error if it has none of them.
        several: the error if it has more than one; empty: the error names them.
    """
    found = [key for key in members if key in kinds]
    if len(found) != 1:
        raise ProtocolError(several or f"both {' and '.join(sorted(found, key=list(kinds).index))}" if found else none)
    return found[0]
