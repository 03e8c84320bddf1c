"""What a procedure restricts for its calls: limits of resources, umask, working directory, variables, privileges.

A limit of a process applies to each process of the call. Where harpd may create cgroups with these controllers, the
supervisor limits the whole call as well, see `harpd.processes.cgroup`.
"""

from __future__ import annotations

import os
import resource

from harpd.proc import DYNAMIC_UID
from harpd.processes.core_dumps import never_dump_core_of
from harpd.processes.prctl import set_no_new_privileges
from harpd.processes.system_calls import leave_nothing_to_later_processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from harpd.proc import Procedure

_LIMITS = (("memory", resource.RLIMIT_AS), ("processes", resource.RLIMIT_NPROC), ("files", resource.RLIMIT_NOFILE))


class RestrictionError(Exception):
    """A restriction of a procedure cannot be applied. The message says which and why."""


def has_restrictions(procedure: Procedure) -> bool:
    """Return whether a procedure restricts its calls."""
    options = ("memory", "processes", "files", "umask", "cwd", "environment")
    return gains_no_privileges(procedure) or any(getattr(procedure, name) is not None for name in options)


def gains_no_privileges(procedure: Procedure) -> bool:
    """Return whether programs that a call executes gain no privileges.

    With a dynamic user id, they would become the user of another call, by a setuid program that an earlier call with
    its id has left.
    """
    return procedure.no_new_privs or procedure.uid == DYNAMIC_UID


def restrict_process(procedure: Procedure) -> None:
    """Apply the restrictions of a procedure to this process, which is of the call's user already, irrevocably.

    Raises `RestrictionError`. The process must not continue then.
    """
    name = ""
    try:
        for name, number in _LIMITS:
            if (most := getattr(procedure, name)) is not None:
                _, hard = resource.getrlimit(number)
                most = most if hard == resource.RLIM_INFINITY else min(most, hard)
                resource.setrlimit(number, (most, most))
        name = "umask"
        if procedure.umask is not None:
            os.umask(procedure.umask)
        name = f"cwd {procedure.cwd}"
        if procedure.cwd is not None:
            os.chdir(procedure.cwd)
        name = "no_new_privs"
        if gains_no_privileges(procedure):
            set_no_new_privileges()
        if procedure.uid == DYNAMIC_UID:
            never_dump_core_of()  # programs that collect core dumps let the user read them, and so a later call
            name = "a filter of system calls"
            leave_nothing_to_later_processes()
    except (OSError, ValueError) as error:
        raise RestrictionError(f"cannot apply {name}: {error}") from error
    if procedure.environment is not None:
        os.environ.update(procedure.environment)
