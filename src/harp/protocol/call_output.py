"""What a call's process says: a record, as a line of the wire, and the three ways that a call ends, as objects.

Lean, as `harp.protocol.strict_json` is and for the same reason. `harp.protocol.ends` has the values.
"""

from __future__ import annotations

from harp.protocol.strict_json import Envelope, Raw

TYPE_CHECKING = False
if TYPE_CHECKING:
    from harp.protocol.json_text import Payload

#: The version of harpd's protocol.
VERSION = 1
#: How the line of a record begins, in all that a harpd of ours says.
RECORD_PREFIX = b'{"stream":'


def record(text: Raw) -> bytes:
    """The line of a record of a streaming procedure. There may be many: without a step for each member."""
    return b"%b%b}\n" % (RECORD_PREFIX, text)


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
