"""The decoder of the daemons: objects whose payloads are `Raw` slices of the text.

msgspec finds the slices. It is lenient in some cases and strict in others, so a line that it rejects, or may have read
too leniently, is scanned by `scan_slices`. Both give the same slices.

The scan of a long text would hold the interpreter for up to a second, and so delay all other peers: in a thread, too.
So a long text is sliced by msgspec alone, which needs 60 ms for 16 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from harp.protocol.call_output import RECORD_PREFIX
from harp.protocol.json_text import (
    MAX_DEPTH,
    InvalidJSON,
    JSONObject,
    Raw,
    decode_checked,
    loads,
    may_exceed_depth,
    scan_array,
    scan_object,
)

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_array = msgspec.json.Decoder(list[msgspec.Raw])

#: Bytes from which a text is long, and the maximum number of members of a long object.
_LONG, _MAX_MEMBERS = 64 * 1024, 100
#: White space, the name of a member, and its colon. Names of the protocol are short and have no escapes.
_NAME = re.compile(rb'[ \t\n\r]*"([^"\\]*)"[ \t\n\r]*:[ \t\n\r]*')
#: What follows a value: a comma, or a brace and the end.
_NEXT = re.compile(rb"[ \t\n\r]*(?:,|}[ \t\n\r]*\Z)")
#: What msgspec raises for text that it rejects.
_REJECTIONS = (msgspec.MsgspecError, ValueError, RecursionError)


class _Slices(JSONObject):
    """An object whose members are slices of the text."""

    __slots__ = ()

    def value(self, key: str) -> Any:
        """See `JSONObject`."""
        text = bytes(self[key])
        try:
            value = msgspec.json.decode(text)
            if type(value) is not dict or msgspec.json.encode(value) == text:
                return value
        except _REJECTIONS:
            pass
        _nested(text)  # rejects an object with a repeated name
        return loads(text)

    def payload(self, key: str) -> Raw:
        """See `JSONObject`."""
        return Raw(self[key])

    def is_null(self, key: str) -> bool:
        """See `JSONObject`."""
        return bytes(self[key]) == b"null"

    def nested_object(self, key: str) -> JSONObject | None:
        """See `JSONObject`."""
        return _nested(bytes(self[key]))

    def nested_objects(self, key: str) -> Iterator[JSONObject | None] | None:
        """See `JSONObject`."""
        text = bytes(self[key])
        if not text.startswith(b"["):
            return None
        try:
            return map(_nested, map(bytes, _array.decode(text)))
        except _REJECTIONS:
            return map(_nested, scan_array(text))


def decode_slices(line: bytes) -> JSONObject:
    """Decode an object; its payloads are `Raw` text. Raises `InvalidJSON`."""
    if len(line) > MAX_DEPTH or not line.isascii():
        decode_checked(line)
    return _decode(line)


def _nested(text: bytes) -> JSONObject | None:
    return _decode(text) if text.startswith(b"{") else None


def _decode(text: bytes) -> JSONObject:
    """Decode an object whose encoding and depth were checked."""
    if len(text) > _LONG:
        return _decode_long(text)
    try:
        slices = _object.decode(text)
        # msgspec keeps the last of repeated members, among others. It has read the line exactly if it writes it so.
        # Spaces between members are usual; inside of them, none is added or lost.
        written = msgspec.json.encode(slices)
        if written == text or written.replace(b" ", b"") == text.replace(b" ", b""):
            return _Slices(slices)
    except _REJECTIONS:
        pass
    return scan_slices(text)


def _decode_long(text: bytes) -> JSONObject:
    """Decode a long object with msgspec alone. Raises `InvalidJSON`."""
    # msgspec rejects escapes of lone surrogates: slice a text of the same structure that has none.
    plain = text.replace(rb"\ud", rb"\u0").replace(rb"\uD", rb"\u0") if rb"\u" in text else text
    try:
        slices = _object.decode(plain)
    except _REJECTIONS as error:
        raise InvalidJSON(str(error)) from error
    if len(slices) > _MAX_MEMBERS:
        raise InvalidJSON(f"more than {_MAX_MEMBERS} members")
    return _Slices(_find_slices(text, plain, {name.encode(): bytes(value) for name, value in slices.items()}))


def _find_slices(text: bytes, plain: bytes, values: dict[bytes, bytes]) -> dict[str, bytes]:
    """Return the slices of a text with the values of a text of the same structure, which msgspec has found.

    Raises `InvalidJSON` for a repeated name, of which msgspec keeps the last value, and for an unusual name.
    """
    found: dict[str, bytes] = {}
    at = plain.index(b"{") + 1
    for _ in values:
        match = _NAME.match(plain, at)
        name = None if match is None else match[1]
        if (
            match is None
            or name not in values
            or name.decode() in found
            or not plain.startswith(values[name], match.end())
        ):
            raise InvalidJSON("a repeated name, or a name with escapes, in a long object")
        at = match.end() + len(values[name])
        found[name.decode()] = text[match.end() : at]
        following = _NEXT.match(plain, at)
        at = at if following is None else following.end()
    if at != len(text):
        raise InvalidJSON("a repeated name in a long object")
    return found


def scan_slices(line: bytes) -> JSONObject:
    """Decode an object as `decode_slices` does, without msgspec: slower, for any text. Raises `InvalidJSON`."""
    return _Slices(dict(scan_object(decode_checked(line))))


def slice_records(lines: Sequence[bytes]) -> list[Raw] | None:
    """Return the payloads of many lines that all begin as records do, in one step; None: decode line by line.

    The insides of the lines must be the elements of one array: then each is one value and nothing else.
    """
    insides = [line[len(RECORD_PREFIX) : -1] for line in lines]
    if any(not line.endswith(b"}") for line in lines) or any(map(may_exceed_depth, lines)):
        return None
    text = b"[%b]" % b",".join(insides)
    try:
        text.decode("utf-8")
        found = list(map(Raw, _array.decode(text)))
    except _REJECTIONS:
        return None
    return found if found == insides else None
