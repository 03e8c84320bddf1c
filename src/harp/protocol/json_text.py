"""Strict JSON for the wire, and JSON text that is passed on without decoding.

The module `json` is lenient in four ways that this one is not: deep nesting raises RecursionError, ``NaN`` passes in
both directions, bytes may be taken for UTF-16, and repeated keys are dropped. Decoding returns a value or raises
`InvalidJSON`; encoding returns one line of ASCII or raises `NotJSON`, which has the position of the invalid part.

`Raw` is JSON text that was checked and is not decoded again: the dispatcher stores and sends payloads in this form, so
that key order, big integers and the digits of floats are unchanged.
There are two decoders of a message: `decode_values` (for clients) gives payloads as values,
`harp_daemon.sliced_json.decode_slices` (for the daemons) as `Raw`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from typing import Any, Protocol, TypeAlias

from harp.protocol.strict_json import (
    MAX_DEPTH,
    Envelope,
    InvalidJSON,
    NotJSON,
    Raw,
    decode_checked,
    dumps,
    loads,
    reject_constant,
    translate_errors,
)

__all__ = [
    "MAX_DEPTH",
    "Decoder",
    "Envelope",
    "InvalidJSON",
    "JSONObject",
    "NotJSON",
    "Payload",
    "Raw",
    "canonical",
    "decode_values",
    "dumps",
    "loads",
    "scan_array",
    "scan_object",
]

JSON: TypeAlias = Any  # dict[str, JSON] | list[JSON] | str | int | float | bool | None


#: A payload: any JSON value, or its text.
Payload: TypeAlias = Any


_DECODER = json.JSONDecoder(parse_constant=reject_constant)
# Only finds the ends of values: numbers may have any length and are not converted.
_SCANNER = json.JSONDecoder(parse_constant=reject_constant, parse_int=str, parse_float=str)
_SPACE = re.compile(r"[ \t\n\r]*")


class JSONObject(Protocol):
    """A decoded JSON object: its members by name."""

    def __contains__(self, key: str) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def value(self, key: str) -> JSON:
        """Return the member's value."""

    def is_null(self, key: str) -> bool:
        """Return whether the member is null."""

    def payload(self, key: str) -> Payload:
        """Return the member as a payload: its value or its `Raw` text, depending on the decoder."""

    def nested_object(self, key: str) -> JSONObject | None:
        """Return the member as an object; None if it is not one."""

    def nested_objects(self, key: str) -> Iterator[JSONObject | None] | None:
        """Return the elements of the member as objects; None if the member is not an array.

        An element that is not an object is None. Elements are decoded one by one; each may raise `InvalidJSON`.
        """


Decoder: TypeAlias = Callable[[bytes], JSONObject]


class _Values:
    """An object whose payloads are values."""

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

    def is_null(self, key: str) -> bool:
        return self._members[key] is None

    def nested_object(self, key: str) -> JSONObject | None:
        value = self._members[key]
        return _Values(value) if isinstance(value, dict) else None

    def nested_objects(self, key: str) -> Iterator[JSONObject | None] | None:
        value = self._members[key]
        if not isinstance(value, list):
            return None
        return (_Values(element) if isinstance(element, dict) else None for element in value)


def decode_values(line: bytes) -> JSONObject:
    """Decode an object; its payloads are values. Raises `InvalidJSON`."""
    text = decode_checked(line)
    return _Values({key: value for key, value, _ in _members(text, _DECODER)})


def scan_object(text: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and text of each member of the object that `text` is. Raises `InvalidJSON`."""
    return ((key, text[start:end].encode("utf-8")) for key, _, (start, end) in _members(text, _SCANNER))


def scan_array(array: bytes) -> Iterator[bytes]:
    """Yield the text of each element of an array that was decoded before."""
    text = array.decode("utf-8")
    at = _skip_space(text, 1)
    while text[at] != "]":
        _, end = translate_errors(_SCANNER.raw_decode, text, at)
        yield text[at:end].encode("utf-8")
        at = _skip_space(text, end)
        if text[at] == ",":
            at = _skip_space(text, at + 1)


def _members(text: str, decoder: json.JSONDecoder) -> Iterator[tuple[str, JSON, tuple[int, int]]]:
    """Yield name, value and span of each member of the object that `text` is; reject a repeated name."""
    seen: set[str] = set()
    at = _skip_space(text, 0)
    if text[at : at + 1] != "{":
        translate_errors(decoder.decode, text)  # raises the reason if the text is not JSON at all
        raise InvalidJSON("expected an object")
    at = _skip_space(text, at + 1)
    more = text[at : at + 1] != "}"
    while more:
        if text[at : at + 1] != '"':
            raise InvalidJSON(f"expected a name in double quotes at column {at + 1}")
        key, at = translate_errors(decoder.raw_decode, text, at)
        if key in seen:
            raise InvalidJSON(f"repeated key {json.dumps(key)}")
        seen.add(key)
        at = _skip_space(text, at)
        if text[at : at + 1] != ":":
            raise InvalidJSON(f"expected ':' at column {at + 1}")
        start = _skip_space(text, at + 1)
        value, end = translate_errors(decoder.raw_decode, text, start)
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


_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)


class _Number(str):
    """The canonical text of a number."""

    __slots__ = ()


def _canonical_number(text: str) -> _Number:
    try:
        number = Decimal(text, _EXACT)
        return _Number("0" if number.is_zero() else str(number.normalize(_EXACT)))
    except ArithmeticError:  # the exponent is too large for a decimal: such numbers are compared as text
        return _Number(text)


_CANONICAL = json.JSONDecoder(
    parse_constant=reject_constant, parse_int=_canonical_number, parse_float=_canonical_number
)


def canonical(text: bytes) -> str:
    """Return a text that is the same for two JSON texts exactly if their values are equal.

    Key order and notation do not matter. Numbers are compared by value: ``1`` equals ``1.0``, but not ``true``.

    Args:
        text: JSON in UTF-8, as in a `Raw`.
    """
    return _write_canonical(translate_errors(_CANONICAL.decode, decode_checked(text)))


def _write_canonical(value: JSON) -> str:
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, dict):
        members = (f"{json.dumps(key)}:{_write_canonical(value[key])}" for key in sorted(value))
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_write_canonical, value)) + "]"
    return json.dumps(value)
