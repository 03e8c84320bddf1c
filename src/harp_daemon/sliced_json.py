"""The decoder of the daemons: objects whose payloads are `Raw` slices of the text.

msgspec finds the slices. It is lenient in some cases and strict in others, so a line that it rejects, or may have read
too leniently, is scanned by `scan_slices`. Both give the same slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import msgspec

from harp.protocol.call_output import RECORD_PREFIX
from harp.protocol.json_text import JSONObject, Raw, decode_checked, loads, may_exceed_depth, scan_array, scan_object

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_array = msgspec.json.Decoder(list[msgspec.Raw])

#: What msgspec raises for text that it rejects.
_REJECTIONS = (msgspec.MsgspecError, ValueError, RecursionError)

_view: Callable[[msgspec.Raw], Sized] = memoryview

#: Bytes of a member besides its name and value: two quotes, a colon and a comma.
_MEMBER_OVERHEAD = 4


class _Slices(JSONObject):
    """An object whose members are slices of the text."""

    __slots__ = ()

    def value(self, key: str) -> Any:
        """See `JSONObject`."""
        text = self._members[key]
        try:
            return msgspec.json.decode(text)
        except _REJECTIONS:
            return loads(bytes(text))

    def payload(self, key: str) -> Raw:
        """See `JSONObject`."""
        return Raw(self._members[key])

    def is_null(self, key: str) -> bool:
        """See `JSONObject`."""
        return bytes(self._members[key]) == b"null"

    def nested_object(self, key: str) -> JSONObject | None:
        """See `JSONObject`."""
        return _nested(bytes(self._members[key]))

    def nested_objects(self, key: str) -> Iterator[JSONObject | None] | None:
        """See `JSONObject`."""
        text = bytes(self._members[key])
        if not text.startswith(b"["):
            return None
        try:
            return map(_nested, map(bytes, _array.decode(text)))
        except _REJECTIONS:
            return map(_nested, scan_array(text))


def decode_slices(line: bytes) -> JSONObject:
    """Decode an object; its payloads are `Raw` text. Raises `InvalidJSON`."""
    decode_checked(line)
    return _decode(line)


def _nested(text: bytes) -> JSONObject | None:
    return _decode(text) if text.startswith(b"{") else None


def _decode(text: bytes) -> JSONObject:
    """Decode an object whose encoding and depth were checked."""
    try:
        slices = _object.decode(text)
    except _REJECTIONS:
        return scan_slices(text)
    # msgspec keeps the last of repeated members. The line is read exactly only if nothing was dropped and nothing is
    # written in more bytes than necessary: then the sizes add up.
    names = len("".join(slices).encode())
    size = 1 + names + sum(map(len, map(_view, slices.values()))) + _MEMBER_OVERHEAD * len(slices)
    return _Slices(slices) if slices and size == len(text) else scan_slices(text)


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
