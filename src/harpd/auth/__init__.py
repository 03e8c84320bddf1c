"""How harpd decides who may call: the base class of authentication modules.

An authentication module has a function ``create(config)``. It is given the keys of the section ``authentication``
but `module`, and returns an object with ``authenticate(user, password)``, best of a class derived from `AuthDB`.

The modules of this package import nothing else of harpd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["AuthDB"]


class AuthDB(ABC):
    """Knows users and their passwords. Spec: docs/settings-harpd.md, Authentication."""

    @abstractmethod
    def authenticate(self, user: str, password: str) -> bool:
        """Say whether this is the user's password.

        It is called in a thread, several at a time, and may block: a call that takes longer than
        ``limits.authentication_timeout`` seconds counts as a refusal. So does an exception, which is logged.

        Args:
            user: the name that the client gave; any text.
            password: the password that the client gave; any text. Never log it.

        Returns:
            True, and nothing that is merely true, to let the user in.
        """

    def recalls(self, user: str, password: str) -> bool:
        """Say whether it is known already, without blocking, that this is the user's password.

        It is asked before `authenticate`, on the daemon's event loop: True lets the user in, False has `authenticate`
        asked. It may answer from what was found earlier, as long as that still holds.
        """
        return False

    def warnings(self) -> list[str]:
        """What is wrong with the users and still lets the daemon run; ``harpd --test`` prints it."""
        return []
