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

from harpcaller.hosts.connection import Conversation
from harpcaller.hosts.inventory import Host
from harpcaller.hosts.tls import HostTLS

__all__ = ["IdleConnections"]

#: Seconds for which a connection waits at the most, and what share of the time that its host gives.
_LONGEST, _SHARE = 10.0, 0.5
#: How many wait for a host, and for all.
_MOST_HOST, _MOST = 256, 512


class IdleConnections:
    """All connections that wait. Belongs to one event loop."""

    def __init__(self) -> None:
        self._idle: dict[tuple[Host, HostTLS], deque[tuple[float, Conversation]]] = {}
        self._count = 0
        self._cleaning: asyncio.TimerHandle | None = None

    def take(self, host: Host, tls: HostTLS) -> Conversation | None:
        """A connection to this host on which the next request may be written; None: there is none."""
        waiting = self._idle.get((host, tls))
        while waiting:
            until, talk = waiting.pop()
            self._count -= 1
            talk.wake()
            if time.monotonic() < until and talk.is_fresh:
                return talk
            talk.abort()
        return None

    def give(self, host: Host, tls: HostTLS, talk: Conversation) -> None:
        """Have a connection wait, if its host wants that; else close it. What was said last still goes out."""
        waiting = self._idle.setdefault((host, tls), deque())
        if talk.keep is None or not talk.is_fresh or len(waiting) >= _MOST_HOST or self._count >= _MOST:
            talk.close()
            return
        talk.rest()
        waiting.append((time.monotonic() + min(_LONGEST, _SHARE * talk.keep), talk))
        self._count += 1
        if self._cleaning is None:
            self._cleaning = asyncio.get_running_loop().call_later(_LONGEST, self._clean)

    def close(self) -> None:
        """Close all."""
        if self._cleaning is not None:
            self._cleaning.cancel()
            self._cleaning = None
        for waiting in self._idle.values():
            for _, talk in waiting:
                talk.wake()
                talk.close()
        self._idle.clear()
        self._count = 0

    def _clean(self) -> None:
        """Close what has waited long enough, and what nobody can use any more."""
        self._cleaning = None
        now = time.monotonic()
        for place, waiting in list(self._idle.items()):
            left = deque((until, talk) for until, talk in waiting if now < until and talk.is_fresh)
            for _, talk in waiting:
                if all(talk is not other for _, other in left):
                    talk.wake()
                    talk.close()
            self._count -= len(waiting) - len(left)
            if left:
                self._idle[place] = left
            else:
                del self._idle[place]
        if self._count:
            self._cleaning = asyncio.get_running_loop().call_later(_LONGEST / 2, self._clean)
