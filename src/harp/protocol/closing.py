"""What a call's process says, as objects of the wire: a record, and the three ways that a call ends.

Lean, as `harp.protocol.strictjson` is and for the same reason. `harp.protocol.ends` has the values.
"""

from __future__ import annotations

from harp.protocol.strictjson import Envelope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from harp.protocol.jsontext import Payload

__all__ = ["VERSION", "error", "exception", "record", "result"]

#: The version of harpd's protocol.
VERSION = 1


def record(value: Payload) -> Envelope:
    """A record of a streaming procedure."""
    return Envelope(stream=value)


def result(value: Payload) -> Envelope:
    """The procedure returned."""
    return Envelope(result=value)


def exception(type: str, message: str, data: Payload) -> Envelope:
    """The procedure raised."""
    return Envelope(exception=_report(type, message, data))


def error(type: str, message: str, data: Payload) -> Envelope:
    """The call could not be carried out."""
    return Envelope(error=_report(type, message, data))


def _report(type: str, message: str, data: Payload) -> Envelope:
    body = Envelope(type=type, message=message)
    if data is not None:
        body["data"] = data
    return body
