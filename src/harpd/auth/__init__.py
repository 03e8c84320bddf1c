"""Authentication of clients: the base class for authentication modules.

An authentication module has a function ``create(config)``. Its argument is the section ``authentication``, with
`module`. It returns an object with a method ``authenticate(user, password)``, preferably an `AuthDB`.

The modules of this package import no other part of harpd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["AuthDB"]


class AuthDB(ABC):
    """A database of users and passwords. Spec: docs/settings-harpd.md, Authentication."""

    @abstractmethod
    def authenticate(self, user: str, password: str) -> bool:
        """Return whether the user exists and has this password.

        It is called in threads, several at the same time, and may block. A call that needs longer than
        ``limits.authentication_timeout`` seconds gives the client an error; an exception, which is logged, rejects it.

        Args:
            user: the client's user name; any text.
            password: the client's password; any text. Never log it.

        Returns:
            True to accept the user, False to reject the user. Another value that is true accepts the user, too, and is
            logged as a warning; an awaitable rejects the user.
        """

    def check_cached(self, user: str, password: str) -> bool:
        """Return whether an earlier check already accepted this password, and the result is still valid.

        It is called before `authenticate`, on the daemon's event loop, and must not block. True accepts the user; after
        False, `authenticate` is called.
        """
        return False

    def warnings(self) -> list[str]:
        """Return remarks about the users. ``harpd --test`` prints them as warnings."""
        return []

    def problems(self) -> list[str]:
        """Return mistakes, each with its place. ``harpd --test`` fails with the first; start and reload log each."""
        return []
