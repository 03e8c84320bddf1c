"""The surroundings of calls: a few variables, umask and working directory, independent of those of harpd.

The environment of a daemon may have keys of a cloud, passwords from a service file, or ``LD_PRELOAD``. None of that is
for calls. `harpd --test` loads the procedures file in the same surroundings.
"""

from __future__ import annotations

import os
import pwd

TYPE_CHECKING = False  # not from `typing`: the zygote loads this module, and its size costs each fork
if TYPE_CHECKING:
    from collections.abc import Mapping

#: The variables that calls have from harpd's own environment, and their defaults.
_INHERITED = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
#: The shell and the home of a user without an entry in the user database.
_SHELL, _HOME = "/bin/sh", "/"
_OOM_SCORE = "/proc/self/oom_score_adj"
UMASK, DIRECTORY = 0o022, "/"
#: The prefix of the variables that harpd sets; no configuration may set them.
OWN_PREFIX = "HARPD_"


def call_environment(own: Mapping[str, str], configured: Mapping[str, str | None]) -> dict[str, str]:
    """Return the environment of a zygote, and so of its calls, before a call changes its user.

    Args:
        own: harpd's own environment.
        configured: the setting `environment`; None: the variable's value in `own`, if it has one.
    """
    found = {name: own.get(name) or value for name, value in _INHERITED.items()}
    found |= user_variables(_entry_of(os.geteuid()))
    for name, value in configured.items():
        if value is not None:
            found[name] = value
        elif name in own:
            found[name] = own[name]
    return found


def user_variables(entry: pwd.struct_passwd | None) -> dict[str, str]:
    """Return the variables of a user with this entry in the user database; None: no entry."""
    if entry is None:
        return {"HOME": _HOME, "SHELL": _SHELL}
    names = {"USER": entry.pw_name, "LOGNAME": entry.pw_name}
    return {**names, "HOME": entry.pw_dir or _HOME, "SHELL": entry.pw_shell or _SHELL}


def _entry_of(uid: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return None


def enter_surroundings() -> None:
    """Set umask and working directory of this process and of those that it forks."""
    os.umask(UMASK)
    os.chdir(DIRECTORY)


def oom_score_is_changed() -> bool:
    """Return whether this process has another OOM score than the usual one."""
    try:
        with open(_OOM_SCORE, "rb", buffering=0) as file:
            return file.read() != b"0\n"
    except OSError:  # no /proc
        return False


def reset_oom_score() -> None:
    """Let the kernel treat this process as any other process when memory is short, also if harpd is protected."""
    try:
        with open(_OOM_SCORE, "wb", buffering=0) as file:
            file.write(b"0")
    except OSError:
        pass  # only a lower value than that of harpd needs a right
