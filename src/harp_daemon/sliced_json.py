"""The decoder of the daemons: objects whose payloads are `Raw` slices of the text.

msgspec finds the slices. It has read an object exactly if it writes the same text again. Otherwise, for example if a
key is repeated, each slice is found again in the text. Texts of more than `LONG` bytes are decoded in short steps: see
`harp_daemon.json_pieces`. Of these, only strings have a value; arrays, objects and numbers are payloads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from harp.protocol.call_output import RECORD_PREFIX
from harp.protocol.json_text import (
    MAX_DEPTH,
    MAX_LINE_DEPTH,
    InvalidJSON,
    JSONObject,
    Raw,
    decode_checked,
    decode_values,
    loads,
    may_exceed_depth,
)
from harp_daemon.json_pieces import find_parts

#: Bytes from which a text is long, and the most bytes of a string that is not a payload.
LONG, _MAX_STRING = 64 * 1024, 1024 * 1024
_MAX_MEMBERS = 100  #: Maximum number of members of an object.
_SPACE = b" \t\r\n"
#: The text between two values: white space, a comma, a name and its colon.
_NAME = re.compile(rb'[ \t\r\n,]*("(?:[^"\\]|\\.){0,9999}+")[ \t\r\n]*:[ \t\r\n]*')
#: The exceptions of msgspec for text that it rejects.
_REJECTIONS = (msgspec.MsgspecError, ValueError, RecursionError)

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_array = msgspec.json.Decoder(list[msgspec.Raw])


class _Slices(JSONObject):
    """An object whose members are slices of the text."""

    __slots__ = ()

    def value(self, key: str) -> Any:
        """See `JSONObject`."""
        text = bytes(self[key])
        if len(text) > LONG and (len(text) > _MAX_STRING or not text.startswith(b'"')):
            raise InvalidJSON(f"expected a string of at most {_MAX_STRING} bytes, or another value of at most {LONG}")
        try:
            value = msgspec.json.decode(text)
            if type(value) is not dict or msgspec.json.encode(value) == text:
                return value
        except _REJECTIONS:
            pass
        _nested(text)  # rejects an object with a repeated key
        return loads(text)

    def payload(self, key: str) -> Raw:
        """See `JSONObject`."""
        return Raw(self[key])

    def is_null(self, key: str) -> bool:
        """See `JSONObject`."""
        return bytes(self[key]) == b"null"

    def nested_object(self, key: str, values_only: bool = False) -> JSONObject | None:
        """See `JSONObject`."""
        return super().nested_object(key) if values_only else _nested(bytes(self[key]))

    def nested_objects(self, key: str) -> Iterator[JSONObject | None] | None:
        """See `JSONObject`."""
        text = bytes(self[key])
        return map(_nested, slice_elements(text)) if text.startswith(b"[") else None


def decode_slices(line: bytes) -> JSONObject:
    """Decode an object; its payloads are `Raw` text. Raises `InvalidJSON`."""
    if len(line) > LONG:
        return _find_members(line)
    if len(line) > MAX_DEPTH or not line.isascii():
        decode_checked(line, MAX_LINE_DEPTH)
    return _decode(line)


def _nested(text: bytes) -> JSONObject | None:
    if not text.startswith(b"{"):
        return None
    return _find_members(text, is_checked=True) if len(text) > LONG else _decode(text)


def _find_members(text: bytes, is_checked: bool = False) -> JSONObject:
    """Decode a long object in short steps. Raises `InvalidJSON`."""
    if not text.lstrip(_SPACE).startswith(b"{"):
        raise InvalidJSON("expected an object")
    found: dict[str, bytes] = {}
    for start, end in find_parts(text, is_checked):
        if len(found) == _MAX_MEMBERS:
            raise InvalidJSON(f"more than {_MAX_MEMBERS} members")
        name = _NAME.match(text, start, end)
        if name is None:
            if text[start:end].strip(_SPACE):
                raise InvalidJSON("the name of a member is too long")
        elif (key := loads(name[1])) in found:
            raise InvalidJSON(f"repeated key {name[1].decode()}")
        else:
            found[key] = text[name.end() : end].rstrip(_SPACE)
    return _Slices(found)


def _decode(text: bytes) -> JSONObject:
    """Decode an object whose encoding and depth were checked. Raises `InvalidJSON`."""
    try:
        slices = _object.decode(text)
        written = msgspec.json.encode(slices)
        # Spaces between members are usual; spaces inside of them are unchanged.
        is_equal = written == text or written.replace(b" ", b"") == text.replace(b" ", b"")
        if is_equal and len(slices) <= _MAX_MEMBERS:
            return _Slices(slices)
    except _REJECTIONS:
        pass
    return _find_slices(text)


def _find_slices(text: bytes) -> JSONObject:
    """Decode an object member by member."""
    plain = _without_surrogates(text)
    try:
        values = _object.decode(plain)
    except _REJECTIONS as error:
        decode_values(text)  # raises the reason as clients do
        raise InvalidJSON(str(error)) from error
    if len(values) > _MAX_MEMBERS:
        raise InvalidJSON(f"more than {_MAX_MEMBERS} members")
    found: dict[str, bytes] = {}
    at = plain.index(b"{") + 1
    while name := _NAME.match(plain, at):
        value = bytes(values.pop(loads(name[1]), b""))
        at = name.end() + len(value)
        if not value or not plain.startswith(value, name.end()):  # msgspec has the last value of a repeated key
            raise InvalidJSON(f"repeated key {name[1].decode()}")
        found[loads(text[slice(*name.span(1))])] = text[name.end() : at]
    if values:
        raise InvalidJSON("the name of a member is too long")
    return _Slices(found)


def slice_elements(array: bytes) -> Iterator[bytes]:
    """Yield the text of each element of an array, which is valid JSON."""
    if len(array) > LONG:
        for start, end in find_parts(array, is_checked=True):
            if element := array[start:end].strip(_SPACE):
                yield element
        return
    plain = _without_surrogates(array)
    end = 1
    for element in map(bytes, _array.decode(plain)):
        start = plain.index(element, end)  # only white space and a comma are before it
        end = start + len(element)
        yield array[start:end]


def _without_surrogates(text: bytes) -> bytes:
    """Return a text of the same structure without escapes of lone surrogates, which msgspec rejects."""
    return text.replace(rb"\ud", rb"\u0").replace(rb"\uD", rb"\u0")


def slice_records(lines: Sequence[bytes]) -> list[bytes] | None:
    """Return the payloads of many lines that all begin as records do, in one step; None: decode line by line.

    The insides of the lines must be the elements of one array: then each is exactly one value.
    """
    insides = [line[len(RECORD_PREFIX) : -1] for line in lines]
    if any(not line.endswith(b"}") for line in lines):
        return None
    if max(map(len, lines)) > MAX_DEPTH and any(map(may_exceed_depth, lines)):
        return None
    text = b"[%b]" % b",".join(insides)
    try:
        text.decode("utf-8")
        found = list(map(bytes, _array.decode(text)))
    except _REJECTIONS:
        return None
    # A space after the colon is usual, too. Within an array, only white space can differ.
    return found if found == insides or found == [inside.strip() for inside in insides] else None
