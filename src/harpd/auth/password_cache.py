"""A cache of correct passwords, so that the next check of the same password needs no slow hash.

It stores a keyed digest of password and stored hash, with a random key of this process. So an entry is valid only while
the stored hash is unchanged, and it does not reveal the password.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping

#: Most users in the cache; the least recently added are removed first.
_MAX_USERS = 1000


class PasswordCache:
    """The last correct password of each user. Thread-safe."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._digests: OrderedDict[str, bytes] = OrderedDict()

    def check(self, user: str, password: str, stored: Mapping[str, str], matches: Callable[[str, str], bool]) -> bool:
        """Return whether the user exists and has this password; cache a correct one. It blocks.

        Args:
            user: the user name.
            password: the password in clear.
            stored: the stored password or hash of each user.
            matches: returns whether a password (first argument) is correct for a stored one (second argument).
        """
        # For an unknown user another password is checked, so that the time does not reveal which user names exist.
        expected = stored.get(user, next(iter(stored.values()), ""))
        if not matches(password, expected) or user not in stored:
            return False
        self._digests[user] = self._digest(password, expected)
        if len(self._digests) > _MAX_USERS:
            self._digests.popitem(last=False)
        return True

    def contains(self, user: str, password: str, stored: str) -> bool:
        """Return whether an earlier check accepted this password for the user and the stored password or hash."""
        found = self._digests.get(user)
        return found is not None and hmac.compare_digest(found, self._digest(password, stored))

    def _digest(self, password: str, stored: str) -> bytes:
        text = f"{len(stored)} {stored}{password}"  # with the length, so that no other pair gives the same text
        return hmac.digest(self._key, text.encode("utf-8", "surrogatepass"), "sha256")
