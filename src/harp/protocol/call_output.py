"""The lines of a call's process that are also lines of the wire. It imports as little as `harp.protocol.json_text`."""

from __future__ import annotations

#: The version of harpd's protocol.
VERSION = 1
#: The start of the line of a record, as HARP's harpd writes it.
RECORD_PREFIX = b'{"stream":'


def encode_record(text: bytes) -> bytes:
    """Return the line of a record, given as JSON text. Fast, because there may be many records."""
    return b"%b%b}\n" % (RECORD_PREFIX, text)
