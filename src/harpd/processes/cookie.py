"""The mark by which a call's processes are known wherever they went: an entry of their environment, as /proc shows it.

What a call executes gets the entry as anything in the environment. What it only forks would show the environment
that its zygote was executed with: /proc reads it where it lies in memory. So a zygote is executed with room for the
entry, and each call writes its id there.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["EnvCookie", "cookie_for", "find_cookies", "reserve_cookie"]

_NAME = "HARPD_CALL"
#: Bytes for a call's id, which is a UUID.
_ROOM = 36
_PREFIX, _UNUSED = f"{_NAME}=".encode(), "-" * _ROOM

_getenv = ctypes.CDLL(None).getenv
_getenv.restype = ctypes.c_void_p
_getenv.argtypes = [ctypes.c_char_p]


def cookie_for(call_id: str) -> bytes:
    """The entry that marks the processes of a call."""
    return _PREFIX + call_id.encode()


def reserve_cookie() -> dict[str, str]:
    """The environment to execute a zygote with."""
    return {**os.environ, _NAME: _UNUSED}


def find_cookies(environment: bytes) -> frozenset[bytes]:
    """The entries that mark the processes of calls, in an environment as /proc shows it."""
    if _PREFIX not in environment:
        return frozenset()
    found = (item for item in environment.split(b"\0") if item.startswith(_PREFIX))
    return frozenset(found) - {_PREFIX + _UNUSED.encode()}


class EnvCookie:
    """The room in this process's environment. Make it before anything changes the environment."""

    def __init__(self) -> None:
        self._address = _getenv(_NAME.encode())
        os.environ.pop(_NAME, None)  # the memory stays; what the procedures file executes belongs to no call

    def write(self, call_id: str) -> None:
        """Mark this process, what it forks and what it executes as a call's."""
        text = call_id.encode()
        if self._address is not None and len(text) <= _ROOM:
            ctypes.memmove(self._address, text.ljust(_ROOM, b"\0"), _ROOM)
        os.environ[_NAME] = call_id
