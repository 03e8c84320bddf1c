"""Whether jobs that are accepted now can be kept: there is free disk space, and the store's file is where it was.

Below the reserve of free space no job is accepted, so that those that run can store their ends. A file that was removed
or moved can still be written, but the next start would not find its jobs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from harpcaller.store import StorageError

_INTERVAL = 1.0  #: Seconds for which a measurement counts.


class DiskSpace:
    """The file of a store, which is open, and the free space of its file system."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._identity = _identify(file)
        self._free = 0
        self._measured_at = -_INTERVAL

    def describe_missing(self) -> str | None:
        """Return that the file was removed, moved or replaced; None if it is where it was."""
        if _identify(self._file) == self._identity:
            return None
        return f"{self._file}: the file of the running dispatcher was removed or moved; move it back, or restart"

    def find_shortage(self, reserve: int) -> StorageError | None:
        """Return the error for a job that is submitted now; None if more than the reserve is free."""
        now = time.monotonic()
        if now - self._measured_at >= _INTERVAL:
            if (missing := self.describe_missing()) is not None:
                return StorageError(f"no job is accepted: {missing}")
            try:
                found = os.statvfs(self._file)
            except OSError:  # a write reports it
                return None
            self._free, self._measured_at = found.f_bavail * found.f_frsize, now
        if self._free >= reserve:
            return None
        reason = f"{self._free >> 20} MiB are free, and disk_reserve is {reserve >> 20} MiB"
        return StorageError(f"{self._file.parent}: no job is accepted: {reason}; free space, or prune jobs")


def _identify(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
