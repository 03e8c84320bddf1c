"""Carries the data of one call between its supervisor and its client.

A *connection-bound* call ends with its connection. Only the supervisor's lines are sent on: when the client sends data
or disconnects, the call is stopped. The connection counts for `limits.max_connections` until the call's processes have
ended. If the client requested keep-alive, data after the closing line is its next request.

For a *resumable* call, both directions are sent on without decoding; only the length of the client's lines is checked.
When either side disconnects, no error line is sent: it would look like the end of the call, but the call continues.
With keep-alive, the next request follows the command ``release``.
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
from harpd.control.supervisor_client import SupervisorClient, SupervisorConnection, SupervisorDied
from harpd.frontend.line_relay import LineRelay
from harpd.frontend.tls_stream import ClientDisconnected, TLSStream

log = logging.getLogger("harpd.frontend")

#: Seconds for the supervisor to stop a call, beyond the two grace periods.
_STOP_MARGIN = 10.0
#: Seconds that a supervisor may take for its first reply. Until then a disconnect of the client is not noticed.
_FIRST_REPLY_TIMEOUT = 60.0
#: The start of the line by which a supervisor that shuts down rejects a call, as `encode_message` writes it.
_SHUTDOWN_PREFIX = b'{"harp":1,"error":{"type":"shutdown"'

AFTER_REQUEST = Failed("invalid_request", "data after the request line")
CALL_DIED = Failed("call_died", "the supervisor died")
SHUTDOWN = Failed("shutdown", "the daemon is shutting down")


class RequestRejected(Exception):
    """The request is rejected, or its call was stopped.

    Args:
        error: the error for the client.
        discard_input: whether the client may still be sending.
    """

    def __init__(self, error: Failed, discard_input: bool = False) -> None:
        super().__init__(error, discard_input)
        self.error = error
        self.discard_input = discard_input


@dataclass(eq=False)
class _Proxy:
    """The common part of both proxies.

    Attributes:
        stream: the connection to the client.
        limits: the configured limits.
        on_accepted: called when the supervisor has replied to the request.
        keep_alive: whether the client requested keep-alive.
        call: the call's id, for the log.
        supervisor: the connection to the supervisor.
        request: the line that starts the call; empty after an attach.
    """

    stream: TLSStream
    limits: Limits
    on_accepted: Callable[[], None]
    keep_alive: bool
    call: str
    supervisor: SupervisorConnection
    request: bytes

    def __post_init__(self) -> None:
        self._log_fields = {"call": self.call, "peer": self.stream.peer}
        self._detached: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def detach(self) -> None:
        """End the proxy, because the frontend stops and the supervisor continues."""
        if not self._detached.done():
            self._detached.set_exception(RequestRejected(SHUTDOWN))


@dataclass(eq=False)
class BoundProxy(_Proxy):
    """The proxy of a connection-bound call.

    Attributes:
        client: the client of the supervisors; the call starts in the active one.
    """

    client: SupervisorClient

    def __post_init__(self) -> None:
        super().__post_init__()
        self._relay = LineRelay()
        self._next_request = b""
        #: The error for the client if the supervisor exits before the call.
        self.error_on_loss = CALL_DIED

    async def run(self) -> bytes | None:
        """Start the call and send its lines to the client until the call has ended.

        Returns:
            The received part of the client's next request; None: the connection ends.

        Raises:
            ClientDisconnected: the client disconnected; the call is stopped.
            RequestRejected: the call was stopped; the client needs an error.
            SupervisorError: the supervisor retires and no other becomes active.
        """
        relay = self._relay
        rejected: RequestRejected | None = None
        try:
            await _run_until_first(self._detached, self._relay_lines(), self._watch_client())
        except ClientDisconnected:
            if not relay.complete:
                self.stream.abort()
                await self._stop_call("client disconnected; call stopped")
            raise
        except RequestRejected as error:
            rejected = error
            if not relay.complete:
                frontend_stops = error.error is SHUTDOWN
                await self._stop_call(
                    "frontend stops; call stopped" if frontend_stops else "client sent unexpected data; call stopped"
                )
        finally:
            self.supervisor.close()
        if relay.mid_line:
            self.stream.abort()
        elif not relay.complete:
            raise rejected or RequestRejected(self.error_on_loss)
        elif self._may_continue and rejected is None:
            return self._next_request
        else:
            await self.stream.drain()
        return None

    @property
    def _may_continue(self) -> bool:
        """Whether the client can send its next request now."""
        return self.keep_alive and self._relay.complete and not self._relay.failed

    async def _relay_lines(self) -> None:
        """Send the supervisor's lines to the client until the supervisor closes. Raises `ClientDisconnected`."""
        with contextlib.suppress(SupervisorDied):
            data = await self._send_request()
            if data.startswith(_SHUTDOWN_PREFIX) and not self.client.is_active(self.supervisor):
                # It began to retire before it received the request: it has not started the call.
                self.supervisor.close()
                self.supervisor = await self.client.connect_active()
                data = await self._send_request()
            self.request = b""
            self.on_accepted()
            while data:
                if sendable := self._relay.feed(data):
                    await self.stream.write(sendable)
                if self._may_continue:
                    return  # do not wait until the supervisor closes, which it does after the exit of the process
                data = await self.supervisor.receive()

    async def _send_request(self) -> bytes:
        await self.supervisor.send(self.request)
        return await self.supervisor.receive()

    async def _watch_client(self) -> None:
        """Wait until the client disconnects or sends data. Raises `ClientDisconnected` or `RequestRejected`."""
        while True:
            data = await self.stream.read()
            if self._may_continue:
                self._next_request = data
                return
            if data.strip():
                raise RequestRejected(AFTER_REQUEST, discard_input=True)

    async def _stop_call(self, event: str) -> None:
        """Tell the supervisor to stop the call; wait until its processes have ended; log the event."""
        with contextlib.suppress(SupervisorDied):
            self.supervisor.finish_sending()
            try:
                async with asyncio.timeout(2 * self.limits.kill_grace + _STOP_MARGIN):
                    while await self.supervisor.receive():
                        pass
            except TimeoutError:
                log.error("call did not stop in time", extra={**self._log_fields, "cause": event})
                return
        log.info(event, extra=self._log_fields)


@dataclass(eq=False)
class ResumableProxy(_Proxy):
    """The proxy of a resumable call: it can end and another one can attach later.

    Attributes:
        received: data received from the supervisor: its reply to the attach.
        commands: data that the client sent after its request.
    """

    received: bytes
    commands: bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        self._next_request: bytes | None = None

    async def run(self) -> bytes | None:
        """Send data in both directions until one side disconnects.

        Returns:
            The received part of the client's next request; None: the connection ends.

        Raises:
            ClientDisconnected: the client disconnected.
        """
        try:
            await _run_until_first(self._detached, self._start())
            if self.received:
                await _run_until_first(self._detached, self._relay_lines(), self._relay_commands())
            if self._next_request is None:
                await self.stream.drain()
        except LineTooLong as error:
            log.warning("invalid command from client; detached", extra={**self._log_fields, "reason": str(error)})
        except TimeoutError:
            log.error("supervisor does not respond; detached", extra=self._log_fields)
        except RequestRejected:
            log.info("frontend stops; client detached", extra=self._log_fields)
        else:
            return self._next_request
        finally:
            self.supervisor.close()
        return None

    async def _start(self) -> None:
        """Wait for the first reply: a supervisor that rejects the request reads no commands. Raises `TimeoutError`."""
        with contextlib.suppress(SupervisorDied):
            if self.request:
                await self._send_to_supervisor(self.request)
                self.request = b""
                async with asyncio.timeout(_FIRST_REPLY_TIMEOUT):
                    self.received = await self.supervisor.receive()
            self.on_accepted()

    async def _relay_lines(self) -> None:
        """Send the supervisor's data to the client. Raises `ClientDisconnected`."""
        data, self.received = self.received, b""
        with contextlib.suppress(SupervisorDied):
            while data:
                await self.stream.write(data)
                data = await self.supervisor.receive()

    async def _relay_commands(self) -> None:
        """Send the client's commands to the supervisor, line by line.

        Raises `ClientDisconnected`, `LineTooLong` and `TimeoutError`.
        """
        buffer = LineBuffer(MAX_COMMAND_BYTES)
        data = self.commands
        with contextlib.suppress(SupervisorDied):
            while True:
                if lines := self._split_commands(buffer, data):
                    await self._send_to_supervisor(b"".join(lines))
                if self._next_request is not None:
                    await self._detached  # until the supervisor closes; data from the client is its next request
                data = await self.stream.read()
        while True:  # `_relay_lines` still sends what the supervisor sent before its death
            await self.stream.read()

    def _split_commands(self, buffer: LineBuffer, data: bytes) -> list[bytes]:
        """Return the complete command lines; after a release, store the rest as the next request.

        Raises:
            LineTooLong: a command exceeds its limit. A request may be longer.
        """
        lines: list[bytes] = []
        while data and self._next_request is None:
            piece, end, data = data.partition(b"\n")
            for line in buffer.feed(piece + end):
                lines.append(line + b"\n")
                if self.keep_alive and _is_release(line):
                    self._next_request = data
        return lines

    async def _send_to_supervisor(self, data: bytes) -> None:
        async with asyncio.timeout(self.limits.write_timeout):
            await self.supervisor.send(data)


def _is_release(line: bytes) -> bool:
    """Return whether this line is the command ``release``."""
    try:
        return b"release" in line and isinstance(decode_command(line), Release)
    except ProtocolError:
        return False


async def _run_until_first(detached: asyncio.Future[None], *coroutines: Coroutine[Any, Any, None]) -> None:
    """Run the coroutines until one ends or `detached` is set; return or raise the outcome of the first."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait([*tasks, detached], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    next(future for future in (*tasks, detached) if future.done() and not future.cancelled()).result()
