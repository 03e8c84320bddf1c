"""Cuts the supervisor's data for the client at line ends, without decoding it.

The frontend needs to know whether the closing line was sent, and whether it can send its own error: it cannot send one
in the middle of a line. No input or output here.
"""

from __future__ import annotations

#: Up to this many bytes of an incomplete line are buffered. So if the supervisor dies in the middle of a line, the
#: client has received no part of it, unless the line is longer.
_MAX_PARTIAL_BYTES = 64 * 1024

#: The starts of the lines that close a call, as `harp.protocol.harpd.encode_message` writes them.
_ERROR = b'{"harp":1,"error":'
_CLOSING = (b'{"result":', b'{"exception":', _ERROR)
_HEAD = max(map(len, _CLOSING))


class LineRelay:
    """A buffer between the supervisor's data and the client."""

    def __init__(self) -> None:
        self._partial = b""
        self._head = b""  # the start of the last line that was sent
        #: Whether the last line was sent in part: only its rest can follow.
        self.mid_line = False

    @property
    def complete(self) -> bool:
        """Whether the closing line was sent."""
        return not self.mid_line and self._head.startswith(_CLOSING)

    @property
    def failed(self) -> bool:
        """Whether the closing line is an error. The connection cannot be used after it."""
        return self.complete and self._head.startswith(_ERROR)

    def feed(self, data: bytes) -> bytes:
        """Add data; return the data to send now: complete lines, or a part of a long line."""
        data = self._partial + data
        end = data.rfind(b"\n") + 1
        cut = len(data) if len(data) - end >= _MAX_PARTIAL_BYTES else end
        sent, self._partial = data[:cut], data[cut:]
        if sent:
            start = sent.rfind(b"\n", 0, -1) + 1  # of the last line, complete or not
            if start > 0 or not self.mid_line:
                self._head = sent[start : start + _HEAD]
            self.mid_line = not sent.endswith(b"\n")
        return sent
