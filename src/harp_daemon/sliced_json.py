"""Opening a message with its payloads as `Raw` text, as `harp.protocol.json_text.slice_text` does, some times faster.

msgspec slices; whatever it does not take, or may have taken too lightly, goes to the careful one. Both give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import msgspec

from harp.protocol.call_output import RECORD_PREFIX
from harp.protocol.json_text import JSONObject, Payload, Raw, slice_text
from harp.protocol.strict_json import decode_checked, loads, may_exceed_depth

_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_elements = msgspec.json.Decoder(list[msgspec.Raw])

_view: Callable[[msgspec.Raw], Sized] = memoryview

#: What stands around a member besides its value: two quotes, a colon and a comma.
_AROUND = 4


class _Members:
    """Members whose payloads are slices of the line."""

    __slots__ = ("_slices",)

    def __init__(self, slices: dict[str, msgspec.Raw]) -> None:
        self._slices = slices

    def __contains__(self, key: str) -> bool:
        return key in self._slices

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def value(self, key: str) -> Any:
        """See `JSONObject`."""
        raw = self._slices[key]
        try:
            return msgspec.json.decode(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return loads(bytes(raw))

    def payload(self, key: str) -> Payload:
        """See `JSONObject`."""
        return Raw(self._slices[key])

    def nested_object(self, key: str) -> JSONObject | None:
        """See `JSONObject`."""
        raw = bytes(self._slices[key])
        return decode_slices(raw) if raw.startswith(b"{") else None

    def nested_objects(self, key: str) -> Iterator[JSONObject | None] | None:
        """See `JSONObject`."""
        raw = self._slices[key]
        if bytes(memoryview(raw)[:1]) != b"[":
            return None
        elements = map(bytes, _elements.decode(raw))
        return (_opened(element) if element.startswith(b"{") else None for element in elements)


def decode_slices(line: bytes) -> JSONObject:
    """Open an object with its payloads as `Raw` text. Raises `InvalidJSON`."""
    decode_checked(line)
    return _opened(line)


def _opened(line: bytes) -> JSONObject:
    """Open an object whose text is checked already."""
    try:
        slices = _decoder.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return slice_text(line)
    # Of a repeated key the last one is left. The members that are left are the whole line only if nothing was dropped,
    # nor anything is spelled in more bytes than it must; then the careful one looks.
    size = 1 + len("".join(slices).encode()) + sum(map(len, map(_view, slices.values()))) + _AROUND * len(slices)
    return _Members(slices) if slices and size == len(line) else slice_text(line)


def slice_records(lines: Sequence[bytes]) -> list[Raw] | None:
    """The payloads of lines that all begin as records do, in one step for all; None: look at each.

    Each line's inside has to be a whole element of an array that is made of them all: then it is one value, and
    nothing else.
    """
    insides = [line[len(RECORD_PREFIX) : -1] for line in lines]
    if any(not line.endswith(b"}") for line in lines) or any(map(may_exceed_depth, lines)):
        return None
    text = b"[%b]" % b",".join(insides)
    try:
        text.decode("utf-8")
        found = list(map(Raw, _elements.decode(text)))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return found if found == insides else None
