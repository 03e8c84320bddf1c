"""Users in the configuration file.

authentication:
  module: harpd.auth.inconfig
  users:
    alice: "crypt:$6$..."
    bob: "plain:secret"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harp_daemon.passwords import CRYPT, PLAIN, PasswordCache
from harpd.auth import AuthDB

__all__ = ["ConfiguredUsers", "create"]


def create(config: Mapping[str, Any]) -> ConfiguredUsers:
    """Return the users of the configuration.

    Raises ValueError if it is invalid. The message names the key and never contains a password.
    """
    users = config.get("users")
    if not (isinstance(users, dict) and all(isinstance(name, str) for name in users)):
        raise ValueError("users: expected a mapping of names (a number as a name in quotes) to passwords")
    if unknown := sorted(set(config) - {"module", "users"}):
        raise ValueError(f"{unknown[0]}: unknown key; expected users")
    for name, password in users.items():
        if not (isinstance(password, str) and password.startswith((PLAIN, CRYPT))):
            raise ValueError(f'users.{name}: expected "plain:PASSWORD" or "crypt:HASH"')
    return ConfiguredUsers(users)


class ConfiguredUsers(AuthDB):
    """The users of the configuration: ``plain:PASSWORD`` or ``crypt:HASH`` by user name."""

    def __init__(self, users: Mapping[str, str]) -> None:
        self._stored = dict(users)
        self._cache = PasswordCache()

    def check_cached(self, user: str, password: str) -> bool:
        """Return whether an earlier check accepted this password."""
        return self._cache.contains(user, password, self._stored)

    def authenticate(self, user: str, password: str) -> bool:
        """Return whether the configuration has this user with this password."""
        return self._cache.check(user, password, self._stored)
