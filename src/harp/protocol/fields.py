"""The protocol error, and checks of a message's members that name the member at fault."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from harp.protocol.json_text import Decoder, InvalidJSON, JSONObject, NotJSON, Payload, Raw, dumps

_KINDS = {b"[": list, b"{": dict}


class ProtocolError(ValueError):
    """What came is not a message of the protocol, or not one that may come now.

    Attributes:
        type: the error type of the wire: ``parse_error``, ``invalid_protocol``, ``invalid_request``.
        message: what is wrong, and where.
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
    """Open a line as an object; ``parse_error`` when it is not JSON, ``invalid_request`` when it is no object."""
    try:
        return decoder(line)
    except InvalidJSON as error:
        message = str(error)
        not_json = message != "expected an object" and not message.startswith("repeated key")
        raise ProtocolError(message, "parse_error" if not_json else "invalid_request") from error


def member_value(members: JSONObject, key: str) -> Any:
    """A member's value; a number that can't be held is a protocol error as well."""
    try:
        return members.value(key)
    except InvalidJSON as error:
        raise ProtocolError(f"{key}: {error}") from error


def required_string(members: JSONObject, key: str) -> str:
    """A member that must be there and be a string."""
    if key not in members:
        raise ProtocolError(f"{key}: missing")
    found = member_value(members, key)
    if not isinstance(found, str):
        raise ProtocolError(f"{key}: expected a string, got {_kind(found)}")
    return found


def reject_unknown_keys(members: JSONObject, known: Iterable[str]) -> None:
    """Refuse members that the message does not have."""
    if unknown := set(members).difference(known):
        raise ProtocolError(f"unknown key {', '.join(sorted(unknown))}")


def is_count(number: object) -> bool:
    """Whether it is an integer from 0 on; true is none."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def is_seconds(number: object) -> bool:
    """Whether it is a positive number; true is none."""
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf


def encode_payload(payload: Payload) -> Raw:
    """A payload as JSON text.

    Raises:
        ProtocolError: it is a value that JSON can't carry.
    """
    try:
        return dumps(payload)
    except NotJSON as error:
        raise ProtocolError(str(error)) from error


def is_container(payload: Payload, kinds: tuple[type, ...]) -> bool:
    """Whether a payload, value or text, is an array (list, tuple) or an object (dict) as asked."""
    if isinstance(payload, Raw):
        return _KINDS.get(payload[:1]) in kinds
    return isinstance(payload, kinds) or (isinstance(payload, tuple) and list in kinds)


def _kind(found: object) -> str:
    if found is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return names.get(type(found), "an object")
