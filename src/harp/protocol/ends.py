"""The ends of a call: the closing lines that both protocols share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from harp.protocol import call_output as closing
from harp.protocol.fields import check, required_object, required_string
from harp.protocol.json_text import Envelope, JSONObject, Payload, Raw


@dataclass(frozen=True, slots=True)
class Returned:
    """The procedure returned; `result` is its value."""

    result: Payload


@dataclass(frozen=True, slots=True)
class Raised:
    """The procedure raised an exception."""

    type: str
    message: str
    data: Payload = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The call could not be carried out or was cut short. Also the rejection of a request."""

    type: str
    message: str
    data: Payload = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The call was cancelled before it returned."""


End: TypeAlias = Returned | Raised | Failed | Cancelled


def encode_end(end: End) -> Envelope:
    """Return the object of the closing line. harpd adds its version to a `Failed`."""
    match end:
        case Returned(result):
            return closing.result(result)
        case Raised(type, message, data):
            return closing.exception(type, message, data)
        case Failed(type, message, data):
            return closing.error(type, message, data)
        case Cancelled():
            return Envelope(cancelled=True)


def decode_end(kind: str, members: JSONObject) -> End:
    """Return the end that a closing line has.

    Args:
        kind: its distinguishing key: ``result``, ``exception``, ``error`` or ``cancelled``.
        members: the line.

    Raises:
        ProtocolError: the line is not valid.
    """
    if kind == "result":
        return Returned(members.payload("result"))
    if kind == "cancelled":
        check(members.value("cancelled") is True, "cancelled: expected true")
        return Cancelled()
    body = required_object(members, kind)
    data = body.payload("data") if "data" in body else None
    if isinstance(data, Raw) and data == b"null":
        data = None
    report = Raised if kind == "exception" else Failed
    return report(required_string(body, "type"), required_string(body, "message"), data)
