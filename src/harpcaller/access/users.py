"""The users who log in to the HTTP API by name and password: a file of lines ``name:crypt-hash:role,role``.

Checking a password takes a thread for up to 300 ms. So few are checked at once, few wait, and after
wrong ones of an address for a name the next ones are refused without a check, for longer and longer.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from harp_daemon.passwords import PasswordCache
from harpcaller.access import AuthError, RateLimited
from harpcaller.access.attempts import FailedAttempts
from harpcaller.access.tokens import NAME, TokenError, identify_file, read_private

log = logging.getLogger(__name__)

_LINE = re.compile(rf"({NAME}):([^:\s]+):((?:{NAME})(?:,{NAME})*)?", re.ASCII)
_CHECK_EVERY = 1.0  #: Seconds between two looks at the file.
_MAX_CHECKS, _MAX_WAITING = 2, 20  #: Maximum number of passwords that are checked at once, and that wait for it.
_WRONG = "the name or the password is wrong"


class User(NamedTuple):
    """A user: the hash of the password, the roles, and a digest of both, with which a session ends."""

    hash: str
    roles: tuple[str, ...]
    sha256: str


class Users:
    """The users of a file, which is read again when it has changed. Raises `TokenError` if it cannot be used."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._looked_at = time.monotonic()
        self._identity = identify_file(file)
        self._users = read_users(file)
        self._cache = PasswordCache()
        self._attempts = FailedAttempts()
        self._checks = asyncio.Semaphore(_MAX_CHECKS)
        self._waiting = 0

    def get(self, name: str) -> User | None:
        """Return the present user of this name. If the changed file cannot be used, the users stay as they are."""
        if time.monotonic() - self._looked_at >= _CHECK_EVERY:
            self._refresh()
        return self._users.get(name)

    def _refresh(self) -> None:
        self._looked_at = time.monotonic()
        identity = identify_file(self.file)
        if identity == self._identity:
            return
        self._identity = identity
        try:
            self._users = read_users(self.file)
        except (TokenError, OSError) as error:
            log.error("cannot use changed file", extra={"file": str(self.file), "error": str(error)})

    async def check(self, peer: str, name: str, password: str) -> User:
        """Return the user with this name and password. Raises `AuthError`, and `RateLimited` without a check."""
        if (seconds := self._attempts.remaining(peer, name)) > 0:
            raise RateLimited("too many wrong passwords; try again later", seconds)
        if self._waiting >= _MAX_WAITING:
            raise RateLimited("too many logins at once; try again later", 1.0)
        self._waiting += 1
        try:
            async with self._checks:
                self._refresh()
                user = self._users.get(name)
                stored = {one: found.hash for one, found in self._users.items()}
                is_right = await asyncio.to_thread(self._cache.check, name, password, stored)
        finally:
            self._waiting -= 1
        if user is None or not is_right:
            delay = self._attempts.record_failure(peer, name)
            raise AuthError(_WRONG, "no such user, or the password is wrong", delay=delay)
        self._attempts.reset(peer, name)
        return user


def read_users(file: Path) -> dict[str, User]:
    """Return the users of a file, by name; none if it does not exist. Raises `TokenError`.

    Empty lines and lines that begin with ``#`` are ignored. No error has a part of a line.
    """
    found: dict[str, User] = {}
    for number, line in enumerate(read_private(file).decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise TokenError(
                f"{file}: line {number}: expected NAME:CRYPT-HASH:ROLE,ROLE; openssl passwd -6 makes a hash"
            )
        name, hashed, roles = match[1], match[2], tuple((match[3] or "").split(",")) if match[3] else ()
        if name in found:
            raise TokenError(f"{file}: line {number}: a second user {name}")
        found[name] = User(hashed, roles, sha256(line.strip().encode()).hexdigest())
    return found
