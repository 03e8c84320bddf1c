"""A call's lines on their way between its warden and its client.

Of a *tied* call only the warden's lines are carried: a client that says anything, or goes away, stops the call, and its
connection counts until the call's processes are gone.

When the client has asked for its connection to be kept, what it says after the closing line is its next request.

Of a *kept* call bytes are carried both ways, unread but for the length of the client's lines. Whoever goes away,
nothing is said in its name: an error line would be taken for the call's end, and the call goes on. With a connection
that is to be kept, the next request follows the order ``done``.
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
from harp.protocol.harpd import LONGEST_ORDER, Done, decode_order
from harp.protocol.lines import LineBuffer, LineTooLong
from harpd.config.settings import Limits
from harpd.control.supervisor_client import Reply, WardenConnection, WardenLost, Wardens
from harpd.frontend.line_relay import Relay
from harpd.frontend.tls_stream import Client, Gone

__all__ = ["AFTER_REQUEST", "CALL_DIED", "SHUTDOWN", "Around", "KeptCall", "Refused", "TiedCall"]

log = logging.getLogger("harpd.frontend")

#: Seconds beyond the grace periods that the warden has to end a call.
_STOP_MARGIN = 10.0
#: The most bytes of orders that may come before the warden's first answer.
_MOST_HELD = 64 * 1024
#: How the line begins by which a warden refuses a call because it ends; `encode_message` writes it so.
_REFUSED = b'{"harp":1,"error":{"type":"shutdown"'

AFTER_REQUEST = Failed("invalid_request", "data after the request line")
CALL_DIED = Failed("call_died", "the warden of the calls died")
SHUTDOWN = Failed("shutdown", "the daemon is shutting down")


class Refused(Exception):
    """The request is refused, or the call cut short.

    Args:
        error: what the client is told.
        sending: whether more may be on its way from the client.
    """

    def __init__(self, error: Failed, sending: bool = False) -> None:
        super().__init__(error, sending)
        self.error = error
        self.sending = sending


class _Spoke(Exception):
    """The client sent something after its request."""


class _Leaving(Exception):
    """The gate ends, and the wardens go on."""


@dataclass(frozen=True, slots=True)
class Around:
    """What a call is carried with.

    Attributes:
        call: its id, for the log.
        client: its client.
        limits: the configuration's.
        taken: called once the warden has the request.
        keep: whether the client wants to go on with another request.
    """

    call: str
    client: Client
    limits: Limits
    taken: Callable[[], None]
    keep: bool


class _Carrying:
    """What both kinds share: they end when the gate leaves."""

    def __init__(self, around: Around, warden: WardenConnection) -> None:
        self._client = around.client
        self._limits = around.limits
        self._taken = around.taken
        self._about = {"call": around.call, "peer": around.client.peer}
        self._keep = around.keep
        self._warden = warden
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def leave(self) -> None:
        """End the carrying: the gate ends, and the wardens go on."""
        if not self._left.done():
            self._left.set_exception(_Leaving())


class TiedCall(_Carrying):
    """A call whose client's connection is its life.

    Args:
        around: what it is carried with.
        wardens: the way to the wardens.
        asked: what tells the warden from others, see `Wardens.current`.
        warden: who gets the call.
        request: the line for it.
    """

    def __init__(
        self, around: Around, wardens: Wardens, asked: int | None, warden: WardenConnection, request: bytes
    ) -> None:
        super().__init__(around, warden)
        self._wardens = wardens
        self._asked = asked
        self._request = request
        self._relay = Relay()
        self._next = b""
        #: What the client is told when the warden ends before the call does.
        self.lost = CALL_DIED

    @classmethod
    async def begin(cls, around: Around, wardens: Wardens, request: bytes) -> TiedCall:
        """Reach a warden for a call. Raises `WardenError`."""
        asked = wardens.current()
        return cls(around, wardens, asked, await wardens.reach(), request)

    async def carry(self) -> bytes | None:
        """Ask the warden for the call, and carry its lines to the client until the call has ended.

        Returns:
            What has come of the client's next request; None: there will be none.

        Raises:
            Gone: the client is gone, and the call with it.
            Refused: the call was cut short, and the client has to be told.
            WardenError: the warden retires, and there is no other.
        """
        relay = self._relay
        cut: Refused | None = None
        try:
            await _first(self._carry_lines(), self._watch(), self._left)
        except Gone:
            if not relay.ended:
                self._client.abort()
                await self._stop("client went away; call stopped")
            raise
        except _Spoke:
            cut = Refused(AFTER_REQUEST, sending=True)
            if not relay.ended:
                await self._stop("client sent more; call stopped")
        except _Leaving:
            cut = Refused(SHUTDOWN)
            if not relay.ended:
                await self._stop("the gate ends; call stopped")
        finally:
            self._warden.close()
        if relay.torn:
            self._client.abort()
        elif not relay.ended:
            raise cut or Refused(self.lost)
        elif self._goes_on and cut is None:
            return self._next
        else:
            await self._client.finish()
        return None

    @property
    def _goes_on(self) -> bool:
        """Whether the client may say its next request now."""
        return self._keep and self._relay.ended and not self._relay.failed

    async def _carry_lines(self) -> None:
        """Send the client what the warden says, until the warden closes or dies. Raises `Gone`."""
        with contextlib.suppress(WardenLost):
            data = await self._ask()
            if data.startswith(_REFUSED) and self._wardens.current() != self._asked:
                # It retired while the request was on its way, and has started nothing.
                self._warden.close()
                self._warden = await self._wardens.reach()
                data = await self._ask()
            self._request = b""
            self._taken()
            while data:
                if sendable := self._relay.feed(data):
                    await self._client.write(sendable)
                if self._goes_on:
                    return  # that its process is gone, which the warden says by closing, nobody waits for
                data = await self._warden.receive()

    async def _ask(self) -> bytes:
        await self._warden.send(self._request)
        return await self._warden.receive()

    async def _watch(self) -> None:
        """Wait until the client goes away or says something. Raises `Gone` or `_Spoke`."""
        while True:
            data = await self._client.read()
            if self._goes_on:
                self._next = data
                return
            if data.strip():
                raise _Spoke

    async def _stop(self, why: str) -> None:
        """Have the warden stop the call, and wait until its processes are gone."""
        with contextlib.suppress(WardenLost):
            self._warden.send_end()
            try:
                async with asyncio.timeout(2 * self._limits.kill_grace + _STOP_MARGIN):
                    while await self._warden.receive():
                        pass
            except TimeoutError:
                log.error("call did not end in time", extra={**self._about, "why": why})
                return
        log.info(why, extra=self._about)


class KeptCall(_Carrying):
    """A call that goes on without its client, who may come back.

    Args:
        around: what it is carried with.
        warden: who has the call, or gets it.
        request: the line for the warden, if it has not got it.
        received: what it has said already.
        orders: what the client has said already after its request.
    """

    def __init__(
        self, around: Around, warden: WardenConnection, orders: bytes, request: bytes = b"", received: bytes = b""
    ) -> None:
        super().__init__(around, warden)
        self._request = request
        self._received = received
        self._orders = orders
        self._held = bytearray()  # orders that came before the warden has answered, which reads nothing else till then
        self._answered = False
        self._next: bytes | None = None

    @classmethod
    async def begin(cls, around: Around, wardens: Wardens, request: bytes, orders: bytes) -> KeptCall:
        """Reach a warden for a call. Raises `WardenError`."""
        return cls(around, await wardens.reach(), orders, request=request)

    @classmethod
    def attached(cls, around: Around, reply: Reply, orders: bytes) -> KeptCall:
        """Go on with a call from what its warden has replied."""
        return cls(around, reply.connection, orders, received=reply.line + reply.more)

    async def carry(self) -> bytes | None:
        """Carry bytes both ways until one side is gone.

        Returns:
            What has come of the client's next request; None: there will be none.

        Raises:
            Gone: it was the client.
        """
        try:
            await _first(self._carry_lines(), self._carry_orders(), self._left)
            if self._next is None:
                await self._client.finish()
        except LineTooLong as error:
            log.warning("client sent what is no order; detached", extra={**self._about, "reason": str(error)})
        except TimeoutError:
            log.error("warden does not read; client detached", extra=self._about)
        except _Leaving:
            log.info("the gate ends; client detached", extra=self._about)
        else:
            return self._next
        finally:
            self._warden.close()
        return None

    async def _carry_lines(self) -> None:
        """Send the client what the warden says. Raises `Gone` and `TimeoutError`."""
        with contextlib.suppress(WardenLost):
            if self._request:
                await self._send(self._request)
                self._request = b""
            data = self._received or await self._warden.receive()
            self._received = b""
            self._taken()
            with contextlib.suppress(WardenLost):  # what it has said is to be read all the same
                while self._held:
                    held, self._held = bytes(self._held), bytearray()
                    await self._send(held)
            self._answered = True
            while data:
                await self._client.write(data)
                data = await self._warden.receive()

    async def _carry_orders(self) -> None:
        """Send the warden what the client says, a line at a time. Raises `Gone`, `LineTooLong` and `TimeoutError`."""
        buffer = LineBuffer(LONGEST_ORDER)
        data = self._orders
        with contextlib.suppress(WardenLost):
            while self._next is None:
                lines = self._take_orders(buffer, data)
                if self._answered and lines:
                    await self._send(b"".join(lines))
                else:
                    self._held += b"".join(lines)
                    if len(self._held) > _MOST_HELD:
                        raise LineTooLong(f"more than {_MOST_HELD} bytes came before the acknowledgement")
                if self._next is None:
                    data = await self._client.read()
            await self._left  # the warden closes now; what the client says until then is its next request
        while True:  # what the warden has said before it died goes to the client still
            await self._client.read()

    def _take_orders(self, buffer: LineBuffer, data: bytes) -> list[bytes]:
        """The orders that are whole; what follows the last one, if that is to be the next request, is kept as it is.

        Raises:
            LineTooLong: an order is longer than one may be; a request may be longer.
        """
        lines: list[bytes] = []
        while data and self._next is None:
            piece, end, data = data.partition(b"\n")
            for line in buffer.feed(piece + end):
                lines.append(line + b"\n")
                if self._keep and _is_done(line):
                    self._next = data
        return lines

    async def _send(self, data: bytes) -> None:
        async with asyncio.timeout(self._limits.write_stall):
            await self._warden.send(data)


def _is_done(line: bytes) -> bool:
    """Whether a client says by this line that it wants no more of a kept call."""
    try:
        return b"done" in line and isinstance(decode_order(line), Done)
    except ProtocolError:
        return False


async def _first(one: Coroutine[Any, Any, None], other: Coroutine[Any, Any, None], left: asyncio.Future[None]) -> None:
    """Run both until one has ended, by returning or raising, or until it is left; the first of the three counts."""
    tasks = [asyncio.create_task(one), asyncio.create_task(other)]
    try:
        await asyncio.wait([*tasks, left], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    next(future for future in (*tasks, left) if future.done() and not future.cancelled()).result()
