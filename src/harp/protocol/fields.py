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

    Attributes:
        type: the error type on the wire: ``parse_error``, ``invalid_protocol``, ``invalid_request``.
        message: the reason, with the name of the invalid member.
    """

    def __init__(self, message: str, type: str = "invalid_request") -> None:
        super().__init__(message)
        self.type = type
        self.message = message


def check(condition: bool, message: str) -> None:
    """Raise `ProtocolError` unless the condition is true."""
    if not condition:
        raise ProtocolError(message)


def decode_object(line: bytes, decoder: Decoder) -> JSONObject:
    """Decode a line, without its line feed, that must be an object.

    Raises:
        ProtocolError: of type ``parse_error`` if it is not JSON, else ``invalid_request`` if it is not an object or
            repeats a key.
    """
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
    """Return a member that must be an object; `values_only`: it has no payloads, which is faster.

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


def is_object(payload: Payload) -> bool:
    """Return whether a payload is an object."""
    return payload.startswith(b"{") if isinstance(payload, Raw) else isinstance(payload, dict)


def is_arguments(payload: Payload) -> bool:
    """Return whether a payload is an array or an object."""
    return payload.startswith((b"[", b"{")) if isinstance(payload, Raw) else isinstance(payload, (list, tuple, dict))
