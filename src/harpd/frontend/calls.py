"""Carries the data of one call between its supervisor and its client.

A *connection-bound* call ends with its connection. Only the supervisor's lines are sent on: when the client sends data
or disconnects, the call is stopped. The connection counts for `limits.max_connections` until the call's processes have
ended. If the client requested keep-alive, data after the closing line is its next request.

For a *resumable* call, both directions are sent on without decoding; only the length of the client's lines is checked.
When either side disconnects, no error line is sent: it would look like the end of the call, but the call continues.
With keep-alive, the next request follows the command ``release``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import MAX_COMMAND_BYTES, Release, decode_command
from harp.protocol.lines import LineBuffer, LineTooLong
from harp_daemon.timer_wheel import Timer
from harpd.config.settings import Limits
from harpd.frontend.link import Link, LinkChannel
from harpd.frontend.supervisor_links import AttachReply
from harpd.supervisor.frames import COMMANDS_WINDOW, END, ERROR

log = logging.getLogger("harpd.frontend")

#: Seconds for the supervisor to stop a call, beyond the two grace periods.
_STOP_MARGIN = 10.0
#: From this many bytes on, a client is not read before its request was handled.
MAX_EARLY_BYTES = 64 * 1024
#: Seconds that a supervisor may take for its first reply to a resumable call.
_FIRST_REPLY_TIMEOUT = 60.0
#: The start of the line by which a supervisor that shuts down rejects a call, as `encode_message` writes it.
_SHUTDOWN_PREFIX = b'{"harp":1,"error":{"type":"shutdown"'

AFTER_REQUEST = Failed("invalid_request", "data after the request line")
CALL_DIED = Failed("call_died", "the supervisor died")
SHUTDOWN = Failed("shutdown", "the daemon is shutting down")


class ClientConnection(Protocol):
    """The connection of a call's client."""

    limits: Limits
    peer: str

    @property
    def reads(self) -> bool:
        """Whether the client reads: its write buffer is not full. When it reads again, `on_client_reads` is called."""

    def write(self, lines: bytes) -> None:
        """Send lines to the client."""

    def pause_reading(self) -> None:
        """Read nothing from the client."""

    def resume_reading(self) -> None:
        """Read from the client again."""

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Return a timer that runs the callback."""

    def on_accepted(self) -> None:
        """Handle that the supervisor has the request."""

    def restart(self, call: BoundCall, link: Link) -> bool:
        """Start the call in the next supervisor; return False if the supervisor of this link is still active."""

    def end_call(self, error: Failed | None = None, discard_input: bool = False) -> None:
        """Send an error if there is one, and close the connection: its call has ended, or is detached."""

    def abort_call(self) -> None:
        """Close the connection in the middle of a line: its call has ended."""

    def next_request(self, received: bytes) -> None:
        """Wait for the next request, the beginning of which was received: the call is over."""


class _Call:
    """The common part of both kinds of calls.

    Args:
        connection: the connection of its client.
        call: its id, for the log.
        keep_alive: whether the client requested keep-alive.
        facts, arguments: the request that starts it, see `harpd.supervisor.main`; empty for an attach.
    """

    _channel: LinkChannel

    def __init__(
        self, connection: ClientConnection, call: str, keep_alive: bool, facts: bytes = b"", arguments: bytes = b""
    ) -> None:
        self._connection = connection
        self._keep_alive = keep_alive
        self._facts, self._arguments = facts, arguments
        self._log_fields = {"call": call, "peer": connection.peer}

    def on_client_reads(self) -> None:
        """Let the supervisor send more: the client reads again."""
        self._channel.take(0, reads=True)


class BoundCall(_Call):
    """A connection-bound call: the user of a channel."""

    _accepted = _complete = _mid_line = False
    _stop_event: str | None = None
    _stop_timer: Timer | None = None
    _error, _discard_input = CALL_DIED, False

    @property
    def size(self) -> int:
        """The bytes of its request."""
        return len(self._facts) + len(self._arguments)

    def start(self, link: Link) -> None:
        """Start the call in the supervisor of this link."""
        self._channel = link.start(self, self._facts, self._arguments)

    # The supervisor: `ChannelUser`.

    def on_lines(self, kind: int, lines: bytes) -> None:
        """See `ChannelUser`."""
        if not self._accepted:
            channel, retires = self._channel, kind == ERROR and lines.startswith(_SHUTDOWN_PREFIX)
            if retires and self._stop_event is None and self._connection.restart(self, channel.link):
                # It began to retire before it received the request: it has not started the call.
                channel.user = None
                return
            self._accepted = True
            self._facts = self._arguments = b""
            self._connection.on_accepted()
        if self._stop_event is not None:
            return
        self._connection.write(lines)
        self._channel.take(len(lines), self._connection.reads)
        self._mid_line = not lines.endswith(b"\n")
        if kind in (END, ERROR):
            self._complete = True
            if kind == END and self._keep_alive:  # do not wait for the close, which follows the exit of the process
                self._channel.user = None
                self._connection.next_request(b"")

    def on_credit(self) -> None:
        """See `ChannelUser`. There are no commands."""

    def on_closed(self) -> None:
        """See `ChannelUser`."""
        if self._stop_event is not None:
            log.info(self._stop_event, extra=self._log_fields)
        self._finish()

    def _finish(self) -> None:
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        if self._mid_line:
            self._connection.abort_call()
        elif self._complete:
            self._connection.end_call()
        else:
            self._connection.end_call(self._error, self._discard_input)

    # The client.

    def on_client_data(self, data: bytes) -> None:
        """Stop the call, unless the data is only space."""
        if not data.strip() or self._stop_event is not None:
            return
        if self._complete:
            self._leave()
        else:
            self._error, self._discard_input = AFTER_REQUEST, True
            self._stop("client sent unexpected data; call stopped")

    def on_client_lost(self) -> None:
        """Stop the call, unless it has ended."""
        if self._complete:
            self._leave()
        else:
            self._stop("client disconnected; call stopped")

    # The frontend.

    def detach(self) -> None:
        """Stop the call: the frontend stops and the supervisor continues."""
        if self._complete:
            self._leave()
        else:
            self._error = SHUTDOWN
            self._stop("frontend stops; call stopped")

    def on_shutdown(self) -> None:
        """Handle that the supervisor stops, too: this is the error if it exits before the call has ended."""
        self._error = SHUTDOWN

    def _leave(self) -> None:
        self._channel.user = None
        self._connection.end_call()

    def _stop(self, event: str) -> None:
        """Tell the supervisor to stop the call; its close of the channel proves that the processes have ended."""
        if self._stop_event is None:
            self._stop_event = event
            seconds = 2 * self._connection.limits.kill_grace + _STOP_MARGIN
            self._stop_timer = self._connection.call_later(seconds, self._on_stop_timeout)
            self._channel.hang_up()

    def _on_stop_timeout(self) -> None:
        log.error("call did not stop in time", extra={**self._log_fields, "cause": self._stop_event})
        self._channel.user = None
        self._finish()


class ResumableCall(_Call):
    """A resumable call: the user of a channel. It can end and another one can attach later."""

    _reply_timer: Timer | None = None  # until the first reply
    _credit_timer: Timer | None = None  # while the supervisor takes no commands
    _unhandled = b""  # data of the client: before the first reply, or while the supervisor takes no commands

    def __init__(
        self, connection: ClientConnection, call: str, keep_alive: bool, facts: bytes = b"", arguments: bytes = b""
    ) -> None:
        super().__init__(connection, call, keep_alive, facts, arguments)
        self._lines = LineBuffer(MAX_COMMAND_BYTES)

    def start(self, link: Link) -> None:
        """Start the call in the supervisor of this link."""
        self._reply_timer = self._connection.call_later(_FIRST_REPLY_TIMEOUT, self._on_timeout)
        self._channel = link.start(self, self._facts, self._arguments)
        self._facts = self._arguments = b""

    def attach(self, reply: AttachReply) -> None:
        """Use the channel of a request to attach."""
        self._channel = reply.channel
        self._connection.on_accepted()

    # The supervisor: `ChannelUser`.

    def on_lines(self, kind: int, lines: bytes) -> None:
        """See `ChannelUser`."""
        if self._reply_timer is not None:
            self._reply_timer.cancel()
            self._reply_timer = None
            self._connection.on_accepted()
        self._connection.write(lines)
        self._channel.take(len(lines), self._connection.reads)
        if self._unhandled and self._credit_timer is None:  # it waited for the first reply
            self._handle_data()

    def on_credit(self) -> None:
        """See `ChannelUser`."""
        if self._credit_timer is not None and self._channel.may_send:
            self._credit_timer.cancel()
            self._credit_timer = None
            self._handle_data()

    def on_closed(self) -> None:
        """See `ChannelUser`."""
        self._cancel_timers()
        self._connection.end_call()

    # The client.

    def on_client_data(self, data: bytes) -> None:
        """Send complete commands on, after the first reply: a supervisor that rejects the call reads none."""
        self._unhandled += data
        if self._reply_timer is None:
            self._handle_data()
        elif len(self._unhandled) > MAX_EARLY_BYTES:
            self._connection.pause_reading()

    def _handle_data(self) -> None:
        """Send commands on, as many as the supervisor takes now, and read no more until it has taken all.

        A window at a time: a client that floods its call with commands must not delay the calls of others.
        """
        while self._unhandled and self._channel.may_send:
            data, self._unhandled = self._unhandled[:COMMANDS_WINDOW], self._unhandled[COMMANDS_WINDOW:]
            try:
                lines = self._lines.feed(data)
            except LineTooLong as error:
                log.warning("invalid command from client; detached", extra={**self._log_fields, "reason": str(error)})
                self._leave()
                return
            end = next((at for at, line in enumerate(lines, 1) if self._keep_alive and _is_release(line)), None)
            if lines:
                self._channel.send_commands(b"".join([line + b"\n" for line in lines[:end]]))
            if end is not None:
                self._channel.user = None
                self._cancel_timers()
                self._connection.next_request(b"\n".join((*lines[end:], self._lines.pending)) + self._unhandled)
                return
        if self._channel.may_send:
            self._connection.resume_reading()
        elif self._credit_timer is None:
            self._connection.pause_reading()
            seconds = self._connection.limits.write_timeout
            self._credit_timer = self._connection.call_later(seconds, self._on_timeout)

    def on_client_lost(self) -> None:
        """Detach; the call continues."""
        self._leave()

    # The frontend.

    def detach(self) -> None:
        """Detach: the frontend stops and the supervisor continues."""
        log.info("frontend stops; client detached", extra=self._log_fields)
        self._leave()

    def on_shutdown(self) -> None:
        """Handle that the supervisor stops, too: it sends the end of the call."""

    def _leave(self) -> None:
        self._cancel_timers()
        self._channel.user = None
        self._channel.hang_up()
        self._connection.end_call()

    def _on_timeout(self) -> None:
        log.error("supervisor does not respond; detached", extra=self._log_fields)
        self._leave()

    def _cancel_timers(self) -> None:
        for timer in (self._reply_timer, self._credit_timer):
            if timer is not None:
                timer.cancel()


def _is_release(line: bytes) -> bool:
    """Return whether this line is the command ``release``."""
    try:
        return b"release" in line and isinstance(decode_command(line), Release)
    except ProtocolError:
        return False
