"""Core dumps of calls: they would have all that is in the memory of a process, such as secret arguments."""

from __future__ import annotations

import resource

#: The kernel passes no core dump to a program either with this limit, which it does with a limit of 0.
_NONE = 1, 1


def never_dump_core_of(pid: int = 0) -> None:
    """Disable core dumps of a process, by default of this one, and of the processes that it starts from now on."""
    try:
        resource.prlimit(pid, resource.RLIMIT_CORE, _NONE)
    except OSError:
        pass  # it has ended
