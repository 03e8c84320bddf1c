"""A pool of idle connections to hosts, for the next call: a TLS handshake costs as much as the rest of a small call.

A connection is stored only for a short time. If its host disappears, it seems open, and a start written to it is
delayed until the outage is detected. An old connection is not used again: the certificate may have expired. Nor is a
connection used after a change of the files that accepted the host's certificate. If a reused connection breaks before
the acknowledgement, the run attaches to the call; it never writes the start twice. Spec: docs/protocol.md, Keep-alive.
"""

from __future__ import annotations

import time
from collections import deque

from harp_daemon.timer_wheel import Timer, TimerWheel
from harpcaller.hosts.connection import HarpdConnection
from harpcaller.hosts.registry import Host
from harpcaller.hosts.tls import HostTLS

#: Maximum idle time of a connection in seconds, and as a share of the time that its host grants.
_MAX_IDLE, _KEEP_ALIVE_SHARE = 10.0, 0.5
_MAX_AGE = 300.0  #: Maximum seconds from the opening of a connection to the end of a call after which it is stored.
#: Maximum number of idle connections to one host, and to all hosts.
_MAX_PER_HOST, _MAX_TOTAL = 256, 512


class ConnectionPool:
    """All idle connections of one event loop."""

    def __init__(self, timers: TimerWheel) -> None:
        self._timers = timers
        self._connections: dict[tuple[Host, HostTLS], deque[tuple[float, HarpdConnection]]] = {}
        self._count = 0
        self._cleanup_timer: Timer | None = None

    def get(self, host: Host, tls: HostTLS) -> HarpdConnection | None:
        """Remove and return the most recently used connection to this host, or return None."""
        idle = self._connections.get((host, tls))
        while idle:
            expires_at, conn = idle.pop()
            self._count -= 1
            if time.monotonic() < expires_at and conn.is_reusable and conn.tls_version == tls.version:
                return conn
            conn.abort()
        return None

    def put(self, host: Host, tls: HostTLS, conn: HarpdConnection) -> None:
        """Add a connection after its request, or close it if it cannot be reused; all data is still sent."""
        idle = self._connections.setdefault((host, tls), deque())
        full = len(idle) >= _MAX_PER_HOST or self._count >= _MAX_TOTAL
        now = time.monotonic()
        keep_alive = conn.keep_alive
        if keep_alive is None or not conn.is_reusable or full or now - conn.opened_at >= _MAX_AGE:
            conn.close()
            return
        idle.append((now + min(_MAX_IDLE, _KEEP_ALIVE_SHARE * keep_alive), conn))
        self._count += 1
        if self._cleanup_timer is None:
            self._cleanup_timer = self._timers.call_later(_MAX_IDLE, self._close_expired)

    def close(self) -> None:
        """Close all connections."""
        for idle in self._connections.values():
            for _, conn in idle:
                conn.close()
        self._connections.clear()
        self._count = 0

    def _close_expired(self) -> None:
        self._cleanup_timer = None
        for key, idle in list(self._connections.items()):
            while idle and time.monotonic() >= idle[0][0]:
                self._count -= 1
                idle.popleft()[1].close()
            if not idle:
                del self._connections[key]
        if self._count:
            self._cleanup_timer = self._timers.call_later(_MAX_IDLE / 2, self._close_expired)
