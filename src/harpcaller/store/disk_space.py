"""The reserve of free disk space: below it no job is accepted, so that those that run can store their ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

from harpcaller.store import StorageError

_INTERVAL = 1.0  #: Seconds for which a measurement counts.


class DiskSpace:
    """The free space of the file system of a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._free = 0
        self._measured_at = -_INTERVAL

    def find_shortage(self, reserve: int) -> StorageError | None:
        """Return the error for a job that is submitted now; None if more than the reserve is free."""
        now = time.monotonic()
        if now - self._measured_at >= _INTERVAL:
            try:
                found = os.statvfs(self._directory)
            except OSError:  # a write reports it
                return None
            self._free, self._measured_at = found.f_bavail * found.f_frsize, now
        if self._free >= reserve:
            return None
        reason = f"{self._free >> 20} MiB are free, and disk_reserve is {reserve >> 20} MiB"
        return StorageError(f"{self._directory}: no job is accepted: {reason}; free space, or prune jobs")
