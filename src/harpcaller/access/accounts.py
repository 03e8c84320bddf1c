"""The accounts of Unix sockets' clients: the name of a user and of each of the user's groups.

The kernel proves the user id. Looking up its names may need a directory service, so it is done in a thread, and its
outcome is used for a short time.
"""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import time
from contextlib import suppress

_LIFETIME = 5.0  # seconds
_MAX_USERS = 10_000
_MAX_RENEWALS = 2  #: Maximum number of lookups, of any kind, beside which a user is looked up again.


class Accounts:
    """The principals of users."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[float, tuple[str, ...]]] = {}  # with their time
        self._lookups: dict[int, asyncio.Future[tuple[str, ...]]] = {}

    def get_cached(self, uid: int) -> tuple[str, ...] | None:
        """Return the principals of a user that were looked up a short time ago."""
        since, principals = self._found.get(uid, (-_LIFETIME, ()))
        return principals if time.monotonic() - since < _LIFETIME else None

    def look_up(self, uid: int) -> asyncio.Future[tuple[str, ...]]:
        """Return a future of the principals of a user. Do not cancel it: others may wait for it."""
        lookup = self._lookups.get(uid)
        if lookup is None:
            lookup = asyncio.get_running_loop().run_in_executor(None, find_principals, uid)
            self._lookups[uid] = lookup
            lookup.add_done_callback(lambda done: self._on_found(uid, done))
        return lookup

    def renew(self, uid: int) -> None:
        """Look a user up again soon. Few at a time: a directory service that is slow must not occupy all threads."""
        if len(self._lookups) < _MAX_RENEWALS:
            self.look_up(uid)

    def _on_found(self, uid: int, lookup: asyncio.Future[tuple[str, ...]]) -> None:
        del self._lookups[uid]
        if not lookup.cancelled() and lookup.exception() is None:
            self._found.pop(uid, None)
            self._found[uid] = time.monotonic(), lookup.result()
            if len(self._found) > _MAX_USERS:
                del self._found[next(iter(self._found))]


def find_principals(uid: int) -> tuple[str, ...]:
    """Return the principals of a user: its name, or the number if it has none, and its groups. May block."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return (f"uid:{uid}",)
    names = []
    for gid in dict.fromkeys((user.pw_gid, *os.getgrouplist(user.pw_name, user.pw_gid))):
        name = str(gid)
        with suppress(KeyError):
            name = grp.getgrgid(gid).gr_name
        names.append(f"gid:{name}")
    return (f"uid:{user.pw_name}", *names)
