"""The requests of a client's connection, phase by phase; each phase has its own deadline.

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
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import AnyRequest, Attach, ListCalls, Request, RequestedTerms, decode_request, encode_message
from harp.protocol.json_text import dumps
from harp.protocol.lines import LineBuffer, LineTooLong
from harp_daemon.long_lines import LONG_LINE, decode_in_thread
from harp_daemon.memory_quota import MemoryQuota
from harp_daemon.sliced_json import decode_slices
from harp_daemon.timer_wheel import TimerWheel
from harpd.config.loaded import LoadedConfig
from harpd.control.supervisor_client import SupervisorClient, SupervisorError
from harpd.frontend.arrival_clock import ArrivalClock, boottime
from harpd.frontend.authenticator import Authenticator
from harpd.frontend.calls import AFTER_REQUEST, BoundCall, ResumableCall
from harpd.frontend.client_connection import SHUTDOWN, Call, ClientConnection
from harpd.frontend.link import Link
from harpd.frontend.supervisor_links import SupervisorLinks

log = logging.getLogger("harpd.frontend")

#: Most characters of a user name or a procedure name in the log.
_MAX_LOGGED_NAME = 64
#: From this many bytes on, a client is not read before its request was handled.
_MAX_EARLY_BYTES = 64 * 1024

_AUTH_ERROR = Failed("auth_error", "unknown user or wrong password")
_REQUEST_MEMORY_FULL = Failed("too_many_connections", "limits.request_memory is used up; try again later")

#: The terms of a resumable call that its supervisor needs besides the id.
_TERMS = tuple(name for name in RequestedTerms.__slots__ if name != "id")


@dataclass(frozen=True, slots=True)
class ConnectionContext:
    """The objects that all connections of a configuration share."""

    config: LoadedConfig
    authenticator: Authenticator
    quota: MemoryQuota
    client: SupervisorClient
    links: SupervisorLinks
    arrival_clock: ArrivalClock
    timers: TimerWheel


class Connection(ClientConnection):
    """A client's connection and its requests."""

    def __init__(self, accepted: socket.socket, peer: str, context: ConnectionContext) -> None:
        super().__init__(accepted, peer, context.config, context.quota, context.timers)
        self._context = context
        self._lines = LineBuffer(self.limits.request_line)
        self._early = b""  # data that arrived after the request line, before the supervisor has the request
        self._received_at = boottime()  # when the request arrived, or earlier
        self._authentication_time = 0.0  # seconds
        self._idle = False

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
        elif self._receive in (self._receive_request, self._keep_early):
            self._cancel_task()
            self.end(SHUTDOWN)

    # The request line.

    def _on_connected(self) -> None:
        self._receive = self._receive_request
        self.set_timer(self.limits.request_timeout, self._on_request_timeout)

    def _receive_request(self, data: bytes) -> None:
        if self._idle:
            self._idle = False
            self._received_at = self._context.arrival_clock.earliest_arrival()
            self.cancel_timer()
        if not self._reservation.grow(len(data)):
            self.end(_REQUEST_MEMORY_FULL, discard_input=True)
            return
        try:
            lines = self._lines.feed(data)
        except LineTooLong:
            reason = f"the request line is longer than {self.limits.request_line} bytes"
            self.end(Failed("invalid_request", reason), discard_input=True)
            return
        if lines:
            self.cancel_timer()
            self._receive = self._keep_early
            self._early = b"\n".join((*lines[1:], self._lines.pending))
            self._handle_line(lines[0])
        elif self._timer is None:
            self.set_timer(self.limits.request_timeout, self._on_request_timeout)

    def _on_request_timeout(self) -> None:
        reason = f"no complete request line within {self.limits.request_timeout:g} s"
        self.end(Failed("invalid_request", reason))

    def _keep_early(self, data: bytes) -> None:
        self._early += data
        if len(self._early) > _MAX_EARLY_BYTES:
            self.pause_reading()

    def _take_early(self) -> bytes:
        early, self._early = self._early, b""
        if early:
            self.resume_reading()
        return early

    def _handle_line(self, line: bytes) -> None:
        if len(line) > LONG_LINE:
            self._run(self._handle_long_line(line))
            return
        try:
            request = decode_request(line, decode_slices)
        except ProtocolError as error:
            self._reject_invalid(error)
            return
        if not self._admit(request):
            return
        link = self._context.links.find()
        if link is not None and isinstance(request, Request) and self._is_cached(request):
            self._start_call(request, link)
        else:
            self._run(self._handle_request(request))

    def _reject_invalid(self, error: ProtocolError) -> None:
        self.end(Failed(error.type, error.message), discard_input=bool(self._early.strip()))

    def _admit(self, request: AnyRequest) -> bool:
        """Return whether the request can be handled; if the client has sent more than it may, reject it."""
        resumable = isinstance(request, Attach) or (isinstance(request, Request) and request.call is not None)
        if resumable or not self._early.strip():
            return True
        self.end(AFTER_REQUEST, discard_input=True)  # with keep-alive, too, the client has to wait for the reply
        return False

    # The call.

    def _start_call(self, request: Request, link: Link) -> None:
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
        self._call = kind(self, call_id, request.keep_alive, b"%b\n%b" % (dumps(facts), request.arguments))
        self._call.start(link)

    def on_accepted(self, call: Call) -> None:
        self._reservation.release()
        self._call = call
        self._receive = call.on_client_data
        if self._early:
            call.on_client_data(self._take_early())

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
        if self.stopping or self._lost:
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
        return is_cached

    # Work for the request that has to wait.

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this work in a task; meanwhile the client's data waits."""
        self._task = asyncio.get_running_loop().create_task(self._run_guarded(work))

    async def _run_guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except ProtocolError as error:
            self._reject_invalid(error)
        except SupervisorError as error:
            self.end(Failed("procedure_loading_error", str(error)))
        except Exception:
            log.exception("connection failed", extra={"peer": self.peer})
            self._fail()

    async def _handle_long_line(self, line: bytes) -> None:
        async with asyncio.timeout(self.limits.request_timeout):
            request = await decode_in_thread(partial(decode_request, decoder=decode_slices), line)
        if self._admit(request):
            await self._handle_request(request, shared_link=False)

    async def _handle_request(self, request: AnyRequest, shared_link: bool = True) -> None:
        if not self._is_cached(request):
            begin = time.monotonic()
            authenticate = self._context.authenticator.authenticate
            if not await authenticate(request.user, request.password, self._log_fields(request)):
                self.end(_AUTH_ERROR)
                return
            self._authentication_time = time.monotonic() - begin
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
        calls = await self._context.client.list_calls(request.owner)
        keep_alive = self.limits.keep_alive_timeout if request.keep_alive else None
        self.write(encode_message(replace(calls, keep_alive=keep_alive)))
        if request.keep_alive:
            self.next_request(self._take_early())
        else:
            self.end()

    async def _attach(self, request: Attach) -> None:
        log.info("attach accepted", extra={"call": request.call, "since": request.since, **self._log_fields(request)})
        facts = {"attach": request.call, "owner": request.owner, "secret": request.secret, "since": request.since}
        keep_alive = {"keep_alive": self.limits.keep_alive_timeout} if request.keep_alive else {}
        call = ResumableCall(self, request.call, request.keep_alive, dumps({**facts, **keep_alive}))
        error = await self._context.links.attach(call)
        if error is not None:
            self.write(error)
            self.end()
