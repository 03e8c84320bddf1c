"""The ends of a call: the closing lines that both protocols share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, TypeAlias

from harp.protocol.json_text import JSONObject, Raw, loads
from harp.protocol.schema import Kind, Payload, WireObject

#: Bytes of the message of an end that are decoded. A legacy harpd sends texts of exceptions of any length.
_MAX_MESSAGE = 1024 * 1024
#: The start of a string up to the last complete character.
_CHARACTERS = re.compile(rb'"(?:[^"\\]++|\\u[0-9A-Fa-f]{4}|\\[^u])*+')


def _decode_message(members: JSONObject, key: str) -> str:
    payload = members.payload(key)
    if not isinstance(payload, Raw) or len(payload) <= _MAX_MESSAGE or not payload.startswith(b'"'):
        text: str = members.value(key)
        return text
    start = _CHARACTERS.match(payload, 0, _MAX_MESSAGE)
    text = loads(start[0].decode(errors="ignore") + '"') if start else ""
    return f"{text}... (cut: it had {len(payload)} bytes)"


_MESSAGE = Kind(decode=_decode_message, is_text=True)


class Returned(WireObject):
    """The procedure returned; `result` is its value."""

    result: Payload


class Raised(WireObject):
    """The procedure raised an exception."""

    type: Annotated[str, "exception.type"]
    message: Annotated[str, "exception.message", _MESSAGE]
    data: Annotated[Payload, "exception.data"] = None


class Failed(WireObject):
    """The call could not be carried out or was cut short. Also the rejection of a request."""

    type: Annotated[str, "error.type"]
    message: Annotated[str, "error.message", _MESSAGE]
    data: Annotated[Payload, "error.data"] = None


class Cancelled(WireObject):
    """The call was cancelled before it returned."""

    CONSTANTS: ClassVar = {"cancelled": True}


End: TypeAlias = Returned | Raised | Failed | Cancelled

#: The ends of a procedure that was called, by the key that identifies their line.
CALL_ENDS: Mapping[str, type[Returned | Raised | Failed]] = {"result": Returned, "exception": Raised, "error": Failed}
