"""Users in a file of lines ``user:crypt-hash``, which is looked at with every request: edits take effect at once.

    authentication:
      module: harpd.auth.passfile
      file: /etc/harpd/users

Empty lines and lines that begin with ``#`` are skipped. What follows a second colon is ignored, so that the
file may have more fields. ``openssl passwd -6`` and ``mkpasswd`` make hashes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harpd.auth import AuthDB
from harpd.auth.crypt import matches
from harpd.auth.password_cache import PasswordCache

__all__ = ["PasswordFile", "create"]

log = logging.getLogger(__name__)


def create(config: Mapping[str, Any]) -> PasswordFile:
    """Open the file that `config` names.

    Raises:
        ValueError: the configuration is wrong, or the file can't be read; the message names key and file.
    """
    file = config.get("file")
    if not isinstance(file, str) or not file:
        raise ValueError(f"file: expected the path of a file, got {file!r}")
    if unknown := sorted(set(config) - {"file"}):
        raise ValueError(f"{unknown[0]}: unknown key; expected file")
    database = PasswordFile(Path(file))
    try:
        database.hashes()
    except OSError as error:
        raise ValueError(f"file: {file}: {error.strerror}") from error
    return database


#: No form of crypt(3) gives less: DES has 13 characters. What is shorter, `*` and `!` apart, is a slip of the pen.
_MIN_HASH_LENGTH = 13


#: Seconds since its last change after which a file that looks the same is the same. What is younger may have been
#: changed again within a tick of the clock that its time is taken from.
_MIN_FILE_AGE = 2.0


class PasswordFile(AuthDB):
    """Users and hashed passwords from a file.

    Args:
        path: the file; a relative path is taken from the working directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache = PasswordCache()
        self._last_read: tuple[tuple[int, ...], dict[str, str]] | None = None

    def recalls(self, user: str, password: str) -> bool:
        """Say whether it was found that the file has this user with this password, and the file is still the same."""
        known = self._last_read
        if known is None or known[0] != self._file_identity():
            return False
        stored = known[1].get(user)
        return stored is not None and self._cache.contains(user, password, stored)

    def _file_identity(self) -> tuple[int, ...] | None:
        """What changes when the file does; None: it can't be told."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        if time.time() - found.st_ctime < _MIN_FILE_AGE:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def authenticate(self, user: str, password: str) -> bool:
        """Say whether the file has this user with this password; when it can't be read, it has nobody."""
        looked = self._file_identity()
        try:
            hashes = self.hashes()
        except OSError as error:
            log.error("the users' file can't be read", extra={"file": str(self._path), "reason": error.strerror})
            return False
        if user in hashes:
            fits = matches(password, hashes[user])
            if fits:
                self._cache.add(user, password, hashes[user])
                self._last_read = None if looked is None else (looked, hashes)
            return fits
        log.info("the users' file has no such user", extra={"file": str(self._path), "user": user})
        # Takes as long as for a known user, so that time does not tell which names exist.
        for other in hashes.values():
            matches(password, other)
            break
        return False

    def hashes(self) -> dict[str, str]:
        """Read the file: hashes by user. The first line of a user counts. Raises `OSError`."""
        found: dict[str, str] = {}
        for _, user, hashed in self._entries():
            if user and hashed:
                found.setdefault(user, hashed)
        return found

    def warnings(self) -> list[str]:
        """The lines that let nobody in, though they look as if they should. Raises `OSError`."""
        found = []
        for number, user, hashed in self._entries():
            locked = hashed.startswith(("*", "!"))  # as in shadow(5), on purpose
            if not user or (len(hashed) < _MIN_HASH_LENGTH and not locked):
                found.append(f"{self._path}:{number}: expected user:crypt-hash; this line lets nobody in")
        return found

    def _entries(self) -> Iterator[tuple[int, str, str]]:
        for number, line in enumerate(self._path.read_text("utf-8", "replace").splitlines(), 1):
            user, _, rest = line.strip().partition(":")
            if line.strip() and not user.startswith("#"):
                yield number, user, rest.split(":", 1)[0]
