"""The TLS connection of a client: handshake, flow control, one deadline at a time, an orderly close; and its call.

`harpd.frontend.connection` handles the requests, and `harpd.frontend.calls` has the two kinds of calls.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from harp.protocol.ends import Failed
from harp.protocol.harpd import encode_message
from harp_daemon.memory_quota import MemoryQuota, Reservation
from harp_daemon.timer_wheel import Timer, TimerWheel
from harpd.config.loaded import LoadedConfig
from harpd.frontend.link import Channel, Link
from harpd.supervisor.frames import START

log = logging.getLogger("harpd.frontend")

#: From this many unsent bytes on, the supervisor should wait.
_HIGH_WATER = 64 * 1024
#: Seconds for the TLS shutdown, including the last buffered bytes.
_CLOSE_TIMEOUT = 30.0
#: After an error the client may still be sending. Its data is read and discarded, because unread data would make the
#: kernel reset the connection, and the client could lose the error. Reading ends after `_QUIET_TIME` seconds without
#: data, at the latest after `_MAX_DISCARD_TIME` seconds.
_QUIET_TIME, _MAX_DISCARD_TIME = 0.5, 10.0

CALL_DIED = Failed("call_died", "the supervisor died")
SHUTDOWN = Failed("shutdown", "the daemon is shutting down")
_TOO_MANY_CONNECTIONS = Failed("too_many_connections", "limits.max_connections is reached; try again later")
_INTERNAL_ERROR = Failed("system_error", "internal error of harpd; its log has the details")


class Call(Channel):
    """A call of either kind: its channel to the supervisor, and the connection of the client.

    `request` is the body of the first frame, see `harpd.supervisor.main`.
    """

    _accepted = False  # the supervisor has replied to the request

    def __init__(self, connection: ClientConnection, call_id: str, keep_alive: bool, request: bytes) -> None:
        self._connection = connection
        self._keep_alive = keep_alive  # requested by the client
        self._request = request
        self._log_fields = {"call": call_id, "peer": connection.peer}

    def start(self, link: Link) -> None:
        """Start the call in the supervisor of this link."""
        self.open(link, START, self._request)

    @abstractmethod
    def on_client_data(self, data: bytes) -> None:
        """Handle data of the client, after the first reply of the supervisor."""

    @abstractmethod
    def disconnect(self) -> None:
        """Handle that the client has disconnected, or that the frontend stops and the supervisor continues."""


class ClientConnection(asyncio.Protocol, ABC):
    """A client's connection, which owns the accepted socket. A subclass handles its requests.

    `quota` is the memory for long request lines, and `peer` the client's address and port.
    """

    def __init__(
        self, accepted: socket.socket, peer: str, config: LoadedConfig, quota: MemoryQuota, timers: TimerWheel
    ) -> None:
        self.peer = peer
        self.limits = config.configuration.limits
        self.reads = True  # the client reads: its write buffer is not full
        self.stopping = False  # the frontend stops
        self._socket = accepted
        self._tls = config.context
        self._reservation = Reservation(quota)  # of the request, until the supervisor has it
        self._timers = timers
        self._transport: asyncio.Transport | None = None
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._receive: Callable[[bytes], None] = self._ignore  # handles the client's data in the present phase
        self._call: Call | None = None
        self._task: asyncio.Task[None] | None = None  # work of the present phase that has to wait
        self._timer: Timer | None = None  # of the present phase
        self._write_timer: Timer | None = None
        self._written = 0  # bytes
        self._discard_until = 0.0
        self._rejected = self._closing = self._lost = False

    # From the acceptor.

    def serve(self) -> asyncio.Future[None]:
        """Handle the requests; return a future that is done when the connection is closed, and can be cancelled."""
        self._task = asyncio.get_running_loop().create_task(self._shake_hands())
        self._closed.add_done_callback(self._on_closed)
        return self._closed

    def reject(self) -> asyncio.Future[None]:
        """Reply that there are too many connections; see `serve`."""
        self._rejected = True
        return self.serve()

    async def _shake_hands(self) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self,
                self._socket,
                ssl=self._tls,
                ssl_handshake_timeout=self.limits.handshake_timeout,
                ssl_shutdown_timeout=_CLOSE_TIMEOUT,
            )
        except OSError as error:  # includes ssl.SSLError
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            log.info("TLS handshake failed", extra={"peer": self.peer, "reason": reason})
            self._check_closed()

    def _on_closed(self, closed: asyncio.Future[None]) -> None:
        if closed.cancelled():
            self._cancel_task()
            self._abort()

    # From the transport: `asyncio.Protocol`.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._task = transport, None
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        if self._rejected:
            self.end(_TOO_MANY_CONNECTIONS, discard_input=True)
        else:
            self._on_connected()

    def data_received(self, data: bytes) -> None:
        try:
            self._receive(data)
        except Exception:
            log.exception("connection failed", extra={"peer": self.peer})
            self._fail()

    def eof_received(self) -> None:
        self._on_lost()
        if self._call is not None:  # it is being stopped
            self._abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._on_lost()
        self._check_closed()

    def pause_writing(self) -> None:
        self.reads = False
        self._check_progress(before=-math.inf)

    def resume_writing(self) -> None:
        self.reads = True
        if self._write_timer is not None:
            self._write_timer.cancel()
        if self._closing:
            self._close()
        elif self._call is not None:
            self._call.confirm(0, reads=True)

    def _on_lost(self) -> None:
        if self._lost:
            return
        self._lost = True
        log.debug("client disconnected", extra={"peer": self.peer})
        self._cancel_task()
        self._reservation.release()
        if self._call is not None:
            self._call.disconnect()
        else:
            self.cancel_timer()

    def _check_progress(self, before: float) -> None:
        """Disconnect a client that has read nothing for `limits.write_timeout` seconds; it had read `before` bytes."""
        if self._transport is None:
            return
        unsent = self._transport.get_write_buffer_size()
        read = self._written - unsent
        if read <= before:
            log.info("client does not read", extra={"peer": self.peer, "unsent": unsent})
            self._abort()
        else:
            self._write_timer = self._timers.call_later(self.limits.write_timeout, partial(self._check_progress, read))

    # From the call.

    def write(self, lines: bytes) -> None:
        self._written += len(lines)
        if self._transport is not None:
            self._transport.write(lines)

    def pause_reading(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def set_timer(self, seconds: float, callback: Callable[[], object]) -> None:
        """Run the callback after this time, unless the timer is cancelled or set again before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timers.call_later(seconds, callback)

    def cancel_timer(self) -> None:
        """Cancel the timer, if it is set."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end(self, error: Failed | None = None, discard_input: bool = False) -> None:
        """Send an error if there is one, and close the connection: its call has ended or is detached."""
        self._call = None
        self._reservation.release()
        if error is not None and not self._lost:
            level = logging.ERROR if error in (CALL_DIED, _INTERNAL_ERROR) else logging.INFO
            fields = {"peer": self.peer, "type": error.type, "reason": error.message}
            log.log(level, "replied with an error", extra=fields)
            self.write(encode_message(error))
        if discard_input and not self._lost:
            self._receive = self._discard
            self._discard_until = time.monotonic() + _MAX_DISCARD_TIME
            self.set_timer(_QUIET_TIME, self._close)
            self.resume_reading()
        else:
            self._close()

    def abort_call(self) -> None:
        """Close the connection in the middle of a line: its call has ended."""
        self._call = None
        self.cancel_timer()
        self._abort()
        self._check_closed()

    # The end.

    def _discard(self, data: bytes) -> None:
        self.set_timer(min(_QUIET_TIME, self._discard_until - time.monotonic()), self._close)

    def _ignore(self, data: bytes) -> None:
        pass

    def _fail(self) -> None:
        if self._call is None:
            self.end(_INTERNAL_ERROR)
        else:
            self._abort()  # stops or detaches the call

    def _close(self) -> None:
        """Close the connection when all written data is sent, as long as the client reads."""
        self._closing = True
        self._receive = self._ignore
        self.cancel_timer()
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=1, low=0)  # calls `pause_writing` if there is unsent data
            if self.reads and not self._transport.is_closing():
                self._transport.close()  # a second close makes abort raise AttributeError: asyncio of Python 3.11.2
        self._check_closed()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _check_closed(self) -> None:
        """Let `serve` return when the connection is closed and no call is being stopped."""
        if self._transport is None and self._call is None and not self._closed.done():
            self._closed.set_result(None)

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    # The requests.

    @abstractmethod
    def _on_connected(self) -> None:
        """Handle that the handshake is done."""

    @abstractmethod
    def on_accepted(self, call: Call) -> None:
        """Handle that the supervisor has replied to the request: pass the client's data to the call."""

    @abstractmethod
    def restart(self, call: Call) -> bool:
        """Start the call in the next supervisor; return False if its supervisor is still the active one."""

    @abstractmethod
    def next_request(self, received: bytes) -> None:
        """Wait for the next request, the beginning of which was received: the call is over."""
