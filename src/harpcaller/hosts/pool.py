"""Connections to hosts that wait for the next call: a TLS handshake costs as much as the rest of a small one.

Only of hosts that agreed, and only for a short while: a host that vanishes without a word leaves a connection that
looks alive, and a start that is written to it is lost with its job. Whatever breaks before a call is acknowledged is
settled by attaching, as ever: no request is written twice.

Spec: docs/protocol.md, Kept connections.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from harpcaller.hosts.connection import HarpdConnection
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.tls import HostTLS

__all__ = ["ConnectionPool"]

#: Seconds for which a connection waits at the most, and what share of the time that its host gives.
_MAX_IDLE, _KEEP_ALIVE_SHARE = 10.0, 0.5
#: How many wait for a host, and for all.
_MAX_PER_HOST, _MAX_TOTAL = 256, 512


class ConnectionPool:
    """All connections that wait. Belongs to one event loop."""

    def __init__(self) -> None:
        self._connections: dict[tuple[Host, HostTLS], deque[tuple[float, HarpdConnection]]] = {}
        self._count = 0
        self._cleanup_timer: asyncio.TimerHandle | None = None

    def get(self, host: Host, tls: HostTLS) -> HarpdConnection | None:
        """A connection to this host on which the next request may be written; None: there is none."""
        waiting = self._connections.get((host, tls))
        while waiting:
            until, talk = waiting.pop()
            self._count -= 1
            talk.unpark()
            if time.monotonic() < until and talk.is_reusable:
                return talk
            talk.abort()
        return None

    def put(self, host: Host, tls: HostTLS, talk: HarpdConnection) -> None:
        """Have a connection wait, if its host wants that; else close it. What was said last still goes out."""
        waiting = self._connections.setdefault((host, tls), deque())
        if (
            talk.keep_alive is None
            or not talk.is_reusable
            or len(waiting) >= _MAX_PER_HOST
            or self._count >= _MAX_TOTAL
        ):
            talk.close()
            return
        talk.park()
        waiting.append((time.monotonic() + min(_MAX_IDLE, _KEEP_ALIVE_SHARE * talk.keep_alive), talk))
        self._count += 1
        if self._cleanup_timer is None:
            self._cleanup_timer = asyncio.get_running_loop().call_later(_MAX_IDLE, self._close_expired)

    def close(self) -> None:
        """Close all."""
        if self._cleanup_timer is not None:
            self._cleanup_timer.cancel()
            self._cleanup_timer = None
        for waiting in self._connections.values():
            for _, talk in waiting:
                talk.unpark()
                talk.close()
        self._connections.clear()
        self._count = 0

    def _close_expired(self) -> None:
        """Close what has waited long enough, and what nobody can use any more."""
        self._cleanup_timer = None
        now = time.monotonic()
        for place, waiting in list(self._connections.items()):
            left = deque((until, talk) for until, talk in waiting if now < until and talk.is_reusable)
            for _, talk in waiting:
                if all(talk is not other for _, other in left):
                    talk.unpark()
                    talk.close()
            self._count -= len(waiting) - len(left)
            if left:
                self._connections[place] = left
            else:
                del self._connections[place]
        if self._count:
            self._cleanup_timer = asyncio.get_running_loop().call_later(_MAX_IDLE / 2, self._close_expired)
