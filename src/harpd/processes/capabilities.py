"""Give up all rights beyond those of a user: groups, capabilities, and every way to gain one."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from harpd.processes.prctl import never_dump_core

_CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
#: The version of the structures of capset(2), and how many 32-bit words the three sets need.
_CAPABILITY_VERSION, _CAPABILITY_WORDS = 0x20080522, 6
#: Above the highest capability of any kernel.
_CAPABILITIES = 64
_EMPTY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def become_unprivileged(uid: int, gid: int) -> None:
    """Change from root to this user, irrevocably: no other group, no capability, and no way to gain one.

    Programs that it executes gain none either. No other process of the user can read its memory. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")

    def prctl(option: int, value: int = 0) -> None:
        call("prctl", option, *map(ctypes.c_ulong, (value, 0, 0, 0)))

    for capability in range(_CAPABILITIES):
        try:
            prctl(_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno != errno.EINVAL:  # this kernel does not have it
                raise
    prctl(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * _CAPABILITY_WORDS)())
    prctl(_SET_NO_NEW_PRIVS, 1)
    never_dump_core()
    if (os.getresuid(), os.getresgid(), os.getgroups()) != ((uid,) * 3, (gid,) * 3, []):
        raise OSError(errno.EPERM, f"the change to user {uid}, group {gid} had no effect")
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if any(int(status[name], 16) for name in _EMPTY_SETS) or status["NoNewPrivs"].strip() != "1":
        raise OSError(errno.EPERM, "the process still has capabilities")
