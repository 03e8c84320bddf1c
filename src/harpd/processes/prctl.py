"""The options of prctl(2) that the standard library does not offer."""

from __future__ import annotations

import ctypes
import os
from _signal import SIGKILL  # type: ignore[import-not-found]  # without the enumerations of `signal`

_SET_PDEATHSIG, _SET_DUMPABLE, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 4, 36, 38

# Prepared once, in the zygote. Its arguments have no declared types: with them, a call of it in a process that was just
# forked touches 28 pages instead of 9. On the supported systems, an int is passed in a whole register.
_call = ctypes.CDLL(None).prctl
_failing_call = ctypes.CDLL(None, use_errno=True).prctl


def _prctl(option: int, value: int) -> None:
    if _call(option, value, 0, 0, 0) and _failing_call(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def become_subreaper() -> None:
    """Become the new parent of all orphaned descendants."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def set_no_new_privileges() -> None:
    """Let no program that this process or a child of it executes gain privileges, as setuid programs do."""
    _prctl(_SET_NO_NEW_PRIVS, 1)


def never_dump_core() -> None:
    """Disable core dumps of this process, for all signals and all destinations of core dumps."""
    _prctl(_SET_DUMPABLE, 0)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, until a change of user. Kill it if that has happened."""
    _prctl(_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), SIGKILL)
