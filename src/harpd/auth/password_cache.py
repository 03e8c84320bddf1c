"""Passwords that were found to be right, so that the next check of the same one costs no hash.

What is kept is a digest, by a key of this process, of password and stored hash together: it holds for as long as the
stored hash is the same, and says nothing to who reads it.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict

__all__ = ["PasswordCache"]

#: So many users' are kept; those that were not asked for the longest go first.
_MAX_USERS = 1000


class PasswordCache:
    """The last right password of each user. May be used by several threads."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._digests: OrderedDict[str, bytes] = OrderedDict()

    def add(self, user: str, password: str, stored: str) -> None:
        """This password was found to fit what is stored for the user."""
        self._digests[user] = self._digest(password, stored)
        if len(self._digests) > _MAX_USERS:
            self._digests.popitem(last=False)

    def contains(self, user: str, password: str, stored: str) -> bool:
        """Whether this password was found to fit what is stored for the user now."""
        found = self._digests.get(user)
        return found is not None and hmac.compare_digest(found, self._digest(password, stored))

    def _digest(self, password: str, stored: str) -> bytes:
        text = f"{len(stored)} {stored}{password}"  # the length: no other pair reads the same
        return hmac.digest(self._key, text.encode("utf-8", "surrogatepass"), "sha256")
