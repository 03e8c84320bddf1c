"""Users in a file of lines ``user:crypt-hash``. The file is checked with every request: edits take effect at once.

    authentication:
      module: harpd.auth.passfile
      file: /etc/harpd/users

Empty lines and lines that begin with ``#`` are ignored. The text after a second colon is ignored as well, so the file
can have more fields. ``openssl passwd -6`` and ``mkpasswd`` create hashes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harpd.auth import AuthDB
from harpd.auth.passwords import PasswordCache

__all__ = ["PasswordFile", "create"]

log = logging.getLogger(__name__)


def create(config: Mapping[str, Any]) -> PasswordFile:
    """Return the users of the configured file.

    Raises ValueError if the configuration is invalid, or the file cannot be read. The message names key and file.
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


#: The shortest hash of crypt(3), which DES makes. Other text is a mistake, except `*` and `!`, which lock a user.
_MIN_HASH_LENGTH = 13
#: Seconds after its last change until a file with unchanged attributes is considered unchanged. A younger file may have
#: changed again within one tick of the clock of the file system.
_MIN_FILE_AGE = 2.0


class PasswordFile(AuthDB):
    """The users and hashed passwords of a file. A relative path starts at the working directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache = PasswordCache()
        self._last_read: tuple[tuple[int, ...], dict[str, str]] | None = None

    def check_cached(self, user: str, password: str) -> bool:
        """Return whether an earlier check accepted this password and the file is unchanged."""
        last_read = self._last_read
        if last_read is None or last_read[0] != self._file_identity():
            return False
        return self._cache.contains(user, password, last_read[1])

    def _file_identity(self) -> tuple[int, ...] | None:
        """Return attributes that change with the file; None: a change could go unnoticed, or the file is missing."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        if time.time() - status.st_ctime < _MIN_FILE_AGE:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def authenticate(self, user: str, password: str) -> bool:
        """Return whether the file has this user with this password; False if it cannot be read."""
        identity = self._file_identity()
        try:
            hashes = self.hashes()
        except OSError as error:
            log.error("cannot read the users file", extra={"file": str(self._path), "reason": error.strerror})
            return False
        if user not in hashes:
            log.info("unknown user", extra={"file": str(self._path), "user": user})
        correct = self._cache.check(user, password, hashes)
        if correct:
            self._last_read = None if identity is None else (identity, hashes)
        return correct

    def hashes(self) -> dict[str, str]:
        """Read the file; return the hashes by user. A user's first line counts. Raises `OSError`."""
        found: dict[str, str] = {}
        for _, user, hashed in self._entries():
            if user and hashed:
                found.setdefault(user, hashed)
        return found

    def warnings(self) -> list[str]:
        """Return a warning for each line without a valid user and hash. Raises `OSError`."""
        found = []
        for number, user, hashed in self._entries():
            locked = hashed.startswith(("*", "!"))  # as in shadow(5), on purpose
            if not user or (len(hashed) < _MIN_HASH_LENGTH and not locked):
                found.append(f"{self._path}:{number}: expected user:crypt-hash; this line accepts no user")
        return found

    def _entries(self) -> Iterator[tuple[int, str, str]]:
        for number, line in enumerate(self._path.read_text("utf-8", "replace").splitlines(), 1):
            user, _, rest = line.strip().partition(":")
            if line.strip() and not user.startswith("#"):
                yield number, user, rest.split(":", 1)[0]
