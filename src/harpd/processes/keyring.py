"""The session keyring of a process, in which programs store keys, such as those of Kerberos.

Each process that has the keyring can read and replace all keys in it, whatever its user is, and a child has that of its
parent. So calls of different users must not share the one that harpd was started with.
"""

from __future__ import annotations

import ctypes
import os

_JOIN_SESSION_KEYRING = 1
#: The number of keyctl(2) on each machine.
_KEYCTL = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine)

_syscall = ctypes.CDLL(None).syscall  # without declared types, see `harpd.processes.prctl`


def make_session_keyring() -> None:
    """Give this process a new session keyring. It has no effect on other machines, and where keyrings are refused."""
    if _KEYCTL is not None:
        _syscall(_KEYCTL, _JOIN_SESSION_KEYRING, 0)
