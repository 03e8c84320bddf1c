"""The lines of a call's process that are also lines of the wire. It imports as little as `harp.protocol.json_text`."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from harp.protocol.json_text import Raw

#: The version of harpd's protocol.
VERSION = 1
#: The start of the line of a record, as HARP's harpd writes it.
RECORD_PREFIX = b'{"stream":'


def encode_record(text: Raw) -> bytes:
    """Return the line of a record of a streaming procedure. Fast, because there may be many records."""
    return b"%b%b}\n" % (RECORD_PREFIX, text)
