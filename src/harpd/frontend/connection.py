"""One client's connection, phase by phase: each with its deadline.

    handshake -> request line -> authentication -> call -> close, or, if the client asked for that, the next request

A client that is silent, slow or sends garbage costs its own connection and one line of the log. An owner id and a
secret, of which requests for kept calls have both, go to the supervisor and nowhere else.

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
from dataclasses import replace
from functools import partial

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import AnyRequest, Attach, ListCalls, Request, decode_request, encode_message
from harp.protocol.json_text import Envelope, dumps
from harp.protocol.lines import LineBuffer, LineTooLong
from harp.protocol.resumable import encode_terms
from harp_daemon.memory_quota import MemoryQuota, Reservation
from harp_daemon.sliced_json import decode_slices
from harpd.config.loaded import LoadedConfig
from harpd.control.supervisor_client import SupervisorClient, SupervisorError
from harpd.frontend.proxy import (
    AFTER_REQUEST,
    CALL_DIED,
    SHUTDOWN,
    BoundProxy,
    ProxyContext,
    RequestRejected,
    ResumableProxy,
)
from harpd.frontend.thread_pool import BoundedThreadPool, TaskFailed
from harpd.frontend.tls_stream import ClientDisconnected, TLSStream

__all__ = ["Connection"]

log = logging.getLogger("harpd.frontend")

#: What of a user's name goes into the log.
_MAX_LOGGED_NAME = 64

_AUTH_ERROR = Failed("auth_error", "unknown user or wrong password")
_TOO_MANY_CONNECTIONS = Failed(
    "too_many_connections", "the daemon has as many connections as it may have; try again later"
)
_REQUEST_MEMORY_FULL = Failed(
    "too_many_connections", "the daemon holds as many long requests as it may hold; try again later"
)
_INTERNAL_ERROR = Failed("system_error", "an internal error of the daemon; its log says more")


class Connection:
    """Serves one accepted socket, which it owns.

    Args:
        accepted: the socket.
        peer: its peer, for the log and for the call.
        generation: configuration, certificate and users for this connection.
        threads: where passwords are checked.
        allowance: memory for long requests.
        wardens: the way to the supervisors.
        lately: a time, in seconds since the system's start, at which this program did run, some seconds ago at most.
    """

    def __init__(
        self,
        accepted: socket.socket,
        peer: str,
        config: LoadedConfig,
        thread_pool: BoundedThreadPool,
        allowance: MemoryQuota,
        client: SupervisorClient,
        last_heartbeat: Callable[[], float],
    ) -> None:
        self._stream = TLSStream(accepted, peer, config)
        self._peer = peer
        self._config = config
        self._limits = config.configuration.limits
        self._thread_pool = thread_pool
        self._share = Reservation(allowance)
        self._client = client
        self._last_heartbeat = last_heartbeat
        self._next_request = b""
        self._idle = False
        self._received_at = self._stream.accepted_at  # when the request arrived, or before
        self._authentication_time = 0.0  # seconds that the request's took
        self._proxy: BoundProxy | ResumableProxy | None = None
        self._call_done = asyncio.Event()
        self._stopping = False

    async def wait_call_done(self) -> None:
        """Return when there is no call that this connection may have to end."""
        if self._proxy is not None:
            await self._call_done.wait()

    def stop(self, task: asyncio.Task[None], supervisor_stops: bool) -> None:
        """End this connection soon, because the daemon ends.

        Args:
            task: the task that serves it.
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
        """Answer the requests of this connection, mostly one. Raises nothing of the network."""
        await self._run_guarded(self._handle_requests)

    async def reject(self) -> None:
        """Say that there are too many connections. Raises nothing of the network."""
        await self._run_guarded(
            partial(self._send_rejection, RequestRejected(_TOO_MANY_CONNECTIONS, discard_input=True))
        )

    async def _run_guarded(self, phases: Callable[[], Awaitable[None]]) -> None:
        if not await self._stream.handshake():
            return
        try:
            await phases()
        except ClientDisconnected:
            log.debug("client went away", extra={"peer": self._peer})
        except asyncio.CancelledError:
            if self._proxy is not None or not self._stopping:
                self._stream.abort()
                raise
            if not self._idle:
                await self._try_send_error(SHUTDOWN)
        except Exception:
            log.exception("connection failed", extra={"peer": self._peer})
            await self._try_send_error(_INTERNAL_ERROR)
        finally:
            self._share.release()
            await self._stream.close()

    async def _handle_requests(self) -> None:
        while await self._handle_request() and not self._stopping:
            await self._wait_for_next_request()

    async def _handle_request(self) -> bool:
        """Answer one request; whether another one may come."""
        try:
            try:
                self._proxy, goes_on = await self._open_call()
                if self._proxy is not None:
                    more = await self._proxy.run()
                    self._next_request, goes_on = more or b"", more is not None
            except SupervisorError as error:
                raise RequestRejected(Failed("procedure_loading_error", str(error))) from error
            finally:
                self._call_done.set()
        except RequestRejected as refused:
            await self._send_rejection(refused)
            return False
        return goes_on

    async def _wait_for_next_request(self) -> None:
        """Wait until the next request begins to come. Raises `ClientDisconnected`: it did not."""
        self._proxy = None
        self._call_done = asyncio.Event()
        self._idle = True
        try:
            if not self._next_request:
                async with asyncio.timeout(self._limits.keep_alive_timeout):
                    self._next_request = await self._stream.read()
        except TimeoutError as error:
            raise ClientDisconnected from error
        self._idle = False
        self._received_at = self._last_heartbeat()

    async def _send_rejection(self, refused: RequestRejected) -> None:
        level = logging.ERROR if refused.error is CALL_DIED else logging.INFO
        await self._stream.send_error(refused.error, refused.discard_input, level)

    async def _try_send_error(self, error: Failed) -> None:
        with contextlib.suppress(ClientDisconnected):
            await self._stream.send_error(error, False, logging.ERROR if error is _INTERNAL_ERROR else logging.INFO)

    # The request.

    async def _open_call(self) -> tuple[BoundProxy | ResumableProxy | None, bool]:
        """Read a request, check who sent it, and begin what it asks for.

        Returns:
            The call; None when the request has been answered. And whether then another may come.

        Nothing of the request is kept here: it may be long, and the call may take days.

        Raises:
            Refused: the request is refused.
            Gone: the client is.
            SupervisorError: a supervisor gives no answer.
        """
        request, orders = await self._read_request()
        about = {"user": request.user[:_MAX_LOGGED_NAME], "peer": self._peer}
        match request:
            case ListCalls(owner):
                log.debug("calls listed", extra=about)
                held = await self._client.list_calls(owner)
                keep = self._limits.keep_alive_timeout if request.keep_alive else None
                await self._stream.write(encode_message(replace(held, keep_alive=keep)))
                if not request.keep_alive:
                    await self._stream.drain()
                return None, request.keep_alive
            case Attach(call=call):
                log.info("attach accepted", extra={"call": call, "since": request.since, **about})
                reply = await self._client.attach(_attach_line(request, self._peer, self._limits.keep_alive_timeout))
                return ResumableProxy.from_reply(self._proxy_context(call, request.keep_alive), reply, orders), False
            case Request(call=terms):
                call = str(uuid.uuid4()) if terms is None else terms.id
                procedure = request.procedure[:_MAX_LOGGED_NAME]
                log.info("call accepted", extra={"call": call, "procedure": procedure, **about})
                line = _start_line(
                    call,
                    request,
                    self._peer,
                    self._received_at,
                    self._limits.keep_alive_timeout,
                    self._authentication_time,
                )
                around = self._proxy_context(call, request.keep_alive)
                if terms is None:
                    return await BoundProxy.open(around, self._client, line), False
                return await ResumableProxy.open(around, self._client, line, orders), False

    def _proxy_context(self, call: str, keep: bool) -> ProxyContext:
        return ProxyContext(call, self._stream, self._limits, self._share.release, keep)

    async def _read_request(self) -> tuple[AnyRequest, bytes]:
        """Read and authenticate a request; return it and the data after it.

        Raises `RequestRejected` and `ClientDisconnected`.
        """
        line, more = await self._read_request_line()
        said_more = bool(more.strip())
        try:
            request = decode_request(line, decode_slices)
        except ProtocolError as error:
            raise RequestRejected(Failed(error.type, error.message), discard_input=said_more) from error
        kept = isinstance(request, Attach) or (isinstance(request, Request) and request.call is not None)
        if said_more and not kept:  # one that keeps its connection waits for the answer, too
            raise RequestRejected(AFTER_REQUEST, discard_input=True)
        begin = time.monotonic()
        if not await self._authenticated(request):
            raise RequestRejected(_AUTH_ERROR)
        self._authentication_time = time.monotonic() - begin
        return request, more

    async def _read_request_line(self) -> tuple[bytes, bytes]:
        """Return the request line and the data after it. Raises `RequestRejected` and `ClientDisconnected`."""
        buffer = LineBuffer(self._limits.request_line)
        try:
            async with asyncio.timeout(self._limits.request_timeout):
                lines: list[bytes] = []
                while not lines:
                    data, self._next_request = self._next_request or await self._stream.read(), b""
                    if not self._share.grow(len(data)):
                        raise RequestRejected(_REQUEST_MEMORY_FULL, discard_input=True)
                    lines = buffer.feed(data)
        except TimeoutError as error:
            fault = f"no whole request line came within {self._limits.request_timeout:g} s"
            raise RequestRejected(Failed("invalid_request", fault)) from error
        except LineTooLong as error:
            fault = f"the request line is longer than {self._limits.request_line} bytes"
            raise RequestRejected(Failed("invalid_request", fault), discard_input=True) from error
        line, *more = lines
        return line, b"\n".join((*more, buffer.pending))

    async def _authenticated(self, request: AnyRequest) -> bool:
        if self._is_cached(request):
            return True
        about = {"user": request.user[:_MAX_LOGGED_NAME], "peer": self._peer}
        check = partial(self._config.users.authenticate, request.user, request.password)
        try:
            answer: object = await self._thread_pool.run(check, self._limits.authentication_timeout)
        except TimeoutError:
            log.error("authentication took too long", extra=about)
            return False
        except TaskFailed as error:
            # Neither the exception's text nor a traceback with it: the password may be in there.
            log.error("authentication module failed", extra={**about, **_raised_at(error.__cause__)})
            return False
        if not isinstance(answer, bool):
            kind = type(answer).__name__
            log.error("authentication module returned neither True nor False", extra={**about, "returned": kind})
        elif not answer:
            log.warning("authentication failed", extra=about)
        return answer is True

    def _is_cached(self, request: AnyRequest) -> bool:
        """Whether the module knows already, without a thread, that this is the user's password."""
        recalls = getattr(self._config.users, "recalls", None)  # not every module derives from `AuthDB`
        try:
            return recalls is not None and recalls(request.user, request.password) is True
        except Exception:  # noqa: BLE001 - the usual way logs it
            return False


def _start_line(
    call: str, request: Request, peer: str, received_at: float, keep_alive: float, authentication: float
) -> bytes:
    """Return the line that starts a call in a supervisor. Spec: harpd.supervisor.main.

    `received_at`: when the request arrived, or earlier.
    """
    members = Envelope(call=call, procedure=request.procedure, arguments=request.arguments)
    members |= {"user": request.user, "peer": peer, "authentication": round(authentication, 6)}
    if request.keep_alive:
        members["keep_alive"] = keep_alive
    if request.call is not None:
        terms = encode_terms(request.call)
        del terms["id"]
        members["resumable"] = {**terms, "received": received_at}
    return dumps(members) + b"\n"


def _attach_line(request: Attach, peer: str, keep_alive: float) -> bytes:
    """The line that asks a supervisor to attach to a call. Spec: harpd.supervisor.main."""
    members = Envelope(attach=request.call, owner=request.owner, secret=request.secret, since=request.since)
    members |= {"user": request.user, "peer": peer}
    if request.keep_alive:
        members["keep_alive"] = keep_alive
    return dumps(members) + b"\n"


def _raised_at(error: BaseException | None) -> dict[str, object]:
    """What of an exception may be logged: its type and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    return {"error": type(error).__name__, "at": place}
