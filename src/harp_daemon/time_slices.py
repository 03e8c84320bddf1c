"""How soon the kernel runs a daemon that has work while other processes use all cores.

Linux lets a program continue for about 3 ms before another one that has just got work may interrupt it. Since version
6.12, a program whose slices are shorter is not kept waiting. It gets as much time in all, in more parts. A job needs
the daemons ten times, so that calls that use all cores would delay it by 30 ms.
"""

from __future__ import annotations

# The zygote imports this module: only what it has in any case, because each module costs each fork.
import ctypes
import os
import struct

_SHORT = 300_000  #: Nanoseconds.
_SYSTEM_CALLS = {"x86_64": 314, "aarch64": 274}  #: The number of sched_setattr(2) by machine.
#: Its structure: size; the usual policy, without flags, nice and priority; the slice; two more times.
_ATTRIBUTES = struct.Struct("IIQiIQQQ")


def take_short_slices() -> None:
    """Give this thread, and those that it starts later, short slices. No effect where the kernel has none."""
    _set_slice(_SHORT)


def take_usual_slices() -> None:
    """Give this thread, and the processes that it starts later, slices of the usual length."""
    _set_slice(0)


def _set_slice(nanoseconds: int) -> None:
    number = _SYSTEM_CALLS.get(os.uname().machine)
    try:
        if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:  # the administrator has chosen another policy
            return
        nice = os.getpriority(os.PRIO_PROCESS, 0)
    except OSError:  # a filter of system calls
        return
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
    ctypes.CDLL(None).syscall(number, 0, attributes, 0)
