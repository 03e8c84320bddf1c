"""The two kinds of calls, which forward data between supervisor and client.

A *connection-bound* call ends with its connection. Only the supervisor's lines are sent on: when the client sends data
or disconnects, the call is stopped. The connection counts for `limits.max_connections` until the call's processes have
ended. If the client requested keep-alive, data after the closing line is its next request.

For a *resumable* call, both directions are sent on without decoding; only the length of the client's lines is checked.
When either side disconnects, no error line is sent: it would look like the end of the call, but the call continues.
With keep-alive, the next request follows the command ``release``.
"""

from __future__ import annotations

import asyncio
import logging

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import MAX_COMMAND_BYTES, Release, decode_command, decode_message
from harp.protocol.lines import LineBuffer, LineTooLong
from harpd.frontend.client_connection import CALL_DIED, SHUTDOWN, Call, ClientConnection
from harpd.frontend.link import Link
from harpd.supervisor.frames import ATTACH, COMMANDS_WINDOW, END, ERROR

log = logging.getLogger("harpd.frontend")

#: Seconds for the supervisor to stop a call, beyond the two grace periods.
_STOP_MARGIN = 10.0
#: Seconds for a supervisor's first reply to a resumable call.
_FIRST_REPLY_TIMEOUT = 60.0
#: The start of the line by which a supervisor that shuts down rejects a call, as `encode_message` writes it.
_SHUTDOWN_PREFIX = b'{"harp":1,"error":{"type":"shutdown"'

AFTER_REQUEST = Failed("invalid_request", "data after the request line")


class BoundCall(Call):
    """A connection-bound call."""

    _complete = _mid_line = _unexpected_data = False
    _stop_event: str | None = None

    # From the supervisor.

    def on_lines(self, kind: int, lines: bytes) -> None:
        if not self._accepted:
            retires = kind == ERROR and lines.startswith(_SHUTDOWN_PREFIX) and self._stop_event is None
            if retires and self._connection.restart(self):
                return  # it began to retire before it received the request: it has not started the call
            self._accepted = True
            self._request = b""
            self._connection.on_accepted(self)
        if self._stop_event is not None:
            return
        self._connection.write(lines)
        self.confirm(len(lines), self._connection.reads)
        self._mid_line = not lines.endswith(b"\n")
        if kind in (END, ERROR):
            self._complete = True
            if kind == END and self._keep_alive:  # do not wait for the close, which follows the exit of the process
                self.abandon()
                self._connection.next_request(b"")

    def on_closed(self) -> None:
        if self._stop_event is not None:
            log.info(self._stop_event, extra=self._log_fields)
        self._finish()

    def _finish(self) -> None:
        if self._mid_line:
            self._connection.abort_call()
        elif self._complete:
            self._connection.end()
        elif self._unexpected_data:
            self._connection.end(AFTER_REQUEST, discard_input=True)
        else:
            self._connection.end(SHUTDOWN if self._connection.stopping else CALL_DIED)

    # From the client and the frontend.

    def on_client_data(self, data: bytes) -> None:
        if data.strip() and self._stop_event is None:
            self._unexpected_data = True
            self._stop("client sent unexpected data; call stopped")

    def disconnect(self) -> None:
        stopping = self._connection.stopping
        self._stop("frontend stops; call stopped" if stopping else "client disconnected; call stopped")

    def _stop(self, event: str) -> None:
        """Let the supervisor stop the call; its close of the channel proves that the processes have ended."""
        if self._complete:
            self.abandon()
            self._connection.end()
        elif self._stop_event is None:
            self._stop_event = event
            seconds = 2 * self._connection.limits.kill_grace + _STOP_MARGIN
            self._connection.set_timer(seconds, self._on_stop_timeout)
            self.hang_up()

    def _on_stop_timeout(self) -> None:
        log.error("call did not stop in time", extra={**self._log_fields, "cause": self._stop_event})
        self.abandon()
        self._finish()


class ResumableCall(Call):
    """A resumable call. Its connection can end, and another one can attach to it later."""

    _attached: asyncio.Future[bytes | None] | None = None  # until the first reply to `attach`
    _waits = False  # until the supervisor accepts more commands
    _unsent = b""  # data of the client, meanwhile

    def __init__(self, connection: ClientConnection, call_id: str, keep_alive: bool, request: bytes) -> None:
        super().__init__(connection, call_id, keep_alive, request)
        self._lines = LineBuffer(MAX_COMMAND_BYTES)

    def start(self, link: Link) -> None:
        self._connection.set_timer(_FIRST_REPLY_TIMEOUT, self._on_timeout)
        super().start(link)
        self._request = b""

    async def attach(self, link: Link) -> bytes | None:
        """Attach to the call in the supervisor of this link.

        Return None if the supervisor has the call. Otherwise return its error line; b"" if it died.
        """
        self._attached = asyncio.get_running_loop().create_future()
        self.open(link, ATTACH, self._request)
        try:
            return await self._attached
        finally:
            if not self._accepted:
                self.abandon()
                self.hang_up()

    # From the supervisor.

    def on_lines(self, kind: int, lines: bytes) -> None:
        if not self._accepted and not self._is_accepted(kind, lines):
            return
        self._connection.write(lines)
        self.confirm(len(lines), self._connection.reads)
        if not self._accepted:
            self._accepted = True
            self._connection.cancel_timer()
            self._connection.on_accepted(self)

    def _is_accepted(self, kind: int, lines: bytes) -> bool:
        """Return whether the first reply is for the client. Otherwise it is the outcome of `attach`."""
        if self._attached is None:
            return True
        if self._attached.done():  # cancelled
            return False
        rejected = kind == ERROR and _is_no_such_call(lines)
        self._attached.set_result(lines if rejected else None)
        return not rejected

    def add_credit(self, size: int) -> None:
        super().add_credit(size)
        if self._waits and self.may_send:
            self._waits = False
            self._connection.cancel_timer()
            self._connection.resume_reading()
            self.on_client_data(b"")

    def on_closed(self) -> None:
        if self._attached is None or self._accepted:
            self._connection.end()
        elif not self._attached.done():
            self._attached.set_result(b"")

    # From the client and the frontend.

    def on_client_data(self, data: bytes) -> None:
        """Send commands on, as many as the supervisor accepts now, and read no more until it has accepted all.

        A window at a time: a client that floods its call with commands must not delay the calls of others.
        """
        self._unsent += data
        while self._unsent and self.may_send:
            data, self._unsent = self._unsent[:COMMANDS_WINDOW], self._unsent[COMMANDS_WINDOW:]
            try:
                lines = self._lines.feed(data)
            except LineTooLong as error:
                log.warning("invalid command from client; detached", extra={**self._log_fields, "reason": str(error)})
                self._detach()
                return
            end = next((at for at, line in enumerate(lines, 1) if self._keep_alive and _is_release(line)), None)
            if lines:
                self.send_commands(b"".join([line + b"\n" for line in lines[:end]]))
            if end is not None:
                self.abandon()
                self._connection.next_request(b"\n".join((*lines[end:], self._lines.pending)) + self._unsent)
                return
        if not self.may_send and not self._waits:
            self._waits = True
            self._connection.pause_reading()
            self._connection.set_timer(self._connection.limits.write_timeout, self._on_timeout)

    def disconnect(self) -> None:
        if self._connection.stopping:
            log.info("frontend stops; client detached", extra=self._log_fields)
        self._detach()

    def _detach(self) -> None:
        self.abandon()
        self.hang_up()
        self._connection.end()

    def _on_timeout(self) -> None:
        log.error("supervisor does not respond; detached", extra=self._log_fields)
        self._detach()


def _is_no_such_call(error: bytes) -> bool:
    """Return whether a supervisor rejects a request to attach by this line because it does not have the call."""
    try:
        end = decode_message(error.removesuffix(b"\n"))
    except ProtocolError:
        return False
    return isinstance(end, Failed) and end.type == "no_such_call"


def _is_release(line: bytes) -> bool:
    """Return whether this line is the command ``release``."""
    try:
        return b"release" in line and isinstance(decode_command(line), Release)
    except ProtocolError:
        return False
