"""Ids that can't start any more: used, or said not to be here.

A busy host bars some hundred in a second, so they are small, and forgotten all of a period at once. Pure: the time
comes from outside.
"""

from __future__ import annotations

import hashlib

__all__ = ["TombstoneSet"]


class TombstoneSet:
    """Ids, each barred for its owner alone; for `least` seconds at least, and for twice that at most while ids come.

    Args:
        least: seconds.
        now: the time.
    """

    def __init__(self, least: float, now: float) -> None:
        self._least = least
        self._since = now
        self._new: set[bytes] = set()
        self._old: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def add(self, owner: str, call_id: str, now: float) -> None:
        """Bar an owner's id."""
        age = now - self._since
        if age > self._least:
            self._old = self._new if age <= 2 * self._least else set()
            self._new = set()
            self._since = now
        self._new.add(_digest(owner, call_id))

    def contains(self, owner: str, call_id: str) -> bool:
        """Whether it is barred."""
        digest = _digest(owner, call_id)
        return digest in self._new or digest in self._old


def _digest(owner: str, call_id: str) -> bytes:
    text = f"{len(owner)} {owner}{call_id}"  # the length: no other owner's id reads the same
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
