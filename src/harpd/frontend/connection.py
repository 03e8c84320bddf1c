"""The TLS connection of a client, its requests, and its call.

A connection has phases, each with its own deadline:

    handshake -> request line -> authentication -> call -> close; with keep-alive: -> next request line

It is driven by data of the client, lines of the supervisor, and timers. On the usual path there is no task: the
link to the supervisor is open, and the password is in the cache. A client that is silent, slow or sends invalid data
costs only its own connection and one log line. The owner id and the secret in a request for a resumable call are sent
to the supervisor and never logged.

There are two kinds of calls, which forward data between supervisor and client.

A *connection-bound* call ends with its connection. Only the supervisor's lines are sent on: when the client sends data
or disconnects, the call is stopped. The connection counts for `limits.max_connections` until the call's processes have
ended. If the client requested keep-alive, data after the closing line is its next request.

For a *resumable* call, both directions are sent on without decoding; only the length of the client's lines is checked.
When either side disconnects, no error line is sent: it would look like the end of the call, but the call continues.
With keep-alive, the next request follows the command ``release``.

Spec: docs/protocol.md, harpd.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harp import __version__
from harp.protocol import harpd as messages
from harp.protocol.ends import Failed
from harp.protocol.harpd import AnyRequest, Attach, ListCalls, Request, encode_message
from harp.protocol.json_text import dumps
from harp.protocol.lines import LineBuffer, LineTooLong, LongLine
from harp.protocol.schema import ProtocolError
from harp_daemon.acceptor import network
from harp_daemon.event_loop import LONG_LINE, run_in_turn
from harp_daemon.memory_quota import MemoryQuota, Reservation
from harp_daemon.settings import OLD_TLS_REASONS
from harp_daemon.sliced_json import decode_slices
from harp_daemon.timer_wheel import Timer, TimerWheel
from harpd.config.loaded import LoadedConfig
from harpd.control.supervisor_client import SupervisorError
from harpd.frontend.authenticator import Authenticator, PasswordNotChecked
from harpd.frontend.link import Channel, Link, SupervisorLinks
from harpd.supervisor.frames import ATTACH, COMMANDS_WINDOW, END, ERROR, START

log = logging.getLogger("harpd.frontend")

#: From this many unsent bytes on, the supervisor should wait.
_HIGH_WATER = 64 * 1024
#: Seconds for the TLS shutdown, including the last buffered bytes.
_CLOSE_TIMEOUT = 30.0
#: After an error the client may still be sending. Its data is read and discarded, because unread data would make the
#: kernel reset the connection, and the client could lose the error. Reading ends after `_QUIET_TIME` seconds without
#: data, at the latest after `_MAX_DISCARD_TIME` seconds.
_QUIET_TIME, _MAX_DISCARD_TIME = 0.5, 10.0
#: Most characters of a user name or a procedure name in the log.
_MAX_LOGGED_NAME = 64
#: From this many bytes on, a client is not read before its request was handled.
_MAX_EARLY_BYTES = 64 * 1024
#: Seconds between two heartbeats. After twice this time without one, the process was suspended.
_HEARTBEAT_INTERVAL = 0.5
#: Seconds for the supervisor to stop a call, beyond the two grace periods.
_STOP_MARGIN = 10.0
#: Seconds for a supervisor's first reply to a resumable call.
_FIRST_REPLY_TIMEOUT = 60.0
#: The first bytes of two replies of a supervisor, as `encode_message` writes them: it shuts down; it does not have the
#: call.
_SHUTDOWN_PREFIX = b'{"harp":1,"error":{"type":"shutdown"'
_NO_SUCH_CALL_PREFIX = b'{"harp":1,"error":{"type":"no_such_call"'
#: The terms of a resumable call that its supervisor needs in addition to the id.
_TERMS = tuple(name for name in messages.RequestedTerms.__match_args__ if name != "id")

#: What this harpd supports beside resumable calls.
_FEATURES = messages.CALLER, messages.SECRETS

#: Returns the seconds since the system's start, including the time in which it was suspended.
_boottime = partial(time.clock_gettime, time.CLOCK_BOOTTIME)

_CALL_DIED = Failed("call_died", "the supervisor died")
_SHUTDOWN = Failed("shutdown", "the daemon is shutting down")
_TOO_MANY_CONNECTIONS = Failed("too_many_connections", "too many connections, in all or from here; try again later")
_INTERNAL_ERROR = Failed("system_error", "internal error of harpd; its log has the details")
_AUTH_ERROR = Failed("auth_error", "unknown user or wrong password")
_NOT_CHECKED = Failed(
    "authentication_timeout", "the password was not checked in time; it may be right; try again later"
)
_REQUEST_MEMORY_FULL = Failed("too_many_connections", "limits.request_memory is used up; try again later")
_AFTER_REQUEST = Failed("invalid_request", "data after the request line")


class ArrivalClock:
    """A clock that gives a time before the arrival of received data, even after a suspension of the process.

    Data that was sent to a suspended process is read after it continues. A request in this data is as old as the
    suspension, and its dispatcher may have abandoned it. So a start that is delayed for too long must be recognised.

    Each heartbeat records the time. Data that is read in the same or in the next turn of the event loop may have
    arrived before it: the present turn may have looked for data before the heartbeat. Data of later turns arrived
    after it.
    """

    def __init__(self) -> None:
        self._confirmed = self._recorded = _boottime()

    def run(self) -> None:
        """Record a heartbeat now and after each interval."""
        self._record()
        asyncio.get_running_loop().call_later(_HEARTBEAT_INTERVAL, self.run)

    def earliest_arrival(self) -> float:
        """Return a time before the arrival of the data that is read in this turn; usually half a second before."""
        if _boottime() - self._recorded > 2 * _HEARTBEAT_INTERVAL:
            self._record()  # after a suspension, so that later requests count as new
        return self._confirmed

    def _record(self) -> None:
        loop = asyncio.get_running_loop()
        self._recorded = recorded = _boottime()
        # Callbacks run before the reads of their turn.
        loop.call_soon(loop.call_soon, self._confirm, recorded)

    def _confirm(self, recorded: float) -> None:
        self._confirmed = recorded


@dataclass(frozen=True, slots=True)
class ConnectionContext:
    """The objects that all connections of a configuration share."""

    config: LoadedConfig
    authenticator: Authenticator
    quota: MemoryQuota
    links: SupervisorLinks
    arrival_clock: ArrivalClock
    timers: TimerWheel
    confirm: Callable[[Connection], None]  # the client of this connection has authenticated
    report_login: Callable[[str, str, str], None]  # a login of a user from an address has failed, for this reason


class Connection(asyncio.Protocol):
    """A client's connection and its requests; it owns the accepted socket. `peer` is the client's address and port."""

    def __init__(self, accepted: socket.socket, peer: str, context: ConnectionContext) -> None:
        self.peer = peer
        self._address = peer.rpartition(":")[0].strip("[]")
        self.limits = context.config.configuration.limits
        self.client_reads = True  # the client reads: its write buffer is not full
        self.stopping = False  # the frontend stops
        self._context = context
        self._socket = accepted
        self._reservation = Reservation(context.quota)  # of the request, until the supervisor has it
        self._timers = context.timers
        self._transport: asyncio.Transport | None = None
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._receive: Callable[[bytes], None] = self._ignore_data  # handles the client's data in the present phase
        self._call: Call | None = None
        self._task: asyncio.Task[None] | None = None  # work of the present phase that has to wait
        self._timer: Timer | None = None  # of the present phase
        self._write_timer: Timer | None = None
        self._written = 0  # bytes
        self._discard_until = 0.0
        self._rejected = self._closing = self._disconnected = self._idle = False
        self._lines = LineBuffer(self.limits.request_line)
        self._early_data = b""  # data that arrived after the request line, before the supervisor has the request
        self._received_at = _boottime()  # when the request arrived, or earlier
        self._authentication_time = 0.0  # seconds

    def serve(self, rejected: bool = False) -> asyncio.Future[None]:
        """Handle the requests; return a future that is done when the connection is closed, and can be cancelled.

        A rejected client receives the reply that there are too many connections.
        """
        self._rejected = rejected
        self._task = asyncio.get_running_loop().create_task(self._shake_hands())
        self._closed.add_done_callback(self._on_closed)
        return self._closed

    async def _shake_hands(self) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self,
                self._socket,
                ssl=self._context.config.context,
                ssl_handshake_timeout=self.limits.handshake_timeout,
                ssl_shutdown_timeout=_CLOSE_TIMEOUT,
            )
        except OSError as error:  # includes ssl.SSLError
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            fields = {"peer": self.peer, "reason": reason}
            if reason in OLD_TLS_REASONS:
                fields["hint"] = "the client has no TLS version of at least network.tls_minimum"
            log.info("TLS handshake failed", extra=fields)
            self._check_closed()

    def _on_closed(self, closed: asyncio.Future[None]) -> None:
        if closed.cancelled():
            self._cancel_task()
            self._abort()

    def stop(self, supervisor_stops: bool) -> None:
        """End this connection soon: the frontend stops. If the supervisor stops too, it ends the calls."""
        self.stopping = True
        if self._call is not None:
            if not supervisor_stops:
                self._call.disconnect()
        elif self._transport is None:
            self._closed.cancel()  # in the handshake
        elif self._idle:
            self._close()
        elif self._receive in (self._receive_request, self._receive_early_data):
            self._cancel_task()
            self.end_connection(_SHUTDOWN)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._task = transport, None
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        if self._rejected:
            self.end_connection(_TOO_MANY_CONNECTIONS, discard_input=True)
        else:
            self._receive = self._receive_request
            self.set_timer(self.limits.request_timeout, self._on_request_timeout)

    def data_received(self, data: bytes) -> None:
        try:
            self._receive(data)
        except Exception:
            log.exception("connection failed", extra={"peer": self.peer})
            self._fail()

    def eof_received(self) -> None:
        self._on_disconnect()
        if self._call is not None:  # it is being stopped
            self._abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._on_disconnect()
        self._check_closed()

    def pause_writing(self) -> None:
        self.client_reads = False
        self._check_progress(before=-math.inf)

    def resume_writing(self) -> None:
        self.client_reads = True
        if self._write_timer is not None:
            self._write_timer.cancel()
        if self._closing:
            self._close()
        elif self._call is not None:
            self._call.confirm(0, reads=True)

    def _on_disconnect(self) -> None:
        if self._disconnected:
            return
        self._disconnected = True
        log.debug("client disconnected", extra={"peer": self.peer})
        self._cancel_task()
        self._reservation.release()
        if self._call is not None:
            self._call.disconnect()
        else:
            self.cancel_timer()

    def _check_progress(self, before: float) -> None:
        """Disconnect a client that has not read for `limits.write_timeout` seconds; it had read `before` bytes."""
        if self._transport is None:
            return
        unsent = self._transport.get_write_buffer_size()
        read = self._written - unsent
        if read <= before:
            log.info("client does not read", extra={"peer": self.peer, "unsent": unsent})
            self._abort()
        else:
            self._write_timer = self._timers.call_later(self.limits.write_timeout, partial(self._check_progress, read))

    # The request line.

    def _receive_request(self, data: bytes) -> None:
        if self._idle:
            self._idle = False
            self._received_at = self._context.arrival_clock.earliest_arrival()
            self.cancel_timer()
        if not self._reservation.grow(len(data)):
            self.end_connection(_REQUEST_MEMORY_FULL, discard_input=True)
            return
        try:
            long, lines = self._lines.feed_long(data)
        except LineTooLong:
            reason = f"the request line is longer than {self.limits.request_line} bytes"
            self.end_connection(Failed("invalid_request", reason), discard_input=True)
            return
        if long is not None or lines:
            self.cancel_timer()
            self._receive = self._receive_early_data
            line = lines.pop(0) if long is None else long
            self._early_data = b"\n".join((*lines, self._lines.pending))
            self._handle_line(line)
        elif self._timer is None:
            self.set_timer(self.limits.request_timeout, self._on_request_timeout)

    def _on_request_timeout(self) -> None:
        reason = f"no complete request line within {self.limits.request_timeout:g} s"
        self.end_connection(Failed("invalid_request", reason))

    def _receive_early_data(self, data: bytes) -> None:
        self._early_data += data
        if len(self._early_data) > _MAX_EARLY_BYTES:
            self.pause_reading()

    def _pop_early_data(self) -> bytes:
        early, self._early_data = self._early_data, b""
        if early:
            self.resume_reading()
        return early

    def _handle_line(self, line: bytes | LongLine) -> None:
        if isinstance(line, LongLine) or len(line) > LONG_LINE:
            self._run(self._handle_long_line(line))
            return
        try:
            request = messages.decode_request(line, decode_slices)
        except ProtocolError as error:
            self._reject_invalid(error)
            return
        if not self._admit(request):
            return
        link = self._context.links.find_link()
        if (
            link is not None
            and isinstance(request, Request)
            and self._is_cached(request)
            and self._may_connect(request)
        ):
            self._start_call(request, link)
        else:
            self._run(self._handle_request(request))

    def _reject_invalid(self, error: ProtocolError) -> None:
        self.end_connection(Failed(error.type, error.message), discard_input=bool(self._early_data.strip()))

    def _admit(self, request: AnyRequest) -> bool:
        """Return whether the request can be handled; if the client has sent more than it may, reject it."""
        resumable = isinstance(request, Attach) or (isinstance(request, Request) and request.call is not None)
        if resumable or not self._early_data.strip():
            return True
        # With keep-alive, too, the client must wait for the reply.
        self.end_connection(_AFTER_REQUEST, discard_input=True)
        return False

    def _start_call(self, request: Request, link: Link) -> None:
        terms = request.call
        call_id = str(uuid.uuid4()) if terms is None else terms.id
        fields: dict[str, Any] = {"call": call_id, "procedure": request.procedure[:_MAX_LOGGED_NAME]}
        fields |= self._log_fields(request)
        if request.caller is not None:
            fields |= {"caller": request.caller.principal, "job": request.caller.job}
        log.info("call accepted", extra=fields)
        header: dict[str, Any] = {"call": call_id, "procedure": request.procedure}  # see `harpd.supervisor.main`
        header |= {"user": request.user, "peer": self.peer}
        if (caller := request.caller) is not None:
            header["caller"] = {"principal": caller.principal, "job": caller.job, "address": caller.address}
        if request.secrets:
            header["secrets"] = list(request.secrets)
        header["authentication"] = round(self._authentication_time, 6)
        if request.keep_alive:
            header["keep_alive"] = self.limits.keep_alive_timeout
        if terms is not None:
            header["resumable"] = {name: getattr(terms, name) for name in _TERMS}
            header["resumable"]["received"] = self._received_at
        kind = BoundCall if terms is None else ResumableCall
        self._call = kind(self, call_id, request.keep_alive, b"%b\n%b" % (dumps(header), request.arguments))
        self._call.start(link)

    def on_accepted(self, call: Call) -> None:
        self._reservation.release()
        self._call = call
        self._receive = call.on_client_data
        if self._early_data:
            call.on_client_data(self._pop_early_data())

    def restart(self, call: Call) -> bool:
        if self._context.links.is_active(call.link):
            return False
        call.abandon()
        self._call = None
        self._run(self._restart(call))
        return True

    def next_request(self, received: bytes) -> None:
        self._call = None
        self._reservation.release()
        self._lines = LineBuffer(self.limits.request_line)
        self._receive = self._receive_request
        self._idle = True
        if self.stopping or self._disconnected:
            self._close()
        elif received:
            self._receive_request(received)
        else:
            self.set_timer(self.limits.keep_alive_timeout, self._close)

    def _log_fields(self, request: AnyRequest) -> dict[str, str]:
        return {"user": request.user[:_MAX_LOGGED_NAME], "peer": self.peer}

    def _is_cached(self, request: AnyRequest) -> bool:
        begin = time.monotonic()
        is_cached = self._context.authenticator.is_cached(request.user, request.password)
        self._authentication_time = time.monotonic() - begin
        if is_cached:
            self._context.confirm(self)
        return is_cached

    def _may_connect(self, request: AnyRequest) -> bool:
        """Return whether the user of the request, whose password is right, may send it from this address."""
        return self._context.config.rights.may_connect(request.user, self._address)

    # Work for the request that has to wait.

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run this work in a task. Data that the client sends before its end waits."""
        self._task = asyncio.get_running_loop().create_task(self._run_guarded(work))

    async def _run_guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except ProtocolError as error:
            self._reject_invalid(error)
        except SupervisorError as error:
            self.end_connection(Failed("procedure_loading_error", str(error)))
        except Exception:
            log.exception("connection failed", extra={"peer": self.peer})
            self._fail()

    async def _handle_long_line(self, line: bytes | LongLine) -> None:
        decode = partial(messages.decode_request, decoder=decode_slices)
        request = await run_in_turn(decode, line, network(self._address))
        if self._admit(request):
            await self._handle_request(request, shared_link=False)

    async def _handle_request(self, request: AnyRequest, shared_link: bool = True) -> None:
        if not self._is_cached(request):
            begin = time.monotonic()
            authenticate = self._context.authenticator.authenticate
            try:
                accepted = await authenticate(request.user, request.password, self._address, self._log_fields(request))
            except PasswordNotChecked:
                self._context.report_login(request.user, self._address, "not checked in time")
                self.end_connection(_NOT_CHECKED)
                return
            if not accepted:
                self._context.report_login(request.user, self._address, "wrong password, or unknown user")
                self.end_connection(_AUTH_ERROR)
                return
            self._context.confirm(self)
            self._authentication_time = time.monotonic() - begin
        if not self._may_connect(request):
            log.warning("user denied from this address", extra=self._log_fields(request))
            self._context.report_login(request.user, self._address, "not allowed from this address")
            hint = "see the setting rights of harpd"
            self.end_connection(Failed("access_denied", f"user {request.user!r} may not connect from here; {hint}"))
            return
        if isinstance(request, ListCalls):
            await self._list_calls(request)
        elif isinstance(request, Attach):
            await self._attach(request)
        else:
            self._start_call(request, await self._context.links.connect_active(shared_link))

    async def _restart(self, call: Call) -> None:
        link = await self._context.links.connect_active(shared=call.link.shared)
        self._call = call
        call.start(link)

    async def _list_calls(self, request: ListCalls) -> None:
        log.debug("calls listed", extra=self._log_fields(request))
        calls = await self._context.links.client.list_calls(request.owner)
        keep_alive = self.limits.keep_alive_timeout if request.keep_alive else None
        self.write(encode_message(replace(calls, keep_alive=keep_alive, features=_FEATURES, version=__version__)))
        if request.keep_alive:
            self.next_request(self._pop_early_data())
        else:
            self.end_connection()

    async def _attach(self, request: Attach) -> None:
        log.info("attach accepted", extra={"call": request.call, "since": request.since, **self._log_fields(request)})
        header = {"attach": request.call, "owner": request.owner, "secret": request.secret, "since": request.since}
        keep_alive = {"keep_alive": self.limits.keep_alive_timeout} if request.keep_alive else {}
        call = ResumableCall(self, request.call, request.keep_alive, dumps({**header, **keep_alive}))
        error = await self._context.links.attach(call.attach)
        if error is not None:
            self.write(error)
            self.end_connection()

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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end_connection(self, error: Failed | None = None, discard_input: bool = False) -> None:
        """Send an error if there is one, and close the connection: its call has ended or is detached."""
        self._call = None
        self._reservation.release()
        if error is not None and not self._disconnected:
            level = logging.ERROR if error in (_CALL_DIED, _INTERNAL_ERROR) else logging.INFO
            fields = {"peer": self.peer, "type": error.type, "reason": error.message}
            log.log(level, "replied with an error", extra=fields)
            self.write(encode_message(error))
        if discard_input and not self._disconnected:
            self._receive = self._discard_data
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

    def _discard_data(self, data: bytes) -> None:
        self.set_timer(min(_QUIET_TIME, self._discard_until - time.monotonic()), self._close)

    def _ignore_data(self, data: bytes) -> None:
        pass

    def _fail(self) -> None:
        if self._call is None:
            self.end_connection(_INTERNAL_ERROR)
        else:
            self._abort()  # stops or detaches the call

    def _close(self) -> None:
        """Close the connection when all written data is sent, as long as the client reads."""
        self._closing = True
        self._receive = self._ignore_data
        self.cancel_timer()
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=1, low=0)  # calls `pause_writing` if there is unsent data
            if self.client_reads and not self._transport.is_closing():
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


class Call(Channel):
    """A call of either kind. `request` is the body of its first frame, see `harpd.supervisor.main`."""

    _accepted = False  # the supervisor has replied to the request

    def __init__(self, connection: Connection, call_id: str, keep_alive: bool, request: bytes) -> None:
        self._connection = connection
        self._keep_alive = keep_alive  # requested by the client
        self._request = request
        self._log_fields = {"call": call_id, "peer": connection.peer}

    def start(self, link: Link) -> None:
        self.open(link, START, self._request)

    @abstractmethod
    def on_client_data(self, data: bytes) -> None:
        """Handle data of the client, after the first reply of the supervisor."""

    @abstractmethod
    def disconnect(self) -> None:
        """Handle that the client has disconnected, or that the frontend stops and the supervisor continues."""


class BoundCall(Call):
    """A connection-bound call."""

    _complete = _mid_line = _unexpected_data = _timed_out = False
    _stop_event: str | None = None

    def on_lines(self, kind: int, lines: bytes) -> None:
        is_first = not self._accepted
        if is_first:
            retires = kind == ERROR and lines.startswith(_SHUTDOWN_PREFIX) and self._stop_event is None
            if retires and self._connection.restart(self):
                return  # it retired before it received the request: it has not started the call
            self._accepted = True
            self._request = b""
            self._connection.on_accepted(self)
        if self._stop_event is not None and not is_first:  # the first lines show whether the call started
            return
        self._connection.write(lines)
        self.confirm(len(lines), self._connection.client_reads)
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
            self._connection.end_connection()
        elif self._unexpected_data:
            self._connection.end_connection(_AFTER_REQUEST, discard_input=True)
        else:
            # Without an acknowledgement, "shutdown" promises that the call was not started: dispatchers start it again.
            is_start_decided = self._accepted or not (self.link.broken or self._timed_out)
            self._connection.end_connection(_SHUTDOWN if self._connection.stopping and is_start_decided else _CALL_DIED)

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
            self._connection.end_connection()
        elif self._stop_event is None:
            self._stop_event = event
            seconds = 2 * self._connection.limits.kill_grace + _STOP_MARGIN
            self._connection.set_timer(seconds, self._on_stop_timeout)
            self.hang_up()

    def _on_stop_timeout(self) -> None:
        log.error("call did not stop in time", extra={**self._log_fields, "cause": self._stop_event})
        self._timed_out = True
        self.abandon()
        self._finish()


class ResumableCall(Call):
    """A resumable call. Its connection can end, and another connection can attach to it later."""

    _attached: asyncio.Future[bytes | None] | None = None  # until the first reply to `attach`
    _waits_for_credit = False  # until the supervisor accepts more commands
    _unsent_commands = b""  # data of the client that waits for it

    def __init__(self, connection: Connection, call_id: str, keep_alive: bool, request: bytes) -> None:
        super().__init__(connection, call_id, keep_alive, request)
        self._lines = LineBuffer(messages.MAX_COMMAND_BYTES)

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

    def on_lines(self, kind: int, lines: bytes) -> None:
        if not self._accepted and not self._is_accepted(kind, lines):
            return
        self._connection.write(lines)
        self.confirm(len(lines), self._connection.client_reads)
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
        rejected = kind == ERROR and lines.startswith(_NO_SUCH_CALL_PREFIX)
        self._attached.set_result(lines if rejected else None)
        return not rejected

    def add_credit(self, size: int) -> None:
        super().add_credit(size)
        if self._waits_for_credit and self.may_send:
            self._waits_for_credit = False
            self._connection.cancel_timer()
            self._connection.resume_reading()
            self.on_client_data(b"")

    def on_closed(self) -> None:
        if self._attached is None or self._accepted:
            self._connection.end_connection()
        elif not self._attached.done():
            self._attached.set_result(b"")

    def on_client_data(self, data: bytes) -> None:
        """Forward commands, as many as the supervisor accepts now; pause reading until it has accepted all.

        They are sent in windows: a client that floods its call with commands must not delay other calls.
        """
        self._unsent_commands += data
        while self._unsent_commands and self.may_send:
            data, self._unsent_commands = (
                self._unsent_commands[:COMMANDS_WINDOW],
                self._unsent_commands[COMMANDS_WINDOW:],
            )
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
                self._connection.next_request(b"\n".join((*lines[end:], self._lines.pending)) + self._unsent_commands)
                return
        if not self.may_send and not self._waits_for_credit:
            self._waits_for_credit = True
            self._connection.pause_reading()
            self._connection.set_timer(self._connection.limits.write_timeout, self._on_timeout)

    def disconnect(self) -> None:
        if self._connection.stopping:
            log.info("frontend stops; client detached", extra=self._log_fields)
        self._detach()

    def _detach(self) -> None:
        self.abandon()
        self.hang_up()
        self._connection.end_connection()

    def _on_timeout(self) -> None:
        log.error("supervisor does not respond; detached", extra=self._log_fields)
        self._detach()


def _is_release(line: bytes) -> bool:
    try:
        return b"release" in line and isinstance(messages.decode_command(line), messages.Release)
    except ProtocolError:
        return False
