"""Tombstones: ids of calls that can no longer start, because they were used or reported as absent.

A busy host adds hundreds a second, so a tombstone is a short digest, and all of a period are deleted at once. Pure:
the time is an argument.
"""

from __future__ import annotations

import hashlib


class TombstoneSet:
    """Tombstones by owner. Each stays for `ttl` seconds at least, and twice as long at most while others are added."""

    def __init__(self, ttl: float, now: float) -> None:
        self._ttl = ttl
        self._since = now
        self._new: set[bytes] = set()
        self._old: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def add(self, owner: str, call_id: str, now: float) -> None:
        """Add a tombstone for an owner's call."""
        age = now - self._since
        if age > self._ttl:
            self._old = self._new if age <= 2 * self._ttl else set()
            self._new = set()
            self._since = now
        self._new.add(_digest(owner, call_id))

    def contains(self, owner: str, call_id: str) -> bool:
        """Return whether there is a tombstone for an owner's call."""
        digest = _digest(owner, call_id)
        return digest in self._new or digest in self._old


def _digest(owner: str, call_id: str) -> bytes:
    text = f"{len(owner)} {owner}{call_id}"  # the length makes the text unique for owner and id
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
