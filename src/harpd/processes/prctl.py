"""prctl(2): what the standard library does not offer of it."""

from __future__ import annotations

import ctypes
import os
import signal

__all__ = ["become_subreaper", "die_with_parent", "never_dump_core"]

_SET_PDEATHSIG = 1
_SET_DUMPABLE = 4
_SET_CHILD_SUBREAPER = 36

# Prepared here: each call's process, where it is used, is a copy of the one that has loaded this module.
_call = ctypes.CDLL(None, use_errno=True).prctl
_call.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def _prctl(option: int, value: int) -> None:
    if _call(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def become_subreaper() -> None:
    """Descendants whose parent dies become children of this process."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def never_dump_core() -> None:
    """Leave no core, whatever signal ends this process and wherever the system sends cores."""
    _prctl(_SET_DUMPABLE, 0)


def die_with_parent(parent: int) -> None:
    """Be killed when the parent dies; a change of user clears this, so call it after.

    Args:
        parent: the parent's pid; if it has died already, this process ends here.
    """
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
