"""Carries the data of one call between its supervisor and its client.

A *connection-bound* call ends with its connection. Only the supervisor's lines are sent on: when the client sends data
or disconnects, the call is stopped, and the connection counts until the call's processes have ended. If the client
asked for keep-alive, data after the closing line is its next request.

For a *resumable* call, both directions are sent on without decoding; only the length of the client's lines is checked.
When either side disconnects, no error line is sent: it would look like the end of the call, but the call continues.
With keep-alive, the next request follows the command ``done``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from harp.protocol.ends import Failed
from harp.protocol.fields import ProtocolError
from harp.protocol.harpd import MAX_COMMAND_BYTES, Release, decode_command
from harp.protocol.lines import LineBuffer, LineTooLong
from harpd.config.settings import Limits
from harpd.control.supervisor_client import AttachReply, SupervisorClient, SupervisorConnection, SupervisorDied
from harpd.frontend.line_relay import LineRelay
from harpd.frontend.tls_stream import ClientDisconnected, TLSStream

__all__ = ["AFTER_REQUEST", "CALL_DIED", "SHUTDOWN", "BoundProxy", "ProxyContext", "RequestRejected", "ResumableProxy"]

log = logging.getLogger("harpd.frontend")

#: Seconds beyond the grace periods that the supervisor has to end a call.
_STOP_MARGIN = 10.0
#: The most bytes of orders that may come before the supervisor's first answer.
_MAX_PENDING_BYTES = 64 * 1024
#: How the line begins by which a supervisor refuses a call because it ends; `encode_message` writes it so.
_SHUTDOWN_PREFIX = b'{"harp":1,"error":{"type":"shutdown"'

AFTER_REQUEST = Failed("invalid_request", "data after the request line")
CALL_DIED = Failed("call_died", "the supervisor of the calls died")
SHUTDOWN = Failed("shutdown", "the daemon is shutting down")


class RequestRejected(Exception):
    """The request is refused, or the call cut short.

    Args:
        error: what the client is told.
        sending: whether more may be on its way from the client.
    """

    def __init__(self, error: Failed, discard_input: bool = False) -> None:
        super().__init__(error, discard_input)
        self.error = error
        self.discard_input = discard_input


class _UnexpectedData(Exception):
    """The client sent something after its request."""


class _ShuttingDown(Exception):
    """The gate ends, and the supervisors go on."""


@dataclass(frozen=True, slots=True)
class ProxyContext:
    """What a call is carried with.

    Attributes:
        call: its id, for the log.
        client: its client.
        limits: the configuration's.
        taken: called once the supervisor has the request.
        keep: whether the client wants to go on with another request.
    """

    call: str
    stream: TLSStream
    limits: Limits
    on_accepted: Callable[[], None]
    keep_alive: bool


class _Proxy:
    """What both kinds share: they end when the gate leaves."""

    def __init__(self, context: ProxyContext, supervisor: SupervisorConnection) -> None:
        self._stream = context.stream
        self._limits = context.limits
        self._on_accepted = context.on_accepted
        self._log_fields = {"call": context.call, "peer": context.stream.peer}
        self._keep_alive = context.keep_alive
        self._supervisor = supervisor
        self._detached: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def detach(self) -> None:
        """End the carrying: the gate ends, and the supervisors go on."""
        if not self._detached.done():
            self._detached.set_exception(_ShuttingDown())


class BoundProxy(_Proxy):
    """A call whose client's connection is its life.

    Args:
        around: what it is carried with.
        wardens: the way to the supervisors.
        asked: what tells the supervisor from others, see `SupervisorClient.current`.
        warden: who gets the call.
        request: the line for it.
    """

    def __init__(
        self,
        context: ProxyContext,
        client: SupervisorClient,
        inode: int | None,
        supervisor: SupervisorConnection,
        request: bytes,
    ) -> None:
        super().__init__(context, supervisor)
        self._client = client
        self._inode = inode
        self._request = request
        self._relay = LineRelay()
        self._next_request = b""
        #: What the client is told when the supervisor ends before the call does.
        self.error_on_loss = CALL_DIED

    @classmethod
    async def open(cls, context: ProxyContext, client: SupervisorClient, request: bytes) -> BoundProxy:
        """Reach a supervisor for a call. Raises `SupervisorError`."""
        inode = client.active_socket_inode()
        return cls(context, client, inode, await client.connect_active(), request)

    async def run(self) -> bytes | None:
        """Ask the supervisor for the call, and carry its lines to the client until the call has ended.

        Returns:
            What has come of the client's next request; None: there will be none.

        Raises:
            Gone: the client is gone, and the call with it.
            Refused: the call was cut short, and the client has to be told.
            SupervisorError: the supervisor retires, and there is no other.
        """
        relay = self._relay
        rejected: RequestRejected | None = None
        try:
            await _run_until_first(self._relay_lines(), self._watch_client(), self._detached)
        except ClientDisconnected:
            if not relay.complete:
                self._stream.abort()
                await self._stop_call("client went away; call stopped")
            raise
        except _UnexpectedData:
            rejected = RequestRejected(AFTER_REQUEST, discard_input=True)
            if not relay.complete:
                await self._stop_call("client sent more; call stopped")
        except _ShuttingDown:
            rejected = RequestRejected(SHUTDOWN)
            if not relay.complete:
                await self._stop_call("the gate ends; call stopped")
        finally:
            self._supervisor.close()
        if relay.mid_line:
            self._stream.abort()
        elif not relay.complete:
            raise rejected or RequestRejected(self.error_on_loss)
        elif self._may_continue and rejected is None:
            return self._next_request
        else:
            await self._stream.drain()
        return None

    @property
    def _may_continue(self) -> bool:
        """Whether the client may say its next request now."""
        return self._keep_alive and self._relay.complete and not self._relay.failed

    async def _relay_lines(self) -> None:
        """Send the supervisor's lines to the client until the supervisor closes. Raises `ClientDisconnected`."""
        with contextlib.suppress(SupervisorDied):
            data = await self._send_request()
            if data.startswith(_SHUTDOWN_PREFIX) and self._client.active_socket_inode() != self._inode:
                # It retired while the request was on its way, and has started nothing.
                self._supervisor.close()
                self._supervisor = await self._client.connect_active()
                data = await self._send_request()
            self._request = b""
            self._on_accepted()
            while data:
                if sendable := self._relay.feed(data):
                    await self._stream.write(sendable)
                if self._may_continue:
                    return  # that its process is gone, which the supervisor says by closing, nobody waits for
                data = await self._supervisor.receive()

    async def _send_request(self) -> bytes:
        await self._supervisor.send(self._request)
        return await self._supervisor.receive()

    async def _watch_client(self) -> None:
        """Wait until the client goes away or says something. Raises `ClientDisconnected` or `_UnexpectedData`."""
        while True:
            data = await self._stream.read()
            if self._may_continue:
                self._next_request = data
                return
            if data.strip():
                raise _UnexpectedData

    async def _stop_call(self, why: str) -> None:
        """Have the supervisor stop the call, and wait until its processes are gone."""
        with contextlib.suppress(SupervisorDied):
            self._supervisor.finish_sending()
            try:
                async with asyncio.timeout(2 * self._limits.kill_grace + _STOP_MARGIN):
                    while await self._supervisor.receive():
                        pass
            except TimeoutError:
                log.error("call did not end in time", extra={**self._log_fields, "why": why})
                return
        log.info(why, extra=self._log_fields)


class ResumableProxy(_Proxy):
    """A call that goes on without its client, who may come back.

    Args:
        around: what it is carried with.
        warden: who has the call, or gets it.
        request: the line for the supervisor, if it has not got it.
        received: what it has said already.
        orders: what the client has said already after its request.
    """

    def __init__(
        self,
        context: ProxyContext,
        supervisor: SupervisorConnection,
        commands: bytes,
        request: bytes = b"",
        received: bytes = b"",
    ) -> None:
        super().__init__(context, supervisor)
        self._request = request
        self._received = received
        self._commands = commands
        self._pending_commands = (
            bytearray()
        )  # orders that came before the supervisor has answered, which reads nothing else till then
        self._accepted = False
        self._next_request: bytes | None = None

    @classmethod
    async def open(
        cls, context: ProxyContext, client: SupervisorClient, request: bytes, commands: bytes
    ) -> ResumableProxy:
        """Reach a supervisor for a call. Raises `SupervisorError`."""
        return cls(context, await client.connect_active(), commands, request=request)

    @classmethod
    def from_reply(cls, context: ProxyContext, reply: AttachReply, commands: bytes) -> ResumableProxy:
        """Go on with a call from what its supervisor has replied."""
        return cls(context, reply.connection, commands, received=reply.line + reply.rest)

    async def run(self) -> bytes | None:
        """Carry bytes both ways until one side is gone.

        Returns:
            What has come of the client's next request; None: there will be none.

        Raises:
            Gone: it was the client.
        """
        try:
            await _run_until_first(self._relay_lines(), self._relay_commands(), self._detached)
            if self._next_request is None:
                await self._stream.drain()
        except LineTooLong as error:
            log.warning("client sent what is no order; detached", extra={**self._log_fields, "reason": str(error)})
        except TimeoutError:
            log.error("supervisor does not read; client detached", extra=self._log_fields)
        except _ShuttingDown:
            log.info("the gate ends; client detached", extra=self._log_fields)
        else:
            return self._next_request
        finally:
            self._supervisor.close()
        return None

    async def _relay_lines(self) -> None:
        """Send the client what the supervisor says. Raises `ClientDisconnected` and `TimeoutError`."""
        with contextlib.suppress(SupervisorDied):
            if self._request:
                await self._send_to_supervisor(self._request)
                self._request = b""
            data = self._received or await self._supervisor.receive()
            self._received = b""
            self._on_accepted()
            with contextlib.suppress(SupervisorDied):  # what it has said is to be read all the same
                while self._pending_commands:
                    held, self._pending_commands = bytes(self._pending_commands), bytearray()
                    await self._send_to_supervisor(held)
            self._accepted = True
            while data:
                await self._stream.write(data)
                data = await self._supervisor.receive()

    async def _relay_commands(self) -> None:
        """Send the client's commands to the supervisor, line by line.

        Raises `ClientDisconnected`, `LineTooLong` and `TimeoutError`.
        """
        buffer = LineBuffer(MAX_COMMAND_BYTES)
        data = self._commands
        with contextlib.suppress(SupervisorDied):
            while self._next_request is None:
                lines = self._split_commands(buffer, data)
                if self._accepted and lines:
                    await self._send_to_supervisor(b"".join(lines))
                else:
                    self._pending_commands += b"".join(lines)
                    if len(self._pending_commands) > _MAX_PENDING_BYTES:
                        raise LineTooLong(f"more than {_MAX_PENDING_BYTES} bytes came before the acknowledgement")
                if self._next_request is None:
                    data = await self._stream.read()
            await self._detached  # the supervisor closes now; what the client says until then is its next request
        while True:  # what the supervisor has said before it died goes to the client still
            await self._stream.read()

    def _split_commands(self, buffer: LineBuffer, data: bytes) -> list[bytes]:
        """The orders that are whole; what follows the last one, if that is to be the next request, is kept as it is.

        Raises:
            LineTooLong: an order is longer than one may be; a request may be longer.
        """
        lines: list[bytes] = []
        while data and self._next_request is None:
            piece, end, data = data.partition(b"\n")
            for line in buffer.feed(piece + end):
                lines.append(line + b"\n")
                if self._keep_alive and _is_release(line):
                    self._next_request = data
        return lines

    async def _send_to_supervisor(self, data: bytes) -> None:
        async with asyncio.timeout(self._limits.write_timeout):
            await self._supervisor.send(data)


def _is_release(line: bytes) -> bool:
    """Whether a client says by this line that it wants no more of a kept call."""
    try:
        return b"release" in line and isinstance(decode_command(line), Release)
    except ProtocolError:
        return False


async def _run_until_first(
    one: Coroutine[Any, Any, None], other: Coroutine[Any, Any, None], detached: asyncio.Future[None]
) -> None:
    """Run both until one has ended, by returning or raising, or until it is left; the first of the three counts."""
    tasks = [asyncio.create_task(one), asyncio.create_task(other)]
    try:
        await asyncio.wait([*tasks, detached], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    next(future for future in (*tasks, detached) if future.done() and not future.cancelled()).result()
