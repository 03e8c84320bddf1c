"""One client's connection, phase by phase; each phase has its own deadline.

    handshake -> request line -> authentication -> call -> close; with keep-alive: -> next request line

It is driven by data of the client, lines of the supervisor, and timers. On the usual path nothing waits in a task: the
link to the supervisor is open, and the password is in the cache. A client that is silent, slow or sends invalid data
costs only its own connection and one log line. The owner id and the secret in a request for a resumable call are sent
to the supervisor and never logged.

Spec: docs/protocol.md, harpd.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import (
    AnyRequest,
    Attach,
    ListCalls,
    Request,
    RequestedTerms,
    decode_request,
    encode_message,
)
from harp.protocol.json_text import dumps
from harp.protocol.lines import LineBuffer, LineTooLong
from harp_daemon.memory_quota import MemoryQuota, Reservation
from harp_daemon.sliced_json import decode_slices
from harp_daemon.timer_wheel import Timer, TimerWheel
from harpd.config.loaded import LoadedConfig
from harpd.control.supervisor_client import SupervisorClient, SupervisorError
from harpd.frontend.arrival_clock import ArrivalClock, boottime
from harpd.frontend.calls import AFTER_REQUEST, CALL_DIED, MAX_EARLY_BYTES, SHUTDOWN, BoundCall, ResumableCall
from harpd.frontend.link import Link
from harpd.frontend.supervisor_links import SupervisorLinks
from harpd.frontend.thread_pool import BoundedThreadPool, TaskFailed

log = logging.getLogger("harpd.frontend")

#: Most characters of a user name or a procedure name in the log.
_MAX_LOGGED_NAME = 64
#: From this many unsent bytes on, the supervisor should wait.
_HIGH_WATER = 64 * 1024
#: From this length on, a request is decoded in a thread, and sent over a link of its own: it must not delay others.
_LONG_REQUEST = 64 * 1024
#: Seconds for the TLS shutdown, including the last buffered bytes.
_CLOSE_TIMEOUT = 30.0
#: After an error the client may still be sending. Its data is read and discarded, because unread data would make the
#: kernel reset the connection, and the client could lose the error. Reading ends after `_QUIET_TIME` seconds without
#: data, at the latest after `_MAX_DISCARD_TIME` seconds.
_QUIET_TIME, _MAX_DISCARD_TIME = 0.5, 10.0

_AUTH_ERROR = Failed("auth_error", "unknown user or wrong password")
_TOO_MANY_CONNECTIONS = Failed("too_many_connections", "limits.max_connections is reached; try again later")
_REQUEST_MEMORY_FULL = Failed("too_many_connections", "limits.request_memory is used up; try again later")
_INTERNAL_ERROR = Failed("system_error", "internal error of harpd; its log has the details")

#: The terms of a resumable call that its supervisor needs besides the id.
_TERMS = tuple(name for name in RequestedTerms.__slots__ if name != "id")


@dataclass(frozen=True, slots=True)
class ConnectionContext:
    """The objects that all connections of a configuration share.

    Attributes:
        config: configuration, certificate and users.
        thread_pool: runs password checks.
        decoder_pool: decodes long requests.
        quota: memory for long request lines.
        client: the client of the supervisors.
        links: the links to the supervisors.
        arrival_clock: tells when the data of a request arrived.
        timers: the timers of all deadlines.
    """

    config: LoadedConfig
    thread_pool: BoundedThreadPool
    decoder_pool: BoundedThreadPool
    quota: MemoryQuota
    client: SupervisorClient
    links: SupervisorLinks
    arrival_clock: ArrivalClock
    timers: TimerWheel


class Connection(asyncio.Protocol):
    """A client's connection and its requests; a `harpd.frontend.calls.ClientConnection`.

    Args:
        accepted: the socket, which this object owns.
        peer: the client's address and port.
        context: the objects that connections share.
    """

    def __init__(self, accepted: socket.socket, peer: str, context: ConnectionContext) -> None:
        self.peer = peer
        self.limits = context.config.configuration.limits
        self.reads = True
        self._socket = accepted
        self._context = context
        self._reservation = Reservation(context.quota)
        self._transport: asyncio.Transport | None = None
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: Handles the client's data in the present phase.
        self._receive: Callable[[bytes], None] = self._receive_request
        self._lines = LineBuffer(self.limits.request_line)
        self._early = b""  # data that arrived after the request line, or while a task handles the request
        self._received_at = boottime()  # when the request arrived, or earlier
        self._authentication_time = 0.0  # seconds
        self._call: BoundCall | ResumableCall | None = None
        self._task: asyncio.Task[None] | None = None  # work for the request that has to wait
        self._timer: Timer | None = None  # of the present phase
        self._write_timer: Timer | None = None
        self._discard_until, self._has_discarded = 0.0, False
        self._idle = self._rejected = self._stopping = self._closing = self._lost = False

    # From the acceptor.

    def serve(self) -> asyncio.Future[None]:
        """Handle the requests of this connection, usually one. Network errors are handled here.

        Returns:
            A future that is done when the connection is closed; its cancellation closes it.
        """
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
                ssl=self._context.config.context,
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

    def stop(self, supervisor_stops: bool) -> None:
        """End this connection soon, because the frontend stops.

        `supervisor_stops`: whether the supervisor stops too; then it ends the calls.
        """
        self._stopping = True
        if self._transport is None and self._call is None:
            self._closed.cancel()  # in the handshake
        elif self._call is not None and supervisor_stops:
            self._call.on_shutdown()
        elif self._call is not None:
            self._call.detach()
        elif self._idle:
            self._close()
        elif self._receive in (self._receive_request, self._keep_early):
            self._cancel_task()
            self.end_call(SHUTDOWN)

    # From the transport: `asyncio.Protocol`.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin after the handshake."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._task = transport, None
        transport.set_write_buffer_limits(high=_HIGH_WATER)
        if self._rejected:
            self.end_call(_TOO_MANY_CONNECTIONS, discard_input=True)
        else:
            self._timer = self.call_later(self.limits.request_timeout, self._on_request_timeout)

    def data_received(self, data: bytes) -> None:
        """Handle data of the client."""
        try:
            self._receive(data)
        except Exception:
            log.exception("connection failed", extra={"peer": self.peer})
            self._fail()

    def eof_received(self) -> None:
        """Handle that the client has disconnected, or has closed its sending half."""
        self._lose_client()
        if self._call is not None:  # it is being stopped
            self._abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Handle the end of the connection."""
        self._transport = None
        self._lose_client()
        self._check_closed()

    def pause_writing(self) -> None:
        """Wait until the client reads, for a limited time."""
        self.reads = False
        self._check_progress(before=None)

    def resume_writing(self) -> None:
        """Continue: the client reads."""
        self.reads = True
        if self._write_timer is not None:
            self._write_timer.cancel()
        if self._closing:
            self._close()
        elif self._call is not None:
            self._call.on_client_reads()

    # From the call: `ClientConnection`.

    def write(self, lines: bytes) -> None:
        """See `ClientConnection`."""
        if self._transport is not None:
            self._transport.write(lines)

    def pause_reading(self) -> None:
        """See `ClientConnection`."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """See `ClientConnection`."""
        if self._transport is not None:
            self._transport.resume_reading()

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """See `ClientConnection`."""
        return self._context.timers.call_later(seconds, callback)

    def on_accepted(self) -> None:
        """See `ClientConnection`."""
        self._reservation.release()

    def restart(self, call: BoundCall, link: Link) -> bool:
        """See `ClientConnection`."""
        if self._context.links.is_active(link):
            return False
        self._call = None
        self._run(self._restart(call))
        return True

    def next_request(self, received: bytes) -> None:
        """See `ClientConnection`."""
        self._call = None
        self._reservation.release()
        self._lines = LineBuffer(self.limits.request_line)
        self._receive = self._receive_request
        self._idle = True
        if self._stopping or self._lost:
            self._close()
        elif received:
            self._receive_request(received)
        else:
            self._timer = self.call_later(self.limits.keep_alive_timeout, self._close)

    def end_call(self, error: Failed | None = None, discard_input: bool = False) -> None:
        """See `ClientConnection`; also rejects a request."""
        self._call = None
        self._reservation.release()
        if error is not None and not self._lost:
            level = logging.ERROR if error in (CALL_DIED, _INTERNAL_ERROR) else logging.INFO
            fields = {"peer": self.peer, "type": error.type, "reason": error.message}
            log.log(level, "replied with an error", extra=fields)
            self.write(encode_message(error))
        if discard_input and not self._lost:
            self._cancel_timer()
            self._receive = self._discard
            self.resume_reading()
            self._discard_until = time.monotonic() + _MAX_DISCARD_TIME
            self._timer = self.call_later(_QUIET_TIME, self._on_quiet)
        else:
            self._close()

    def abort_call(self) -> None:
        """See `ClientConnection`."""
        self._call = None
        self._abort()

    # The phases.

    def _receive_request(self, data: bytes) -> None:
        if self._idle:
            self._idle = False
            self._received_at = self._context.arrival_clock.earliest_arrival()
            self._cancel_timer()
        if not self._reservation.grow(len(data)):
            self.end_call(_REQUEST_MEMORY_FULL, discard_input=True)
            return
        try:
            lines = self._lines.feed(data)
        except LineTooLong:
            reason = f"the request line is longer than {self.limits.request_line} bytes"
            self.end_call(Failed("invalid_request", reason), discard_input=True)
            return
        if lines:
            self._cancel_timer()
            self._early = b"\n".join((*lines[1:], self._lines.pending))
            self._handle_line(lines[0])
        elif self._timer is None:
            self._timer = self.call_later(self.limits.request_timeout, self._on_request_timeout)

    def _on_request_timeout(self) -> None:
        reason = f"no complete request line within {self.limits.request_timeout:g} s"
        self.end_call(Failed("invalid_request", reason))

    def _keep_early(self, data: bytes) -> None:
        self._early += data
        if len(self._early) > MAX_EARLY_BYTES:
            self.pause_reading()

    def _discard(self, data: bytes) -> None:
        self._has_discarded = True

    def _on_quiet(self) -> None:
        if self._has_discarded and time.monotonic() < self._discard_until:
            self._has_discarded = False
            self._timer = self.call_later(_QUIET_TIME, self._on_quiet)
        else:
            self._close()

    def _ignore(self, data: bytes) -> None:
        """Handle data after the last reply."""

    # The request.

    def _handle_line(self, line: bytes) -> None:
        if len(line) > _LONG_REQUEST:
            self._run(self._handle_long_line(line))
            return
        try:
            request = decode_request(line, decode_slices)
        except ProtocolError as error:
            self._reject_invalid(error)
            return
        if not self._admit(request):
            return
        link = self._context.links.active()
        if link is not None and isinstance(request, Request) and self._is_cached(request):
            self._start_call(request, link)
        else:
            self._run(self._handle_request(request))

    def _reject_invalid(self, error: ProtocolError) -> None:
        self.end_call(Failed(error.type, error.message), discard_input=bool(self._early.strip()))

    def _admit(self, request: AnyRequest) -> bool:
        """Return whether the request can be handled; if the client has sent more than it may, reject it."""
        resumable = isinstance(request, Attach) or (isinstance(request, Request) and request.call is not None)
        if resumable or not self._early.strip():
            return True
        self.end_call(AFTER_REQUEST, discard_input=True)  # with keep-alive, too, the client has to wait for the reply
        return False

    def _start_call(self, request: Request, link: Link) -> None:
        """Start a call in the supervisor of this link."""
        terms = request.call
        call_id = str(uuid.uuid4()) if terms is None else terms.id
        procedure = request.procedure[:_MAX_LOGGED_NAME]
        log.info("call accepted", extra={"call": call_id, "procedure": procedure, **self._log_fields(request)})
        facts: dict[str, Any] = {"call": call_id, "procedure": request.procedure}  # see `harpd.supervisor.main`
        facts["authentication"] = round(self._authentication_time, 6)
        if request.keep_alive:
            facts["keep_alive"] = self.limits.keep_alive_timeout
        if terms is not None:
            facts["resumable"] = {name: getattr(terms, name) for name in _TERMS}
            facts["resumable"]["received"] = self._received_at
        kind = BoundCall if terms is None else ResumableCall
        call = kind(self, call_id, request.keep_alive, dumps(facts), request.arguments)
        call.start(link)
        self._continue_with(call)

    def _continue_with(self, call: BoundCall | ResumableCall) -> None:
        """Pass the client's data to the call from now on, first the data that has arrived early."""
        self._call = call
        self._receive = call.on_client_data
        if self._early:
            early, self._early = self._early, b""
            self.resume_reading()
            call.on_client_data(early)

    def _log_fields(self, request: AnyRequest) -> dict[str, str]:
        return {"user": request.user[:_MAX_LOGGED_NAME], "peer": self.peer}

    # Work for the request that has to wait.

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this work in a task; meanwhile the client's data waits."""
        self._receive = self._keep_early
        self._task = asyncio.get_running_loop().create_task(self._run_guarded(work))

    async def _run_guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except ProtocolError as error:
            self._reject_invalid(error)
        except SupervisorError as error:
            self.end_call(Failed("procedure_loading_error", str(error)))
        except Exception:
            log.exception("connection failed", extra={"peer": self.peer})
            self._fail()

    async def _handle_long_line(self, line: bytes) -> None:
        try:
            decode = partial(decode_request, line, decode_slices)
            request = await self._context.decoder_pool.run(decode, self.limits.request_timeout)
        except TaskFailed as error:
            raise error.__cause__ or error from None
        if self._admit(request):
            await self._handle_request(request)

    async def _handle_request(self, request: AnyRequest) -> None:
        if not await self._authenticated(request):
            self.end_call(_AUTH_ERROR)
        elif isinstance(request, ListCalls):
            await self._list_calls(request)
        elif isinstance(request, Attach):
            await self._attach(request)
        else:
            shared = len(request.arguments) + len(request.procedure) <= _LONG_REQUEST
            self._start_call(request, await self._context.links.connect_active(shared))

    async def _restart(self, call: BoundCall) -> None:
        """Start a call in the next supervisor."""
        call.start(await self._context.links.connect_active(shared=call.size <= _LONG_REQUEST))
        self._continue_with(call)

    async def _list_calls(self, request: ListCalls) -> None:
        log.debug("calls listed", extra=self._log_fields(request))
        calls = await self._context.client.list_calls(request.owner)
        keep_alive = self.limits.keep_alive_timeout if request.keep_alive else None
        self.write(encode_message(replace(calls, keep_alive=keep_alive)))
        if request.keep_alive:
            early, self._early = self._early, b""
            self.resume_reading()
            self.next_request(early)
        else:
            self.end_call()

    async def _attach(self, request: Attach) -> None:
        log.info("attach accepted", extra={"call": request.call, "since": request.since, **self._log_fields(request)})
        facts = {"attach": request.call, "owner": request.owner, "secret": request.secret, "since": request.since}
        keep_alive = {"keep_alive": self.limits.keep_alive_timeout} if request.keep_alive else {}
        reply = await self._context.links.attach(dumps({**facts, **keep_alive}))
        call = ResumableCall(self, request.call, request.keep_alive)
        call.attach(reply)
        self._continue_with(call)
        if self._call is call:
            reply.pass_on(call)

    # Authentication.

    async def _authenticated(self, request: AnyRequest) -> bool:
        if self._is_cached(request):
            return True
        log_fields = self._log_fields(request)
        check = partial(self._context.config.users.authenticate, request.user, request.password)
        begin = time.monotonic()
        try:
            answer: object = await self._context.thread_pool.run(check, self.limits.authentication_timeout)
        except TimeoutError:
            log.error("authentication timed out", extra=log_fields)
            return False
        except TaskFailed as error:
            # Neither the text of the exception nor a traceback: they may contain the password.
            log.error("authentication module failed", extra={**log_fields, **_raised_at(error.__cause__)})
            return False
        self._authentication_time = time.monotonic() - begin
        if not isinstance(answer, bool):
            log.error("authentication module returned no bool", extra={**log_fields, "type": type(answer).__name__})
        elif not answer:
            log.warning("authentication failed", extra=log_fields)
        return answer is True

    def _is_cached(self, request: AnyRequest) -> bool:
        """Return whether the module accepts the password without blocking, by its method `check_cached`."""
        begin = time.monotonic()
        # Not every module derives from `AuthDB`.
        check_cached = getattr(self._context.config.users, "check_cached", None)
        try:
            return check_cached is not None and check_cached(request.user, request.password) is True
        except Exception:  # noqa: BLE001 - `authenticate` is called next, and its error is logged
            return False
        finally:
            self._authentication_time = time.monotonic() - begin

    # The end.

    def _lose_client(self) -> None:
        """Handle that the client has disconnected; once."""
        if self._lost:
            return
        self._lost = True
        log.debug("client disconnected", extra={"peer": self.peer})
        self._cancel_timer()
        self._cancel_task()
        self._reservation.release()
        if self._call is not None:
            self._call.on_client_lost()

    def _fail(self) -> None:
        """End the connection after an internal error."""
        if self._call is None:
            self.end_call(_INTERNAL_ERROR)
        else:
            self._abort()  # stops or detaches the call

    def _close(self) -> None:
        """Close the connection when all written data is sent, as long as the client reads."""
        self._closing = True
        self._receive = self._ignore
        self._cancel_timer()
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

    def _check_progress(self, before: int | None) -> None:
        """Disconnect a client that has read nothing for `limits.write_timeout` seconds."""
        if self._transport is None:
            return
        unsent = self._transport.get_write_buffer_size()
        if before is not None and unsent >= before:
            log.info("client does not read", extra={"peer": self.peer, "unsent": unsent})
            self._abort()
        else:
            self._write_timer = self.call_later(self.limits.write_timeout, partial(self._check_progress, unsent))

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None


def _raised_at(error: BaseException | None) -> dict[str, object]:
    """Return log fields of an exception that contain no secret: its type, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    location = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    return {"error": type(error).__name__, "location": location}
