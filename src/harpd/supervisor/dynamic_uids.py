"""User ids for calls of procedures with ``uid="dynamic"``: each call has one that no other process has.

Processes of one user can signal and trace each other. A call with a user id of its own can do neither to another call,
also not to one of the same procedure. The ids are those of a range in the configuration, which belongs to harpd alone.

An id is free again when no process has it: processes that a call has left behind keep it. The kernel answers that
question, `getpriority` finds no process of a user. So an id is safe after the death of a supervisor as well. Two
supervisors of one harpd can run at the same time, while the older one retires. A lock on the byte of an id, in a file
that both use, lets only one of them give it to a call that has not taken it yet. Shared memory and message queues
that a call has left are removed first, so that the next call with this id does not find them.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from harpd.processes.ipc import remove_ipc

_LOCK_FILE = "uids.lock"


class NoFreeUid(Exception):
    """All user ids of the range are in use."""


class DynamicUids:
    """The user ids that calls of this supervisor have, or had while processes remain."""

    def __init__(self, runtime_directory: Path) -> None:
        self._directory = runtime_directory
        self._next = 0
        self._used: set[int] = set()
        self._ended: set[int] = set()  # those of ended calls of which processes may remain
        self._file = -1

    def allocate(self, first: int, last: int) -> int:
        """Return a user id of this range that no process has, the one that was not used for the longest time.

        Raises `NoFreeUid`, and OSError if the lock file cannot be created.
        """
        if self._file < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(self._directory / _LOCK_FILE, flags, 0o600)
        self.collect()
        for _ in range(last - first + 1):
            uid = self._next if first <= self._next <= last else first
            self._next = uid + 1
            if uid not in self._used and self._lock(uid):
                if not _has_process(uid) and remove_ipc(uid):  # a supervisor that was killed has removed none
                    self._used.add(uid)
                    return uid
                self._unlock(uid)
        raise NoFreeUid

    def release(self, uid: int) -> None:
        """Return the id of an ended call, once no process has it any more."""
        self._ended.add(uid)
        self.collect()

    def collect(self) -> None:
        """Return the ids of ended calls whose last process has ended, and that have left nothing."""
        for uid in [uid for uid in self._ended if not _has_process(uid) and remove_ipc(uid)]:
            self._ended.discard(uid)
            self._used.discard(uid)
            self._unlock(uid)

    def close(self) -> None:
        """Unlock all ids, at the exit."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _lock(self, uid: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, uid)
        except OSError:
            return False
        return True

    def _unlock(self, uid: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, uid)


def _has_process(uid: int) -> bool:
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
