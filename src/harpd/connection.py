"""One client's connection, from the handshake to its close: each phase with its deadline.

    handshake -> request line -> authentication -> call -> close

A client that is silent, slow or sends garbage costs its own connection and one line of the log. The client's
going away stops its call, and the connection counts until the call's processes are gone.

Spec: docs/protocol.md, harpd.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import traceback
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from harp.daemon.allowance import Allowance, Share
from harp.protocol.daemon import Request, decode_request, encode_message
from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.jsontext import Envelope, dumps, open_sliced
from harp.protocol.lines import LineBuffer, LineTooLong
from harpd.generation import Generation
from harpd.keeper import Keeper, WardenError
from harpd.relay import Relay
from harpd.threads import Crashed, Threads

__all__ = ["Connection", "peer_name"]

T = TypeVar("T")

log = logging.getLogger("harpd.gate")

_CHUNK = 64 * 1024
#: Seconds for TLS's own farewell, the last bytes on their way included.
_FAREWELL = 30.0
#: After a refusal the client may still be sending. What it sends is read, so that the refusal is not lost by a
#: reset: until it has been silent for the first time, and no longer than the second; seconds.
_SILENT, _LINGER = 0.5, 10.0
#: Seconds beyond the grace periods that the warden has to end a call.
_STOP_MARGIN = 10.0
#: What of a user's name goes into the log.
_NAME_SHOWN = 64

_AFTER_REQUEST = Failed("invalid_request", "data after the request line")
_AUTH_ERROR = Failed("auth_error", "unknown user or wrong password")
_CALL_DIED = Failed("call_died", "the warden of the calls died")
_SHUTDOWN = Failed("shutdown", "the daemon is shutting down")
_TOO_MANY = Failed("too_many_connections", "the daemon has as many connections as it may have; try again later")
_NO_MEMORY = Failed("too_many_connections", "the daemon holds as many long requests as it may hold; try again later")
_INTERNAL = Failed("system_error", "an internal error of the daemon; its log says more")


class _Gone(Exception):
    """The client closed the connection, or takes nothing any more."""


class _Spoke(Exception):
    """The client sent something after its request."""


class _WardenLost(Exception):
    """The warden's connection broke: the warden is dead."""


class _Refused(Exception):
    """The request is refused.

    Args:
        error: what the client is told.
        sending: whether more may be on its way from the client.
    """

    def __init__(self, error: Failed, sending: bool = False) -> None:
        super().__init__(error, sending)
        self.error = error
        self.sending = sending


def peer_name(address: tuple[object, ...]) -> str:
    """A peer's address and port as text."""
    host = str(address[0]).removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


class Connection:
    """Serves one accepted socket, which it owns.

    Args:
        accepted: the socket.
        peer: its peer, for the log and for the call.
        generation: configuration, certificate and users for this connection.
        threads: where passwords are checked.
        allowance: memory for long requests.
        keeper: the way to the warden.
    """

    def __init__(
        self,
        accepted: socket.socket,
        peer: str,
        generation: Generation,
        threads: Threads,
        allowance: Allowance,
        keeper: Keeper,
    ) -> None:
        self._socket = accepted
        self._peer = peer
        self._generation = generation
        self._limits = generation.configuration.limits
        self._threads = threads
        self._share = Share(allowance)
        self._keeper = keeper
        self._reader = asyncio.StreamReader(limit=_CHUNK)
        self._writer: asyncio.StreamWriter
        #: Whether the daemon ends. Set it, then cancel the task unless `calling`.
        self.stopping = False
        #: Whether the warden has the call; then it is the warden who ends it.
        self.calling = False

    async def serve(self) -> None:
        """Answer the one request of this connection. Raises nothing of the network."""
        await self._guard(self._answer)

    async def refuse(self) -> None:
        """Say that there are too many connections. Raises nothing of the network."""
        await self._guard(partial(self._refuse, _TOO_MANY, sending=True))

    async def _guard(self, phases: Callable[[], Awaitable[None]]) -> None:
        if not await self._handshake():
            return
        try:
            await phases()
        except (_Gone, OSError):
            log.debug("client went away", extra={"peer": self._peer})
        except asyncio.CancelledError:
            if self.calling or not self.stopping:
                self._writer.transport.abort()
                raise
            await self._say_at_last(_SHUTDOWN)
        except Exception:
            log.exception("connection failed", extra={"peer": self._peer})
            await self._say_at_last(_INTERNAL)
        finally:
            self._share.release()
            await self._close()

    async def _handshake(self) -> bool:
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(self._reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                self._socket,
                ssl=self._generation.context,
                ssl_handshake_timeout=self._limits.handshake,
                ssl_shutdown_timeout=_FAREWELL,
            )
        except OSError as error:  # of the network and of TLS alike
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            log.info("handshake failed", extra={"peer": self._peer, "reason": reason})
            return False
        self._writer = asyncio.StreamWriter(transport, protocol, self._reader, loop)
        transport.set_write_buffer_limits(high=_CHUNK)
        return True

    async def _answer(self) -> None:
        call = str(uuid.uuid4())
        try:
            await self._call(call, await self._accepted_request(call))
        except _Refused as refused:
            await self._refuse(refused.error, refused.sending)

    async def _accepted_request(self, call: str) -> bytes:
        """Read a request and check who sent it; return what the warden gets. Raises `_Refused` and `_Gone`.

        Nothing of the request is kept here: it may be long, and the call may take days.
        """
        try:
            request = decode_request(await self._read_line(), open_sliced)
        except ProtocolError as error:
            raise _Refused(Failed(error.type, error.message)) from error
        if not await self._authenticated(request):
            raise _Refused(_AUTH_ERROR)
        asked = {"procedure": request.procedure[:_NAME_SHOWN], "user": request.user, "peer": self._peer}
        log.info("call accepted", extra={"call": call, **asked})
        members = Envelope(call=call, procedure=request.procedure, arguments=request.arguments)
        return dumps(Envelope(members, user=request.user, peer=self._peer)) + b"\n"

    async def _read_line(self) -> bytes:
        """Read the request line. Raises `_Refused` and `_Gone`."""
        buffer = LineBuffer(self._limits.request_line)
        try:
            async with asyncio.timeout(self._limits.request):
                lines: list[bytes] = []
                while not lines:
                    data = await self._read()
                    if not self._share.grow(len(data)):
                        raise _Refused(_NO_MEMORY, sending=True)
                    lines = buffer.feed(data)
        except TimeoutError as error:
            fault = f"no whole request line came within {self._limits.request:g} s"
            raise _Refused(Failed("invalid_request", fault)) from error
        except LineTooLong as error:
            fault = f"the request line is longer than {self._limits.request_line} bytes"
            raise _Refused(Failed("invalid_request", fault), sending=True) from error
        line, *more = lines
        if any(map(bytes.strip, (*more, buffer.pending))):
            raise _Refused(_AFTER_REQUEST, sending=True)
        return line

    async def _read(self) -> bytes:
        data = await self._reader.read(_CHUNK)
        if not data:
            raise _Gone
        return data

    async def _authenticated(self, request: Request) -> bool:
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

    async def _call(self, call: str, request: bytes) -> None:
        try:
            reader, writer = await self._keeper.connect()
        except WardenError as error:
            raise _Refused(Failed("procedure_loading_error", str(error))) from error
        self.calling = True
        try:
            writer.transport.set_write_buffer_limits(high=1, low=0)
            writer.write(request)
            del request
            await self._carry(call, reader, writer)
        finally:
            writer.transport.abort()

    async def _carry(self, call: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry the warden's lines to the client until the call has ended or the client is gone."""
        relay = Relay()
        relaying = asyncio.create_task(self._relay(relay, reader, writer))
        watching = asyncio.create_task(self._watch())
        spoke = False
        try:
            await asyncio.wait({relaying, watching}, return_when=asyncio.FIRST_COMPLETED)
            (relaying if relaying.done() else watching).result()
        except (_Gone, _Spoke) as reason:
            if not relay.ended:
                relaying.cancel()
                await asyncio.wait({relaying})
                await self._stop(call, reason, reader, writer)
            if isinstance(reason, _Gone):
                return
            spoke = True
        finally:
            relaying.cancel()
            watching.cancel()
            await asyncio.gather(relaying, watching, return_exceptions=True)
        if relay.torn:
            self._writer.transport.abort()
        elif relay.ended:
            await self._drain(wholly=True)
        elif spoke:
            raise _Refused(_AFTER_REQUEST, sending=True)
        else:
            raise _Refused(_SHUTDOWN if self.stopping else _CALL_DIED)

    async def _relay(self, relay: Relay, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send the client what the warden says, until the warden closes or dies. Raises `_Gone`."""
        with contextlib.suppress(_WardenLost):
            await _of_warden(writer.drain())
            self._share.release()
            while data := await _of_warden(reader.read(_CHUNK)):
                if sendable := relay.feed(data):
                    self._writer.write(sendable)
                    await self._drain()

    async def _watch(self) -> None:
        """Wait until the client goes away or says something. Raises `_Gone` or `_Spoke`."""
        while True:
            try:
                data = await self._read()
            except OSError as error:
                raise _Gone from error
            if data.strip():
                raise _Spoke

    async def _stop(
        self, call: str, reason: Exception, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Have the warden stop the call, and wait until its processes are gone."""
        about = {"call": call, "peer": self._peer}
        if isinstance(reason, _Gone):
            self._writer.transport.abort()
        try:
            writer.write_eof()
            async with asyncio.timeout(2 * self._limits.kill_grace + _STOP_MARGIN):
                while await reader.read(_CHUNK):
                    pass
        except OSError as error:
            if isinstance(error, TimeoutError):
                log.error("call did not end in time after its client was gone", extra=about)
                return
        what = "client went away; call stopped" if isinstance(reason, _Gone) else "client sent more; call stopped"
        log.info(what, extra=about)

    async def _refuse(self, error: Failed, sending: bool = False) -> None:
        """Send an error line. `sending`: whether more may be on its way from the client."""
        level = logging.ERROR if error in (_CALL_DIED, _INTERNAL) else logging.INFO
        log.log(
            level, "answered with an error", extra={"peer": self._peer, "type": error.type, "reason": error.message}
        )
        self._writer.write(encode_message(error))
        await self._drain(wholly=True)
        if sending:
            with contextlib.suppress(TimeoutError, _Gone):
                async with asyncio.timeout(_LINGER):
                    while True:
                        async with asyncio.timeout(_SILENT):
                            await self._read()

    async def _say_at_last(self, error: Failed) -> None:
        with contextlib.suppress(_Gone, OSError):
            await self._refuse(error)

    async def _drain(self, wholly: bool = False) -> None:
        """Wait until the client has taken what is more than the buffer's share, or all of it.

        Raises:
            _Gone: the client is gone, or took nothing for as long as it may.
        """
        transport = self._writer.transport
        if wholly:
            transport.set_write_buffer_limits(high=1, low=0)
        left = transport.get_write_buffer_size()
        while True:
            try:
                async with asyncio.timeout(self._limits.write_stall):
                    await self._writer.drain()
                    return
            except TimeoutError as error:
                before, left = left, transport.get_write_buffer_size()
                if left >= before:
                    log.info("client does not read", extra={"peer": self._peer, "unsent": left})
                    raise _Gone from error
            except OSError as error:
                raise _Gone from error

    async def _close(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(_FAREWELL):
                await self._writer.wait_closed()
        except (OSError, asyncio.CancelledError) as error:
            self._writer.transport.abort()
            if isinstance(error, asyncio.CancelledError):
                raise


async def _of_warden(operation: Awaitable[T]) -> T:
    """Await something on the warden's connection; its loss is told apart from the client's."""
    try:
        return await operation
    except ConnectionError as error:
        raise _WardenLost from error


def _place(error: BaseException | None) -> dict[str, object]:
    """What of an exception may be logged: its type and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    return {"error": type(error).__name__, "at": place}
