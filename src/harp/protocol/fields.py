"""The protocol error, and checks of the members of a message that name the invalid member."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from harp.protocol.json_text import InvalidJSON, JSONObject, Raw

#: A payload: any JSON value, or its text as `Raw`.
Payload: TypeAlias = Any

#: A decoder of the object that a line is. Raises `InvalidJSON`.
Decoder: TypeAlias = Callable[[bytes], JSONObject]

_KINDS = {b"[": list, b"{": dict}


class ProtocolError(ValueError):
    """Data that is not a message of the protocol, or a message that is not allowed now.

    Attributes:
        type: the error type on the wire: ``parse_error``, ``invalid_protocol``, ``invalid_request``.
        message: the reason, with the name of the invalid member.
    """

    def __init__(self, message: str, type: str = "invalid_request") -> None:
        super().__init__(message)
        self.type = type
        self.message = message


def check(condition: bool, message: str) -> None:
    """Raise `ProtocolError` unless the condition holds."""
    if not condition:
        raise ProtocolError(message)


def decode_object(line: bytes, decoder: Decoder) -> JSONObject:
    """Decode a line that must be an object.

    Args:
        line: the line without its line feed.
        decoder: the decoder.

    Raises:
        ProtocolError: of type ``parse_error`` if it is not JSON, else ``invalid_request`` if it is not an object or
            repeats a key.
    """
    try:
        return decoder(line)
    except InvalidJSON as error:
        message = str(error)
        not_json = message != "expected an object" and not message.startswith("repeated key")
        raise ProtocolError(message, "parse_error" if not_json else "invalid_request") from error


def member_value(members: JSONObject, key: str) -> Any:
    """Return the value of a member. Raises `ProtocolError` if it is a number that Python cannot hold."""
    try:
        return members.value(key)
    except InvalidJSON as error:
        raise ProtocolError(f"{key}: {error}") from error


def required_object(
    members: JSONObject, key: str, expected: str = "an object", values_only: bool = False
) -> JSONObject:
    """Return a member that must be an object.

    Args:
        members: the object that has the member.
        key: its name.
        expected: the expectation in the error message.
        values_only: whether it has no payloads; this is faster.

    Raises:
        ProtocolError: it is missing, not an object, or repeats a key.
    """
    try:
        nested = members.nested_object(key, values_only) if key in members else None
    except InvalidJSON as error:
        raise ProtocolError(f"{key}: {error}") from error
    if nested is None:
        raise ProtocolError(f"{key}: expected {expected}")
    return nested


def required_string(members: JSONObject, key: str) -> str:
    """Return the value of a member that must be a string. Raises `ProtocolError`."""
    if key not in members:
        raise ProtocolError(f"{key}: missing")
    try:
        found = members.value(key)
    except InvalidJSON as error:
        raise ProtocolError(f"{key}: {error}") from error
    if not isinstance(found, str):
        raise ProtocolError(f"{key}: expected a string, got {_kind(found)}")
    return found


def reject_unknown_keys(members: JSONObject, *known: Iterable[str]) -> None:
    """Raise `ProtocolError` if there are members that are in none of the `known` keys."""
    if unknown := set(members).difference(*known):
        raise ProtocolError(f"unknown key {', '.join(sorted(unknown))}")


def is_count(number: object) -> bool:
    """Return whether it is an integer of at least 0; true and false are not."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def is_seconds(number: object) -> bool:
    """Return whether it is a positive finite number; true and false are not."""
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf


def is_container(payload: Payload, kinds: tuple[type, ...]) -> bool:
    """Return whether a payload is an array or an object.

    Args:
        payload: a value or JSON text.
        kinds: the allowed kinds: `list` for an array, `dict` for an object.
    """
    if isinstance(payload, Raw):
        return _KINDS.get(payload[:1]) in kinds
    return isinstance(payload, kinds) or (isinstance(payload, tuple) and list in kinds)


def _kind(found: object) -> str:
    if found is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return names.get(type(found), "an object")
