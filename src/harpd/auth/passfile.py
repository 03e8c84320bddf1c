"""Users in a file of lines ``user:crypt-hash``. The file is checked with every request: edits take effect immediately.

    authentication:
      module: harpd.auth.passfile
      file: /etc/harpd/users

Empty lines and lines that begin with ``#`` are ignored. The text after a second colon is ignored as well, so the file
can have more fields. ``openssl passwd -6`` and ``mkpasswd`` create hashes.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harp_daemon.passwords import PasswordCache, is_supported
from harpd.auth import AuthDB
from harpd.auth.files import Files

__all__ = ["PasswordFile", "create"]

log = logging.getLogger(__name__)


def create(config: Mapping[str, Any], files: Files | None = None) -> PasswordFile:
    """Return the users of the configured file. It is read by `files`; None: by this process itself.

    Raises ValueError if the configuration is invalid, or the file cannot be read. The message names key and file.
    """
    file = config.get("file")
    if not isinstance(file, str) or not file:
        raise ValueError(f"file: expected the path of a file, got {file!r}")
    if unknown := sorted(set(config) - {"module", "file"}):
        raise ValueError(f"{unknown[0]}: unknown key; expected file")
    database = PasswordFile(Path(file), files)
    try:
        database.hashes()
    except OSError as error:
        raise ValueError(f"file: {file}: {error.strerror}") from error
    return database


#: Hashes of crypt(3). The lengths find a hash of which a part is missing. Formats that are not listed may have any.
_HASH = re.compile(
    r"\$1\$[^$]*\$.{22}"
    r"|\$5\$(rounds=\d+\$)?[^$]*\$.{43}"
    r"|\$6\$(rounds=\d+\$)?[^$]*\$.{86}"
    r"|\$2[abxy]\$\d\d\$.{53}"
    r"|\$g?y\$[^$]+\$[^$]*\$.{43}"
    r"|(?P<other>\$(?!(1|5|6|2[abxy]|g?y)\$)[\w-]+\$.+)"
    r"|_.{19}|[./0-9A-Za-z]{13}",  # DES
    re.ASCII,
)
#: Seconds after its last change until a file with unchanged attributes is considered unchanged. A younger file may have
#: changed again within one tick of the clock of the file system.
_MIN_FILE_AGE = 2.0
#: Seconds after its last change until a file is considered complete.
_SETTLE_SECONDS = 1.0


class PasswordFile(AuthDB):
    """The users and hashed passwords of a file. A relative path starts at the working directory."""

    def __init__(self, path: Path, files: Files | None = None) -> None:
        self._path = path
        self._files = files or Files()
        self._cache = PasswordCache()
        self._last_hashes: dict[str, str] = {}  # with which a password was accepted last
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
            status = self._files.stat(self._path)
        except OSError:
            return None
        if time.time() - status.st_ctime < _MIN_FILE_AGE:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _has_just_changed(self) -> bool:
        """Return whether the file may still be incomplete. Raises `OSError`."""
        return abs(time.time() - self._files.stat(self._path).st_ctime) < _SETTLE_SECONDS

    def authenticate(self, user: str, password: str) -> bool:
        """Return whether the file has this user with this password; False if it cannot be read."""
        identity = self._file_identity()
        try:
            hashes = self.hashes()
            # A writer may have emptied the file before it writes the user.
            while user not in hashes and user in self._last_hashes and self._has_just_changed():
                time.sleep(_SETTLE_SECONDS / 20)
                hashes = self.hashes()
        except OSError as error:
            log.error("cannot read the users file", extra={"file": str(self._path), "reason": error.strerror})
            return False
        if user not in hashes:
            log.info("unknown user", extra={"file": str(self._path), "user": user})
        correct = self._cache.check(user, password, hashes)
        if correct:
            self._last_hashes = hashes
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
        """Return a warning if the file has no user. Raises `OSError`."""
        return [] if self.hashes() else [f"{self._path}: it has no user; every call is refused"]

    def problems(self) -> list[str]:
        """Return ``FILE:LINE: REASON`` for each line that accepts no user by mistake. Raises `OSError`."""
        found, lines = [], dict[str, int]()
        for number, user, hashed in self._entries():
            reason = _describe_mistake(user, hashed)
            if not reason and lines.setdefault(user, number) != number:
                reason = f"user {user} has another line, {lines[user]}, which counts; remove one of them"
            if reason:
                found.append(f"{self._path}:{number}: {reason}")
        return found

    def _entries(self) -> Iterator[tuple[int, str, str]]:
        for number, line in enumerate(self._files.read(self._path).decode("utf-8", "replace").splitlines(), 1):
            user, _, rest = line.strip().partition(":")
            if line.strip() and not user.startswith("#"):
                yield number, user, rest.split(":", 1)[0]


def _describe_mistake(user: str, hashed: str) -> str:
    """Return why a line accepts no user; empty: it does, or its user is locked on purpose. It contains no hash."""
    if user.startswith("\ufeff"):
        return "expected user:crypt-hash, got a byte-order mark before it; save the file without one"
    for name, text in (("user", user), ("hash", hashed)):
        if text != "".join(text.split()):
            return f"expected user:crypt-hash, got a space in the {name}; remove it"
        if "\ufffd" in text:
            return f"expected user:crypt-hash in UTF-8, got another encoding of the {name}"
    found = _HASH.fullmatch(hashed)
    locked = hashed.startswith(("*", "!"))  # as in shadow(5)
    if not user or not (locked or found):
        return "expected user:crypt-hash; create a hash with: openssl passwd -6"
    if found and found["other"] and not is_supported(hashed):  # such as $apr1$ of htpasswd
        return "this system does not know the format of the hash; create one with: openssl passwd -6"
    return ""
