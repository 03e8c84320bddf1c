"""Removes what a user has left in memory that processes share: System V objects, and POSIX shared memory and queues.

They outlive the processes that made them. So a later call with the same user id would find those of an earlier one.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

_REMOVE = 0  #: IPC_RMID, a command of the three functions.
#: The kinds of System V: the file of /proc that lists them, and the function that removes one.
_KINDS = ("shm", "shmctl"), ("msg", "msgctl"), ("sem", "semctl")
#: Where the kernel shows objects of POSIX as files. A system without queues has no second directory.
_DIRECTORIES = ("/dev/shm", "/dev/mqueue")  # noqa: S108 - of the kernel
_MAX_NAMES = 10_000  #: Maximum number of names that are looked at in a directory: about 20 ms.
_MAX_REMOVED = 1000  #: Maximum number of objects that are removed at once: a few milliseconds.

_libc = ctypes.CDLL(None)


def remove_ipc(uid: int) -> bool:
    """Remove the objects of a user without processes; return False if there are more than are removed at once.

    Directories and their files stay: as other files, they can be read by whom their mode allows.
    """
    room = _MAX_REMOVED
    for kind, function in _KINDS:
        for number in islice(_find_system_v(kind, uid), room):
            room -= 1
            arguments = (number, 0, _REMOVE, 0) if kind == "sem" else (number, _REMOVE, 0)
            getattr(_libc, function)(*arguments)
    for directory in _DIRECTORIES:
        for name in islice(_find_files(directory, uid), room):
            room -= 1
            with suppress(OSError):
                os.unlink(f"{directory}/{name}")
    return room > 0


def _find_system_v(kind: str, uid: int) -> list[int]:
    """Return the ids of the objects that a user owns or has made."""
    try:
        with open(f"/proc/sysvipc/{kind}", "rb") as file:
            header, *lines = file.read().split(b"\n")
    except OSError:  # a kernel without them
        return []
    names = header.split()
    owner, creator = names.index(b"uid"), names.index(b"cuid")
    rows = [line.split() for line in lines if line]
    return [int(row[1]) for row in rows if uid in (int(row[owner]), int(row[creator]))]


def _find_files(directory: str, uid: int) -> Iterator[str]:
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in islice(entries, _MAX_NAMES):
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if status.st_uid == uid and not stat.S_ISDIR(status.st_mode):
                    yield entry.name
