"""Connections to a dispatcher that are kept: who asks for it, where they wait, what it means when one breaks.

As in `harp._core.operations`, nothing here touches a socket or reads a clock: the shells of `HarpCaller` and its
asyncio twin
do what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from harp._core.connection_pool import Idle, Reusable
from harp._core.operations import surely, waits
from harp._core.retry import closed_silently, too_old
from harp.errors import CommunicationError
from harp.protocol.replies import granted
from harp.protocol.requests import Call, Cancel, Request, SubmitMany

__all__ = ["Keeping"]

C = TypeVar("C", bound=Reusable)


class Keeping(Generic[C]):
    """The connections of one client to its dispatcher.

    Dispatchers of the field close without a reply when they are asked to keep a connection. A request that waits takes
    that for an interruption, and would go on trying: it asks only where others have been granted it before.

    Args:
        keep: whether connections are to be kept at all.
        drop: closes one, without waiting and from any thread.
    """

    def __init__(self, keep: bool, drop: Callable[[C], object]) -> None:
        self.keep = keep
        self._idle = Idle(drop)
        self._granted = False

    def asks(self, request: Request) -> bool:
        """Whether this request is to ask for its connection to be kept."""
        return self.keep and (self._granted or not waits(request))

    def take(self, now: float) -> C | None:
        """A connection that waits, for a request that asks; None: there is none, make one."""
        return self._idle.take(now)

    def put(self, conn: C, line: bytes, now: float) -> bool:
        """Have a connection wait if this reply, the last thing that came over it, grants it. False: close it."""
        seconds = granted(line)
        if seconds is None:
            return False
        self._granted = True
        self._idle.put(conn, seconds, now)
        return True

    def ask_anew(self, error: CommunicationError, request: Request, kept: bool) -> None:
        """Let a request that asked and has got no reply be asked over a new connection, or say what it means.

        Args:
            error: what happened.
            request: the request.
            kept: whether its connection was kept from another one.

        Raises:
            CommunicationError: it may not be asked again.
        """
        if kept and not isinstance(request, (Call, SubmitMany, Cancel)):
            return
        if not kept and not self._granted and closed_silently(error):
            raise too_old(error, "keep=True") from error.__cause__
        with surely(kept):
            raise error

    def drain(self) -> list[C]:
        """Take all connections that wait, to close them."""
        return self._idle.drain()
