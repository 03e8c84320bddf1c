"""Strict JSON, as the wire needs it, and JSON text that is passed on without being decoded.

Plain `json` needs care, all of it taken here: deep nesting raises RecursionError, ``NaN`` passes in both
directions, bytes are guessed to be UTF-16, repeated keys vanish. What comes out of this module is values
or `InvalidJSON`; what goes out is one line of ASCII or `NotJSON`, which says where in the value the fault is.

`Raw` is a piece of JSON text that was checked and is never decoded again: the dispatcher stores and sends
payloads in this form, so that key order, big integers and the digits of floats stay what they were.
`open_decoded` and `open_sliced` are the two ways to open a message: payloads as values, or as `Raw`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from itertools import accumulate
from typing import Any, NoReturn, Protocol, TypeAlias

__all__ = [
    "MAX_DEPTH",
    "Envelope",
    "InvalidJSON",
    "Members",
    "NotJSON",
    "Opener",
    "Payload",
    "Raw",
    "canonical",
    "dumps",
    "loads",
    "open_decoded",
    "open_sliced",
]

#: Arrays and objects may be nested this deep in a line. An interpreter with a lower recursion limit may refuse
#: less deep values; both daemons raise theirs so that this is the limit that counts.
MAX_DEPTH = 1000

JSON: TypeAlias = Any  # dict[str, JSON] | list[JSON] | str | int | float | bool | None


class InvalidJSON(ValueError):
    """The text is not JSON, or not JSON that we accept. The message says what and where."""


class NotJSON(ValueError):
    """The value can't be written as JSON.

    Attributes:
        path: where in the value, for example ``"['hosts'][3]"``; empty for the value itself.
        reason: what is wrong there.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"at {path}: {reason}" if path else reason)
        self.path = path
        self.reason = reason


class Raw(bytes):
    """JSON text in UTF-8, checked, without a line feed; passed on as it is."""

    __slots__ = ()


#: A payload: any JSON value, or its text.
Payload: TypeAlias = Any


class Envelope(dict[str, Any]):
    """An object of the protocol itself, whose members may be `Raw`."""

    __slots__ = ()


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJSON(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
# Only finds where values end: numbers of any length pass, and cost no conversion.
_SKIPPER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=str, parse_float=str)
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def loads(text: bytes | str) -> JSON:
    """Decode one JSON value.

    Args:
        text: the JSON text; bytes are UTF-8 and nothing else.

    Returns:
        The value: dict, list, str, int, float, bool or None.

    Raises:
        InvalidJSON: not JSON, not UTF-8, ``NaN`` or ``Infinity``, nested too deep, or a number that this
            interpreter can't hold.
    """
    checked = _checked_text(text)
    return _guarded(_DECODER.decode, checked)


def _checked_text(text: bytes | str) -> str:
    if isinstance(text, str):
        _check_depth(text.encode("utf-8", "surrogatepass"))
        return text
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"not UTF-8 at byte {error.start}") from error
    _check_depth(text)
    return decoded


def _check_depth(text: bytes) -> None:
    """Refuse what nests deeper than MAX_DEPTH. Costs next to nothing for text with few brackets."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    brackets = _STRING.sub(b"", text).translate(None, _NOT_BRACKETS)
    if max(accumulate(map(_STEP.__getitem__, brackets)), default=0) > MAX_DEPTH:
        raise InvalidJSON(f"nested deeper than {MAX_DEPTH}")


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of `json`; everything that it raises becomes `InvalidJSON`."""
    try:
        return function(*arguments)
    except InvalidJSON:
        raise
    except json.JSONDecodeError as error:
        raise InvalidJSON(f"{error.msg} at column {error.pos + 1}") from error
    except RecursionError as error:
        raise InvalidJSON("nested too deep for this interpreter") from error
    except ValueError as error:  # an integer with more digits than the interpreter converts
        raise InvalidJSON(str(error)) from error


class Members(Protocol):
    """One JSON object, opened: its members by name."""

    def __contains__(self, key: str) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def value(self, key: str) -> JSON:
        """The member's decoded value."""

    def payload(self, key: str) -> Payload:
        """The member as a payload: its value or its `Raw` text, as the opener has it."""

    def members(self, key: str) -> Members | None:
        """The member opened as an object, None when it is not one."""


Opener: TypeAlias = Callable[[bytes], Members]


class _Decoded:
    """Members whose payloads are values."""

    __slots__ = ("_members",)

    def __init__(self, members: Mapping[str, JSON]) -> None:
        self._members = members

    def __contains__(self, key: str) -> bool:
        return key in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def value(self, key: str) -> JSON:
        return self._members[key]

    payload = value

    def members(self, key: str) -> Members | None:
        value = self._members[key]
        return _Decoded(value) if isinstance(value, dict) else None


class _Sliced:
    """Members whose payloads are slices of the text."""

    __slots__ = ("_spans", "_text")

    def __init__(self, text: str) -> None:
        self._text = text
        self._spans = {key: span for key, _, span in _scan_object(text, _SKIPPER)}

    def __contains__(self, key: str) -> bool:
        return key in self._spans

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def _slice(self, key: str) -> str:
        start, end = self._spans[key]
        return self._text[start:end]

    def value(self, key: str) -> JSON:
        return _guarded(_DECODER.decode, self._slice(key))

    def payload(self, key: str) -> Payload:
        return Raw(self._slice(key).encode("utf-8"))

    def members(self, key: str) -> Members | None:
        text = self._slice(key)
        return _Sliced(text) if text.startswith("{") else None


def open_decoded(line: bytes) -> Members:
    """Open an object with its payloads decoded. Raises `InvalidJSON`."""
    text = _checked_text(line)
    return _Decoded({key: value for key, value, _ in _scan_object(text, _DECODER)})


def open_sliced(line: bytes) -> Members:
    """Open an object with its payloads as `Raw` text. Raises `InvalidJSON`."""
    return _Sliced(_checked_text(line))


def _scan_object(text: str, decoder: json.JSONDecoder) -> Iterator[tuple[str, JSON, tuple[int, int]]]:
    """Yield name, value and span of each member of the object that `text` is; refuse a repeated name."""
    seen: set[str] = set()
    at = _skip_space(text, 0)
    if text[at : at + 1] != "{":
        _guarded(decoder.decode, text)  # not JSON at all: say so; else it is JSON, but no object
        raise InvalidJSON("expected an object")
    at = _skip_space(text, at + 1)
    more = text[at : at + 1] != "}"
    while more:
        if text[at : at + 1] != '"':
            raise InvalidJSON(f"expected a name in double quotes at column {at + 1}")
        key, at = _guarded(decoder.raw_decode, text, at)
        if key in seen:
            raise InvalidJSON(f"repeated key {json.dumps(key)}")
        seen.add(key)
        at = _skip_space(text, at)
        if text[at : at + 1] != ":":
            raise InvalidJSON(f"expected ':' at column {at + 1}")
        start = _skip_space(text, at + 1)
        value, end = _guarded(decoder.raw_decode, text, start)
        yield key, value, (start, end)
        at = _skip_space(text, end)
        more = text[at : at + 1] == ","
        if more:
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "}":
            raise InvalidJSON(f"expected ',' or '}}' at column {at + 1}")
    at = _skip_space(text, at + 1)
    if at != len(text):
        raise InvalidJSON(f"data after the object at column {at + 1}")


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def dumps(value: JSON) -> Raw:
    """Write a value as one line of ASCII JSON, without the line feed.

    As in `json`, tuples become arrays, and keys that are int, float, bool or None become strings.

    Args:
        value: anything JSON can carry; an `Envelope` may hold `Raw` members.

    Raises:
        NotJSON: the value, or a value in it, has no form in JSON; the exception says where.
    """
    if isinstance(value, Raw):
        return value
    if isinstance(value, Envelope):
        return Raw(b"{" + b",".join(dumps(key) + b":" + dumps(member) for key, member in value.items()) + b"}")
    try:
        text = _ENCODER.encode(value).encode("ascii")
        _check_depth(text)
        return Raw(text)
    except (TypeError, ValueError, RecursionError) as error:
        path, reason = _find_fault(value) or ("", str(error))
        raise NotJSON(path, reason) from error


def _find_fault(value: JSON) -> tuple[str, str] | None:
    """Find the first place in `value` that JSON can't carry. Iterative: the value may be nested too deep."""
    stack: list[tuple[JSON, str, int]] = [(value, "", 0)]
    trail: list[int] = []  # the containers that the item is in
    while stack:
        item, path, depth = stack.pop()
        del trail[depth:]
        if isinstance(item, (dict, list, tuple)):
            if id(item) in trail:
                return path, "contains itself"
            if depth >= MAX_DEPTH:
                return "", f"nested deeper than {MAX_DEPTH}"
            trail.append(id(item))
            children = item.items() if isinstance(item, dict) else enumerate(item)
            for key, child in reversed(list(children)):
                if isinstance(item, dict) and not isinstance(key, (str, int, float, bool, type(None))):
                    return path, f"a key is of type {_type_name(key)}, expected str"
                stack.append((child, f"{path}[{key!r}]", depth + 1))
        elif (reason := _fault_of_scalar(item)) is not None:
            return path, reason
    return None


def _fault_of_scalar(item: JSON) -> str | None:
    if item is None or isinstance(item, (str, bool)):
        return None
    if isinstance(item, float):
        return None if item - item == 0 else f"{item!r} is not a number of JSON"
    if isinstance(item, int):
        try:
            int.__repr__(item)
        except ValueError as error:
            return str(error)
        return None
    return f"type {_type_name(item)} has no form in JSON"


def _type_name(item: object) -> str:
    kind = type(item)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)


class _Number(str):
    """The canonical text of a number; distinct from a string."""

    __slots__ = ()


def _canonical_number(text: str) -> _Number:
    try:
        number = Decimal(text, _EXACT)
        return _Number("0" if number.is_zero() else str(number.normalize(_EXACT)))
    except ArithmeticError:  # an exponent that no decimal holds: such numbers are equal by their spelling
        return _Number(text)


_CANONICAL = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=_canonical_number, parse_float=_canonical_number
)


def canonical(text: bytes) -> str:
    """A text that is the same for two JSON values exactly when they are equal as JSON values.

    Key order and spelling do not count; numbers are equal by value (``1`` and ``1.0``), but ``1`` is not ``true``.

    Args:
        text: JSON in UTF-8, as in a `Raw`.
    """
    return _write_canonical(_guarded(_CANONICAL.decode, _checked_text(text)))


def _write_canonical(value: JSON) -> str:
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, dict):
        members = (f"{json.dumps(key)}:{_write_canonical(value[key])}" for key in sorted(value))
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_write_canonical, value)) + "]"
    return json.dumps(value)
