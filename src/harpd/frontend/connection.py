"""One client's connection, phase by phase: each with its deadline.

    handshake -> request line -> authentication -> call -> close, or, if the client asked for that, the next request

A client that is silent, slow or sends garbage costs its own connection and one line of the log. An owner id and a
secret, of which requests for kept calls have both, go to the warden and nowhere else.

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
from harp_daemon.memory_quota import Allowance, Share
from harp_daemon.sliced_json import open_quickly
from harpd.config.loaded import Generation
from harpd.control.supervisor_client import WardenError, Wardens
from harpd.frontend.proxy import AFTER_REQUEST, CALL_DIED, SHUTDOWN, Around, KeptCall, Refused, TiedCall
from harpd.frontend.thread_pool import Crashed, Threads
from harpd.frontend.tls_stream import Client, Gone

__all__ = ["Connection"]

log = logging.getLogger("harpd.frontend")

#: What of a user's name goes into the log.
_NAME_SHOWN = 64

_AUTH_ERROR = Failed("auth_error", "unknown user or wrong password")
_TOO_MANY = Failed("too_many_connections", "the daemon has as many connections as it may have; try again later")
_NO_MEMORY = Failed("too_many_connections", "the daemon holds as many long requests as it may hold; try again later")
_INTERNAL = Failed("system_error", "an internal error of the daemon; its log says more")


class Connection:
    """Serves one accepted socket, which it owns.

    Args:
        accepted: the socket.
        peer: its peer, for the log and for the call.
        generation: configuration, certificate and users for this connection.
        threads: where passwords are checked.
        allowance: memory for long requests.
        wardens: the way to the wardens.
        lately: a time, in seconds since the system's start, at which this program did run, some seconds ago at most.
    """

    def __init__(
        self,
        accepted: socket.socket,
        peer: str,
        generation: Generation,
        threads: Threads,
        allowance: Allowance,
        wardens: Wardens,
        lately: Callable[[], float],
    ) -> None:
        self._client = Client(accepted, peer, generation)
        self._peer = peer
        self._generation = generation
        self._limits = generation.configuration.limits
        self._threads = threads
        self._share = Share(allowance)
        self._wardens = wardens
        self._lately = lately
        self._next = b""
        self._idle = False
        self._begun = self._client.begun  # when the request arrived, or before
        self._authentication = 0.0  # seconds that the request's took
        self._call: TiedCall | KeptCall | None = None
        self._over = asyncio.Event()
        self._stopping = False

    async def call_over(self) -> None:
        """Return when there is no call that this connection may have to end."""
        if self._call is not None:
            await self._over.wait()

    def stop(self, task: asyncio.Task[None], wardens_end: bool) -> None:
        """End this connection soon, because the daemon ends.

        Args:
            task: the task that serves it.
            wardens_end: whether the wardens end too; then it is they who end calls.
        """
        self._stopping = True
        if self._call is None:
            task.cancel()
        elif not wardens_end:
            self._call.leave()
        elif isinstance(self._call, TiedCall):
            self._call.lost = SHUTDOWN

    async def serve(self) -> None:
        """Answer the requests of this connection, mostly one. Raises nothing of the network."""
        await self._guard(self._answer_all)

    async def refuse(self) -> None:
        """Say that there are too many connections. Raises nothing of the network."""
        await self._guard(partial(self._refuse, Refused(_TOO_MANY, sending=True)))

    async def _guard(self, phases: Callable[[], Awaitable[None]]) -> None:
        if not await self._client.handshake():
            return
        try:
            await phases()
        except Gone:
            log.debug("client went away", extra={"peer": self._peer})
        except asyncio.CancelledError:
            if self._call is not None or not self._stopping:
                self._client.abort()
                raise
            if not self._idle:
                await self._say_at_last(SHUTDOWN)
        except Exception:
            log.exception("connection failed", extra={"peer": self._peer})
            await self._say_at_last(_INTERNAL)
        finally:
            self._share.release()
            await self._client.close()

    async def _answer_all(self) -> None:
        while await self._answer() and not self._stopping:
            await self._wait_for_next()

    async def _answer(self) -> bool:
        """Answer one request; whether another one may come."""
        try:
            try:
                self._call, goes_on = await self._begun_call()
                if self._call is not None:
                    more = await self._call.carry()
                    self._next, goes_on = more or b"", more is not None
            except WardenError as error:
                raise Refused(Failed("procedure_loading_error", str(error))) from error
            finally:
                self._over.set()
        except Refused as refused:
            await self._refuse(refused)
            return False
        return goes_on

    async def _wait_for_next(self) -> None:
        """Wait until the next request begins to come. Raises `Gone`: it did not."""
        self._call = None
        self._over = asyncio.Event()
        self._idle = True
        try:
            if not self._next:
                async with asyncio.timeout(self._limits.idle):
                    self._next = await self._client.read()
        except TimeoutError as error:
            raise Gone from error
        self._idle = False
        self._begun = self._lately()

    async def _refuse(self, refused: Refused) -> None:
        level = logging.ERROR if refused.error is CALL_DIED else logging.INFO
        await self._client.refuse(refused.error, refused.sending, level)

    async def _say_at_last(self, error: Failed) -> None:
        with contextlib.suppress(Gone):
            await self._client.refuse(error, False, logging.ERROR if error is _INTERNAL else logging.INFO)

    # The request.

    async def _begun_call(self) -> tuple[TiedCall | KeptCall | None, bool]:
        """Read a request, check who sent it, and begin what it asks for.

        Returns:
            The call; None when the request has been answered. And whether then another may come.

        Nothing of the request is kept here: it may be long, and the call may take days.

        Raises:
            Refused: the request is refused.
            Gone: the client is.
            WardenError: a warden gives no answer.
        """
        request, orders = await self._accepted_request()
        about = {"user": request.user[:_NAME_SHOWN], "peer": self._peer}
        match request:
            case ListCalls(owner):
                log.debug("calls listed", extra=about)
                held = await self._wardens.held(owner)
                keep = self._limits.idle if request.keep else None
                await self._client.write(encode_message(replace(held, keep=keep)))
                if not request.keep:
                    await self._client.finish()
                return None, request.keep
            case Attach(call=call):
                log.info("attach accepted", extra={"call": call, "since": request.since, **about})
                reply = await self._wardens.attach(_attach_line(request, self._peer, self._limits.idle))
                return KeptCall.attached(self._around(call, request.keep), reply, orders), False
            case Request(call=terms):
                call = str(uuid.uuid4()) if terms is None else terms.id
                procedure = request.procedure[:_NAME_SHOWN]
                log.info("call accepted", extra={"call": call, "procedure": procedure, **about})
                line = _start_line(call, request, self._peer, self._begun, self._limits.idle, self._authentication)
                around = self._around(call, request.keep)
                if terms is None:
                    return await TiedCall.begin(around, self._wardens, line), False
                return await KeptCall.begin(around, self._wardens, line, orders), False

    def _around(self, call: str, keep: bool) -> Around:
        return Around(call, self._client, self._limits, self._share.release, keep)

    async def _accepted_request(self) -> tuple[AnyRequest, bytes]:
        """Read a request and check who sent it; return it, and what came after it. Raises `Refused` and `Gone`."""
        line, more = await self._read_line()
        said_more = bool(more.strip())
        try:
            request = decode_request(line, open_quickly)
        except ProtocolError as error:
            raise Refused(Failed(error.type, error.message), sending=said_more) from error
        kept = isinstance(request, Attach) or (isinstance(request, Request) and request.call is not None)
        if said_more and not kept:  # one that keeps its connection waits for the answer, too
            raise Refused(AFTER_REQUEST, sending=True)
        begin = time.monotonic()
        if not await self._authenticated(request):
            raise Refused(_AUTH_ERROR)
        self._authentication = time.monotonic() - begin
        return request, more

    async def _read_line(self) -> tuple[bytes, bytes]:
        """Read the request line; return it and what came after it. Raises `Refused` and `Gone`."""
        buffer = LineBuffer(self._limits.request_line)
        try:
            async with asyncio.timeout(self._limits.request):
                lines: list[bytes] = []
                while not lines:
                    data, self._next = self._next or await self._client.read(), b""
                    if not self._share.grow(len(data)):
                        raise Refused(_NO_MEMORY, sending=True)
                    lines = buffer.feed(data)
        except TimeoutError as error:
            fault = f"no whole request line came within {self._limits.request:g} s"
            raise Refused(Failed("invalid_request", fault)) from error
        except LineTooLong as error:
            fault = f"the request line is longer than {self._limits.request_line} bytes"
            raise Refused(Failed("invalid_request", fault), sending=True) from error
        line, *more = lines
        return line, b"\n".join((*more, buffer.pending))

    async def _authenticated(self, request: AnyRequest) -> bool:
        if self._recalls(request):
            return True
        about = {"user": request.user[:_NAME_SHOWN], "peer": self._peer}
        check = partial(self._generation.users.authenticate, request.user, request.password)
        try:
            answer: object = await self._threads.run(check, self._limits.authentication)
        except TimeoutError:
            log.error("authentication took too long", extra=about)
            return False
        except Crashed as error:
            # Neither the exception's text nor a traceback with it: the password may be in there.
            log.error("authentication module failed", extra={**about, **_place(error.__cause__)})
            return False
        if not isinstance(answer, bool):
            kind = type(answer).__name__
            log.error("authentication module returned neither True nor False", extra={**about, "returned": kind})
        elif not answer:
            log.warning("authentication failed", extra=about)
        return answer is True

    def _recalls(self, request: AnyRequest) -> bool:
        """Whether the module knows already, without a thread, that this is the user's password."""
        recalls = getattr(self._generation.users, "recalls", None)  # not every module derives from `AuthDB`
        try:
            return recalls is not None and recalls(request.user, request.password) is True
        except Exception:  # noqa: BLE001 - the usual way logs it
            return False


def _start_line(call: str, request: Request, peer: str, begun: float, idle: float, authentication: float) -> bytes:
    """The line that asks a warden to start a call; `begun`: when it arrived, or before. Spec: harpd.supervisor.main."""
    members = Envelope(call=call, procedure=request.procedure, arguments=request.arguments)
    members |= {"user": request.user, "peer": peer, "authentication": round(authentication, 6)}
    if request.keep:
        members["keep"] = idle
    if request.call is not None:
        terms = encode_terms(request.call)
        del terms["id"]
        members["kept"] = {**terms, "begun": begun}
    return dumps(members) + b"\n"


def _attach_line(request: Attach, peer: str, idle: float) -> bytes:
    """The line that asks a warden to attach to a call. Spec: harpd.supervisor.main."""
    members = Envelope(attach=request.call, owner=request.owner, secret=request.secret, since=request.since)
    members |= {"user": request.user, "peer": peer}
    if request.keep:
        members["keep"] = idle
    return dumps(members) + b"\n"


def _place(error: BaseException | None) -> dict[str, object]:
    """What of an exception may be logged: its type and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    return {"error": type(error).__name__, "at": place}
