"""What the supervisor says about a call, on its way to the client: undecoded, and cut at line ends.

The gate does not read the lines. It has to know two things about them: whether the closing line has come, and
whether it may still say something itself, which it may not in the middle of a line. Nothing here reads a socket.
"""

from __future__ import annotations

__all__ = ["LineRelay"]

#: A line that is not whole is kept back up to this many bytes. So what is cut off when the supervisor dies is a
#: line that the client has seen nothing of, unless it is a long one.
_MAX_PARTIAL_BYTES = 64 * 1024

#: How the lines begin that close a call; `harp.protocol.harpd.encode_message` writes them so.
_ERROR = b'{"harp":1,"error":'
_CLOSING = (b'{"result":', b'{"exception":', _ERROR)
_HEAD = max(map(len, _CLOSING))


class LineRelay:
    """Takes the supervisor's bytes and gives what may be sent on."""

    def __init__(self) -> None:
        self._partial: bytes = b""
        self._head = b""  # how the last line that was sent on begins
        self._mid_line = False  # whether the last line that was sent on is not whole

    @property
    def complete(self) -> bool:
        """Whether the closing line was sent on."""
        return not self._mid_line and self._head.startswith(_CLOSING)

    @property
    def failed(self) -> bool:
        """Whether the closing line is an error, after which the connection is of no more use."""
        return self.complete and self._head.startswith(_ERROR)

    @property
    def mid_line(self) -> bool:
        """Whether part of a line was sent on: nothing but its rest may follow."""
        return self._mid_line

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return those to send on now: whole lines, or a piece of a long one."""
        data = self._partial + data
        cut = len(data) if len(data) - data.rfind(b"\n") > _MAX_PARTIAL_BYTES else data.rfind(b"\n") + 1
        sent, self._partial = data[:cut], data[cut:]
        if sent:
            self._track_line(sent)
        return sent

    def _track_line(self, sent: bytes) -> None:
        start = sent.rfind(b"\n", 0, -1) + 1  # where the last line begins, whole or not
        if start > 0 or not self._mid_line:
            self._head = sent[start : start + _HEAD]
        self._mid_line = not sent.endswith(b"\n")
