"""The environment cookie: an environment entry by which the processes of a call are found in /proc.

Programs that a call executes inherit the entry. Processes that it only forks share the initial environment block of
their zygote, which /proc reads from memory: the zygote is executed with space for the entry, where each call writes it.
"""

from __future__ import annotations

import ctypes
import os

_NAME, _ID_LENGTH = "HARPD_CALL", 36  # a call's id is a UUID
_PREFIX, _UNUSED = f"{_NAME}=".encode(), "-" * _ID_LENGTH


def cookie_for(call_id: str) -> bytes:
    """Return the environment entry that the processes of a call have."""
    return _PREFIX + call_id.encode()


def reserve_cookie() -> dict[str, str]:
    """Return the entry of a zygote's environment that has space for a cookie."""
    return {_NAME: _UNUSED}


def find_cookies(environment: bytes) -> frozenset[bytes]:
    """Return the cookies in an environment block as /proc shows it."""
    if _PREFIX not in environment:
        return frozenset()
    found = (item for item in environment.split(b"\0") if item.startswith(_PREFIX))
    return frozenset(found) - {_PREFIX + _UNUSED.encode()}


class EnvCookie:
    """The cookie of this process. Create it before the environment is changed: it looks up the reserved space."""

    def __init__(self) -> None:
        getenv = ctypes.CDLL(None).getenv
        getenv.restype, getenv.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        address = getenv(_NAME.encode())
        if address is None:
            raise LookupError(f"the environment has no {_NAME}")
        self._space = memoryview((ctypes.c_char * _ID_LENGTH).from_address(address)).cast("B")
        # The mapping of `os.environ` without the functions that change the process's own environment: the entry stays
        # in it, and its text is replaced. The functions would touch 30 pages.
        self._entries: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
        self._entries.pop(_NAME.encode(), None)

    def write(self, call_id: bytes) -> None:
        """Set the cookie of this process, of its future children and of the programs that they execute."""
        self._space[:] = call_id.ljust(_ID_LENGTH, b"\0")
        self._entries[b"HARPD_CALL"] = call_id
