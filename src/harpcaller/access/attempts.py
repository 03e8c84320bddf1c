"""Delays after wrong tokens: doubled by each one of a peer and a name, so that guessing takes longer and longer.

Only the refusal of a wrong token is delayed. A right token is accepted at once, so that nobody can lock out others.
"""

from __future__ import annotations

import time

from harp_daemon.acceptor import network
from harpcaller.access.client import Client

_FIRST_DELAY, _MAX_DELAY = 0.1, 30.0  # seconds
_FORGET_AFTER = 600.0  # seconds
_MAX_KEYS = 10_000


def peer_of(client: Client) -> str:
    """Return whose attempts count together: a user, an IPv4 address, or an IPv6 network, which one attacker has."""
    if client.peer.startswith("uid:"):
        return client.peer
    return network(client.peer.rpartition(":")[0].strip("[]"))


class FailedAttempts:
    """The numbers of failed attempts, by peer and name."""

    def __init__(self) -> None:
        self._failed: dict[tuple[str, str], tuple[int, float]] = {}  # number and last time, the latest last

    def record_failure(self, peer: str, name: str) -> float:
        """Count a failed attempt; return the seconds until it may be answered."""
        now = time.monotonic()
        number, last = self._failed.pop((peer, name), (0, now))
        if now - last > _FORGET_AFTER:
            number = 0
        self._failed[peer, name] = number + 1, now
        if len(self._failed) > _MAX_KEYS:
            del self._failed[next(iter(self._failed))]
        return self._delay_after(number)

    @staticmethod
    def _delay_after(number: int) -> float:
        return min(_MAX_DELAY, _FIRST_DELAY * 2.0 ** min(number, 20))

    def remaining(self, peer: str, name: str) -> float:
        """Return the seconds until another attempt should be looked at, after those that have failed."""
        number, last = self._failed.get((peer, name), (0, 0.0))
        return 0.0 if number == 0 else last + self._delay_after(number - 1) - time.monotonic()

    def reset(self, peer: str, name: str) -> None:
        """Forget the failed attempts after one that has succeeded."""
        self._failed.pop((peer, name), None)
