"""The output of a call's process: a record as a line of the wire, and the ends of a call as objects.

As lean as `harp.protocol.strict_json`, for the same reason. `harp.protocol.ends` has the ends as values.
"""

from __future__ import annotations

from harp.protocol.strict_json import Envelope, Raw

TYPE_CHECKING = False
if TYPE_CHECKING:
    from harp.protocol.json_text import Payload

#: The version of harpd's protocol.
VERSION = 1
#: The start of the line of a record, as HARP's harpd writes it.
RECORD_PREFIX = b'{"stream":'


def record(text: Raw) -> bytes:
    """Return the line of a record of a streaming procedure. Fast, because there may be many records."""
    return b"%b%b}\n" % (RECORD_PREFIX, text)


def result(value: Payload) -> Envelope:
    """Return the end of a procedure that returned."""
    return Envelope(result=value)


def exception(type: str, message: str, data: Payload) -> Envelope:
    """Return the end of a procedure that raised an exception."""
    return Envelope(exception=_report(type, message, data))


def error(type: str, message: str, data: Payload) -> Envelope:
    """Return the end of a call that could not be carried out."""
    return Envelope(error=_report(type, message, data))


def _report(type: str, message: str, data: Payload) -> Envelope:
    body = Envelope(type=type, message=message)
    if data is not None:
        body["data"] = data
    return body
