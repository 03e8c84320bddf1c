"""One client's connection, phase by phase; each phase has its own deadline.

    handshake -> request line -> authentication -> call -> close; with keep-alive: -> next request line

A client that is silent, slow or sends invalid data costs only its own connection and one log line. The owner id and the
secret in a request for a resumable call are sent to the supervisor and never logged.

Spec: docs/protocol.md, harpd.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from functools import partial

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import AnyRequest, Attach, ListCalls, Request, decode_request, encode_message
from harp.protocol.json_text import Envelope, dumps
from harp.protocol.lines import LineBuffer, LineTooLong
from harp_daemon.memory_quota import MemoryQuota, Reservation
from harp_daemon.sliced_json import decode_slices
from harpd.config.loaded import LoadedConfig
from harpd.control.supervisor_client import SupervisorClient, SupervisorError
from harpd.frontend.arrival_clock import ArrivalClock, boottime
from harpd.frontend.proxy import (
    AFTER_REQUEST,
    CALL_DIED,
    SHUTDOWN,
    BoundProxy,
    RequestRejected,
    ResumableProxy,
)
from harpd.frontend.thread_pool import BoundedThreadPool, TaskFailed
from harpd.frontend.tls_stream import ClientDisconnected, TLSStream

log = logging.getLogger("harpd.frontend")

#: Most characters of a user name or a procedure name in the log.
_MAX_LOGGED_NAME = 64

_AUTH_ERROR = Failed("auth_error", "unknown user or wrong password")
_TOO_MANY_CONNECTIONS = Failed("too_many_connections", "limits.max_connections is reached; try again later")
_REQUEST_MEMORY_FULL = Failed("too_many_connections", "limits.request_memory is used up; try again later")
_INTERNAL_ERROR = Failed("system_error", "internal error of harpd; its log has the details")


class Connection:
    """A client's connection and its requests.

    Args:
        accepted: the socket, which this object owns.
        peer: the client's address and port.
        config: configuration, certificate and users for this connection.
        thread_pool: runs password checks.
        quota: memory for long request lines.
        client: the client of the supervisors.
        arrival_clock: tells when the data of a request arrived.
    """

    def __init__(
        self,
        accepted: socket.socket,
        peer: str,
        config: LoadedConfig,
        thread_pool: BoundedThreadPool,
        quota: MemoryQuota,
        client: SupervisorClient,
        arrival_clock: ArrivalClock,
    ) -> None:
        self._stream = TLSStream(accepted, peer, config, arrival_clock)
        self._peer = peer
        self._config = config
        self._limits = config.configuration.limits
        self._thread_pool = thread_pool
        self._reservation = Reservation(quota)
        self._client = client
        self._next_request = b""
        self._idle = False
        self._received_at = boottime()  # when the request arrived, or earlier
        self._authentication_time = 0.0  # seconds
        self._proxy: BoundProxy | ResumableProxy | None = None
        self._call_done = asyncio.Event()
        self._stopping = False

    async def wait_call_done(self) -> None:
        """Wait until the proxy of the call has ended; return at once if there is no call."""
        if self._proxy is not None:
            await self._call_done.wait()

    def stop(self, task: asyncio.Future[None], supervisor_stops: bool) -> None:
        """End this connection soon, because the frontend stops.

        Args:
            task: the task that runs `serve`.
            supervisor_stops: whether the supervisor stops too; then it ends the calls.
        """
        self._stopping = True
        if self._proxy is None:
            task.cancel()
        elif not supervisor_stops:
            self._proxy.detach()
        elif isinstance(self._proxy, BoundProxy):
            self._proxy.error_on_loss = SHUTDOWN

    async def serve(self) -> None:
        """Handle the requests of this connection, usually one. Network errors are handled here."""
        await self._run_guarded(self._handle_requests)

    async def reject(self) -> None:
        """Reply that there are too many connections. Network errors are handled here."""
        await self._run_guarded(partial(self._send_error, _TOO_MANY_CONNECTIONS, discard_input=True))

    async def _run_guarded(self, phases: Callable[[], Awaitable[None]]) -> None:
        if not await self._stream.handshake():
            return
        try:
            await phases()
        except ClientDisconnected:
            log.debug("client disconnected", extra={"peer": self._peer})
        except asyncio.CancelledError:
            if self._proxy is not None or not self._stopping:
                self._stream.abort()
                raise
            if not self._idle:
                with contextlib.suppress(ClientDisconnected):
                    await self._send_error(SHUTDOWN)
        except Exception:
            log.exception("connection failed", extra={"peer": self._peer})
            with contextlib.suppress(ClientDisconnected):
                await self._send_error(_INTERNAL_ERROR)
        finally:
            self._reservation.release()
            await self._stream.close()

    async def _handle_requests(self) -> None:
        while await self._handle_request() and not self._stopping:
            await self._wait_for_next_request()

    async def _handle_request(self) -> bool:
        """Handle one request; return whether another one can follow."""
        try:
            request, commands = await self._read_request()
            if isinstance(request, ListCalls):
                await self._list_calls(request)
                return request.keep_alive
            self._proxy = await self._open_proxy(request, commands)
            del request, commands  # they may be long, and the call may take days
            try:
                received = await self._proxy.run()
            finally:
                self._call_done.set()
        except RequestRejected as rejected:
            await self._send_error(rejected.error, rejected.discard_input)
            return False
        except SupervisorError as error:
            await self._send_error(Failed("procedure_loading_error", str(error)))
            return False
        self._next_request = received or b""
        return received is not None

    async def _wait_for_next_request(self) -> None:
        """Wait for the first data of the next request. Raises `ClientDisconnected`, also after the timeout."""
        self._proxy = None
        self._call_done = asyncio.Event()
        self._reservation.release()
        self._idle = True
        try:
            if not self._next_request:
                async with asyncio.timeout(self._limits.keep_alive_timeout):
                    self._next_request = await self._stream.read()
        except TimeoutError as error:
            raise ClientDisconnected from error
        self._idle = False
        self._received_at = self._stream.arrived_at

    async def _send_error(self, error: Failed, discard_input: bool = False) -> None:
        """Send an error that rejects the request or ends the call.

        Args:
            error: the error.
            discard_input: whether the client may still be sending.

        Raises:
            ClientDisconnected: the client disconnected before.
        """
        level = logging.ERROR if error in (CALL_DIED, _INTERNAL_ERROR) else logging.INFO
        log.log(level, "replied with an error", extra={"peer": self._peer, "type": error.type, "reason": error.message})
        await self._stream.write(encode_message(error))
        await self._stream.drain()
        if discard_input:
            await self._stream.discard_input()

    async def _list_calls(self, request: ListCalls) -> None:
        log.debug("calls listed", extra=self._log_fields(request))
        calls = await self._client.list_calls(request.owner)
        keep_alive = self._limits.keep_alive_timeout if request.keep_alive else None
        await self._stream.write(encode_message(replace(calls, keep_alive=keep_alive)))
        if not request.keep_alive:
            await self._stream.drain()

    async def _open_proxy(self, request: Request | Attach, commands: bytes) -> BoundProxy | ResumableProxy:
        """Connect to the supervisor of a call; return the call's proxy.

        Args:
            request: the request that starts or attaches to the call.
            commands: data that the client sent after it.

        Raises:
            SupervisorError: no supervisor is active, or one sent no reply.
        """
        log_fields = self._log_fields(request)
        common = self._stream, self._limits, self._reservation.release, request.keep_alive
        members = Envelope(user=request.user, peer=self._peer)  # Spec: harpd.supervisor.main
        if request.keep_alive:
            members["keep_alive"] = self._limits.keep_alive_timeout
        if isinstance(request, Attach):
            call = request.call
            log.info("attach accepted", extra={"call": call, "since": request.since, **log_fields})
            members |= {"attach": call, "owner": request.owner, "secret": request.secret, "since": request.since}
            supervisor, received = await self._client.attach(dumps(members) + b"\n")
            return ResumableProxy(*common, call, supervisor, b"", received, commands)
        call = str(uuid.uuid4()) if request.call is None else request.call.id
        procedure = request.procedure[:_MAX_LOGGED_NAME]
        log.info("call accepted", extra={"call": call, "procedure": procedure, **log_fields})
        members |= {"call": call, "procedure": request.procedure, "arguments": request.arguments}
        members["authentication"] = round(self._authentication_time, 6)
        if request.call is not None:
            terms = asdict(request.call)
            del terms["id"]
            members["resumable"] = {**terms, "received": self._received_at}
        line = dumps(members) + b"\n"
        supervisor = await self._client.connect_active()
        if request.call is None:
            return BoundProxy(*common, call, supervisor, line, self._client)
        return ResumableProxy(*common, call, supervisor, line, b"", commands)

    def _log_fields(self, request: AnyRequest) -> dict[str, str]:
        return {"user": request.user[:_MAX_LOGGED_NAME], "peer": self._peer}

    async def _read_request(self) -> tuple[AnyRequest, bytes]:
        """Read and authenticate a request; return it and the data after it.

        Raises `RequestRejected` and `ClientDisconnected`.
        """
        line, rest = await self._read_request_line()
        more_data = bool(rest.strip())
        try:
            request = decode_request(line, decode_slices)
        except ProtocolError as error:
            raise RequestRejected(Failed(error.type, error.message), discard_input=more_data) from error
        resumable = isinstance(request, Attach) or (isinstance(request, Request) and request.call is not None)
        if more_data and not resumable:  # with keep-alive, too, the client has to wait for the reply
            raise RequestRejected(AFTER_REQUEST, discard_input=True)
        begin = time.monotonic()
        if not await self._authenticated(request):
            raise RequestRejected(_AUTH_ERROR)
        self._authentication_time = time.monotonic() - begin
        return request, rest

    async def _read_request_line(self) -> tuple[bytes, bytes]:
        """Return the request line and the data after it. Raises `RequestRejected` and `ClientDisconnected`."""
        buffer = LineBuffer(self._limits.request_line)
        try:
            async with asyncio.timeout(self._limits.request_timeout):
                lines: list[bytes] = []
                while not lines:
                    data, self._next_request = self._next_request or await self._stream.read(), b""
                    if not self._reservation.grow(len(data)):
                        raise RequestRejected(_REQUEST_MEMORY_FULL, discard_input=True)
                    lines = buffer.feed(data)
        except TimeoutError as error:
            reason = f"no complete request line within {self._limits.request_timeout:g} s"
            raise RequestRejected(Failed("invalid_request", reason)) from error
        except LineTooLong as error:
            reason = f"the request line is longer than {self._limits.request_line} bytes"
            raise RequestRejected(Failed("invalid_request", reason), discard_input=True) from error
        line, *others = lines
        return line, b"\n".join((*others, buffer.pending))

    async def _authenticated(self, request: AnyRequest) -> bool:
        if self._is_cached(request):
            return True
        log_fields = self._log_fields(request)
        check = partial(self._config.users.authenticate, request.user, request.password)
        try:
            answer: object = await self._thread_pool.run(check, self._limits.authentication_timeout)
        except TimeoutError:
            log.error("authentication timed out", extra=log_fields)
            return False
        except TaskFailed as error:
            # Neither the text of the exception nor a traceback: they may contain the password.
            log.error("authentication module failed", extra={**log_fields, **_raised_at(error.__cause__)})
            return False
        if not isinstance(answer, bool):
            log.error("authentication module returned no bool", extra={**log_fields, "type": type(answer).__name__})
        elif not answer:
            log.warning("authentication failed", extra=log_fields)
        return answer is True

    def _is_cached(self, request: AnyRequest) -> bool:
        """Return whether the module accepts the password without blocking, by its method `check_cached`."""
        check_cached = getattr(self._config.users, "check_cached", None)  # not every module derives from `AuthDB`
        try:
            return check_cached is not None and check_cached(request.user, request.password) is True
        except Exception:  # noqa: BLE001 - `authenticate` is called next, and its error is logged
            return False


def _raised_at(error: BaseException | None) -> dict[str, object]:
    """Return log fields of an exception that contain no secret: its type, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    location = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    return {"error": type(error).__name__, "location": location}
