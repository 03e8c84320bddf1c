"""Users in a file of lines ``user:crypt-hash``, which is read at every request: edits take effect at once.

    authentication:
      module: harpd.auth.passfile
      file: /etc/harpd/users

Empty lines and lines that begin with ``#`` are skipped. What follows a second colon is ignored, so that the
file may have more fields. ``openssl passwd -6`` and ``mkpasswd`` make hashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harpd.auth import AuthDB
from harpd.auth.crypt import matches

__all__ = ["PasswordFile", "create"]


def create(config: Mapping[str, Any]) -> PasswordFile:
    """Open the file that `config` names.

    Raises:
        ValueError: the configuration is wrong; the message names the key.
        OSError: the file can't be read.
    """
    file = config.get("file")
    if not isinstance(file, str) or not file:
        raise ValueError(f"file: expected the path of a file, got {file!r}")
    if unknown := sorted(set(config) - {"file"}):
        raise ValueError(f"{unknown[0]}: unknown key; expected file")
    database = PasswordFile(Path(file))
    database.hashes()
    return database


class PasswordFile(AuthDB):
    """Users and hashed passwords from a file.

    Args:
        path: the file; a relative path is taken from the working directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def authenticate(self, user: str, password: str) -> bool:
        """Say whether the file has this user with this password. Raises `OSError` when it can't be read."""
        hashes = self.hashes()
        if user in hashes:
            return matches(password, hashes[user])
        # Takes as long as for a known user, so that time does not tell which names exist.
        for other in hashes.values():
            matches(password, other)
            break
        return False

    def hashes(self) -> dict[str, str]:
        """Read the file: hashes by user. The first line of a user counts. Raises `OSError`."""
        found: dict[str, str] = {}
        for line in self._path.read_text("utf-8", "replace").splitlines():
            user, colon, rest = line.strip().partition(":")
            if user and colon and not user.startswith("#"):
                found.setdefault(user, rest.split(":", 1)[0])
        return found
