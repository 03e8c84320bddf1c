"""What the warden says about a call, on its way to the client: undecoded, and cut at line ends.

The gate does not read the lines. It has to know two things about them: whether the closing line has come, and
whether it may still say something itself, which it may not in the middle of a line. Nothing here reads a socket.
"""

from __future__ import annotations

__all__ = ["Relay"]

#: A line that is not whole is kept back up to this many bytes. So what is cut off when the warden dies is a
#: line that the client has seen nothing of, unless it is a long one.
_KEPT_BACK = 64 * 1024

#: How the lines begin that close a call; `harp.protocol.harpd.encode_message` writes them so.
_ERROR = b'{"harp":1,"error":'
_CLOSING = (b'{"result":', b'{"exception":', _ERROR)
_HEAD = max(map(len, _CLOSING))


class Relay:
    """Takes the warden's bytes and gives what may be sent on."""

    def __init__(self) -> None:
        self._kept: bytes = b""
        self._head = b""  # how the last line that was sent on begins
        self._inside = False  # whether the last line that was sent on is not whole

    @property
    def ended(self) -> bool:
        """Whether the closing line was sent on."""
        return not self._inside and self._head.startswith(_CLOSING)

    @property
    def failed(self) -> bool:
        """Whether the closing line is an error, after which the connection is of no more use."""
        return self.ended and self._head.startswith(_ERROR)

    @property
    def torn(self) -> bool:
        """Whether part of a line was sent on: nothing but its rest may follow."""
        return self._inside

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return those to send on now: whole lines, or a piece of a long one."""
        data = self._kept + data
        cut = len(data) if len(data) - data.rfind(b"\n") > _KEPT_BACK else data.rfind(b"\n") + 1
        sent, self._kept = data[:cut], data[cut:]
        if sent:
            self._note(sent)
        return sent

    def _note(self, sent: bytes) -> None:
        start = sent.rfind(b"\n", 0, -1) + 1  # where the last line begins, whole or not
        if start > 0 or not self._inside:
            self._head = sent[start : start + _HEAD]
        self._inside = not sent.endswith(b"\n")
