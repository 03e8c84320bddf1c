"""Strict JSON for the wire, and JSON text that is passed on without decoding.

The module `json` is lenient in four ways that this one is not: deep nesting raises RecursionError, ``NaN`` passes in
both directions, bytes may be taken for UTF-16, and repeated keys are dropped. Decoding returns a value or raises
`InvalidJSON`; encoding returns one line of ASCII or raises `NotJSON`, which has the position of the invalid part.

`Raw` is JSON text that was checked and is not decoded again: the dispatcher stores and sends payloads in this form, so
that key order, big integers and the digits of floats are unchanged. There are two decoders of a message:
`decode_values` (for clients) gives payloads as values, `harp_daemon.sliced_json.decode_slices` (for the daemons) as
`Raw`.

`harp.protocol.json_codec` encodes and decodes single values; its names are available here, too.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from json import encoder

from harp.protocol.json_codec import (
    MAX_DEPTH,
    InvalidJSON,
    NotJSON,
    encode_value,
    exceeds_depth,
    may_exceed_depth,
    reject_constant,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from harp.protocol.json_codec import JSON

__all__ = [
    "MAX_DEPTH",
    "Envelope",
    "InvalidJSON",
    "JSONObject",
    "NotJSON",
    "Raw",
    "decode_checked",
    "decode_enclosed",
    "decode_values",
    "dumps",
    "encode_name",
    "loads",
    "may_exceed_depth",
    "reject_constant",
    "scan_array",
    "scan_object",
    "translate_errors",
]


class Raw(bytes):
    """Checked JSON text in UTF-8 without a line feed; it is sent and stored unchanged."""

    __slots__ = ()


class Envelope(dict[str, "Any"]):
    """An object of the protocol, whose members may be `Raw`."""

    __slots__ = ()


_DECODER = json.JSONDecoder(parse_constant=reject_constant)
#: Returns the value at an index of a text and the index after it. Unlike `json.JSONDecoder.decode`, it is written in C.
_scan_value: Callable[[str, int], tuple[Any, int]] = _DECODER.scan_once  # type: ignore[attr-defined]
# Only finds the ends of values: numbers may have any length and are not converted.
_SCANNER = json.JSONDecoder(parse_constant=reject_constant, parse_int=str, parse_float=str)
_SPACE = re.compile(r"[ \t\n\r]*")


def loads(text: bytes | str) -> JSON:
    """Decode one JSON value.

    Args:
        text: the JSON text; bytes are UTF-8 and nothing else.

    Returns:
        The value: dict, list, str, int, float, bool or None.

    Raises:
        InvalidJSON: it is not JSON, not UTF-8, ``NaN`` or ``Infinity``, nested too deep, or a number that this
            interpreter cannot hold.
    """
    checked = decode_checked(text)
    try:
        value, end = _scan_value(checked, 0)
        if end == len(checked):
            return value
    except (ValueError, RecursionError, StopIteration):
        pass  # the decoder finds the reason
    return translate_errors(_DECODER.decode, checked)


def decode_enclosed(line: bytes, opening: bytes) -> tuple[JSON] | None:
    """Return the value of a line that consists of `opening`, a value and a brace; None: decode the line as usual."""
    if not line.startswith(opening) or may_exceed_depth(line):
        return None
    try:
        text = line.decode("utf-8")
        value, end = _DECODER.raw_decode(text, len(opening))
    except (ValueError, RecursionError):
        return None
    return (value,) if text[end:] == "}" else None


def decode_checked(text: bytes | str) -> str:
    """Return the text. Raises `InvalidJSON` if it is not UTF-8 or is nested deeper than MAX_DEPTH."""
    if isinstance(text, str):
        _check_depth(text.encode("utf-8", "surrogatepass"))
        return text
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"not UTF-8 at byte {error.start}") from error
    if len(text) > MAX_DEPTH:
        _check_depth(text)
    return decoded


def _check_depth(text: bytes) -> None:
    """Raise `InvalidJSON` for a nesting deeper than MAX_DEPTH."""
    if exceeds_depth(text):
        raise InvalidJSON(f"nested deeper than {MAX_DEPTH}")


def translate_errors(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of `json` and turn its exceptions into `InvalidJSON`."""
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


class JSONObject(dict[str, "Any"]):
    """A decoded JSON object: its members by name, read with the methods below.

    The daemons' decoder has a subclass, whose payloads are `Raw`.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        def value(self, key: str) -> JSON:
            """Return the member's value."""

        def payload(self, key: str) -> JSON:
            """Return the member as a payload: its value or its `Raw` text, depending on the decoder."""
    else:
        value = payload = dict.__getitem__

    def is_null(self, key: str) -> bool:
        """Return whether the member is null."""
        return self[key] is None

    def nested_object(self, key: str) -> JSONObject | None:
        """Return the member as an object; None if it is not one."""
        value = self[key]
        return JSONObject(value) if isinstance(value, dict) else None

    def nested_values(self, key: str) -> JSONObject | None:
        """Return the member as an object without payloads; None if it is not an object."""
        value = self.value(key)
        return JSONObject(value) if isinstance(value, dict) else None

    def nested_objects(self, key: str) -> Iterator[JSONObject | None] | None:
        """Return the elements of the member as objects; None if the member is not an array.

        An element that is not an object is None. Elements are decoded one by one; each may raise `InvalidJSON`.
        """
        value = self[key]
        if not isinstance(value, list):
            return None
        return (JSONObject(element) if isinstance(element, dict) else None for element in value)


def decode_values(line: bytes) -> JSONObject:
    """Decode an object; its payloads are values. Raises `InvalidJSON`."""
    try:
        text = line.decode() if len(line) <= MAX_DEPTH else decode_checked(line)
        found, end = _scan_value(text, 0)
    except (ValueError, RecursionError, StopIteration):
        return _decode_members(line)
    if type(found) is not dict or end != len(text) or "\\" in text:
        return _decode_members(line)
    for name in found:
        # Without escapes, each name stands in the text as it is: a repeated name is found twice.
        if text.count(f'"{name}"') != 1:
            return _decode_members(line)
    return JSONObject(found)


def _decode_members(line: bytes) -> JSONObject:
    return JSONObject({key: value for key, value, _ in _members(decode_checked(line), _DECODER)})


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


_CONSTANTS: dict[object, Raw] = {None: Raw(b"null"), True: Raw(b"true"), False: Raw(b"false")}


@lru_cache(maxsize=256)
def encode_name(name: str) -> bytes:
    """Return the name of a member and its colon. Cached: the protocol has few names."""
    return encode_value(name) + b":"


def dumps(value: JSON) -> Raw:
    """Write a value as one line of ASCII JSON, without the line feed.

    As in `json`, tuples become arrays, and keys that are int, float, bool or None become strings.

    Args:
        value: any value that has a form in JSON; an `Envelope` may have `Raw` members.

    Raises:
        NotJSON: the value, or a value in it, has no form in JSON; the exception has the position.
    """
    kind = type(value)
    if kind is Raw:
        raw: Raw = value
        return raw
    if kind is str:  # most members of messages
        return Raw(encoder.encode_basestring_ascii(value).encode())
    if kind is Envelope:
        return Raw(b"{%b}" % b",".join([encode_name(key) + dumps(member) for key, member in value.items()]))
    if value is None or value is True or value is False:
        return _CONSTANTS[value]
    return Raw(encode_value(value))
